"""Many items made in shards on disk, by a job that may be stopped at any moment.

A shard holds consecutive items; it appears whole or not at all, and is not made again. No batch
crosses from one shard to the next, so that the bytes of a shard do not depend on which others were
missing.
"""

import abc
import collections
import contextlib
import dataclasses
import errno
import math
import pathlib
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.files import atomic, checksums

T = TypeVar("T")
Arrays = dict[str, np.ndarray]

# Errors of zipfile on a damaged file; RuntimeError on flags and methods that it does not know.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Restartable(abc.ABC):
    """A job of `count` items in files of a folder, `per_shard` items in each but the last."""

    folder: pathlib.Path
    count: int
    per_shard: int

    def __len__(self) -> int:
        return math.ceil(self.count / self.per_shard)

    def rows(self, shard: int) -> range:
        """The items of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

    def missing(self, share: slice = slice(None)) -> list[int]:
        """The shards that are not finished, among all or among `range(len(self))[share]`."""
        return [shard for shard in range(len(self))[share] if not self.is_finished(shard)]

    @abc.abstractmethod
    def is_finished(self, shard: int) -> bool:
        """Whether a shard is there; a damaged one is not."""

    @abc.abstractmethod
    def write(self, shard: int, parts: Iterable[Any]) -> None:
        """Writes the parts of a shard; it is finished when this returns, and not before."""

    @abc.abstractmethod
    def size(self, part: Any) -> int:
        """The number of items in a part."""


class Shards(Restartable):
    """Named arrays, one .npz file a shard; reading checks the CRC of every array."""

    def is_finished(self, shard: int) -> bool:
        """Whether a shard is there; a damaged one is removed.

        Raises:
          OSError: it cannot be read now, which is no damage.
        """
        path = self._path(shard)
        try:
            with zipfile.ZipFile(path) as archive:
                is_whole = archive.testzip() is None
        except DAMAGED as error:
            number = getattr(error, "errno", None)
            if number not in (None, errno.ENOENT, errno.EINVAL):  # trouble with the disk
                raise OSError(number, f"{path}: {error}") from error
            is_whole = False
        if not is_whole:
            path.unlink(missing_ok=True)
        return is_whole

    def write(self, shard: int, parts: Iterable[Arrays]) -> None:
        """See `Restartable`; ValueError where an array does not hold the items of this shard."""
        parts, path, expected = list(parts), self._path(shard), len(self.rows(shard))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name, array in arrays.items():
            if len(array) != expected:
                raise ValueError(f"{path}: {name}: found {len(array)} items, expected {expected}")
        atomic.remove_stale(path)
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def size(self, part: Arrays) -> int:
        """The number of items in a part."""
        return len(next(iter(part.values())))

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Yields one array, shard by shard, in order; ValueError names a damaged one."""
        for shard in range(len(self)):
            path = self._path(shard)
            try:
                with np.load(path, allow_pickle=False) as archive:
                    array = archive[name]
            except (*DAMAGED, ValueError, KeyError, MemoryError) as error:
                remedy = "delete it, and the same command makes it anew"
                raise ValueError(f"{path}: damaged ({error}): {remedy}") from error
            yield array

    def names(self) -> list[str]:
        """Names of the arrays, as the first shard has them."""
        with np.load(self._path(0), allow_pickle=False) as archive:
            return list(archive.files)

    def remove(self) -> None:
        """Deletes the folder with all shards."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: int) -> pathlib.Path:
        rows = self.rows(shard)  # in the name, so that shards of another size are not taken for it
        return self.folder / f"{rows.start:08d}-{rows.stop:08d}.npz"


def whole_batches(per_shard: int, batch_size: int) -> int:
    """The multiple of `batch_size` nearest to `per_shard`, and at least one."""
    return batch_size * max(1, round(per_shard / batch_size))


def job_name(description: Any) -> str:
    """A name for the job that plain values describe: 12 hexadecimal digits of their SHA-256."""
    return checksums.values_sha256(description)[:12]


def fill(
    shards: Restartable,
    produce: Callable[[Sequence[range]], Iterator[Any]],
    *,
    title: str,
    share: slice | None = None,
) -> int:
    """Makes the missing shards, under a progress bar of the first process.

    Args:
      shards: what to fill.
      produce: called once with the items of each missing shard; yields parts of consecutive items,
        each of one shard, in their order.
      title: of the bar.
      share: None where all processes make every item together: the first process keeps the files
        and says what is missing, and the others need not see them. `slice(k, None, n)` where
        process k of n makes every n-th shard by itself.

    Returns:
      The number of items made.
    """
    is_main = jax.process_index() == 0
    keeps = is_main or share is not None
    if share is not None:
        missing = shards.missing(share)
    else:
        mask = np.zeros(len(shards), np.int32)
        with sharding.raised_on_all():
            if keeps:
                mask[shards.missing()] = 1
        missing = np.flatnonzero(sharding.agree(mask)).tolist()
    if not missing:
        return 0
    todo = [shards.rows(shard) for shard in missing]
    left = sum(map(len, todo))
    total = sum(len(shards.rows(k)) for k in range(len(shards))[share or slice(None)])
    bar = tqdm(
        total=total,
        initial=total - left,
        desc=title,
        unit="img",
        disable=not is_main,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file takes fewer lines
    )
    stream = produce(todo)
    with contextlib.closing(stream), bar:  # type: ignore[type-var]

        def parts(count: int) -> Iterator[Any]:
            while count > 0:
                part = next(stream)
                count -= shards.size(part)
                bar.update(shards.size(part))
                yield part

        for shard, rows in zip(missing, todo, strict=True):
            if share is not None:
                shards.write(shard, parts(len(rows)))
                continue
            # Making parts is collective work, and its errors are on all; writing is of one.
            made = collections.deque(parts(len(rows)), maxlen=None if keeps else 0)
            with sharding.raised_on_all():
                if keeps:
                    shards.write(shard, made)
    return left


def in_batches(parts: Sequence[range], batch_size: int) -> Iterator[range]:
    """Cuts every part into ranges of `batch_size`, none crossing from one part to the next."""
    for part in parts:
        for first in range(part.start, part.stop, batch_size):
            yield range(first, min(first + batch_size, part.stop))


def one_late(items: Iterable[T]) -> Iterator[T]:
    """Yields each item after the next was asked for: fetching one overlaps computing another.

    An error is raised after the items before it were yielded, so that a shard which they complete
    is written.
    """
    waiting: list[T] = []
    try:
        for item in items:
            yield from waiting
            waiting = [item]
    except Exception:
        yield from waiting
        raise
    yield from waiting
