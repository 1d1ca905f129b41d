"""Folders of checkpoints, on a file system or in a bucket: which steps are whole, and moving them.

On a file system a checkpoint is whole when it has its name: orbax renames it last. A bucket has no
folders and renames nothing: there a checkpoint is whole where orbax's `commit_success.txt` is,
which is written last and here deleted first.

Whatever fails here is an OSError, and comes within `ANSWER_SECONDS` where a bucket is asked.
"""

import concurrent.futures
import logging
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any, Protocol

import tensorstore as ts
from etils import epath

BUCKET = "gs://"
DAMAGED = "damaged"  # the folder of checkpoints that were set aside
REPLACED = ".replaced"  # ends the name of a checkpoint that is being replaced
ANSWER_SECONDS = 10.0
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the names of orbax's temporary folders
_PROBE_BYTES = 1 << 16
_MARKER = "commit_success.txt"
_WRITE_RETRIES = 6  # of tensorstore, a minute in all; it would go on for a quarter of an hour
_COPIES = 16  # at the same time


class Folder(Protocol):
    """What `Storage` needs of a place."""

    path: Any  # pathlib.Path or epath.Path

    def exists(self) -> bool:
        """Whether anything is there."""

    def steps(self) -> list[int]:
        """Steps that are whole."""

    def tidy(self) -> None:
        """Removes what a save that failed or was killed left, and ends replacing."""

    def probe(self) -> None:
        """Writes a little, to see whether that works; makes the folder where it is gone."""

    def move(self, name: str, target: str) -> None:
        """Moves a checkpoint to another name in the folder: it is whole under one of them."""

    def remove(self, name: str) -> None:
        """Removes a checkpoint, which is no longer whole from the first moment on."""


def open_folder(directory: str | os.PathLike[str]) -> Folder:
    """The folder of that name; nothing is made or asked for yet."""
    return _Bucket(str(directory)) if is_bucket(directory) else _Disk(directory)


def is_bucket(directory: str | os.PathLike[str]) -> bool:
    """Whether it is the address of a bucket."""
    return str(directory).startswith(BUCKET)


class _Disk:
    """A folder of a file system."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(directory).absolute()

    def exists(self) -> bool:
        return self.path.is_dir()

    def steps(self) -> list[int]:
        try:
            return [int(p.name) for p in self.path.iterdir() if p.name.isdecimal() and p.is_dir()]
        except FileNotFoundError:
            return []

    def tidy(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            replaced = path.with_name(path.name.removesuffix(REPLACED))
            if _UNFINISHED in path.name or (replaced != path and replaced.exists()):
                shutil.rmtree(path, ignore_errors=True)
            elif replaced != path:
                path.rename(replaced)

    def probe(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path) as file:
            file.write(bytes(_PROBE_BYTES))

    def move(self, name: str, target: str) -> None:
        (self.path / target).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).rename(self.path / target)

    def remove(self, name: str) -> None:
        going = self.path / f"{name}{_UNFINISHED}"
        (self.path / name).rename(going)
        shutil.rmtree(going)


class _Bucket:
    """The objects of a bucket below a prefix.

    They are listed all at once: no answer is half of one and half of another moment.
    """

    def __init__(self, address: str) -> None:
        _bound_waiting()
        self.path = epath.Path(address)
        name, _, prefix = str(self.path).removeprefix(BUCKET).partition("/")
        self._store = ts.KvStore.open(
            {"driver": "gcs", "bucket": name, "path": prefix + "/"},
            context=ts.Context({"gcs_request_retries": {"max_retries": 1}}),
        ).result()

    def exists(self) -> bool:
        return bool(self._names())

    def steps(self) -> list[int]:
        return [int(name) for name in _whole(self._names()) if name.isdecimal()]

    def tidy(self) -> None:
        names = self._names()
        whole = _whole(names)
        for name in sorted({name.partition("/")[0] for name in names}):
            step = name.removesuffix(REPLACED)
            if not step.isdecimal() or (name == step and name in whole):
                continue
            if name in whole and step not in whole:
                self.move(name, step)
            else:
                self.remove(name)

    def probe(self) -> None:
        self._ask(self._store.write("probe", bytes(_PROBE_BYTES)))
        self._ask(self._store.delete_range(_below("probe")))

    def move(self, name: str, target: str) -> None:
        self.remove(target)
        pairs = [(key, target + key.removeprefix(name)) for key in self._names(name + "/")]
        pairs.sort(key=lambda pair: pair[0] == f"{name}/{_MARKER}")
        if not pairs:
            raise OSError(f"{self.path / name} is gone")
        *most, last = pairs
        try:
            with concurrent.futures.ThreadPoolExecutor(_COPIES) as pool:
                list(pool.map(self._copy, most))
            self._copy(last)
        except Exception as error:  # of gcsfs, aiohttp, google.auth
            raise OSError(f"copying {self.path / name}: {error}") from error
        self.remove(name)

    def remove(self, name: str) -> None:
        for each in (_MARKER, ""):
            self._ask(self._store.delete_range(_below(f"{name}/{each}")))

    def _copy(self, pair: tuple[str, str]) -> None:
        """Within the bucket: the bytes do not come here."""
        import gcsfs

        gcsfs.GCSFileSystem().cp_file(*(str(self.path / key) for key in pair))

    def _names(self, prefix: str = "") -> list[str]:
        listed = self._ask(self._store.list(_below(prefix) if prefix else ts.KvStore.KeyRange()))
        return [name.decode() for name in listed]

    def _ask(self, future: Any) -> Any:
        try:
            return future.result(timeout=ANSWER_SECONDS)
        except TimeoutError:
            raise OSError(f"no answer within {ANSWER_SECONDS:g} s") from None
        except ValueError as error:  # what tensorstore raises
            raise OSError(str(error)) from error


def _whole(names: list[str]) -> set[str]:
    """Folders that hold orbax's marker."""
    found = (re.fullmatch(rf"([^/]+)/{_MARKER}", name) for name in names)
    return {match[1] for match in found if match}


def _below(prefix: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def _bound_waiting() -> None:
    """Has what orbax uses give up on a bucket within minutes, and see what others have written.

    What the environment or fsspec's configuration says already stays.
    """
    import fsspec
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # Else it asks another service about the bucket, for a minute each time when it is away.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # A request that moves no byte for so long has failed.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "10")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    retries = {"max_retries": _WRITE_RETRIES}
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context.setdefault("gcs_request_retries", retries)
    # It prints the traceback of what it raises, too.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    options = fsspec.config.conf.setdefault("gcs", {})
    options.setdefault("requests_timeout", 3 * ANSWER_SECONDS)
    options.setdefault("use_listings_cache", False)
