"""The encoder job: images to latents, on all local devices, shard by shard."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.data.converted import LatentSource
from repulsor_jax.data.latents import Description, Skipped
from repulsor_jax.data.preprocess import BadImageError
from repulsor_jax.data.sources import ImageSource
from repulsor_jax.data.workers import Images, read_in_order
from repulsor_jax.data.writer import Batch, DatasetWriter
from repulsor_jax.files.untrusted import printable

_CHUNK = 16  # images that a worker process reads at a time
_LATENTS_AT_ONCE = 256


def encode_images(
    writer: DatasetWriter,
    source: ImageSource,
    autoencoder: Autoencoder,
    *,
    batch_per_device: int,
    num_workers: int = 0,
    skip_bad_images: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = False,
) -> None:
    """Encodes and writes the shards of this process that are missing.

    Processes share nothing: each encodes every `process_count`-th shard on its own devices. While
    the devices encode one batch, worker processes read the next ones.

    Args:
      writer: from `open_writer`, with `len(source)` images.
      source: the images.
      autoencoder: encodes them.
      batch_per_device: images in one call of the encoder, on each device.
      num_workers: processes that decode and crop; 0 does it in this one.
      skip_bad_images: report an image that cannot be read, note it in the data set and go on,
        instead of raising.
      process_index: this process.
      process_count: number of processes.
      progress: show a progress bar with the time left.

    Raises:
      BadImageError: an image cannot be read, and is not to be skipped.
      ValueError: the images are of several sizes or not of one that the autoencoder takes, or see
        `DatasetWriter.write`.
    """
    if batch_per_device < 1:
        raise ValueError(f"encoding batch: found {batch_per_device} images, expected 1 or more")
    missing = writer.missing(process_index, process_count)
    if not missing:
        return
    devices = Mesh(np.array(jax.local_devices()), ("batch",))
    batch_size = batch_per_device * devices.size
    sharding = NamedSharding(devices, PartitionSpec("batch"))
    params = jax.device_put(autoencoder.params, NamedSharding(devices, PartitionSpec()))
    encode = compiled_encoder(autoencoder, writer.description)

    def batch_rows() -> Iterator[range]:
        # No batch crosses a shard: a shard's bytes do not depend on which others were missing.
        for shard in missing:
            rows = writer.rows(shard)
            yield from (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))

    def encoded() -> Iterator[Batch]:
        shape: tuple[int, ...] = ()
        running: collections.deque[tuple[jax.Array | None, list[int], np.ndarray, list[Skipped]]]
        running = collections.deque()
        read = _read_batches(source, batch_rows, writer, num_workers, batch_size)
        failure: BadImageError | None = None
        for rows, images, labels in read:
            bad = {k: image for k, image in enumerate(images) if isinstance(image, BadImageError)}
            if bad and not skip_bad_images:
                failure = next(iter(bad.values()))
                break
            skipped = [_skip(rows[k], error) for k, error in bad.items()]
            kept = [k for k in range(len(images)) if k not in bad]
            latents = None
            if kept:
                shape = shape or images[kept[0]].shape  # type: ignore[union-attr]
                # One compiled shape: what is not there is black, and its latents are dropped.
                batch = np.zeros((batch_size, *shape), np.uint8)
                for k in kept:
                    batch[k] = _of_shape(images[k], shape, source, rows[k])
                latents = encode(params, jax.device_put(batch, sharding))
            running.append((latents, kept, labels, skipped))
            if len(running) > 1:
                yield _fetch(*running.popleft())
        while running:  # after a failure too: a shard that is complete is kept
            yield _fetch(*running.popleft())
        if failure is not None:
            raise BadImageError(
                f"{failure}. Mend or remove it, or set config.data.on_bad_image='skip'; the same "
                "command goes on from here"
            )

    title = f"encode {writer.description.source} {writer.description.split}".rstrip()
    _write(writer, missing, encoded(), batch_size, process_index, process_count, title, progress)


def convert_latents(
    writer: DatasetWriter,
    source: LatentSource,
    *,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = False,
) -> None:
    """Writes the missing shards of this process from latents that others made.

    The arguments are those of `encode_images`. Latents that were stored shifted and scaled, as
    `source.scaled` says, are brought back by the description's shift and scale.

    Raises:
      ValueError: a file is damaged or of another shape, or see `DatasetWriter.write`.
    """
    missing = writer.missing(process_index, process_count)
    about = writer.description

    def batches() -> Iterator[Batch]:
        for shard in missing:
            rows = writer.rows(shard)
            for start in range(0, len(rows), _LATENTS_AT_ONCE):
                items = [source[i] for i in rows[start : start + _LATENTS_AT_ONCE]]
                shapes = {item.latents.shape: item.name for item in items}
                if len(shapes) > 1:
                    raise ValueError(f"found latents of several shapes, with examples: {shapes}")
                latents = np.stack([item.latents for item in items])
                if source.scaled:
                    latents = latents / about.scale + about.shift
                yield Batch(latents, np.array([item.label for item in items]))

    title = f"convert {about.source} {about.split}".rstrip()
    _write(
        writer,
        missing,
        batches(),
        _LATENTS_AT_ONCE,
        process_index,
        process_count,
        title,
        progress,
    )


def compiled_encoder(autoencoder: Autoencoder, about: Description) -> Callable[..., jax.Array]:
    """Returns a function of (params, uint8 `[B, H, W, C]`) to `[B, views, h, w, c]`."""

    @jax.jit
    def encode(params: object, images: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32) / 127.5 - 1.0
        views = [images, images[:, :, ::-1]][: about.views]
        latents = jnp.stack([autoencoder.encode(params, view) for view in views], axis=1)
        return latents.astype(about.dtype)  # half the bytes to fetch

    return encode


def _read_batches(
    source: ImageSource,
    batch_rows: Callable[[], Iterator[range]],
    writer: DatasetWriter,
    num_workers: int,
    batch_size: int,
) -> Iterator[tuple[range, Images, np.ndarray]]:
    """Yields rows, images and labels of each batch, read in chunks by worker processes."""

    def chunks() -> Iterator[Sequence[int]]:
        for rows in batch_rows():
            yield from (rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK))

    chunks_per_batch = -(-batch_size // _CHUNK)
    read = read_in_order(
        source,
        chunks(),
        writer.description.image_size,
        num_workers=num_workers,
        ahead=2 * num_workers + 2 * chunks_per_batch,
    )
    for rows in batch_rows():
        parts = list(itertools.islice(read, -(-len(rows) // _CHUNK)))
        images = [image for part, _ in parts for image in part]
        yield rows, images, np.concatenate([labels for _, labels in parts])
    read.close()  # type: ignore[attr-defined]


def _write(
    writer: DatasetWriter,
    missing: Sequence[int],
    batches: Iterator[Batch],
    batch_size: int,
    process_index: int,
    process_count: int,
    title: str,
    progress: bool,
) -> None:
    """Deals the batches out to the missing shards, in order, under one progress bar."""
    mine = range(process_index, writer.num_shards, process_count)
    total = sum(len(writer.rows(k)) for k in mine)
    left = sum(len(writer.rows(k)) for k in missing)
    with tqdm(
        total=total, initial=total - left, desc=title, unit="img", disable=not progress
    ) as bar:

        def counted(some: Iterable[Batch]) -> Iterator[Batch]:
            for batch in some:
                yield batch
                bar.update(len(batch.labels) + len(batch.skipped))

        try:
            for shard in missing:
                count = -(-len(writer.rows(shard)) // batch_size)
                writer.write(shard, counted(itertools.islice(batches, count)))
        finally:
            batches.close()  # type: ignore[attr-defined]  # ends the worker processes


def _fetch(
    latents: jax.Array | None, kept: list[int], labels: np.ndarray, skipped: list[Skipped]
) -> Batch:
    if latents is None:
        return Batch(np.empty(0), np.empty(0, np.int32), skipped)
    return Batch(jax.device_get(latents)[kept], labels[kept], skipped)


def _skip(index: int, error: BadImageError) -> Skipped:
    tqdm.write(printable(f"skipped {error}"))  # a name may hold what a console refuses, or obeys
    name, _, reason = str(error).partition(": ")
    return Skipped(index, name, reason)


def _of_shape(
    image: np.ndarray | BadImageError, shape: tuple[int, ...], source: ImageSource, row: int
) -> np.ndarray:
    assert isinstance(image, np.ndarray)
    if image.shape != shape:
        raise ValueError(
            f"{source[row].name}: found {image.shape}, expected the size of the first image, "
            f"{shape}: set config.data.image_size, to which all are cropped and resized"
        )
    return image
