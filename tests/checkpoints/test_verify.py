"""The verify mode."""

import re

import jax
import pytest

from repulsor_jax.checkpoints import verify as verify_lib
from repulsor_jax.checkpoints.checkpointer import CheckpointError
from repulsor_jax.checkpoints.verify import verify
from repulsor_jax.train_state import abstract_train_state
from tests.checkpoints.test_checkpointer import flip, spoil
from tests.oracles import tiny


def test_every_checkpoint_is_read_and_what_is_damaged_named(tmp_path, capsys, monkeypatch):
    values = tiny.config_dict(regularizer__bank_dtype="bfloat16")
    c = tiny.config(regularizer__bank_dtype="bfloat16")
    tiny.save_run(tmp_path, values, {3: tiny.random_params(c), 5: tiny.random_params(c, seed=1)})
    monkeypatch.setattr(verify_lib, "_GROUP_BYTES", 20_000)  # in many parts
    assert verify(tmp_path / "checkpoints")
    said = capsys.readouterr().out
    count = len(jax.tree.leaves(abstract_train_state(tiny.trainer(c), tiny.mesh())))
    assert re.search(rf"^ +3  whole    {count} arrays, 0\.\d MB.*\n +5  whole ", said, re.M)

    before = sorted(str(path) for path in tmp_path.rglob("*"))
    spoil(tmp_path / "checkpoints" / "3")
    assert not verify(tmp_path / "checkpoints")
    said = capsys.readouterr().out
    assert re.search(r"^ +3  DAMAGED  .*checkpoints/3: .*\n +5  whole ", said, re.M)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before

    flip(tmp_path / "checkpoints" / "5" / "latents" / "metadata")
    assert not verify(tmp_path / "checkpoints")
    assert "checkpoints/5: " in capsys.readouterr().out


def test_a_run_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not there: train first"):
        verify(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        verify(tmp_path / "checkpoints")
