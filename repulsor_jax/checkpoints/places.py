"""Folders of checkpoints, on a file system or in a bucket: which steps are whole, and moving them.

On a file system a checkpoint is whole when it has its name: orbax renames it last. A bucket has no
folders and renames nothing: there a checkpoint is whole where orbax's `commit_success.txt` is,
which is written last and here deleted first.

Whatever fails here is an OSError. A bucket that does not answer is given up on after
`ANSWER_SECONDS`; one that answers has `MANY_SECONDS` for each listing or deletion of many objects.
Moving copies them one by one, each tried again by gcsfs, which may take minutes.
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
from tqdm.auto import tqdm

BUCKET = "gs://"
RECORDS = ("manifest", "data", "config", "latents")  # JSON, beside the arrays of "state"
DAMAGED = "damaged"  # the folder of checkpoints that were set aside
REPLACED = ".replaced"  # ends the name of a checkpoint that is being replaced
ANSWER_SECONDS = 10.0  # for one small request
MANY_SECONDS = 120.0  # for as many as a listing or a deletion takes
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the names of orbax's temporary folders
_DELETED = ".deleted"  # ends the name of a checkpoint that is being deleted
_PROBE_BYTES = 1 << 16
_PROBE = "probe"
_MARKER = "commit_success.txt"
# All that a checkpoint has at its top.
_PARTS = {"state", *RECORDS, "_CHECKPOINT_METADATA", _MARKER}
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
            deleted = path.suffix == _DELETED and path.stem.isdecimal()
            unfinished = deleted or _UNFINISHED in path.name
            if unfinished or (replaced != path and replaced.exists()):
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
        going = self.path / f"{name}{_DELETED}"
        if going.exists():
            shutil.rmtree(going)
        (self.path / name).rename(going)
        shutil.rmtree(going)


class _Bucket:
    """The objects of a bucket below a prefix.

    They are listed all at once: no answer is half of one and half of another moment.
    """

    def __init__(self, address: str) -> None:
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
        parts = [name.split("/") for name in names]
        others = {top for top, *below in parts if not below or below[0] not in _PARTS}
        for name in sorted({top for top, *_ in parts}):
            step = name.removesuffix(REPLACED)
            if not step.isdecimal() or (name == step and name in whole):
                continue
            if others & {name, step}:  # not only ours, as the folder of another run
                continue
            if name in whole and step not in whole:
                self.move(name, step)
            else:
                self.remove(name)

    def probe(self) -> None:
        for value in (bytes(_PROBE_BYTES), None):  # None deletes
            self._ask(self._store.write(_PROBE, value), ANSWER_SECONDS)

    def move(self, name: str, target: str) -> None:
        names = self._names()
        arrived = f"{target}/{_MARKER}" in names
        if f"{name}/{_MARKER}" in names:
            if not arrived:
                self.remove(target)
            self._copy_all([key for key in names if key.startswith(f"{name}/")], name, target)
        elif not arrived:
            raise OSError(f"{self.path / name} is not whole")
        self.remove(name)

    def remove(self, name: str) -> None:
        for each in (_MARKER, ""):
            self._ask(self._store.delete_range(_below(f"{name}/{each}")), MANY_SECONDS)

    def _copy_all(self, keys: list[str], name: str, target: str) -> None:
        """Copies what is whole; its marker comes last."""
        pairs = [(key, target + key.removeprefix(name)) for key in keys]
        pairs.sort(key=lambda pair: pair[0] == f"{name}/{_MARKER}")
        *most, last = pairs
        try:
            with concurrent.futures.ThreadPoolExecutor(_COPIES) as pool:
                list(pool.map(self._copy, most))
            self._copy(last)
        except Exception as error:  # of gcsfs, aiohttp, google.auth
            raise OSError(f"copying {self.path / name}: {error}") from error

    def _copy(self, pair: tuple[str, str]) -> None:
        """Within the bucket: the bytes do not come here."""
        import gcsfs

        gcsfs.GCSFileSystem().cp_file(*(str(self.path / key) for key in pair))

    def _names(self) -> list[str]:
        self._ask(self._store.read(_PROBE), ANSWER_SECONDS)  # whether there is an answer at all
        return [name.decode() for name in self._ask(self._store.list(), MANY_SECONDS)]

    def _ask(self, future: Any, seconds: float) -> Any:
        try:
            return future.result(timeout=seconds)
        except TimeoutError:
            raise OSError(f"no answer within {seconds:g} s") from None
        except ValueError as error:  # what tensorstore raises
            raise OSError(str(error)) from error


def _whole(names: list[str]) -> set[str]:
    """Folders that hold orbax's marker."""
    found = (re.fullmatch(rf"([^/]+)/{_MARKER}", name) for name in names)
    return {match[1] for match in found if match}


def _below(prefix: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def bound_waiting() -> None:
    """Has what orbax uses give up on a bucket within minutes, and see what others have written.

    For the program to call once, before it opens the first bucket: it sets the environment,
    fsspec's configuration, and defaults within orbax. What the first two say already stays.
    """
    import fsspec

    # Else it asks another service about the bucket, for a minute each time when it is away.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # A request that moves no byte for so long has failed.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "10")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # It prints the traceback of what it raises, too.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    options = fsspec.config.conf.setdefault("gcs", {})
    options.setdefault("requests_timeout", 3 * ANSWER_SECONDS)
    options.setdefault("use_listings_cache", False)
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils as orbax

        contexts = orbax._BASE_TS_CONTEXT, orbax._DEFAULT_OCDBT_TS_CONTEXT
    except (ImportError, AttributeError) as error:
        tqdm.write(
            "warning: a checkpoint that a bucket does not take is given up only after a quarter of "
            f"an hour: this version of orbax keeps that elsewhere ({error})"
        )
        return
    for context in contexts:
        context.setdefault("gcs_request_retries", {"max_retries": _WRITE_RETRIES})
