import contextlib
import errno
import fcntl
import json
import os
import signal
import time

import pytest

from repulsor_jax.files import locks
from tests.oracles import processes


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "made"
    with (
        locks.locked(path),
        (tmp_path / ".locks" / "made").open() as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / ".locks" / "made").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_where_no_lock_can_be_made_is_a_warning(tmp_path, capsys):
    (tmp_path / ".locks").write_text("in the way, as a read-only folder would be")
    done = []
    with locks.locked(tmp_path / "made"):
        done.append(True)
    assert done
    assert "warning: no lock on" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_one_job_where_storage_has_no_locks_is_a_warning(tmp_path, capsys, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with train_in(tmp_path):
        pass
    assert "no lock for training in" in capsys.readouterr().out
    assert not (tmp_path / ".locks" / "training.json").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_storage_without_locks_is_a_warning(tmp_path, capsys, monkeypatch, number):
    """As NFS without its lock service, or object storage that is mounted."""

    def flock(file, operation):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.locked(tmp_path / "made"):
        pass
    assert "no locks here" in capsys.readouterr().out


def test_what_goes_wrong_inside_is_raised_and_the_lock_is_free(tmp_path):
    with pytest.raises(OSError, match="disk full"), locks.locked(tmp_path / "made"):
        raise OSError("disk full")
    with locks.locked(tmp_path / "made"):
        pass


def train_in(folder, **options):
    return locks.sole(folder, "training", "go elsewhere", **options)


def test_a_second_job_in_a_folder_ends_and_says_who_the_first_is(tmp_path):
    with (
        train_in(tmp_path, machine="here"),
        pytest.raises(
            locks.BusyError,
            match=rf"another job is training here \(process {os.getpid()} on here, since 2.*\): go "
            "elsewhere",
        ),
        train_in(tmp_path, machine="here"),
    ):
        pass
    with train_in(tmp_path), locks.sole(tmp_path, "encoding", "x"):
        pass


@contextlib.contextmanager
def without_locks_between_machines(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda file, operation: None)
        yield


def test_a_holder_on_another_machine_is_known_by_its_signs_of_life(tmp_path, monkeypatch):
    with train_in(tmp_path, machine="far", watch=1.0):
        with (
            without_locks_between_machines(monkeypatch),
            pytest.raises(locks.BusyError, match="process .* on far"),
            train_in(tmp_path, machine="near", watch=3.0),
        ):
            pass
        note = (tmp_path / ".locks" / "training.json").read_text()
        assert json.loads(note)["machine"] == "far"


def test_a_holder_that_died_on_another_machine_is_waited_for_a_moment(tmp_path):
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / "training.json").write_text('{"machine": "far", "process": 1}')
    with train_in(tmp_path, machine="near", watch=0.2):
        pass


@pytest.mark.parametrize("note", ["", "[1]", '{"machine": "\\u001b[31m"}'])
def test_a_note_may_hold_anything(tmp_path, note):
    with train_in(tmp_path):
        (tmp_path / ".locks" / "training.json").write_text(note)
        with pytest.raises(locks.BusyError, match="training here") as error, train_in(tmp_path):
            pass
        assert "\x1b" not in str(error.value)


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, capsys):
    (tmp_path / ".locks").write_text("in the way, as a read-only folder would be")
    with train_in(tmp_path):
        pass
    assert "warning: no lock for training in" in capsys.readouterr().out


HOLDS = """
import sys, time
from repulsor_jax.files import locks
with locks.sole(sys.argv[1], "training", ""):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_killed_holder_leaves_no_lock(tmp_path):
    holder = processes.start_code(HOLDS, tmp_path)
    try:
        assert "held" in holder.stdout.readline()
        with pytest.raises(locks.BusyError, match=f"process {holder.pid} on"), train_in(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        started = time.monotonic()
        with train_in(tmp_path):
            assert time.monotonic() - started < 2
    finally:
        holder.kill()
