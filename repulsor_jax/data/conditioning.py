"""Tasks by channels: what a network is shown of an image beside the noisy latent.

Latent flow matching (Dao et al., arXiv 2307.08698) fills holes and draws images from label maps by
further input channels. A mask is True in the hole. Everything is by row, and random draws depend on
their key alone.
"""

import jax
import jax.numpy as jnp

from repulsor_jax.data.latents import LatentFormat, normalize, sample_posterior

Array = jax.Array

# LaMa's generator (arXiv 2109.07161) for 256 pixels, whose ranges MAT and LFM took over.
_SIDE = 256
_MOST_STROKES, _MOST_SEGMENTS, _MOST_BOXES = 11, 5, 3
_LENGTH, _WIDTH, _BOX, _MARGIN = (10, 70), (5, 25), (30, 100), 10


def random_mask(key: Array, size: int) -> Array:
    """A random hole: with equal chances 0 to 11 strokes, or 0 to 3 boxes; it may be empty.

    At 256 pixels a stroke is a chain of 1 to 5 segments, 10 to 70 long and 5 to 25 wide, each in a
    random direction; a box has sides of 30 to 100 and stays 10 away from the border. Other sizes
    scale all lengths. A pixel is in the hole where its centre is.

    Args:
      key: of this mask alone.
      size: height and width.

    Returns:
      [size, size] bool, True in the hole.
    """
    scale = size / _SIDE
    kind_key, count_key, stroke_key, box_key = jax.random.split(key, 4)
    has_strokes = jax.random.bernoulli(kind_key)
    stroke_count, box_count = (
        jax.random.randint(each, (), 0, most + 1)
        for each, most in zip(
            jax.random.split(count_key), (_MOST_STROKES, _MOST_BOXES), strict=True
        )
    )
    strokes = _strokes(stroke_key, jnp.where(has_strokes, stroke_count, 0), size, scale)
    return strokes | _boxes(box_key, jnp.where(has_strokes, 0, box_count), size, scale)


