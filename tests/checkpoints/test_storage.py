"""Storage that fails: full, read-only, gone, and back again."""

import json
import pathlib
import re
import shutil
import threading

import aiohttp
import google.auth.exceptions
import pytest
from jax.experimental import multihost_utils

from repulsor_jax.checkpoints import storage
from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.checkpoints.places import open_folder
from tests.oracles import disks, processes
from tests.oracles.checkpoints import RECORDS, assert_holds, at_rest, state

ROOT = pathlib.Path(__file__).resolve().parents[2]


def opened(disk, **options):
    options = {"retry_steps": 2, "max_lost_steps": 20} | options
    return Checkpointer(disk / "checkpoints", **options)


def first_retry(checkpointer, first, last):
    """The first step after which the loop is told to save again, or None."""
    at_rest(checkpointer)
    return next((step for step in range(first, last) if checkpointer.retry_due(step)), None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        # The first two are found before anything is begun, the last one beside training.
        (disks.InTheWay, "directory|exists"),
        (disks.ReadOnly, "Read-only file system"),
        (disks.NearlyFull, "No space left"),
    ],
)
def test_training_goes_on_until_too_much_would_be_lost(kind, said, tmp_path, request, capsys):
    disk = tmp_path if kind is disks.InTheWay else request.getfixturevalue("disk")
    trouble = kind(disk)
    with opened(disk) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        trouble.on()
        checkpointer.save(12, state(12), *RECORDS)
        assert first_retry(checkpointer, 13, 18) == 14
        if kind is not disks.InTheWay:  # what is half written takes no space
            assert [p.name for p in (disk / "checkpoints").iterdir()] == ["10"]
        checkpointer.save(28, state(28), *RECORDS)  # the next attempt, after 30, is in time
        assert first_retry(checkpointer, 29, 34) == 30
        out = capsys.readouterr().out
        assert out.count("warning: ") == 2
        assert re.search(rf"step 28 is not saved \(.*({said})", out)
        assert f"The newest checkpoint in {disk}/checkpoints is step 10" in out
        message = rf"step 29 cannot be saved \(.*({said}).*newest checkpoint is step 10"
        with pytest.raises(CheckpointError, match=message):
            checkpointer.save(29, state(29), *RECORDS)  # the next one, after 31, is not
        trouble.off()
        checkpointer.save(30, state(30), *RECORDS)
        assert first_retry(checkpointer, 31, 40) is None
        assert checkpointer.steps() == [10, 30]
    assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["10", "30"]
    for step in (10, 30):
        assert_holds(disk / "checkpoints", step)


def test_at_the_end_saving_is_tried_until_it_works(tmp_path, capsys):
    trouble = disks.InTheWay(tmp_path)
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        trouble.on()
        threading.Timer(0.5, trouble.off).start()
        checkpointer.save(11, state(11), *RECORDS, patience=60.0)
        assert checkpointer.steps() == [10, 11]
    assert "step 11 is not saved" in capsys.readouterr().out


def test_leaving_without_the_last_checkpoint_is_an_error(tmp_path):
    checkpointer = opened(tmp_path)
    checkpointer.save(10, state(10), *RECORDS)
    checkpointer.wait()
    disks.InTheWay(tmp_path).on()
    checkpointer.save(12, state(12), *RECORDS)
    message = "last checkpoint was not saved.*newest is step 10"
    with pytest.raises(CheckpointError, match=message), checkpointer:
        pass


def test_a_directory_that_was_removed_is_made_again(tmp_path, capsys):
    with opened(tmp_path) as checkpointer:
        for step in (10, 12, 12):  # the last as in a run that went back to an older state
            checkpointer.save(step, state(step), *RECORDS)
            checkpointer.wait()
            shutil.rmtree(tmp_path / "checkpoints")
        checkpointer.save(5, state(5), *RECORDS)
    assert "step 10 is gone from" in capsys.readouterr().out
    assert_holds(tmp_path / "checkpoints", 5)


def test_a_step_that_is_there_stays_as_it_is(tmp_path):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.save(10, state(11), *RECORDS, patience=0)
    assert_holds(tmp_path / "checkpoints", 10)


