"""Decoding a few images at a time: the activations of a decoder are what fills a device."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from repulsor_jax.sharding import BATCH_AXES


def decode_in_slices(
    decode: Callable[[Any, jax.Array], jax.Array], params: Any, latents: jax.Array, slice_size: int
) -> jax.Array:
    """Decodes about `slice_size` images at a time; the result is that of `decode`.

    The batch may be split over the batch axes of the mesh that is current (`sharding.use_mesh`):
    every slice then takes the same number of images from each device, at least one, so that no
    image travels. Zeros fill up the last slice where a device's share is no multiple of its part.

    Args:
      decode: maps (params, latents `[b, h, w, c]`) to images `[b, H, W, C]`, each by itself.
      params: its parameters.
      latents: `[B, h, w, c]`.
      slice_size: images per slice, over all devices.

    Raises:
      ValueError: `slice_size` is less than 1.
    """
    if slice_size < 1:
        raise ValueError(f"slice_size: found {slice_size}, expected 1 or more")
    batch, *size = latents.shape
    if batch <= slice_size:
        return decode(params, latents)
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    shards = shards if batch % shards == 0 else 1
    share = batch // shards
    steps = math.ceil(share / max(1, slice_size // shards))
    rows = math.ceil(share / steps)  # of each device in each step
    # Row b of the batch is (shard, row, step). The step is innermost: otherwise a slice would be
    # the images of a few devices, and they would have to travel to the others.
    x = latents.reshape(shards, share, *size)
    x = jnp.pad(x, [(0, 0), (0, rows * steps - share)] + [(0, 0)] * len(size))
    x = x.reshape(shards * rows, steps, *size).swapaxes(0, 1)
    images = jax.lax.map(lambda part: decode(params, part), x).swapaxes(0, 1)
    images = images.reshape(shards, rows * steps, *images.shape[2:])[:, :share]
    return images.reshape(batch, *images.shape[2:])
