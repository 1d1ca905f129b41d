"""The verify mode."""

import re

import pytest

from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.checkpoints.verify import verify
from tests.oracles.checkpoints import RECORDS, flip, spoil, state


def test_every_checkpoint_is_read_and_what_is_damaged_named(tmp_path, capsys):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (3, 5):
            checkpointer.save(step, state(step), *RECORDS)
    assert verify(tmp_path, group_bytes=1)  # one array at a time
    said = capsys.readouterr().out
    assert re.search(r"^ +3  whole    2 arrays, 0\.5 MB.*\n +5  whole ", said, re.M)

    before = sorted(str(path) for path in tmp_path.rglob("*"))
    spoil(tmp_path / "3")
    assert not verify(tmp_path)
    said = capsys.readouterr().out
    assert re.search(rf"^ +3  DAMAGED  {tmp_path}/3: .*\n +5  whole ", said, re.M)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before

    flip(tmp_path / "5" / "latents" / "metadata")
    assert not verify(tmp_path)
    assert f"{tmp_path}/5: " in capsys.readouterr().out


def test_a_run_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no checkpoint"):
        verify(tmp_path)
