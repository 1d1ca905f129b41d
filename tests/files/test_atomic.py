import errno
import fcntl

import pytest

from repulsor_jax.files import atomic
from tests.oracles import disks


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "made"
    with (
        atomic.locked(path),
        (tmp_path / ".locks" / "made").open() as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / ".locks" / "made").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_where_no_lock_can_be_made_is_a_warning(tmp_path, capsys):
    (tmp_path / ".locks").write_text("in the way, as a read-only folder would be")
    done = []
    with atomic.locked(tmp_path / "made"):
        done.append(True)
    assert done
    assert "warning: no lock on" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_storage_without_locks_is_a_warning(tmp_path, capsys, monkeypatch, number):
    """As NFS without its lock service, or object storage that is mounted."""

    def flock(file, operation):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic.locked(tmp_path / "made"):
        pass
    assert "no locks here" in capsys.readouterr().out


def test_what_goes_wrong_inside_is_raised_and_the_lock_is_free(tmp_path):
    with pytest.raises(OSError, match="disk full"), atomic.locked(tmp_path / "made"):
        raise OSError("disk full")
    with atomic.locked(tmp_path / "made"):
        pass


def test_pieces_of_a_file_are_whole_after_a_full_disk(disk):
    file = atomic.Appender(disk / "lines")
    file.append(b"first\n")
    trouble = disks.Full(disk)
    trouble.on()
    pieces = [bytes([65 + k]) * 5000 + b"\n" for k in range(3)]
    for piece in pieces[:2]:
        with pytest.raises(OSError, match="No space left"):
            file.append(piece)
    trouble.off()
    file.append(pieces[2])
    assert (disk / "lines").read_bytes() == b"first\n" + b"".join(pieces)
