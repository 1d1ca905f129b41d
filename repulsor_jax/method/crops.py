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
    is_mirrored = jax.random.bernoulli(mirror_key, 0.5, (len(images), 1, 1, 1))

    def crop(image: Array, side: Array, start: Array) -> Array:
        scale, translation = jnp.broadcast_to(1 / side, (2,)), -size * start / side
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, translation, "linear", antialias=False
        )

    crops = jax.vmap(crop)(images, side, start)
    return jnp.where(is_mirrored, crops[:, :, ::-1], crops)
