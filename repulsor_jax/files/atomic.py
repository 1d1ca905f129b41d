"""Files and folders that appear complete or not at all."""

import contextlib
import glob
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Self

import filelock
from tqdm import tqdm

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

    A lock is a file in `.locks` beside the path; that of a job that was killed is free. Where none
    can be had, in a folder that is read-only or on storage without locks, a warning says so.

    Args:
      path: what is made; it need not be there.
      enabled: False does nothing, as on processes that do not write.
    """
    if not enabled:
        yield
        return
    path = pathlib.Path(path)
    file = path.parent / ".locks" / path.name
    lock = filelock.FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"waiting for another job that makes {path}", flush=True)
            lock.acquire()
    except OSError as error:
        print(f"warning: no lock on {path} ({error}): run one job on it at a time", flush=True)
    try:
        yield
    finally:
        lock.release()


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


class Appender:
    """Appends whole pieces to a file; what cannot be written now is kept and written later."""

    def __init__(self, path: PathLike) -> None:
        """Nothing is written before the first piece; folders are made where absent."""
        self._path = pathlib.Path(path)
        self._size: int | None = None  # of the pieces that are there whole
        self._kept: list[bytes] = []
        self._complained = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._kept:
            self.append_or_keep(b"")

    def append_or_keep(self, piece: bytes) -> None:
        """As `append`; that it cannot be done now is a warning, once until it can be again."""
        try:
            self.append(piece)
            self._complained = False
        except OSError as error:
            if not self._complained:
                tqdm.write(
                    f"warning: {self._path.name} cannot be written now, and is kept ({error})"
                )
            self._complained = True

    def append(self, piece: bytes) -> None:
        """Writes a piece after those that were kept.

        Raises:
          OSError: not now; the piece is kept.
        """
        self._kept.append(piece)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            # What an attempt that failed has written of a piece is taken back.
            self._size = end if self._size is None else min(self._size, end)
            file.truncate(self._size)
            left = memoryview(b"".join(self._kept))
            while left:
                left = left[file.write(left) :]
            self._size = file.tell()
        self._kept.clear()

    def cut(self, size: int) -> None:
        """Drops all but the first `size` bytes, of the file and of what is kept.

        It is done with the next piece that is written, an empty one for example.
        """
        written = size if self._size is None else min(size, self._size)
        kept = b"".join(self._kept)[: size - written]
        self._size, self._kept = written, [kept] if kept else []

    def size(self) -> int:
        """Bytes that are there, or kept, after the first piece or `cut`."""
        return (self._size or 0) + sum(map(len, self._kept))
