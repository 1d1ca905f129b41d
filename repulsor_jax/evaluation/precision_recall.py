"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), exactly.

A set of features spans a manifold: the union of balls around each, whose radius is the distance to
its k-th nearest neighbour in the set. Precision is the share of samples inside the reference's
manifold, recall the share of reference features inside the samples'.

The accelerator does the bulk, all pairwise distances, in float32 and in blocks, so that 50,000 by
50,000 take the memory of one block. Comparisons that are closer than its rounding could be are
decided again in float64 on the host. The result is that of a direct float64 evaluation, on every
device. (The ADM suite rounds features to float16 first, which can move its last digits.)
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repulsor_jax.evaluation.frechet import check_finite

Array = jax.Array

NEIGHBOURS = 3
ROWS, COLUMNS = 1024, 8192  # of a block of distances: 32 MiB
# Candidates kept beyond the k-th neighbour, so that its place in float32 need not be its true one.
_SPARE = 4


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    *,
    samples: np.ndarray,
    reference: np.ndarray,
    neighbours: int = NEIGHBOURS,
    block: tuple[int, int] = (ROWS, COLUMNS),
) -> PrecisionRecall:
    """Improved precision and recall of samples against a reference.

    Args:
      samples: features of generated images, `[N, D]`, float32.
      reference: features of real images, `[M, D]`, float32. ADM's reference files hold 10,000
        images for it; the values depend on both counts.
      neighbours: k, a feature not being its own neighbour.
      block: rows and columns of the distances computed at a time.

    Raises:
      ValueError: features of different dimensions, k or fewer of them, or not finite.
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"found features {samples.shape} and {reference.shape}, expected [N, D] and [M, D]"
        )
    if not 1 <= neighbours < min(len(samples), len(reference)):
        raise ValueError(
            f"found {len(samples)} samples and {len(reference)} reference features for "
            f"{neighbours} neighbours, expected at least one neighbour, and more features than that"
        )
    check_finite(samples)
    check_finite(reference)
    # Distances do not change, and in float32 lose less, when the features are near the origin.
    centre = reference.mean(axis=0, dtype=np.float64)
    real = _Features.of(reference - centre, block)
    fake = _Features.of(samples - centre, block)
    inside_real = _inside(fake, real, _squared_radii(real, neighbours))
    inside_fake = _inside(real, fake, _squared_radii(fake, neighbours))
    return PrecisionRecall(float(inside_real.mean()), float(inside_fake.mean()))


@dataclasses.dataclass(frozen=True)
class _Features:
    """Features in float64 `[N, D]`, their squared norms `[N]`, and their blocks on the device."""

    exact: np.ndarray
    norms: np.ndarray
    rows: Array  # float32 [number of blocks, rows of a block, D], zeros after the last feature
    columns: Array  # likewise

    @staticmethod
    def of(features: np.ndarray, block: tuple[int, int]) -> "_Features":
        norms = np.square(features).sum(axis=1)
        return _Features(features, norms, *(_blocks(features, size, 0.0) for size in block))

    def rounding(self, other: "_Features", dtype: type[np.floating]) -> np.ndarray:
        """Bound on the error of |u|^2 + |v|^2 - 2 u . v over all v of `other`, `[N]`.

        A sum of D products is off by at most D roundings of the sum of their sizes, which is
        |u| |v| or less (Higham 2002, section 3.1); all else adds a few. The machine epsilon is two
        roundings, so there is room.
        """
        reach = np.sqrt(self.norms) + np.sqrt(other.norms.max())
        return (self.exact.shape[1] + 8) * float(np.finfo(dtype).eps) * np.square(reach)


def _blocks(array: np.ndarray, size: int, fill: float) -> Array:
    """Splits the first axis into float32 blocks, `[number, size, ...]`."""
    size = min(size, len(array))
    missing = -len(array) % size
    padding = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
    padded = np.pad(array.astype(np.float32), padding, constant_values=fill)
    return jnp.asarray(padded.reshape(-1, size, *array.shape[1:]))


def _squared_radii(features: _Features, neighbours: int) -> np.ndarray:
    """Squared distance of each feature to its k-th nearest other, `[N]`, float64."""
    count, size = len(features.exact), features.rows.shape[1]
    candidates = min(neighbours + _SPARE, count - 1)
    offsets = _blocks(features.norms, features.columns.shape[1], np.inf)
    tolerance = features.rounding(features, np.float32)
    radii = np.empty(count)
    unsure = []
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        block = features.rows[start // size]
        values, nearest = (
            np.asarray(part)[: len(rows)]
            for part in _least_columns(block, start, features.columns, offsets, candidates + 1)
        )
        squared = np.sort(_squared_distances(features, rows, features, nearest[:, :-1]))
        radii[rows] = squared[:, neighbours - 1]
        # One of those left out, all at `values[:, -1]` or more, may be nearer than it seemed.
        left_out = values[:, -1] + features.norms[rows] - tolerance[rows]
        unsure += list(rows[(radii[rows] > left_out) & (radii[rows] > 0)])
    tolerance = features.rounding(features, np.float64)
    for row, squared in _again(features, unsure, features):
        squared[row] = np.inf
        kth = np.partition(squared, neighbours - 1)[neighbours - 1]
        near = np.flatnonzero(squared <= kth + 2 * tolerance[row])
        radii[row] = np.sort(_squared_distances(features, [row], features, near[None])[0])[
            neighbours - 1
        ]
    return radii


def _inside(features: _Features, manifold: _Features, squared_radii: np.ndarray) -> np.ndarray:
    """Whether each feature is within any ball of the manifold, `[N]`."""
    offsets = _blocks(manifold.norms - squared_radii, manifold.columns.shape[1], np.inf)
    least = [np.asarray(_least(rows, manifold.columns, offsets)) for rows in features.rows]
    margin = np.concatenate(least)[: len(features.exact)] + features.norms
    inside = margin <= 0
    unsure = np.flatnonzero(np.abs(margin) <= features.rounding(manifold, np.float32))
    tolerance = features.rounding(manifold, np.float64)
    for row, squared in _again(features, unsure, manifold):
        margins = squared - squared_radii
        near = np.flatnonzero(np.abs(margins) <= tolerance[row])
        inside[row] = (margins < -tolerance[row]).any() or (
            _squared_distances(features, [row], manifold, near[None])[0] <= squared_radii[near]
        ).any()
    return inside


def _again(
    features: _Features, rows: Sequence[int] | np.ndarray, others: _Features
) -> Iterator[tuple[int, np.ndarray]]:
    """Squared distances of some features to all others, `[M]` for each, by float64 products."""
    for start in range(0, len(rows), 256):
        chosen = np.asarray(rows[start : start + 256])
        products = features.exact[chosen] @ others.exact.T
        squared = features.norms[chosen, None] + others.norms - 2 * products
        yield from zip(chosen.tolist(), squared, strict=True)


def _squared_distances(
    features: _Features,
    rows: Sequence[int] | np.ndarray,
    others: _Features,
    columns: np.ndarray,
) -> np.ndarray:
    """Squared distances of features `[R]` to others `[R, C]`, by differences: no cancellation."""
    return np.stack(
        [
            np.square(others.exact[column] - features.exact[row]).sum(axis=1)
            for row, column in zip(rows, columns, strict=True)
        ]
    )


@jax.jit
def _least(rows: Array, columns: Array, offsets: Array) -> Array:
    """For each row u, the least offset - 2 u . v over all columns v, `[R]`."""

    def step(least: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        return jnp.minimum(least, _values(rows, *block).min(axis=1)), None

    start = jnp.full(len(rows), jnp.inf, jnp.float32)
    return lax.scan(step, start, (columns, offsets))[0]


@functools.partial(jax.jit, static_argnames="k")
def _least_columns(
    rows: Array, first: int, columns: Array, offsets: Array, k: int
) -> tuple[Array, Array]:
    """For each row u, the k least offset - 2 u . v, in order, and their columns, `[R, k]` each.

    Row i is column first + i, and left out.
    """
    number, width = offsets.shape
    own = first + jnp.arange(len(rows))[:, None]

    def step(best: tuple[Array, Array], block: tuple[Array, Array, Array]) -> tuple[Any, None]:
        start, vectors, offset = block
        indices = start + jnp.broadcast_to(jnp.arange(width), (len(rows), width))
        values = jnp.where(indices == own, jnp.inf, _values(rows, vectors, offset))
        values = jnp.concatenate([best[0], values], axis=1)
        indices = jnp.concatenate([best[1], indices], axis=1)
        negative, order = lax.top_k(-values, k)
        return (-negative, jnp.take_along_axis(indices, order, axis=1)), None

    empty = jnp.full((len(rows), k), jnp.inf, jnp.float32), jnp.zeros((len(rows), k), jnp.int32)
    return lax.scan(step, empty, (jnp.arange(number) * width, columns, offsets))[0]


def _values(rows: Array, columns: Array, offsets: Array) -> Array:
    return offsets - 2.0 * jnp.dot(rows, columns.T, precision=lax.Precision.HIGHEST)
