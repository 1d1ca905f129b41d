"""SHA-256 of files and of plain values."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from repulsor_jax.files.untrusted import read_json


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def values_sha256(values: Any) -> str:
    """SHA-256 of plain values as JSON, in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def contents_sha256(
    paths: Sequence[str], note: pathlib.Path, *, title: str, settled: float = 2.0
) -> str:
    """SHA-256 of the contents of files, in their order, in hexadecimal.

    They are read once: the digest is kept in the file `note` with each file's size, inode and times
    of change, of which the system sets one itself at every change, and is taken from there while
    these are the same.

    Raises:
      OSError: a file cannot be read.
    """
    stamps, newest = hashlib.sha256(), 0.0
    for path in paths:
        found = os.stat(path)
        newest = max(newest, found.st_ctime)
        times = found.st_mtime_ns, found.st_ctime_ns
        stamps.update(f"{path}\0{found.st_size} {found.st_ino} {times}\0".encode(errors="replace"))
    stamp, is_settled = stamps.hexdigest(), newest < time.time() - settled
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(note)[stamp])
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        # A million files as futures at once would take gigabytes.
        parts = (pool.map(file_sha256, paths[k : k + 4096]) for k in range(0, len(paths), 4096))
        digests = itertools.chain.from_iterable(parts)
        bar = tqdm(digests, title, len(paths), unit="file", delay=1)
        digest = hashlib.sha256("".join(bar).encode()).hexdigest()
    if not is_settled:
        return digest
    with contextlib.suppress(OSError):  # without a note they are read again the next time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({stamp: digest}))
    return digest
