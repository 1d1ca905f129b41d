"""Decoding with less memory: a few images at a time, or a few tiles of each image.

Both take and give what `Autoencoder.decode` does, and may be put together: the decoder of one may
be the other. The activations of a decoder, not its parameters, are what fills a device.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.sharding import BATCH_AXES

Decode = Callable[[Any, jax.Array], jax.Array]


def decode_in_slices(decode: Decode, params: Any, latents: jax.Array, slice_size: int) -> jax.Array:
    """Decodes about `slice_size` images at a time; the result is that of `decode`.

    The batch may be split over the batch axes of the mesh that is current (`sharding.use_mesh`):
    every slice then takes the same number of images from each device, at least one, so that no
    image travels. Where a device's share is no multiple of its part of a slice, the last slice is
    filled up with zeros.

    Args:
      decode: maps (params, latents `[b, h, w, c]`) to images `[b, H, W, C]`, each by itself.
      params: its parameters.
      latents: `[B, h, w, c]`.
      slice_size: images per slice, over all devices.

    Returns:
      Images `[B, H, W, C]`.

    Raises:
      ValueError: `slice_size` is less than 1.
    """
    if slice_size < 1:
        raise ValueError(f"slice_size: found {slice_size}, expected 1 or more")
    batch = latents.shape[0]
    if batch <= slice_size:
        return decode(params, latents)
    shards = _batch_shards(batch)
    share = batch // shards
    steps = math.ceil(share / max(1, slice_size // shards))
    rows = math.ceil(share / steps)  # of each device in each step
    # Row b of the batch is (shard, row, step): with the step innermost, a split of the batch stays
    # one of shards and rows, and taking one step touches every device alike.
    x = latents.reshape(shards, share, *latents.shape[1:])
    x = jnp.pad(x, [(0, 0), (0, rows * steps - share)] + [(0, 0)] * (latents.ndim - 1))
    x = x.reshape(shards * rows, steps, *latents.shape[1:]).swapaxes(0, 1)
    images = jax.lax.map(lambda part: decode(params, part), x).swapaxes(0, 1)
    images = images.reshape(shards, rows * steps, *images.shape[2:])[:, :share]
    return images.reshape(batch, *images.shape[2:])


def decode_in_tiles(
    decode: Decode, params: Any, latents: jax.Array, tile: int, overlap: int
) -> jax.Array:
    """Decodes square tiles of the latents, one after the other, and blends where they overlap.

    A pixel is the mean of the tiles that cover it, each weighted by a ramp that rises linearly from
    the tile's edge over the overlap. The result is an approximation where a tile does not show a
    pixel all that it depends on: near the edges of tiles for a convolutional decoder (away from
    the overlaps it is exact if the overlap covers the receptive field), and everywhere for
    one with group norm or attention, as the KL family's and taef2's, whose statistics are then
    those of the tile.

    Args:
      decode: maps (params, latents `[B, h, w, c]`) to images `[B, s h, s w, C]` for any h and w.
      params: its parameters.
      latents: `[B, h, w, c]`.
      tile: side of a tile in latent positions; a side of the latents that is shorter stays whole.
      overlap: latent positions that neighbouring tiles share; the last two may share more.

    Returns:
      Images `[B, s h, s w, C]`.

    Raises:
      ValueError: not 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"overlap: found {overlap} with tiles of {tile}, expected at least 0 and less than that"
        )
    height, width = latents.shape[1:3]
    tops, rows = _tile_starts(height, tile, overlap)
    lefts, columns = _tile_starts(width, tile, overlap)
    corners = [(top, left) for top in tops for left in lefts]
    if len(corners) == 1:
        return decode(params, latents)
    parts = jnp.stack([latents[:, y : y + rows, x : x + columns] for y, x in corners])
    images = jax.lax.map(lambda part: decode(params, part), parts)
    scale = images.shape[2] // rows
    ramps = (_ramp(rows * scale, overlap * scale), _ramp(columns * scale, overlap * scale))
    weight = np.outer(*ramps)[..., None].astype(np.float32)
    total = jnp.zeros((images.shape[1], height * scale, width * scale, images.shape[-1]))
    weights = np.zeros((height * scale, width * scale, 1), np.float32)
    for (y, x), image in zip(corners, images, strict=True):
        where = (
            slice(y * scale, (y + rows) * scale),
            slice(x * scale, (x + columns) * scale),
        )
        total = total.at[:, *where].add(image * weight)
        weights[where] += weight
    return total / weights


def _batch_shards(batch: int) -> int:
    """Devices that the batch is split over in the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    return shards if batch % shards == 0 else 1


def _tile_starts(size: int, tile: int, overlap: int) -> tuple[list[int], int]:
    """Where tiles begin, and their length: the last is moved back to end with the latents."""
    tile = min(size, tile)
    starts = range(0, size - tile, max(1, tile - overlap))
    return [*starts, size - tile], tile


def _ramp(size: int, overlap: int) -> np.ndarray:
    """Weights of a tile's pixels along one axis; over a plain overlap, two tiles' add up to 1."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    return np.minimum(distance / max(overlap, 0.5), 1.0)
