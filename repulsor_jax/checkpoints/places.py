"""Folders of checkpoints, on a file system or in a bucket: which steps are whole, and moving them.

On a file system a checkpoint is whole when it has its name: orbax renames it last. A bucket renames
nothing: there a checkpoint is whole while it has `commit_success.txt`, which orbax writes last and
`remove` deletes first.

Deleting old checkpoints is not left to orbax (`max_to_keep`, orbax 0.12.8): it deletes file by file
under the checkpoint's own name, and in a bucket some objects before `commit_success.txt`. A run
killed at that moment would leave half a checkpoint that is listed as whole.

Whatever fails here is an OSError. A bucket that does not answer is given up on after
`ANSWER_SECONDS`; one that answers has `MANY_SECONDS` for each listing or deletion.
"""

import collections
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import tensorstore as ts
from etils import epath

BUCKET = "gs://"
RECORDS = ("manifest", "data", "config", "latents")  # JSON, beside the arrays of "state"
DAMAGED = "damaged"  # the folder of checkpoints that were set aside
ANSWER_SECONDS = 10.0  # for one small request
MANY_SECONDS = 120.0  # for as many as a listing or a deletion takes
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the names of orbax's temporary folders
_DELETED = ".deleted"  # ends the name of a checkpoint that is being deleted
_PROBE, _PROBE_BYTES = "probe", 1 << 16
_MARKER = "commit_success.txt"
# All that a checkpoint has at its top.
_PARTS = {"state", *RECORDS, "_CHECKPOINT_METADATA", _MARKER}


class _Disk:
    """A folder of a file system; `_Bucket` has the same methods."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(directory).absolute()

    def steps(self) -> list[int]:
        try:
            return [int(p.name) for p in self.path.iterdir() if p.name.isdecimal() and p.is_dir()]
        except FileNotFoundError:
            return []

    def tidy(self) -> None:
        """Makes the folder where absent; removes what a killed save or deletion left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            if _UNFINISHED in path.name or (path.suffix == _DELETED and path.stem.isdecimal()):
                shutil.rmtree(path, ignore_errors=True)

    def probe(self) -> None:
        """Makes the folder where absent, and writes a little, to see whether that works."""
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path) as file:
            file.write(bytes(_PROBE_BYTES))

    def move(self, name: str, target: str) -> None:
        """Moves a checkpoint to another name; at every moment it is there under one of them."""
        (self.path / target).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).rename(self.path / target)

    def remove(self, name: str) -> None:
        """Removes a checkpoint; from the first moment on `steps` does not list it."""
        going = self.path / f"{name}{_DELETED}"
        (self.path / name).rename(going)
        shutil.rmtree(going)


class _Bucket:
    """The objects of a bucket below a prefix, always listed in one go."""

    def __init__(self, address: str, answer_seconds: float) -> None:
        self.path = epath.Path(address)
        self._answer_seconds = answer_seconds
        name, _, prefix = str(self.path).removeprefix(BUCKET).partition("/")
        self._store = ts.KvStore.open(
            {"driver": "gcs", "bucket": name, "path": prefix + "/"},
            context=ts.Context({"gcs_request_retries": {"max_retries": 1}}),
        ).result()

    def steps(self) -> list[int]:
        found = self._contents()
        return [int(name) for name in found if name.isdecimal() and _MARKER in found[name]]

    def tidy(self) -> None:
        for name, parts in self._contents().items():
            # A folder with other objects belongs to somebody else, for example to another run.
            if name.isdecimal() and _MARKER not in parts and parts <= _PARTS:
                self.remove(name)

    def probe(self) -> None:
        for value in (bytes(_PROBE_BYTES), None):  # None deletes
            self._ask(self._store.write(_PROBE, value), self._answer_seconds)

    def move(self, name: str, target: str) -> None:
        import gcsfs

        keys = self._ask((self._store + f"{name}/").list(), MANY_SECONDS)
        names = {key.decode() for key in keys} - {_MARKER}
        try:
            bucket = gcsfs.GCSFileSystem()  # copies within the bucket: the bytes do not come here
            for part in (sorted(names), [_MARKER]):
                old, new = ([str(self.path / top / n) for n in part] for top in (name, target))
                bucket.copy(old, new)
        except Exception as error:  # of gcsfs, aiohttp, google.auth
            raise OSError(f"copying {self.path / name}: {error}") from error
        self.remove(name)

    def remove(self, name: str) -> None:
        self._ask(self._store.write(f"{name}/{_MARKER}", None), self._answer_seconds)
        below = self._store + f"{name}/"
        self._ask(below.delete_range(ts.KvStore.KeyRange()), MANY_SECONDS)

    def _contents(self) -> dict[str, set[str]]:
        """The folders and objects at the top, each with the names directly below it."""
        # One small request finds out soon whether the bucket answers; a listing may take long.
        self._ask(self._store.read(_PROBE), self._answer_seconds)
        found: dict[str, set[str]] = collections.defaultdict(set)
        for key in self._ask(self._store.list(), MANY_SECONDS):
            top, _, below = key.decode().partition("/")
            found[top].add(below.partition("/")[0])
        return found

    def _ask(self, future: Any, seconds: float) -> Any:
        try:
            return future.result(timeout=seconds)
        except TimeoutError:
            raise OSError(f"no answer within {seconds:g} s") from None
        except ValueError as error:  # what tensorstore raises
            raise OSError(str(error)) from error


Folder = _Disk | _Bucket


def open_folder(
    directory: str | os.PathLike[str], *, answer_seconds: float = ANSWER_SECONDS
) -> Folder:
    """The folder at a path, or at gs://bucket/path; nothing is made or asked for yet."""
    if is_bucket(directory):
        return _Bucket(str(directory), answer_seconds)
    return _Disk(directory)


def is_bucket(directory: str | os.PathLike[str]) -> bool:
    """Whether it is the address of a bucket."""
    return str(directory).startswith(BUCKET)


def check_address(key: str, directory: str) -> None:
    """Raises ValueError, naming the key, unless this is a path or a bucket that can be reached.

    Names of buckets: docs.cloud.google.com/storage/docs/buckets#naming; 222 characters with dots.
    """
    label = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
    name = rf"(?=[a-z0-9][^/]{{1,220}}[a-z0-9]/){label}(?:\.{label})*"
    if "://" in directory and not re.fullmatch(rf"gs://{name}/[^/].*", directory):
        raise ValueError(
            f"{key}={directory!r}: expected a folder, or gs://bucket/path, the bucket's name of 3 "
            "to 63 lower case letters, digits, '-', '_' and '.'"
        )
    if is_bucket(directory) and importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{key}={directory!r} needs gcsfs: install the extra `gcs`, or mount the bucket"
        )


def bound_waiting() -> None:
    """Bounds the time for which orbax's file systems wait for a bucket that is away.

    The program calls it once, before it opens the first bucket, because it sets environment
    variables of tensorstore and gcsfs, and fsspec's configuration, except those that are set
    already. Within orbax tensorstore tries a request 32 times again, for which there is no setting.
    """
    import fsspec

    # With "true" gcsfs asks another service about the bucket first: a minute each time it is away.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # A request that moves no byte for this long has failed.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "10")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # gcsfs logs the traceback of each error that it also raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    options = fsspec.config.conf.setdefault("gcs", {})
    options.setdefault("requests_timeout", 3 * ANSWER_SECONDS)
    # With a cache gcsfs would not see what other processes have written.
    options.setdefault("use_listings_cache", False)
