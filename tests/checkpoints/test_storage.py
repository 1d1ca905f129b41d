"""Storage that fails: full, read-only, gone, and back again."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading

import aiohttp
import google.auth.exceptions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from repulsor_jax.checkpoints import storage as storage_lib
from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.checkpoints.storage import Storage
from repulsor_jax.files import atomic
from repulsor_jax.runtime.metrics import MetricWriter, read_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORDS = ({"next_index": 1}, {"batch_size": 16}, {"shift": [0.5]})


@pytest.fixture
def disk(tmp_path):
    """A file system of 3 MB of our own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Full:
    """Fills the disk to the last byte, and frees it."""

    def __init__(self, disk):
        self.path = disk / "filler"

    def on(self):
        file = os.open(self.path, os.O_CREAT | os.O_WRONLY)
        try:
            while True:
                os.write(file, bytes(4096))
        except OSError:
            os.close(file)

    def off(self):
        self.path.unlink()


class NearlyFull(Full):
    """Leaves room for names and records, but not for arrays."""

    def on(self):
        free = os.statvfs(self.path.parent)
        self.path.write_bytes(bytes(free.f_bavail * free.f_bsize - 200_000))


class ReadOnly:
    def __init__(self, disk):
        self.disk = disk

    def on(self):
        subprocess.run(["mount", "-o", "remount,ro", str(self.disk)], check=True)

    def off(self):
        subprocess.run(["mount", "-o", "remount,rw", str(self.disk)], check=True)


class InTheWay:
    """A file where the directory was; needs no mount."""

    def __init__(self, disk):
        self.folder, self.kept = disk / "checkpoints", disk / "kept"

    def on(self):
        self.folder.rename(self.kept)
        self.folder.write_text("no directory")

    def off(self):
        self.folder.unlink()
        self.kept.rename(self.folder)


FAILURES = {
    "full": (Full, "No space left"),
    "nearly full": (NearlyFull, "No space left"),
    "read-only": (ReadOnly, "Read-only file system"),
    "a file in its place": (InTheWay, "directory|exists"),
}


@pytest.fixture(params=FAILURES)
def failure(request, tmp_path):
    """A disk, a way in which it fails, and what is said of it."""
    kind, said = FAILURES[request.param]
    disk = tmp_path if kind is InTheWay else request.getfixturevalue("disk")
    return disk, kind(disk), said


def state(step):
    """Half a megabyte that does not compress."""
    rng = np.random.default_rng(step)
    return {"step": jnp.int32(step), "w": jnp.asarray(rng.standard_normal(125_000), jnp.float32)}


def opened(disk, **options):
    options = {"retry_steps": 2, "max_lost_steps": 20} | options
    return Checkpointer(disk / "checkpoints", **options)


def look(checkpointer, first, last):
    """The first step after which the loop is told to save again, or None."""
    checkpointer._storage._waiter.submit(lambda: None).result()  # what is pending has come to rest
    return next((step for step in range(first, last) if checkpointer.retry_due(step)), None)


