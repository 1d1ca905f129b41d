"""Named arrays of many items, made in pieces on disk by a job that may be stopped at any moment.

A shard is one .npz of consecutive items, written atomically; what is there need not be made again.
Reading it checks the CRC that zip keeps of every array. Batches never cross a shard, so its bytes
do not depend on which other shards were missing.
"""

import collections
import contextlib
import dataclasses
import math
import pathlib
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.files import atomic, checksums

T = TypeVar("T")
Arrays = dict[str, np.ndarray]

# What zipfile raises on a damaged file; the last two of flags and methods that it does not know.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Where the arrays of `count` items are kept, `per_shard` items in each file but the last."""

    folder: pathlib.Path
    count: int
    per_shard: int

    def __len__(self) -> int:
        return math.ceil(self.count / self.per_shard)

    def rows(self, shard: int) -> range:
        """The items of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

    def missing(self) -> list[int]:
        """The shards that are not there; one that is damaged counts as such, and is removed."""
        found = []
        for shard in range(len(self)):
            path = self._path(shard)
            if path.is_file() and not _is_whole(path):
                path.unlink()
            if not path.is_file():
                found.append(shard)
        return found

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a shard; it is there when this returns, and not before.

        Raises:
          ValueError: an array does not hold the items of this shard.
        """
        for name, array in arrays.items():
            if len(array) != len(self.rows(shard)):
                raise ValueError(
                    f"{self._path(shard)}: {name}: found {len(array)} items, expected "
                    f"{len(self.rows(shard))}"
                )
        atomic.remove_stale(self._path(shard))
        with atomic.replacing(self._path(shard)) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **dict(arrays))

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Yields one array, shard by shard, in order.

        Raises:
          ValueError: a shard is damaged; names it.
        """
        for shard in range(len(self)):
            path = self._path(shard)
            try:
                with np.load(path, allow_pickle=False) as archive:
                    array = archive[name]
            except (*_DAMAGED, ValueError, KeyError, MemoryError) as error:
                raise ValueError(
                    f"{path}: damaged ({error}): delete it, and the same command makes it anew"
                ) from error
            yield array

    def names(self) -> list[str]:
        """Names of the arrays, as the first shard has them."""
        with zipfile.ZipFile(self._path(0)) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]

    def remove(self) -> None:
        """Deletes the folder with all shards."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: int) -> pathlib.Path:
        rows = self.rows(shard)  # in the name, so that shards of another size are not taken for it
        return self.folder / f"{rows.start:08d}-{rows.stop:08d}.npz"


def whole_batches(per_shard: int, batch_size: int) -> int:
    """The multiple of `batch_size` nearest to `per_shard`, and at least one."""
    return batch_size * max(1, round(per_shard / batch_size))


def digest(description: Any) -> str:
    """A name for what plain values describe: 12 hexadecimal digits of their SHA-256."""
    return checksums.values_sha256(description)[:12]


def fill(
    shards: Shards,
    produce: Callable[[Sequence[range]], Iterator[Arrays]],
    *,
    title: str,
    unit: str = "img",
    progress: bool = True,
) -> int:
    """Makes the missing shards, under a progress bar; every process of the job takes part.

    The first process keeps the files, and says what is missing; the others need not see them.

    Args:
      shards: what to fill.
      produce: called once with the items of each missing shard; yields arrays of consecutive
        items, of one shard at a time, in their order. Where it runs on several processes, what it
        yields matters on the first.
      title: of the bar.
      unit: of the bar.
      progress: whether to show it.

    Returns:
      The number of items made.
    """
    is_main = jax.process_index() == 0
    mask = np.zeros(len(shards), np.int32)
    if is_main:
        mask[shards.missing()] = 1
    missing = np.flatnonzero(sharding.agree(mask)).tolist()
    if not missing:
        return 0
    todo = [shards.rows(shard) for shard in missing]
    left = sum(map(len, todo))
    stream = produce(todo)
    with (
        contextlib.closing(stream),  # type: ignore[type-var]
        tqdm(
            total=shards.count,
            initial=shards.count - left,
            desc=title,
            unit=unit,
            disable=not (progress and is_main),
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file takes fewer lines
        ) as bar,
    ):
        for shard, rows in zip(missing, todo, strict=True):
            parts: list[Arrays] = []
            while sum(len(next(iter(part.values()))) for part in parts) < len(rows):
                parts.append(next(stream))
                bar.update(len(next(iter(parts[-1].values()))))
            if is_main:
                names = parts[0]
                shards.write(shard, {n: np.concatenate([part[n] for part in parts]) for n in names})
    return left


def in_batches(parts: Sequence[range], batch_size: int) -> Iterator[range]:
    """Cuts every part into ranges of `batch_size`, none crossing from one part to the next."""
    for part in parts:
        for first in range(part.start, part.stop, batch_size):
            yield range(first, min(first + batch_size, part.stop))


def one_late(items: Iterable[T]) -> Iterator[T]:
    """Yields each item after the next was asked for: fetching one overlaps computing another."""
    waiting: collections.deque[T] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _is_whole(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except _DAMAGED:
        return False