def test_the_last_and_every_nth_are_kept(tmp_path):
    with opened(tmp_path, keep_last=2, keep_every=4) as checkpointer:
        for step in (2, 4, 6, 8, 10):
            checkpointer.save(step, state(step), *RECORDS)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "4", "8"]


def test_what_a_kill_left_is_cleared_and_nothing_else(tmp_path):
    folder = tmp_path / "checkpoints"
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    for name in ("12.orbax-checkpoint-tmp", "8.deleted", "notes.deleted"):
        (folder / name).mkdir()
    assert Checkpointer(folder, read_only=True).steps() == [10]
    with opened(tmp_path, keep_last=1) as checkpointer:
        (folder / "10.deleted").mkdir()  # is in nobody's way
        checkpointer.save(12, state(12), *RECORDS)
    assert sorted(p.name for p in folder.iterdir()) == ["12", "notes.deleted"]


def test_a_checkpoint_is_not_listed_from_the_first_moment_of_its_deletion(tmp_path, monkeypatch):
    def fail(path):
        raise OSError("killed")

    (tmp_path / "10" / "state").mkdir(parents=True)
    folder = open_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(OSError, match="killed"):
            folder.remove("10")
    assert folder.steps() == []
    folder.tidy()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path, disk):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints cannot be written"):
        opened(tmp_path / "file")
    (disk / "checkpoints").mkdir()
    disks.ReadOnly(disk).on()
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*Read-only file system"):
        opened(disk)
    assert Checkpointer(disk / "checkpoints", read_only=True).steps() == []


def test_the_preemption_service_is_left_to_the_loop(tmp_path, monkeypatch):
    """It takes the last number it was asked with, of anyone, for the place of this process."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with opened(tmp_path) as checkpointer:
        checkpointer.save(5, state(5), *RECORDS)
    assert (checkpointer.steps(), asked) == ([5], [])


@pytest.mark.parametrize(
    ("error", "of_disk", "of_bucket"),
    [
        (OSError("input/output error"), True, True),
        (FileNotFoundError("gone"), False, False),
        (json.JSONDecodeError("expected", "", 0), False, False),
        (ValueError("DATA_LOSS: checksum"), False, False),
        (ValueError("UNAVAILABLE: no answer"), True, True),
        (aiohttp.ServerDisconnectedError(), False, True),
        (google.auth.exceptions.RefreshError("expired"), False, True),
    ],
    ids=repr,
)
def test_trouble_of_the_storage_is_no_damage(error, of_disk, of_bucket):
    assert storage.may_pass(error, of_bucket=False) == of_disk
    assert storage.may_pass(error, of_bucket=True) == of_bucket


def test_messages_are_one_line_of_readable_length():
    error = ValueError("RESOURCE_EXHAUSTED: Error\n  writing " + "x" * 1000 + "\nNo space left")
    said = storage.one_line(error)
    assert "\n" not in said
    assert len(said) < 400
    assert said.startswith("RESOURCE_EXHAUSTED: Error writing x")
    assert said.endswith("No space left")


def test_a_process_that_others_waited_for_says_why_it_failed():
    error = RuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: ...")
    error.__context__ = OSError("No space left on device")
    assert storage.one_line(error) == "No space left on device"


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_processes_agree_where_one_of_them_cannot_write(tmp_path, failing):
    address, folder = processes.free_address(), tmp_path / "checkpoints"
    module = "tests.program.run_failing_process"
    said = processes.wait(
        [processes.start(module, address, rank, folder, failing) for rank in range(2)]
    )
    for text in said:
        assert "steps before the next attempt: [10]" in text
        assert "saved True" in text
    made = ["no shards: [Errno 27] File too large", "no shards: another process failed"]
    for text, line in zip(said, ["shards made: 1"] * 2 if failing else made, strict=True):
        assert line in text
    assert re.search(r"process \d: step 12 is not saved \(.*File too large", said[failing])


def test_the_reason_of_a_failure_outlives_the_specification_behind_it():
    reason = "Error writing: No space left on device [os_error_code='28']"
    text = f"Error opening {'x' * 500}: {reason} [tensorstore_spec='{{{'y' * 900}}}']"
    assert storage.one_line(ValueError(text)).endswith(reason)
