"""Random crops: views of an image that differ in more than their noise. Needs jax alone."""

import jax
import jax.numpy as jnp

Array = jax.Array


def random_crops(key: Array, images: Array, min_crop: float) -> Array:
    """A random square of each image, stretched to its size, mirrored with probability 1/2.

    After SimCLR (arXiv 2002.05709), which draws areas and other forms than squares. Latents are
    cropped as images are, though the mirror image of a latent is no latent of the mirror image.

    Args:
      key: draws the squares.
      images: [B, H, H, C].
      min_crop: the square's side is uniform between this part of H and H.

    Returns:
      [B, H, H, C], bilinear.
    """
    size = images.shape[1]
    side_key, start_key, mirror_key = jax.random.split(key, 3)
    side = jax.random.uniform(side_key, (len(images), 1), minval=min_crop)
    start = jax.random.uniform(start_key, (len(images), 2)) * (1 - side)
    is_mirrored = jax.random.bernoulli(mirror_key, 0.5, (len(images), 1))
    pixels = (jnp.arange(size) + 0.5) / size

    def weights(start: Array, at: Array) -> Array:
        """Bilinear weights of an image's rows for the crop's: [B, size, size]."""
        rows = jnp.clip((start + side * at) * size - 0.5, 0, size - 1)
        return jnp.maximum(0, 1 - jnp.abs(rows[:, :, None] - jnp.arange(size)))

    rows = weights(start[:, :1], pixels)
    columns = weights(start[:, 1:], jnp.where(is_mirrored, 1 - pixels, pixels))
    return jnp.einsum("bij,bkl,bjlc->bikc", rows, columns, images, precision="highest")
