"""Fréchet distance between Gaussians fitted to raw pixels. It is not FID: no Inception features.

Meant for images so small that pixels are a feature space of their own, such as 8x8 digits.
"""

import jax
import numpy as np

from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.config import ConfigError
from repulsor_jax.data.latent_dataset import LatentDataset, decode_records
from repulsor_jax.evaluation.frechet import (
    GaussianStatistics,
    frechet_distance,
    gaussian_statistics,
)
from repulsor_jax.images import to_uint8

METRIC = "frechet_pixels"
MAX_PIXELS = 4096  # the covariance is pixels x pixels


def pixel_statistics(images: np.ndarray) -> GaussianStatistics:
    """Mean and covariance of images uint8 `[N, H, W, C]`, as vectors of values in [-1, 1]."""
    return gaussian_statistics(images.reshape(len(images), -1) / 127.5 - 1.0)


def held_out_statistics(dataset: LatentDataset, autoencoder: Autoencoder) -> GaussianStatistics:
    """Pixel statistics of a whole (small) data set, decoded.

    Raises:
      ConfigError: images of more than `MAX_PIXELS` values.
    """
    one = jax.ShapeDtypeStruct((1, *dataset.latent_shape), np.float32)
    size = jax.eval_shape(autoencoder.decode, autoencoder.params, one).size
    if size > MAX_PIXELS:
        raise ConfigError(
            f"config.evaluation.every_steps asks for a Fréchet distance in pixel space, which is "
            f"for images of at most {MAX_PIXELS} values; these have {size}: set it to 0"
        )
    records = dataset.open().__getitems__(list(range(0, dataset.num_records, dataset.views)))
    latents = decode_records(records, dataset.shape, dataset.dtype)["latents"]
    latents = latents[..., : dataset.latent_shape[-1]].astype(np.float32)  # the posterior's mean
    images = np.asarray(to_uint8(jax.jit(autoencoder.decode)(autoencoder.params, latents)))
    return pixel_statistics(images)


def pixel_frechet_distance(images: np.ndarray, reference: GaussianStatistics) -> float:
    """Fréchet distance of images uint8 `[N, H, W, C]` to reference pixel statistics."""
    return frechet_distance(pixel_statistics(images), reference)
