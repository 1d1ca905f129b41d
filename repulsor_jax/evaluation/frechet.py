"""Fréchet distance between Gaussians fitted to two sets of features; NumPy, float64."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
    """A fitted Gaussian: mean `[D]`, unbiased covariance `[D, D]`, and the sample count."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def gaussian_statistics(samples: np.ndarray) -> GaussianStatistics:
    """Fits a Gaussian to samples `[N, D]`; the covariance divides by N - 1, as `np.cov` does.

    Raises:
      ValueError: not two-dimensional, fewer than two samples, or not finite.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 2 or len(samples) < 2:
        raise ValueError(f"found samples {samples.shape}, expected [N, D] with N of 2 or more")
    if not np.isfinite(samples).all():
        row = int(np.argmin(np.isfinite(samples).all(axis=1)))
        raise ValueError(f"sample {row} is not finite")
    mean = samples.mean(axis=0)
    centred = samples - mean
    return GaussianStatistics(mean, centred.T @ centred / (len(samples) - 1), len(samples))


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