def _strokes(key: Array, count: Array, size: int, scale: float) -> Array:
    """The pixels of the first `count` of 11 strokes, [size, size] bool."""
    keys = jax.random.split(key, 5)
    shape = _MOST_STROKES, _MOST_SEGMENTS
    start = jax.random.uniform(keys[0], (_MOST_STROKES, 2), maxval=size)
    angle = jax.random.uniform(keys[1], shape, maxval=2 * jnp.pi)
    length = scale * jax.random.uniform(keys[2], shape, minval=_LENGTH[0], maxval=_LENGTH[1])
    width = scale * jax.random.uniform(keys[3], shape, minval=_WIDTH[0], maxval=_WIDTH[1])
    segments = jax.random.randint(keys[4], (_MOST_STROKES, 1), 1, _MOST_SEGMENTS + 1)
    is_drawn = jnp.arange(_MOST_SEGMENTS) < segments
    is_drawn &= jnp.arange(_MOST_STROKES)[:, None] < count
    steps = length[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    points = [start]
    for k in range(_MOST_SEGMENTS):
        points.append(jnp.clip(points[-1] + steps[:, k], 0, size))
    chain = jnp.stack(points, axis=1)  # [strokes, segments + 1, 2]
    centres = jnp.stack(jnp.mgrid[:size, :size], axis=-1) + 0.5
    # A drawn line covers one pixel at least, however thin it is.
    radius = jnp.maximum(width / 2, 0.5)

    def draw(hole: Array, segment: tuple[Array, ...]) -> tuple[Array, None]:
        a, b, reach, counts = segment
        along = b - a
        share = ((centres - a) @ along) / jnp.maximum(along @ along, 1e-6)
        away = centres - a - jnp.clip(share, 0, 1)[..., None] * along
        return hole | (counts & (jnp.square(away).sum(-1) <= jnp.square(reach))), None

    flat = (chain[:, :-1].reshape(-1, 2), chain[:, 1:].reshape(-1, 2))
    segments_of = (*flat, radius.ravel(), is_drawn.ravel())
    # One after the other: all distances at once would be 55 images.
    return jax.lax.scan(draw, jnp.zeros((size, size), bool), segments_of)[0]


def _boxes(key: Array, count: Array, size: int, scale: float) -> Array:
    """The pixels of the first `count` of 3 boxes, [size, size] bool."""
    side_key, place_key = jax.random.split(key)
    shape, margin = (_MOST_BOXES, 2), scale * _MARGIN
    side = scale * jax.random.uniform(side_key, shape, minval=_BOX[0], maxval=_BOX[1])
    start = margin + jax.random.uniform(place_key, shape) * (size - 2 * margin - side)
    centres = jnp.arange(size) + 0.5
    inside = (centres >= start[..., None]) & (centres < (start + side)[..., None])
    boxes = inside[:, 0, :, None] & inside[:, 1, None, :]
    return (boxes & (jnp.arange(_MOST_BOXES) < count)[:, None, None]).any(axis=0)


def random_masks(key: Array, numbers: Array, size: int) -> Array:
    """Masks [B, size, size], of which row b depends on the key and `numbers[b]` alone."""
    return jax.vmap(lambda number: random_mask(jax.random.fold_in(key, number), size))(numbers)


def cells_with_hole(mask: Array, cells: int) -> Array:
    """A mask [B, H, W] at the latents' size, [B, cells, cells]: a cell with any hole is one."""
    return _blocks(mask, cells).any(axis=(2, 4))


def mask_at_corners(mask: Array, cells: int) -> Array:
    """A mask [B, H, W] at the latents' size by its nearest pixel, as LFM: the upper left one."""
    return _blocks(mask, cells)[:, :, 0, :, 0]


def inpaint_channels(masked_latents: Array, mask: Array) -> Array:
    """The condition [B, h, w, C + 1]: what is known, and the mask [B, h, w] as 1 (hole) or -1."""
    sign = 2.0 * mask[..., None].astype(masked_latents.dtype) - 1.0
    return jnp.concatenate([masked_latents, sign], axis=-1)


def hide(images: Array, mask: Array) -> Array:
    """Images [B, H, W, C] in [-1, 1] with a black hole, by the mask [B, H, W]."""
    return jnp.where(mask[..., None], -1.0, images)


def composite(mask: Array, generated: Array, original: Array) -> Array:
    """What is generated in the hole, and the original elsewhere to the bit: [B, H, W, C]."""
    return jnp.where(mask[..., None], generated, original)


def class_histogram(label_map: Array, classes: int, cells: int) -> Array:
    """Shares of the classes in each latent cell, [B, cells, cells, classes] float32.

    It is what three bilinear halvings of the one-hot map give (an 8 x 8 mean). A pixel that is of
    none of the classes counts for none, so that the shares of its cell sum to less than 1.

    Args:
      label_map: integers [B, H, W].
      classes: K, which have the numbers 0 to K - 1.
      cells: along a side.
    """
    one_hot = jax.nn.one_hot(label_map, classes)
    return _blocks(one_hot, cells).mean(axis=(2, 4))


def _blocks(x: Array, cells: int) -> Array:
    """[B, H, W, ...] as [B, cells, H / cells, cells, W / cells, ...]."""
    batch, height, width, *rest = x.shape
    if height % cells or width % cells:
        raise ValueError(
            f"found {height} x {width} pixels, expected a multiple of the latents' {cells} cells"
        )
    return x.reshape(batch, cells, height // cells, cells, width // cells, *rest)


# What a step shows: (key, data [B, h, w, C], stored condition or None, latent format) -> condition.


def draw_masked_latents(
    key: Array, data: Array, stored: Array | None, latent_format: LatentFormat, *, size: int
) -> Array:
    """Draws masks of `size` pixels a side, and hides the latents' cells that they touch.

    This form is ours: LFM encodes the masked image. It needs no encoder, and leaks what the
    encoder saw of the hole into the cells beside it. The hole is 0.
    """
    mask = cells_with_hole(random_masks(key, jnp.arange(len(data)), size), data.shape[1])
    return inpaint_channels(jnp.where(mask[..., None], 0.0, data), mask)


def stored_masked_latents(
    key: Array, data: Array, stored: Array | None, latent_format: LatentFormat
) -> Array:
    """The encoded masked images of the data set: latents or moments, then the mask's sign."""
    assert stored is not None
    latents, sign = stored[..., :-1], stored[..., -1:].astype(jnp.float32)
    if latent_format.stochastic:
        latents = sample_posterior(key, latents)
    return jnp.concatenate([normalize(latents, latent_format), sign], axis=-1)


def stored_histograms(
    key: Array, data: Array, stored: Array | None, latent_format: LatentFormat
) -> Array:
    """The class histograms of the data set."""
    assert stored is not None
    return stored.astype(jnp.float32)
