"""Sets of images to compute features of: an .npz or .npy, image files, a TFDS set, latents."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import loky
import numpy as np
from jax.sharding import Mesh

from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.data.latents import LatentDataset
from repulsor_jax.data.pipeline import read_records
from repulsor_jax.data.preprocess import BadImageError, read_images
from repulsor_jax.data.sources import ImageSource
from repulsor_jax.data.workers import read_in_order
from repulsor_jax.evaluation import reference
from repulsor_jax.files.checksums import contents_sha256, file_sha256
from repulsor_jax.files.pictures import to_uint8
from repulsor_jax.files.shards import in_batches

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images by number, read on the host; latents are decoded on the devices."""

    name: str  # for reports
    digest: str  # of the content
    count: int
    shape: tuple[int, ...]  # of one item as read
    dtype: Any
    # Ascending ranges of numbers -> an array of items for each; a range may be empty.
    read: Callable[[Sequence[range]], Iterator[np.ndarray]]
    params: Any = None
    # (params, items [B, *shape]) -> uint8 images [B, H, W, C], under jit.
    decode: Callable[[Any, Array], Array] = lambda params, images: images


def npz_images(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> ImageSet:
    """The images of an .npz as the ADM suite has them, or an .npy; see `reference.open_images`."""
    images = reference.open_images(path, size=size)
    digest, (count, *shape) = file_sha256(images.path)[:16], images.shape
    return ImageSet(images.path.name, digest, count, tuple(shape), np.uint8, images.read)


def source_images(
    source: ImageSource, name: str, shape: tuple[int, ...], note: pathlib.Path, *, crop: bool
) -> ImageSet:
    """The images of a folder, archive or TFDS data set, as `shape`, `[H, W, C]`.

    With `crop` they are centre-cropped and resized as ADM does, and `shape` is a square; else they
    must be of that shape. One channel is for images that are all grey. The digest is that of their
    contents, kept in the file `note`. A bad image is a ValueError that names it.
    """
    height, width, channels = shape
    size = height if crop else 0

    def checked(image: np.ndarray | BadImageError, index: int) -> np.ndarray:
        if isinstance(image, BadImageError):
            raise ValueError(f"{image}. Mend it, or remove it from {name}")
        if image.shape[:2] != (height, width):
            found, expected = list(image.shape[:2]), [height, width]
            raise ValueError(f"{source[index].name}: found {found} pixels, expected {expected}")
        if image.shape[-1] == channels:
            return image
        if not _is_grey(image):
            raise ValueError(
                f"{source[index].name}: found an image in colour, where all others are grey; "
                "config.evaluation.features compares like with like"
            )
        return image[..., :1]

    def read(parts: Sequence[range]) -> Iterator[np.ndarray]:
        workers = loky.cpu_count()  # the cores of this process
        found = read_in_order(source, parts, size, num_workers=workers, ahead=2 * workers)
        for part, (images, _) in zip(parts, found, strict=True):
            each = [checked(image, index) for image, index in zip(images, part, strict=True)]
            yield np.asarray(each, np.uint8).reshape(-1, *shape)

    digest = source.signature()
    if (files := source.files()) and jax.process_index() == 0:  # others need no digest
        digest = hashlib.sha256(
            f"{digest} {contents_sha256(files, note, title=f'read {name}')}".encode()
        ).hexdigest()
    kind = "" if channels == 3 else f" {channels}"
    return ImageSet(name, digest[:16] + kind, len(source), shape, np.uint8, read)


def native_shape(source: ImageSource) -> tuple[int, ...]:
    """Shape `[H, W, C]` of the first image; C is 1 where some, evenly spaced, are all grey."""
    chosen = np.linspace(0, len(source) - 1, min(16, len(source))).astype(int).tolist()
    images, _ = read_images(source, chosen, 0)
    for image in images:
        if isinstance(image, BadImageError):
            raise image
    good = [image for image in images if isinstance(image, np.ndarray)]
    return (*good[0].shape[:2], 1 if all(map(_is_grey, good)) else 3)


def _is_grey(image: np.ndarray) -> bool:
    return bool((image == image[..., :1]).all())


def latent_images(dataset: LatentDataset, autoencoder: Autoencoder) -> ImageSet:
    """The images of a latent data set as its autoencoder gives them back, not mirrored."""
    records = dataset.open()

    def read(parts: Sequence[range]) -> Iterator[np.ndarray]:
        for rows in parts:
            numbers = np.array(rows, np.int64) * dataset.views
            latents = read_records(dataset, records, numbers)["latents"]
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
