"""Fréchet distance between Gaussians fitted to two sets of features; NumPy, float64.

On Inception's pooled features it is FID, on its spatial features sFID.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

BLOCK = 1024  # samples whose scatter is added at once


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
    """A fitted Gaussian: mean `[D]`, unbiased covariance `[D, D]`, and the sample count.

    The count is None for statistics of a file that does not tell it.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


def fit_gaussian(parts: Iterable[np.ndarray]) -> GaussianStatistics:
    """Fits a Gaussian to samples that arrive in parts `[B, D]`, as `np.cov` does to all at once.

    Samples are added in blocks of `BLOCK`, in order: the same samples give the same bits, whatever
    the parts. Mean and scatter of two blocks are merged by Chan et al. (1979): sums of raw squares
    would lose the covariance where the mean is large against it.

    Raises:
      ValueError: parts that are not two-dimensional, of different D or not finite; or fewer than
        two samples.
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for block in _in_blocks(parts):
        block_mean = block.mean(axis=0, dtype=np.float64)
        centred = block - block_mean
        total, step = count + len(block), block_mean - mean
        scatter = (
            scatter + centred.T @ centred + np.outer(step, step) * (count * len(block) / total)
        )
        count, mean = total, mean + step * (len(block) / total)
    if count < 2:
        raise ValueError(f"found {count} samples, expected [N, D] with N of 2 or more")
    return GaussianStatistics(mean, scatter / (count - 1), count)


def _in_blocks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Checks parts, and cuts the samples of all of them into blocks of `BLOCK`."""
    waiting, seen = None, 0
    for part in parts:
        if part.ndim != 2 or (waiting is not None and part.shape[1] != waiting.shape[1]):
            expected = "N, D" if waiting is None else f"N, {waiting.shape[1]}"
            raise ValueError(f"found samples {part.shape}, expected [{expected}]")
        check_features(part, first=seen)
        seen += len(part)
        waiting = part if waiting is None else np.concatenate([waiting, part])
        while len(waiting) >= BLOCK:
            yield waiting[:BLOCK]
            waiting = waiting[BLOCK:]
    if waiting is not None and len(waiting):
        yield waiting


def too_few_samples(statistics: GaussianStatistics) -> str | None:
    """A warning, with the count, if the covariance is singular for want of samples; else None."""
    count, dim = statistics.count, statistics.mean.size
    if count is None or count > dim:
        return None
    return (
        f"found {count} samples for a covariance of {dim} features, expected at least {dim + 1}: "
        f"it is singular (rank {count - 1} at most), and the Fréchet distance is much too large; "
        "compare it only with others of the same count. 50,000 samples are customary"
    )


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance, what FID reports (Heusel et al. 2017, eq. 6).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The product's eigenvalues are those of the
    symmetric, positive semi-definite C_a^(1/2) C_b C_a^(1/2), so that singular covariances need no
    care and no complex numbers arise.

    Raises:
      ValueError: the dimensions differ, or the statistics are not finite.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise ValueError(
            f"found Gaussians of dimensions {a.covariance.shape} and {b.covariance.shape}, "
            "expected the same features on both sides"
        )
    if not all(np.isfinite(x).all() for x in (a.mean, b.mean, a.covariance, b.covariance)):
        raise ValueError("the statistics are not finite")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    overlap = np.sqrt(np.maximum(product, 0)).sum()
    squared = np.square(a.mean - b.mean).sum()
    return float(max(squared + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap, 0.0))


def check_features(features: np.ndarray, first: int = 0) -> None:
    """Raises ValueError that names the first row `[D]` that is not finite; row 0 is `first`."""
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise ValueError(
            f"sample {first + bad} is not finite, nor are {len(finite) - finite.sum() - 1} others "
            f"of {len(finite)}: look at the images that these features were computed from"
        )


def check_pair(samples: np.ndarray, reference: np.ndarray) -> None:
    """Raises ValueError unless both are finite features `[N, D]` and `[M, D]`."""
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"found features {samples.shape} and {reference.shape}, expected [N, D] and [M, D]"
        )
    check_features(samples)
    check_features(reference)
