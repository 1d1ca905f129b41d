"""The encoder job: images to latents, on all local devices; and latents of others, as they are.

Both functions yield the batches that `files.shards.fill` hands to a `DatasetWriter`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

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
from repulsor_jax.data.writer import Batch
from repulsor_jax.files.shards import in_batches, one_late
from repulsor_jax.files.untrusted import printable


def encode_images(
    todo: Sequence[range],
    source: ImageSource,
    autoencoder: Autoencoder,
    description: Description,
    *,
    batch_per_device: int,
    num_workers: int = 0,
    skip_bad_images: bool = False,
) -> Iterator[Batch]:
    """Yields the encoded images of some shards; worker processes read while the devices encode.

    Args:
      todo: indices of the images of each shard.
      source: the images.
      autoencoder: encodes them.
      description: of the data set.
      batch_per_device: images in one call of the encoder, on each device.
      num_workers: processes that decode and crop; 0 does it in this one.
      skip_bad_images: list a bad image as skipped instead of raising.

    Raises:
      BadImageError: an image cannot be read, and is not to be skipped.
      ValueError: the images are of several sizes or not of one that the autoencoder takes.
    """
    devices = Mesh(np.array(jax.local_devices()), ("batch",))
    batch_size = batch_per_device * devices.size
    sharding = NamedSharding(devices, PartitionSpec("batch"))
    params = jax.device_put(autoencoder.params, NamedSharding(devices, PartitionSpec()))
    encode = compiled_encoder(autoencoder, description)

    def started() -> Iterator[tuple[jax.Array | None, np.ndarray, list[Skipped]]]:
        shape: tuple[int, ...] = ()
        for rows, images, labels in _read_batches(
            source, list(in_batches(todo, batch_size)), description.image_size, num_workers
        ):
            skipped: list[Skipped] = []
            good: list[np.ndarray] = []
            for row, image in zip(rows, images, strict=True):
                if not isinstance(image, BadImageError):
                    shape = shape or image.shape
                    if image.shape != shape:
                        raise ValueError(
                            f"{source[row].name}: found {image.shape}, expected the size of the "
                            f"first image, {shape}: set config.data.image_size, to which all are "
                            "cropped and resized"
                        )
                    good.append(image)
                elif skip_bad_images:
                    tqdm.write(printable(f"skipped {image}"))  # a name may hold control characters
                    name, _, reason = str(image).partition(": ")
                    skipped.append(Skipped(index=row, name=name, reason=reason))
                else:
                    raise BadImageError(
                        f"{image}. Mend or remove it, or set config.data.on_bad_image='skip'; "
                        "the same command goes on from here"
                    )
            latents = None
            if good:
                # One compiled shape: absent images are black, and their latents are dropped.
                batch = np.zeros((batch_size, *shape), np.uint8)
                batch[: len(good)] = good
                latents = encode(params, jax.device_put(batch, sharding))
            kept = [not isinstance(image, BadImageError) for image in images]
            yield latents, labels[kept], skipped

    for latents, labels, skipped in one_late(started()):
        found = np.empty(0) if latents is None else jax.device_get(latents)[: len(labels)]
        yield Batch(found, labels, skipped)


def convert_latents(
    todo: Sequence[range], source: LatentSource, description: Description
) -> Iterator[Batch]:
    """Yields latents that others made, for some shards; a scaled source is scaled back."""
    for rows in in_batches(todo, 256):
        latents = np.stack([source.read(i) for i in rows])
        if source.scaled:
            latents = latents / description.scale + description.shift
        yield Batch(latents, source.labels[rows.start : rows.stop])


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
    source: ImageSource, batches: Sequence[range], image_size: int, num_workers: int
) -> Iterator[tuple[range, Images, np.ndarray]]:
    """Yields rows, images and labels of each batch, read in chunks by worker processes."""
    chunk = 16  # images that a worker process reads at a time
    ahead = 2 * num_workers + 2 * -(-max(map(len, batches)) // chunk)
    chunks = in_batches(batches, chunk)
    read = read_in_order(source, chunks, image_size, num_workers=num_workers, ahead=ahead)
    with contextlib.closing(read):  # type: ignore[type-var]  # ends the worker processes
        for rows in batches:
            parts = list(itertools.islice(read, -(-len(rows) // chunk)))
            images = [image for part, _ in parts for image in part]
            yield rows, images, np.concatenate([labels for _, labels in parts])