def test_the_preemption_service_is_left_to_the_loop(tmp_path, monkeypatch):
    """It takes the last number it was asked with, of anyone, for the place of this process."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with opened(tmp_path) as checkpointer:
        checkpointer.save(5, state(5), *RECORDS)
    assert (checkpointer.latest_step(), asked) == (5, [])


def restored(disk, step):
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(step)
    )
    storage = Storage(disk / "checkpoints", keep_last=None, keep_every=None, read_only=True)
    found = storage.read_arrays(step, wanted)
    storage.close()
    return found


def test_training_goes_on_and_saves_when_it_can_again(failure, capsys):
    disk, trouble, said = failure
    with opened(disk) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        trouble.on()
        checkpointer.save(12, state(12), *RECORDS)
        assert look(checkpointer, 13, 18) == 14
        checkpointer.save(14, state(14), *RECORDS)
        assert look(checkpointer, 15, 18) == 16
        out = capsys.readouterr().out
        assert out.count("warning: ") == 2
        assert "step 14 is not saved" in out
        assert f"The newest checkpoint in {disk}/checkpoints is step 10" in out
        assert re.search(said, out)
        trouble.off()
        checkpointer.save(18, state(18), *RECORDS)
        assert look(checkpointer, 19, 30) is None
        assert checkpointer.steps() == [10, 18]
    assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["10", "18"]
    jax.tree.map(np.testing.assert_array_equal, restored(disk, 18), state(18))


def test_training_stops_before_more_is_lost_than_allowed(failure):
    disk, trouble, said = failure
    message = rf"step 29 cannot be saved \(.*({said}).*newest checkpoint is step 10"
    checkpointer = opened(disk)
    checkpointer.save(10, state(10), *RECORDS)
    checkpointer.wait()
    trouble.on()
    checkpointer.save(28, state(28), *RECORDS)  # 30 would not be too late: a warning
    with pytest.raises(CheckpointError, match=message):
        checkpointer.save(29, state(29), *RECORDS)  # the next attempt would be after 31
    trouble.off()
    jax.tree.map(np.testing.assert_array_equal, restored(disk, 10), state(10))


def test_at_the_end_saving_is_tried_until_it_works(tmp_path, capsys):
    trouble = InTheWay(tmp_path)
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        trouble.on()
        threading.Timer(0.5, trouble.off).start()
        checkpointer.save(11, state(11), *RECORDS, patience=60.0)
        assert checkpointer.steps() == [10, 11]
    assert "step 11 is not saved" in capsys.readouterr().out


def test_leaving_without_the_last_checkpoint_is_an_error(tmp_path):
    trouble = InTheWay(tmp_path)
    checkpointer = opened(tmp_path)
    checkpointer.save(10, state(10), *RECORDS)
    checkpointer.wait()
    trouble.on()
    checkpointer.save(12, state(12), *RECORDS)
    message = "last checkpoint was not saved.*newest is step 10"
    with pytest.raises(CheckpointError, match=message), checkpointer:
        pass


def test_a_directory_that_was_removed_is_made_again(tmp_path, capsys):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        shutil.rmtree(tmp_path / "checkpoints")
        checkpointer.save(12, state(12), *RECORDS)
        assert "step 10 is gone from" in capsys.readouterr().out
        checkpointer.save(14, state(14), *RECORDS)
        checkpointer.wait()
        shutil.rmtree(tmp_path / "checkpoints")
        checkpointer.save(5, state(5), *RECORDS)  # a run that went back to its start
    jax.tree.map(np.testing.assert_array_equal, restored(tmp_path, 5), state(5))


def test_what_is_replaced_is_kept_until_the_new_is_there(tmp_path, monkeypatch):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "begin", lambda *unused: "No space left")
            with pytest.raises(CheckpointError, match="step 10 cannot be saved"):
                checkpointer.save(10, state(11), *RECORDS, overwrite=True)
        np.testing.assert_array_equal(restored(tmp_path, 10)["w"], state(10)["w"])
        checkpointer.save(10, state(11), *RECORDS, overwrite=True)
        np.testing.assert_array_equal(restored(tmp_path, 10)["w"], state(11)["w"])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["10"]


def test_replacing_goes_on_from_either_name(tmp_path, monkeypatch):
    """The old one has its other name, and cannot be given its own again for a while."""
    failures = {"begin": 1, "_tidy": 1}

    def failing(name):
        act = getattr(Storage, name)

        def once(self, *arguments):
            failures[name] -= 1
            return "away" if failures[name] >= 0 else act(self, *arguments)

        monkeypatch.setattr(Storage, name, once)

    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
        checkpointer.wait()
        for name in failures:
            failing(name)
        checkpointer.save(10, state(11), *RECORDS, overwrite=True, patience=30)
    assert max(failures.values()) < 0
    np.testing.assert_array_equal(restored(tmp_path, 10)["w"], state(11)["w"])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["10"]


@pytest.mark.parametrize(
    ("error", "of_disk", "of_bucket"),
    [
        (OSError("input/output error"), True, True),
        (FileNotFoundError("gone"), False, False),
        (json.JSONDecodeError("expected", "", 0), False, False),
        (ValueError("DATA_LOSS: checksum"), False, False),
        (ValueError("UNAVAILABLE: no answer"), True, True),
        (ValueError("UNAUTHENTICATED: login"), True, True),
        (aiohttp.ServerDisconnectedError(), False, True),
        (aiohttp.ClientPayloadError("half an answer"), False, True),
        (google.auth.exceptions.RefreshError("expired"), False, True),
    ],
    ids=repr,
)
def test_trouble_of_the_storage_is_no_damage(error, of_disk, of_bucket):
    assert storage_lib._may_pass(error, of_bucket=False) == of_disk
    assert storage_lib._may_pass(error, of_bucket=True) == of_bucket


def test_a_refusal_that_gcsfs_reports_is_no_damage(bucket):
    import gcsfs.retry  # once the fixture has bounded its waiting

    error = gcsfs.retry.HttpError({"code": 401, "message": "login"})
    assert not storage_lib._may_pass(error, of_bucket=False)
    assert storage_lib._may_pass(error, of_bucket=True)


def test_what_a_kill_left_is_cleared_or_brought_back(tmp_path):
    folder = tmp_path / "checkpoints"
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    (folder / "12.orbax-checkpoint-tmp").mkdir()
    (folder / "10").rename(folder / "10.replaced")
    assert Checkpointer(folder, read_only=True).steps() == []
    with opened(tmp_path) as checkpointer:
        assert checkpointer.steps() == [10]
    assert [p.name for p in folder.iterdir()] == ["10"]


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path, disk):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints cannot be written"):
        opened(tmp_path / "file")
    trouble = ReadOnly(disk)
    (disk / "checkpoints").mkdir()
    trouble.on()
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*Read-only file system"):
        opened(disk)
    assert Checkpointer(disk / "checkpoints", read_only=True).steps() == []


def test_a_read_that_fails_once_is_no_damage(tmp_path):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(10, state(10), *RECORDS)
    storage = Storage(
        tmp_path / "checkpoints", keep_last=None, keep_every=None, read_only=True, read_delay=0.0
    )
    answers = iter([OSError("Input/output error"), {"a": 1}])

    def read():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert storage._attempts(10, "data", read) == {"a": 1}
    storage.close()


def test_messages_are_one_line_of_readable_length():
    error = ValueError("RESOURCE_EXHAUSTED: Error\n  writing " + "x" * 1000 + "\nNo space left")
    said = storage_lib.one_line(error)
    assert "\n" not in said
    assert len(said) < 400
    assert said.startswith("RESOURCE_EXHAUSTED: Error writing x")
    assert said.endswith("No space left")


def test_a_process_that_others_waited_for_says_why_it_failed():
    error = RuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: ...")
    error.__context__ = OSError("No space left on device")
    assert storage_lib.one_line(error) == "No space left on device"


def test_pieces_of_a_file_are_whole_after_a_full_disk(disk):
    file = atomic.Appender(disk / "lines")
    file.append(b"first\n")
    trouble = Full(disk)
    trouble.on()
    pieces = [bytes([65 + k]) * 5000 + b"\n" for k in range(3)]
    for piece in pieces[:2]:
        with pytest.raises(OSError, match="No space left"):
            file.append(piece)
    trouble.off()
    file.append(pieces[2])
    assert (disk / "lines").read_bytes() == b"first\n" + b"".join(pieces)


def test_metrics_are_rewound_on_a_full_disk(disk):
    trouble = Full(disk)
    with MetricWriter(disk, 0) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": float(step)})
        trouble.on()
        writer.rewind(1)
        writer.scalars(2, {"loss": 20.0})
        trouble.off()
    found = read_jsonl(disk / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in found] == [(1, 1.0), (2, 20.0)]


def test_a_log_is_completed_on_leaving(disk, capsys):
    trouble = Full(disk)
    with atomic.Appender(disk / "lines") as file:
        trouble.on()
        for line in (b"one\n", b"two\n"):
            file.append_or_keep(line * 1000)
        trouble.off()
    assert (disk / "lines").read_bytes() == b"one\n" * 1000 + b"two\n" * 1000
    assert capsys.readouterr().out.count("warning: lines cannot be written now, and is kept") == 1


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_processes_agree_where_one_of_them_cannot_write(tmp_path, failing):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.program.run_failing_process", address]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "checkpoints"), str(failing)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    for text in said:
        assert "steps before the next attempt: [10]" in text
        assert "saved True" in text
    assert re.search(r"process \d: step 12 is not saved \(.*File too large", said[failing])
    assert [process.returncode for process in processes] == [0, 0]
