"""The training data: a deterministic, endless, resumable stream of host batches."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from repulsor_jax.data.latents import LatentDataset, decode_records


class DamagedDataError(RuntimeError):
    """A record of the data set cannot be read."""


def training_iterator(
    dataset: LatentDataset,
    *,
    global_batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    num_threads: int = 2,
    prefetch: int = 4,
    features: np.ndarray | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Returns this process's share of every global batch, for ever.

    Each epoch is a new permutation of the images, fixed by (seed, epoch), and, where the data set
    holds mirror images or masks, a new choice among each image's records. Batches follow each
    other without a gap, so that one may hold the end of an epoch and the start of the next.

    Row b of global batch s is position `s * global_batch_size + b` of one sequence. So it is the
    same record whatever processes there are and whichever of them reads it; a process reads its
    own rows only; and the state, `{"next_index": batches read}`, resumes a run on any of them.

    Args:
      dataset: the data set.
      global_batch_size: may exceed the data set.
      seed: of the order of records.
      rows: of each global batch, to read, see `sharding.local_row_numbers`; None is all.
      num_threads: threads that read batches ahead; 0 reads in the caller.
      prefetch: batches to read ahead; 0 reads in the caller.
      features: `[num_images, ...]`, row by image (`data.features`), or None.

    Returns:
      A grain iterator of {"latents": `[b, *dataset.shape]` of the data set's dtype, "labels": int32
      `[b]`, "ids": int32 `[b]`} with b rows, and `get_state` / `set_state`; with conditions also
      "condition" `[b, h, w, condition_channels]`, with features "features" `[b, ...]`. An id is the
      number of the image, which its mirror image shares. Where a record turns out to be damaged,
      `next` raises `DamagedDataError`.
    """
    own = np.arange(global_batch_size) if rows is None else rows
    source, order = dataset.open(), _record_order(dataset, seed)

    def read(batch: int) -> dict[str, np.ndarray]:
        return read_records(dataset, source, order(batch * global_batch_size + own), features)

    batches = grain.MapDataset.range(sys.maxsize // global_batch_size)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(batches.map(read).to_iter_dataset(options))


def read_records(
    dataset: LatentDataset,
    source: grain.sources.ArrayRecordDataSource,
    numbers: np.ndarray,
    features: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Reads records by their numbers `[b]`: what `training_iterator` gives, row by row.

    Args:
      dataset: the data set.
      source: `dataset.open()`.
      numbers: of the records; image i is the records from `i * dataset.views` on.
      features: row i is of image i; None is without.

    Raises:
      DamagedDataError: a checksum is wrong.
    """
    # One call into the reader: grain's own shuffle and batch read record by record, at half the
    # speed.
    try:
        records = source.__getitems__(numbers.tolist()) if len(numbers) else []
    except RuntimeError as error:  # which the reader raises where a checksum is wrong
        where = dataset.directory / _damaged_shard(dataset, source, numbers)
        raise DamagedDataError(
            f"{where}: a record is damaged ({error}). Restore the file; "
            "config.data.verify=True says whether it is the only one"
        ) from error
    ids = (numbers // dataset.views).astype(np.int32)
    found = decode_records(records, dataset.record_shape, dataset.dtype) | {"ids": ids}
    if dataset.condition:
        parts = np.split(found["latents"], [dataset.shape[-1]], axis=-1)
        found["latents"], found["condition"] = map(np.ascontiguousarray, parts)
    if features is not None:
        found["features"] = np.asarray(features[ids])
    return found


def _damaged_shard(
    dataset: LatentDataset, source: grain.sources.ArrayRecordDataSource, indices: np.ndarray
) -> str:
    """The file of the first of these records that cannot be read; "" where each now can."""
    ends = np.cumsum([shard.records for shard in dataset.shards])
    for index in indices.tolist():
        try:
            source[index]
        except RuntimeError:
            return dataset.shards[int(np.searchsorted(ends, index, side="right"))].name
    return ""


def batch_records(
    dataset: LatentDataset, global_batch_size: int, seed: int, batch: int
) -> np.ndarray:
    """Numbers of the records in a global batch, `[global_batch_size]`, row by row."""
    first = batch * global_batch_size
    return _record_order(dataset, seed)(np.arange(first, first + global_batch_size))


def _record_order(dataset: LatentDataset, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the map from ascending positions in the endless sequence to numbers of records."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        images = np.random.default_rng((seed, epoch)).permutation(dataset.num_images)
        if dataset.views == 1:
            return images
        views = np.random.default_rng((seed, epoch, 1)).integers(dataset.views, size=len(images))
        return dataset.views * images + views

    def records(positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, dataset.num_images)
        return np.concatenate([order(e)[places[epochs == e]] for e in np.unique(epochs).tolist()])

    return records


def rescale_position(
    state: Mapping[str, Any], old_batch_size: int, new_batch_size: int
) -> tuple[dict[str, Any], int]:
    """Moves an iterator's state to another global batch size: the same place in the sequence.

    Returns the state, and the number of samples that are read again: a position is a whole number
    of batches, so it is rounded down, and no sample is left out.
    """
    batches, repeated = divmod(state["next_index"] * old_batch_size, new_batch_size)
    return {**state, "next_index": batches}, repeated
