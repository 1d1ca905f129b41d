"""Files and folders that appear complete or not at all."""

import contextlib
import glob
import os
import pathlib
import secrets
from collections.abc import Iterator

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


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)
