"""Checkpoints in a bucket, served on this machine, that fails as it is told; deleting on a disk."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from repulsor_jax import config as config_lib
from repulsor_jax.checkpoints import places
from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.checkpoints.storage import Storage
from repulsor_jax.checkpoints.verify import verify
from repulsor_jax.sample import sample
from tests.checkpoints.test_storage import RECORDS, look, state
from tests.oracles import fake_bucket, tiny

WHERE = f"gs://{fake_bucket.NAME}/runs/a/checkpoints"
PREFIX = "runs/a/checkpoints/"


def opened(**options):
    return Checkpointer(WHERE, **({"retry_steps": 2, "max_lost_steps": 20} | options))


def restored(step):
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(step)
    )
    storage = Storage(WHERE, keep_last=None, keep_every=None, read_only=True)
    found = storage.read_arrays(step, wanted)
    storage.close()
    return found


def test_comes_back_equal_and_the_old_are_deleted(bucket):
    bucket.put(PREFIX + "notes/a.txt", b"not ours")
    with opened(keep_last=2, keep_every=4) as checkpointer:
        for step in (2, 4, 6, 8, 10):
            checkpointer.save(step, state(step), *RECORDS)
        assert checkpointer.latest_step() == 10
        assert checkpointer.steps() == [4, 8, 10]
        assert checkpointer.records()[0] == RECORDS[1]
    assert {name.split("/")[3] for name in bucket.names()} == {"4", "8", "10", "notes"}
    jax.tree.map(np.testing.assert_array_equal, restored(10), state(10))


def test_a_checkpoint_is_whole_or_not_there_whenever_a_run_is_killed(bucket):
    """After each change of the bucket: a save, a deletion, a replacement, and setting aside.

    Each state is tidied as at the next start, then listed; a few are restored in full.
    """
    with opened(keep_last=1) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.save(12, state(12), *RECORDS)
        checkpointer.wait()
        checkpointer.save(12, state(12), {"next_index": 2}, *RECORDS[1:], overwrite=True)
        checkpointer._storage.set_aside([12])
        assert checkpointer.steps() == []
    history = list(bucket.history)
    whole = {
        (step, len([name for name in objects if name.startswith(f"{PREFIX}{step}/")]))
        for objects in history
        for step in (10, 12)
        if f"{PREFIX}{step}/commit_success.txt" in objects
    }
    assert len(whole) == 2  # always as many objects as in the end
    expected = jax.tree.map(np.asarray, {step: state(step) for step in (10, 12)})
    folder = places.open_folder(WHERE)
    seen = []
    for index, objects in enumerate(history):
        bucket.objects = dict(objects)
        folder.tidy()
        steps = sorted(folder.steps())
        left = {name.split("/")[3] for name in bucket.names()} - {"damaged", "probe"}
        assert left == {str(step) for step in steps}
        if steps not in seen[-1:] or index % 40 == 0:
            for step in steps:
                jax.tree.map(np.testing.assert_array_equal, restored(step), expected[step])
        seen += [steps] if steps not in seen[-1:] else []
    assert seen == [[], [10], [10, 12], [12], []]


def test_moving_again_after_a_deletion_that_failed_keeps_the_only_whole_copy(bucket):
    for name in ("state/a", "state/b", "commit_success.txt"):
        bucket.put(f"{PREFIX}12/{name}", name.encode())
    whole = {name.partition("/12/")[2]: bucket.objects[name][1] for name in bucket.names()}
    bucket.trouble = "503"
    bucket.fails = lambda method, name: method == "DELETE" and name.endswith("/12/state/b")
    folder = places.open_folder(WHERE)
    with pytest.raises(OSError, match="Service Unavailable"):
        folder.move("12", "12.replaced")
    assert folder.steps() == []
    bucket.heal()
    for _ in range(2):
        folder.move("12", "12.replaced")
        left = {name.removeprefix(PREFIX): data for name, (_, data) in bucket.objects.items()}
        assert left == {f"12.replaced/{name}": data for name, data in whole.items()}


def test_what_is_not_whole_is_not_moved_and_its_target_not_touched(bucket):
    for name in ("12/state/a", "12.replaced/state/a"):
        bucket.put(PREFIX + name, b"a")
    there = dict(bucket.objects)
    with pytest.raises(OSError, match=f"{WHERE}/12 is not whole"):
        places.open_folder(WHERE).move("12", "12.replaced")
    assert bucket.objects == there


def test_only_what_looks_like_a_checkpoint_is_tidied_away(bucket):
    others = ("1/notes.txt", "2/checkpoints/10/state/a", "3", "3.replaced/state/a", "probe.txt")
    for name in (*others, "3/weights/a", "4/state/a", "5.replaced/data/metadata"):
        bucket.put(PREFIX + name, b"a")
    with opened() as checkpointer:
        assert checkpointer.steps() == []
    assert bucket.names() == sorted(PREFIX + name for name in (*others, "3/weights/a"))


def test_a_checkpoint_of_a_run_looks_like_one(bucket):
    with opened() as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    bucket.objects.pop(f"{PREFIX}10/commit_success.txt")
    places.open_folder(WHERE).tidy()
    assert bucket.names() == []


def test_a_listing_may_take_longer_than_an_answer(bucket, monkeypatch):
    monkeypatch.setattr(places, "ANSWER_SECONDS", 0.2)
    bucket.put(f"{PREFIX}10/commit_success.txt", b"")
    bucket.trouble = "slow"
    bucket.fails = lambda method, name: not name and time.sleep(0.5)
    assert places.open_folder(WHERE).steps() == [10]


def test_what_a_deletion_left_on_a_disk_is_in_nobodys_way(tmp_path, monkeypatch):
    def fail(path):
        raise OSError("Input/output error")

    folder = places.open_folder(tmp_path)
    (tmp_path / "10/state").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(OSError, match="Input/output error"):
            folder.remove("10")
    assert [p.name for p in tmp_path.iterdir()] == ["10.deleted"]  # no name of orbax's
    (tmp_path / "10/state").mkdir(parents=True)
    folder.remove("10")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "12.deleted/state").mkdir(parents=True)
    (tmp_path / "notes.deleted").mkdir()
    folder.tidy()
    assert [p.name for p in tmp_path.iterdir()] == ["notes.deleted"]


def test_a_checkpoint_of_a_disk_can_be_copied_in(bucket, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            bucket.put(PREFIX + str(path.relative_to(tmp_path)), path.read_bytes())
    with opened() as checkpointer:
        assert checkpointer.steps() == [10]
    jax.tree.map(np.testing.assert_array_equal, restored(10), state(10))


@pytest.mark.parametrize("trouble", ["503", "reset"])
def test_training_goes_on_and_saves_when_it_can_again(bucket, trouble, capsys):
    with opened() as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        bucket.trouble = trouble
        checkpointer.save(12, state(12), *RECORDS)
        assert look(checkpointer, 13, 18) == 14
        said = capsys.readouterr().out
        assert f"The newest checkpoint in {WHERE} is step 10" in said
        bucket.heal()
        checkpointer.save(14, state(14), *RECORDS)
        assert look(checkpointer, 15, 30) is None
        assert checkpointer.steps() == [10, 14]
    jax.tree.map(np.testing.assert_array_equal, restored(14), state(14))


def test_a_bucket_that_does_not_answer_holds_nothing_up(bucket, monkeypatch, capsys):
    monkeypatch.setattr(places, "ANSWER_SECONDS", 0.2)
    with opened() as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        bucket.trouble = "hang"
        started = time.monotonic()
        checkpointer.save(12, state(12), *RECORDS)
        assert checkpointer.steps() == [10]
        assert time.monotonic() - started < 2
        assert "step 12 is not saved (no answer within 0.2 s)" in capsys.readouterr().out
        with pytest.raises(CheckpointError, match=rf"{WHERE} cannot be written \(no answer"):
            opened()
        with pytest.raises(CheckpointError, match=rf"{WHERE} cannot be read \(no answer"):
            opened(read_only=True)
        bucket.heal()
        checkpointer.save(14, state(14), *RECORDS)


def test_a_bucket_that_is_away_is_no_damage(bucket, monkeypatch):
    with opened() as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    bucket.fails = lambda method, name: "/10/state/d/" in name
    bucket.trouble = "503"
    with pytest.raises(
        CheckpointError, match="10: state cannot be read.*the bucket is away"
    ) as error:
        restored(10)
    assert error.type is CheckpointError


@pytest.mark.slow
def test_sampling_and_verify_read_a_bucket(bucket, tmp_path, capsys):
    values = tiny.config_dict(
        model__in_channels=3,
        model__depth=1,
        regularizer__name="none",
        sampling__solver="euler",
        checkpoint__directory=WHERE,
    )
    c = config_lib.parse(values)
    tiny.save_run(epath.Path(WHERE).parent, values, {3: tiny.random_params(c)})
    assert sample(c, tmp_path).is_file()
    assert verify(WHERE)
    name = next(name for name in bucket.names() if "/3/state/d/" in name)
    bucket.put(name, bytes(len(bucket.objects[name][1])))
    assert not verify(WHERE)
    assert re.search(f"3  DAMAGED  {WHERE}/3: ", capsys.readouterr().out)


@pytest.mark.parametrize("key", ["checkpoint__directory", "sampling__guiding_run"])
def test_addresses_are_checked_before_anything_starts(key, monkeypatch):
    guided = {"sampling__cfg_scale": 2.0}
    names = ("", "My_Bucket", "ab", "-ab", "ab-", "a..b", "a.-b", "a" * 64, "a" * 63 + ".b" * 80)
    for where in ("s3://bucket/a", "gs://bucket", *(f"gs://{name}/a" for name in names)):
        with pytest.raises(config_lib.ConfigError, match=f"'{where}': expected a folder, or gs://"):
            tiny.config(**guided, **{key: where})
    for name in ("bucket", "my_bucket-1", "a" * 63, ".".join(["a" * 54] * 4)):
        tiny.config(**guided, **{key: f"gs://{name}/a"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config_lib.ConfigError, match="needs gcsfs: install the extra `gcs`"):
        tiny.config(**guided, **{key: "gs://bucket/a"})


def test_an_orbax_that_keeps_its_retries_elsewhere_is_one_warning(bucket, monkeypatch, capsys):
    monkeypatch.delattr(tensorstore_utils, "_BASE_TS_CONTEXT")
    places.bound_waiting()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert re.match("warning: .*_BASE_TS_CONTEXT", said[0])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["checkpoint.directory", "sampling.guiding_run"])
def test_the_program_bounds_waiting_where_a_bucket_is_configured(key, tmp_path):
    code = """
import runpy, sys
from repulsor_jax import folders
folders.bound_waiting = lambda: sys.exit("bounded")
runpy.run_module("repulsor_jax.main", run_name="__main__", alter_sys=True)
"""
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path}", "--mode=verify"]
    arguments += ["--config.sampling.cfg_scale=2.0", f"--config.{key}=gs://bucket/a"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "bounded"
