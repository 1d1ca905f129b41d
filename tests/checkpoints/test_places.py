"""Checkpoints in a bucket, served on this machine, that fails as it is told."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from repulsor_jax import config as config_lib
from repulsor_jax.checkpoints import places, storage
from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.checkpoints.places import open_folder
from repulsor_jax.checkpoints.verify import verify
from repulsor_jax.sample import sample
from tests.oracles import fake_bucket, tiny
from tests.oracles.checkpoints import RECORDS, assert_holds, at_rest, state

WHERE = f"gs://{fake_bucket.NAME}/runs/a/checkpoints"
PREFIX = "runs/a/checkpoints/"


def opened(where=WHERE, **options):
    return Checkpointer(where, **({"retry_steps": 2, "max_lost_steps": 20} | options))


def tops(bucket):
    """The folders and objects directly below the directory of checkpoints."""
    return {name.removeprefix(PREFIX).split("/")[0] for name in bucket.names()}


def test_comes_back_equal_and_the_old_are_deleted(bucket):
    bucket.put(PREFIX + "notes/a.txt", b"not ours")
    with opened(keep_last=2, keep_every=4) as checkpointer:
        for step in (2, 4, 6, 8, 10):
            checkpointer.save(step, state(step), *RECORDS)
        assert checkpointer.latest_step() == 10
        assert checkpointer.steps() == [4, 8, 10]
    assert tops(bucket) == {"4", "8", "10", "notes"}
    assert_holds(WHERE, 10)


def test_a_checkpoint_is_whole_or_not_there_whenever_a_run_is_killed(bucket):
    """After each change of the bucket: two saves, a deletion, and setting aside.

    Each state is tidied as at the next start, then listed; some are restored in full.
    """
    with opened(keep_last=1) as checkpointer:
        for step in (10, 12):
            checkpointer.save(step, state(step), *RECORDS)
            checkpointer.wait()
    folder = open_folder(WHERE)
    folder.move("12", "damaged/12")
    history = list(bucket.history)

    def objects_of(name, objects):
        """What lies below a name that has the marker of a whole checkpoint."""
        prefix = f"{PREFIX}{name}/"
        below = {key.removeprefix(prefix) for key in objects if key.startswith(prefix)}
        return below if "commit_success.txt" in below else None

    seen = []
    for name in ("10", "12", "damaged/12"):
        found = [objects_of(name, objects) for objects in history]
        assert len({frozenset(each) for each in found if each}) == 1  # whole, whenever it is there
        seen.append([k for k, each in enumerate(found) if each])
    # At each moment after the first save one of them is there.
    assert set().union(*seen) == set(range(seen[0][0], len(history)))

    steps_seen = []
    for objects in history:
        bucket.objects = dict(objects)
        folder.tidy()
        steps = sorted(folder.steps())
        assert tops(bucket) - {"damaged", "probe"} == set(map(str, steps))
        if steps not in steps_seen[-1:]:
            steps_seen.append(steps)
            for step in steps:
                assert_holds(WHERE, step)
    assert steps_seen == [[], [10], [10, 12], [12], []]


def test_only_what_looks_like_a_checkpoint_is_tidied_away(bucket):
    others = ("1/notes.txt", "2/checkpoints/10/state/a", "3", "3.old/state/a", "probe.txt")
    for name in (*others, "3/weights/a", "4/state/a", "5/data/metadata"):
        bucket.put(PREFIX + name, b"a")
    with opened() as checkpointer:
        assert checkpointer.steps() == []
    assert bucket.names() == sorted(PREFIX + name for name in (*others, "3/weights/a"))


def test_a_checkpoint_of_a_disk_can_be_copied_in_and_looks_like_one(bucket, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            bucket.put(PREFIX + str(path.relative_to(tmp_path)), path.read_bytes())
    with opened() as checkpointer:
        assert checkpointer.steps() == [10]
    assert_holds(WHERE, 10)
    bucket.objects.pop(f"{PREFIX}10/commit_success.txt")
    open_folder(WHERE).tidy()
    assert bucket.names() == []


@pytest.mark.parametrize("trouble", ["403", "reset"])
def test_training_goes_on_and_saves_when_it_can_again(bucket, trouble, capsys):
    with opened() as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        bucket.trouble = trouble
        checkpointer.save(12, state(12), *RECORDS)
        assert checkpointer.steps() == [10]  # those that were there last
        assert [step for step in (13, 14) if checkpointer.retry_due(step)] == [14]
        assert f"The newest checkpoint in {WHERE} is step 10" in capsys.readouterr().out
        bucket.heal()
        if trouble == "403":  # refuses arrays only, which is learnt beside training
            bucket.trouble, bucket.fails = trouble, lambda method, name: "/14/state/ocdbt" in name
            checkpointer.save(14, state(14), *RECORDS)
            at_rest(checkpointer)
            assert [step for step in (15, 16) if checkpointer.retry_due(step)] == [16]
            assert "step 14 is not saved (PERMISSION_DENIED" in capsys.readouterr().out
            assert tops(bucket) == {"10"}
            bucket.heal()
        checkpointer.save(16, state(16), *RECORDS)
    assert_holds(WHERE, 16)


def test_a_bucket_that_does_not_answer_holds_nothing_up(bucket, capsys):
    hasty = open_folder(WHERE, answer_seconds=0.2)
    with opened(hasty) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        bucket.trouble = "hang"
        started = time.monotonic()
        checkpointer.save(12, state(12), *RECORDS)
        assert checkpointer.steps() == [10]
        assert time.monotonic() - started < 2
        assert "step 12 is not saved (no answer within 0.2 s)" in capsys.readouterr().out
        with pytest.raises(CheckpointError, match=rf"{WHERE} cannot be written \(no answer"):
            opened(hasty)
        with pytest.raises(CheckpointError, match=rf"{WHERE} cannot be read \(no answer"):
            opened(hasty, read_only=True)
        bucket.heal()
        checkpointer.save(14, state(14), *RECORDS)


def test_arrays_that_a_bucket_does_not_take_are_given_up(bucket, monkeypatch, capsys):
    """Tensorstore itself would go on for half an hour, in threads that outlive the program."""
    with opened() as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        before = set(threading.enumerate())
        monkeypatch.setattr(storage, "BARRIER_SECONDS", 1)  # of the save that hangs alone
        bucket.trouble, bucket.fails = "hang", lambda method, name: "/12/state/ocdbt" in name
        checkpointer.save(12, state(12), *RECORDS)
        checkpointer.wait()
        assert "step 12 is not saved (not written within 0.9 s)" in capsys.readouterr().out
        left = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
        for thread in left:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in left)
        bucket.heal()
        monkeypatch.undo()
        checkpointer.save(12, state(12), *RECORDS, patience=0)
    assert_holds(WHERE, 12)


def test_a_listing_may_take_longer_than_an_answer(bucket):
    bucket.put(f"{PREFIX}10/commit_success.txt", b"")
    bucket.trouble = "slow"
    bucket.fails = lambda method, name: not name and time.sleep(0.5)
    assert open_folder(WHERE, answer_seconds=0.2).steps() == [10]


@pytest.mark.parametrize("name", ["/10/state/d/", "/10/data/metadata"])
def test_a_bucket_that_is_away_is_no_damage(bucket, name):
    with opened() as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    bucket.trouble, bucket.fails = "403", lambda method, asked: name in asked
    message = f"10: {name.split('/')[2]} cannot be read.*the bucket is away"
    with pytest.raises(CheckpointError, match=message) as error:
        assert_holds(WHERE, 10)
    assert error.type is CheckpointError
    refusals = iter([True])
    bucket.fails = lambda method, asked: name in asked and next(refusals, False)
    assert_holds(WHERE, 10)  # read once more


@pytest.mark.slow
def test_sampling_and_verify_read_a_bucket(bucket, tmp_path, capsys):
    values = tiny.config_dict(
        model__in_channels=3,
        model__depth=1,
        terms="none",
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


def test_addresses_are_checked(monkeypatch):
    names = ("", "My_Bucket", "ab", "-ab", "ab-", "a..b", "a.-b", "a" * 64, "a" * 63 + ".b" * 80)
    for where in ("s3://bucket/a", "gs://bucket", *(f"gs://{name}/a" for name in names)):
        with pytest.raises(ValueError, match=f"key='{where}': expected a folder, or gs://"):
            places.check_address("key", where)
    for name in ("bucket", "my_bucket-1", "a" * 63, ".".join(["a" * 54] * 4)):
        places.check_address("key", f"gs://{name}/a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs gcsfs: install the extra `gcs`"):
        places.check_address("key", "gs://bucket/a")


@pytest.mark.slow
def test_the_program_bounds_waiting_where_a_bucket_is_configured(tmp_path):
    code = """
import os, runpy
try:
    runpy.run_module("repulsor_jax.main", run_name="__main__", alter_sys=True)
finally:
    print("bound:", os.environ.get("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"))
"""
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path}", "--mode=verify"]
    nobody = {
        "TENSORSTORE_GCS_HTTP_URL": "http://localhost:9",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--config.checkpoint.directory=gs://bucket/a"],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | nobody,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "bound: 30"
    assert "gs://bucket/a cannot be read" in done.stderr
