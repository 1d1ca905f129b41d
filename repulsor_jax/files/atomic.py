"""Files and folders that appear complete or not at all."""

import contextlib
import glob
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Self

from tqdm import tqdm

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path`, which takes its place when the block succeeds.

    The file reaches the disk before it is renamed: a machine that loses its power keeps the old
    file or the new one. Folders are made where absent.
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
    """Removes what a killed `replacing` left beside `path`, which nothing else may be writing."""
    path = pathlib.Path(path)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*"):
        stale.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Appender:
    """Appends whole lines to a file; keeps what cannot be written now, and writes it later."""

    def __init__(self, path: PathLike) -> None:
        self._path = pathlib.Path(path)
        self._size: int | None = None  # of the whole pieces in the file
        self._kept: list[bytes] = []
        self._complained = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._kept:
            self.append_or_keep(b"")

    def append_or_keep(self, piece: bytes) -> None:
        """As `append`, with a warning for the first of several failures in a row."""
        try:
            self.append(piece)
            self._complained = False
        except OSError as error:
            if not self._complained:
                name = self._path.name
                tqdm.write(f"warning: {name} cannot be written now, and is kept ({error})")
            self._complained = True

    def append(self, piece: bytes) -> None:
        """Writes a piece after those that were kept; keeps it, too, where that raises OSError."""
        self._kept.append(piece)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab+", buffering=0) as file:
            # An attempt that failed may have left a part of a piece.
            end = file.seek(0, os.SEEK_END)
            if self._size is None and end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a kill cut the last line: it stays a line of its own
                    self._kept.insert(0, b"\n")
            self._size = end if self._size is None else min(self._size, end)
            file.truncate(self._size)
            left = memoryview(b"".join(self._kept))
            while left:
                left = left[file.write(left) :]
            self._size = file.tell()
        self._kept.clear()

    def cut(self, size: int) -> None:
        """Drops all but the first `size` bytes, written or kept; done with the next `append`."""
        written = size if self._size is None else min(size, self._size)
        kept = b"".join(self._kept)[: size - written]
        self._size, self._kept = written, [kept] if kept else []

    def size(self) -> int:
        """Bytes that are written or kept, after the first piece or `cut`."""
        return (self._size or 0) + sum(map(len, self._kept))
