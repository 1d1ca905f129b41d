"""Files and folders that appear complete or not at all."""

import contextlib
import glob
import os
import pathlib
import secrets
from collections.abc import Iterator

import filelock

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path`, which takes its place when the block succeeds.

    The file is written through to the disk before it is renamed, so that a machine that loses its
    power keeps the old file or the new one. Folders of `path` are made where absent.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(path: PathLike) -> None:
    """Removes what `replacing` left beside `path` when it was killed.

    Only for a path that nothing else is writing at this moment.
    """
    path = pathlib.Path(path)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*"):
        stale.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: PathLike, *, enabled: bool = True) -> Iterator[None]:
    """Holds the lock of `path` among the jobs on it; waits, and says so, while another has it.

    A lock is a file in `.locks` beside the path; that of a job that was killed is free.

    Args:
      path: what is made; it need not be there.
      enabled: False does nothing, as on processes that do not write.
    """
    if not enabled:
        yield
        return
    path = pathlib.Path(path)
    file = path.parent / ".locks" / path.name
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another job that makes {path}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)
