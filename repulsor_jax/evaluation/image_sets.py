"""Sets of images to compute features of: an .npz, files of images, a TFDS data set, latents."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.data.latents import LatentDataset, decode_records
from repulsor_jax.data.preprocess import BadImageError
from repulsor_jax.data.sources import ImageSource
from repulsor_jax.data.workers import read_in_order
from repulsor_jax.evaluation import reference
from repulsor_jax.files.checksums import file_sha256
from repulsor_jax.files.pictures import to_uint8
from repulsor_jax.files.shards import in_batches

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images by number, read on the host; latents are decoded on the devices."""

    name: str  # for reports
    digest: str  # of the content, or of the names and sizes of its files
    count: int
    shape: tuple[int, ...]  # of one item as read
    dtype: Any
    # Ascending ranges of numbers -> an array of items for each; a range may be empty.
    read: Callable[[Sequence[range]], Iterator[np.ndarray]]
    params: Any = None
    # (params, items [B, *shape]) -> uint8 images [B, H, W, C], under jit.
    decode: Callable[[Any, Array], Array] = lambda params, images: images


def npz_images(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> ImageSet:
    """The images of an .npz in the ADM suite's layout; see `reference.open_images` for errors."""
    images = reference.open_images(path, size=size)
    digest, (count, *shape) = file_sha256(images.path)[:16], images.shape
    return ImageSet(images.path.name, digest, count, tuple(shape), np.uint8, images.read)


def source_images(source: ImageSource, name: str, size: int) -> ImageSet:
    """The images of a folder, archive or TFDS data set, centre-cropped and resized as ADM does.

    A bad image is a ValueError that names it.
    """

    def read(parts: Sequence[range]) -> Iterator[np.ndarray]:
        workers = os.cpu_count() or 1
        for images, _ in read_in_order(source, parts, size, num_workers=workers, ahead=2 * workers):
            for image in images:
                if isinstance(image, BadImageError):
                    raise ValueError(f"{image}. Mend it, or remove it from {name}")
            yield np.asarray(images, np.uint8).reshape(-1, size, size, 3)

    digest = source.signature()[:16]
    return ImageSet(name, digest, len(source), (size, size, 3), np.uint8, read)


def latent_images(dataset: LatentDataset, autoencoder: Autoencoder) -> ImageSet:
    """The images of a latent data set as its autoencoder gives them back, not mirrored."""
    records = dataset.open()

    def read(parts: Sequence[range]) -> Iterator[np.ndarray]:
        for rows in parts:
            found = records.__getitems__([row * dataset.views for row in rows]) if rows else []
            latents = decode_records(found, dataset.shape, dataset.dtype)["latents"]
            yield latents[..., : dataset.latent_shape[-1]].astype(np.float32)  # posterior's mean

    parts = [autoencoder.identity, *(shard.sha256 for shard in dataset.shards)]
    digest = hashlib.sha256(" ".join(parts).encode())
    return ImageSet(
        name=f"{dataset.directory.name} (decoded)",
        digest=digest.hexdigest()[:16],
        count=dataset.num_images,
        shape=dataset.latent_shape,
        dtype=np.float32,
        read=read,
        params=autoencoder.params,
        decode=lambda params, latents: jnp.asarray(to_uint8(autoencoder.decode(params, latents))),
    )


def device_batches(
    images: ImageSet, parts: Sequence[range], batch_size: int, mesh: Mesh
) -> Iterator[tuple[range, Array]]:
    """Reads the items of each part in batches, every process its rows, and puts them on the mesh.

    Yields the numbers of a batch, and the items `[batch_size, *shape]` sharded on their rows, of
    which the first `len(numbers)` count.
    """
    numbers = list(in_batches(parts, batch_size))
    runs = sharding.local_rows(mesh, batch_size)
    pieces = images.read([batch[run.start : run.stop] for batch in numbers for run in runs])
    for batch in numbers:
        own = np.zeros((sum(map(len, runs)), *images.shape), images.dtype)
        start = 0
        for run in runs:
            items = next(pieces)
            own[start : start + len(items)] = items
            start += len(run)
        yield batch, sharding.to_global(own, mesh)
