"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

A set of features spans a manifold: the union of balls around each, whose radius is the distance to
its k-th nearest neighbour in the set. Precision is the share of samples inside the reference's
manifold, recall the share of reference features inside the samples'.

Distances are float32, in blocks, so that 50,000 by 50,000 take the memory of one block. (The ADM
suite rounds features to float16.)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repulsor_jax.evaluation.frechet import check_pair

Array = jax.Array
Columns = tuple[Array, Array]  # float32 features [blocks, size, D], and their squared norms

NEIGHBOURS = 3
ROWS, COLUMNS = 1024, 8192  # of a block of distances: 32 MiB


class PrecisionRecall(NamedTuple):
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
    check_pair(samples, reference)
    if not 1 <= neighbours < min(len(samples), len(reference)):
        raise ValueError(
            f"found {len(samples)} samples and {len(reference)} reference features for "
            f"{neighbours} neighbours, expected at least one neighbour, and more features than that"
        )
    # Distances do not change, and in float32 lose less, when the features are near the origin.
    centre = reference.mean(axis=0, dtype=np.float64)
    real, fake = ((x - centre).astype(np.float32) for x in (reference, samples))
    rows, columns = block
    real_columns, fake_columns = _columns(real, columns), _columns(fake, columns)
    shares = []
    for found, manifold, balls in ((fake, real, real_columns), (real, fake, fake_columns)):
        squared = _by_rows(functools.partial(_squared_radii, balls, neighbours), manifold, rows)
        radii = _blocks(squared, columns, -1.0)  # no feature is inside the padding's balls
        shares.append(_by_rows(functools.partial(_inside, balls, radii), found, rows).mean())
    return PrecisionRecall(*map(float, shares))


def _blocks(array: np.ndarray, size: int, fill: float) -> Array:
    """Cuts the first axis into blocks `[blocks, size, ...]` of `size` at most, filling the last."""
    size = min(size, len(array))
    padding = [(0, -len(array) % size)] + [(0, 0)] * (array.ndim - 1)
    padded = np.pad(array, padding, constant_values=fill)
    return jnp.asarray(padded.reshape(-1, size, *array.shape[1:]))


def _columns(features: np.ndarray, size: int) -> Columns:
    norms = _blocks(np.square(features).sum(axis=1), size, np.inf)  # padding is far from everything
    return _blocks(features, size, 0.0), norms


def _by_rows(function: Callable[[Array], Array], features: np.ndarray, size: int) -> np.ndarray:
    """Applies a function of `[size, D]` to all features, block by block."""
    found = [np.asarray(function(block)) for block in _blocks(features, size, 0.0)]
    return np.concatenate(found)[: len(features)]


def _squared_distances(rows: Array, vectors: Array, norms: Array) -> Array:
    products = jnp.dot(rows, vectors.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum(jnp.square(rows).sum(axis=1)[:, None] + norms - 2.0 * products, 0.0)


@functools.partial(jax.jit, static_argnums=1)
def _squared_radii(columns: Columns, neighbours: int, rows: Array) -> Array:
    """Squared distance of each row to its k-th nearest other column, `[R]`.

    The row itself is a column too, at distance 0: hence k + 1.
    """

    def step(nearest: Array, block: Columns) -> tuple[Array, None]:
        found = jnp.concatenate([nearest, _squared_distances(rows, *block)], axis=1)
        return -lax.top_k(-found, neighbours + 1)[0], None

    start = jnp.full((len(rows), neighbours + 1), jnp.inf, jnp.float32)
    return lax.scan(step, start, columns)[0][:, -1]


@jax.jit
def _inside(columns: Columns, squared_radii: Array, rows: Array) -> Array:
    """Whether each row is within the ball of any column, `[R]`."""

    def step(inside: Array, block: tuple[Columns, Array]) -> tuple[Array, None]:
        (vectors, norms), radii = block
        return inside | (_squared_distances(rows, vectors, norms) <= radii).any(axis=1), None

    return lax.scan(step, jnp.zeros(len(rows), bool), (columns, squared_radii))[0]
