"""Encodes an image source into a latent data set."""

import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.data.latent_dataset import LatentDataset, write_latent_dataset
from repulsor_jax.data.sources import ImageSource


def encode_dataset(
    source: ImageSource,
    autoencoder: Autoencoder,
    directory: str | os.PathLike[str],
    *,
    source_name: str,
    split: str,
    batch_size: int,
    dtype: str = "float16",
    num_shards: int = 1,
    progress: bool = True,
) -> LatentDataset:
    """Encodes every image, in order, and writes the data set.

    Args:
      source: the images, all of one size.
      autoencoder: encodes them.
      directory: where to write, see `write_latent_dataset`.
      source_name: name of the source; recorded.
      split: split of the source; recorded.
      batch_size: images per encoder call.
      dtype: "float16" or "float32", of the stored latents.
      num_shards: number of files.
      progress: show a progress bar with the time left.

    Returns:
      The data set.

    Raises:
      FileExistsError: `directory` already holds files.
      ValueError: an image is not uint8 `[H, W, C]` of the first image's size, or see
        `write_latent_dataset`.
    """
    if batch_size < 1:
        raise ValueError(f"encoding batch size: found {batch_size}, expected 1 or more")

    @jax.jit
    def encode(images: jax.Array) -> jax.Array:
        return autoencoder.encode(images.astype(jnp.float32) / 127.5 - 1.0)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        shape = source[0][0].shape
        title = f"encode {source_name} {split}"
        with tqdm(total=len(source), desc=title, unit="img", disable=not progress) as bar:
            for start in range(0, len(source), batch_size):
                rows = range(start, min(start + batch_size, len(source)))
                images, labels = _read(source, rows, shape)
                # One compiled shape: the last batch is padded, and its latents cut.
                padding = [(0, batch_size - len(rows)), (0, 0), (0, 0), (0, 0)]
                latents = jax.device_get(encode(jax.device_put(np.pad(images, padding))))
                yield latents[: len(rows)], labels
                bar.update(len(rows))

    return write_latent_dataset(
        directory,
        batches(),
        num_records=len(source),
        stochastic=autoencoder.stochastic,
        autoencoder=autoencoder.name,
        scale=autoencoder.scale,
        source=source_name,
        split=split,
        class_names=source.class_names,
        dtype=dtype,
        num_shards=num_shards,
    )


def _read(
    source: ImageSource, rows: range, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 `[B, H, W, C]` and labels `[B]`, checked against image 0's shape."""
    items = [source[i] for i in rows]
    for i, (image, _) in zip(rows, items, strict=True):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape != shape:
            raise ValueError(
                f"image {i}: found {image.dtype} {image.shape}, expected uint8 [H, W, C] of the "
                f"size of image 0, {shape}: resize the images to one size first"
            )
    return np.stack([image for image, _ in items]), np.array([label for _, label in items])
