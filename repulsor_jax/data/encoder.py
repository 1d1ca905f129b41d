"""The encoder job: images to latents, on all local devices; and latents of others, as they are.

Both functions yield the batches that `files.shards.fill` hands to a `DatasetWriter`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.data import conditioning
from repulsor_jax.data.converted import LatentSource
from repulsor_jax.data.latents import Description, Skipped
from repulsor_jax.data.preprocess import BadImageError
from repulsor_jax.data.sources import ImageSource
from repulsor_jax.data.workers import Images, read_in_order
from repulsor_jax.data.writer import Batch
from repulsor_jax.files.shards import in_batches, one_late
from repulsor_jax.files.untrusted import printable

UNLABELLED = 255  # in a label map: of no class


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
            numbers: list[int] = []  # of the good images
            for row, image in zip(rows, images, strict=True):
                if not isinstance(image, BadImageError):
                    shape = shape or image.shape
                    if image.shape != shape:
                        raise ValueError(
                            f"{source[row].name}: found {image.shape}, expected the size of the "
                            f"first image, {shape}: set config.data.image_size, to which all are "
                            "cropped and resized"
                        )
                    if description.condition == "semantic":
                        _check_classes(image[..., -1], source[row].name, description)
                    good.append(image)
                    numbers.append(row)
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
                drawn = None
                if description.condition == "inpaint":  # a mask belongs to an image's number
                    padded = np.resize(np.array(numbers, np.int32), batch_size)
                    drawn = jax.device_put(padded, sharding)
                latents = encode(params, jax.device_put(batch, sharding), drawn)
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


def _check_classes(label_map: np.ndarray, name: str, about: Description) -> None:
    classes = about.condition_channels
    wrong = label_map[(label_map >= classes) & (label_map != UNLABELLED)]
    if wrong.size:
        raise ValueError(
            f"map of {name}: found the class {wrong[0]}, expected 0 to {classes - 1}, or "
            f"{UNLABELLED} for none: is config.conditioning.classes={classes} right?"
        )


def compiled_encoder(autoencoder: Autoencoder, about: Description) -> Callable[..., jax.Array]:
    """Returns a function of (params, uint8 `[B, H, W, C]`, None) to `[B, views, h, w, c]`.

    With conditions for inpainting the third argument are the images' numbers, int32 `[B]`, from
    which their masks are drawn; label maps are the last channel of the images. The condition
    follows the latents on the last axis.
    """

    def shown(
        params: object, image: jax.Array, label_map: jax.Array, numbers: Any, view: int
    ) -> Any:
        """The records of a view, `[B, masks, h, w, c]`."""
        latents = autoencoder.encode(params, image)
        cells = latents.shape[1]
        if about.condition == "inpaint":
            if image.shape[1] != image.shape[2]:
                raise ValueError(f"found images of {image.shape[1:3]} pixels, expected squares")

            def masked(number: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.key(0), number)
                mask = conditioning.random_masks(key, numbers, image.shape[1])
                hidden = autoencoder.encode(params, conditioning.hide(image, mask))
                corners = conditioning.mask_at_corners(mask, cells)
                return conditioning.inpaint_channels(hidden, corners)

            condition = jax.lax.map(masked, view * about.masks + jnp.arange(about.masks))
            condition = condition.swapaxes(0, 1)
        elif about.condition == "semantic":
            classes = about.condition_channels
            condition = conditioning.class_histogram(label_map, classes, cells)[:, None]
        else:
            return latents[:, None]
        latents = jnp.broadcast_to(latents[:, None], (*condition.shape[:-1], latents.shape[-1]))
        return jnp.concatenate([latents, condition], axis=-1)

    @jax.jit
    def encode(params: object, images: jax.Array, numbers: jax.Array | None = None) -> jax.Array:
        label_map = images[..., -1]
        if about.condition == "semantic":
            images = images[..., :-1]
        images = images.astype(jnp.float32) / 127.5 - 1.0
        views = [(images, label_map), (images[:, :, ::-1], label_map[:, :, ::-1])]
        records = [
            shown(params, *view, numbers, k)
            for k, view in enumerate(views[: 2 if about.flipped else 1])
        ]
        return jnp.concatenate(records, axis=1).astype(about.dtype)  # half the bytes to fetch

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
