"""The training data: a deterministic, endless, resumable stream of host batches."""

import functools
import sys

import grain
import numpy as np

from repulsor_jax.data.latent_dataset import LatentDataset, decode_records


class DamagedDataError(RuntimeError):
    """A record of the data set cannot be read."""


def training_iterator(
    dataset: LatentDataset,
    *,
    global_batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Returns this process's share of every global batch, for ever.

    Each epoch is a new permutation of the images, fixed by (seed, epoch), and, where the data set
    holds mirror images, a new choice between each image and its mirror image. Batches follow each
    other without a gap, so that one may hold the end of an epoch and the start of the next.

    Batch s of process r is batch `s * process_count + r` of b rows of one global sequence. So the
    global batch, the processes' batches concatenated in process order, is the same row by row for
    any process count; a process reads its own records only; and the state,
    `{"next_index": steps taken}`, resumes a run on any process count.

    Args:
      dataset: the data set.
      global_batch_size: rows of a global batch; it may exceed the data set.
      seed: of the order of records; 0 or more.
      process_index: this process, in [0, process_count).
      process_count: number of processes; must divide the global batch size.
      num_threads: threads that read batches ahead; 0 reads in the caller.
      prefetch: batches to read ahead; 0 reads in the caller.

    Returns:
      A grain iterator of {"latents": `[b, *dataset.shape]` of the data set's dtype, "labels": int32
      `[b]`} with b = global_batch_size / process_count, and `get_state` / `set_state`. Where a
      record turns out to be damaged, `next` raises `DamagedDataError`.

    Raises:
      ValueError: an argument is out of range.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"found process_index {process_index} of {process_count}, expected 0 <= index < count"
        )
    if global_batch_size < 1 or global_batch_size % process_count:
        raise ValueError(
            f"found a global batch size of {global_batch_size} over {process_count} processes, "
            "expected a positive multiple of the process count"
        )
    if seed < 0:
        raise ValueError(f"data seed: found {seed}, expected 0 or more")
    source = dataset.open()
    batch_size = global_batch_size // process_count

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        images = np.random.default_rng((seed, epoch)).permutation(dataset.num_images)
        if not dataset.flipped:
            return images
        flips = np.random.default_rng((seed, epoch, 1)).integers(2, size=len(images))
        return 2 * images + flips

    def read(batch: int) -> dict[str, np.ndarray]:
        # One call into the reader per batch: grain's own shuffle and batch go record by record,
        # at half the speed.
        positions = np.arange(batch * batch_size, (batch + 1) * batch_size)
        epochs, rows = np.divmod(positions, dataset.num_images)
        indices = np.concatenate([order(e)[rows[epochs == e]] for e in np.unique(epochs).tolist()])
        try:
            records = source.__getitems__(indices.tolist())
        except RuntimeError as error:  # how the reader says that a checksum is wrong
            raise DamagedDataError(
                f"{dataset.directory}: a record is damaged ({error}). Run with "
                "config.data.verify=True to learn in which file, and restore it"
            ) from error
        return decode_records(records, dataset.shape, dataset.dtype)

    batches = grain.MapDataset.range(sys.maxsize // batch_size)[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(batches.map(read).to_iter_dataset(options))
