"""Fréchet distance between Gaussians fitted to two sets of features; NumPy, float64.

On Inception's pooled features it is FID, on its spatial features sFID.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Moments:
    """What can be merged: sample count, mean `[D]`, and scatter `[D, D]`, in float64.

    The scatter is the sum of (x - mean) (x - mean)^T. Sums of raw squares would merge as well,
    but lose the covariance where the mean is large against it.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray


def gaussian_statistics(samples: np.ndarray) -> GaussianStatistics:
    """Fits a Gaussian to samples `[N, D]`; the covariance divides by N - 1, as `np.cov` does.

    Raises:
      ValueError: not two-dimensional, fewer than two samples, or not finite.
    """
    return statistics_from_moments(_moments(_checked(samples)))


class MomentAccumulator:
    """Moments of samples that arrive in batches.

    Samples are added in blocks of `BLOCK`, in order, whatever the batches: the same samples give
    the same moments, bit for bit, for any batch size.
    """

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._seen = 0

    def add(self, samples: np.ndarray) -> None:
        """Adds samples `[B, D]`, B of 0 or more.

        Raises:
          ValueError: not two-dimensional, of another D than before, or not finite; nothing is
            added.
        """
        samples = _checked(samples, first=self._seen)
        dim = self._pending[0].shape[1] if self._pending else samples.shape[1]
        dim = self._moments.mean.size if self._moments else dim
        if samples.shape[1] != dim:
            raise ValueError(f"found samples of {samples.shape[1]} features, expected {dim}")
        self._seen += len(samples)
        self._pending.append(samples.copy())
        self._num_pending += len(samples)
        if self._num_pending >= BLOCK:
            pending = np.concatenate(self._pending)
            whole = len(pending) // BLOCK * BLOCK
            for start in range(0, whole, BLOCK):
                self._moments = _merged(self._moments, _moments(pending[start : start + BLOCK]))
            self._pending, self._num_pending = [pending[whole:]], len(pending) - whole

    def moments(self) -> Moments:
        """Moments of all samples so far; more can be added after.

        Raises:
          ValueError: there are none.
        """
        if not self._seen:
            raise ValueError("found no samples, expected at least one")
        if not self._num_pending:
            assert self._moments is not None
            return self._moments
        return _merged(self._moments, _moments(np.concatenate(self._pending)))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of samples, such as two hosts' (Chan et al. 1979).

    Several sets merged in a fixed order give the same bits every time.

    Raises:
      ValueError: the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"found moments of {a.mean.size} and {b.mean.size} features")
    count = a.count + b.count
    step = b.mean - a.mean
    scatter = np.outer(step, step)
    scatter *= a.count * b.count / count
    scatter += a.scatter
    scatter += b.scatter
    return Moments(count, a.mean + step * (b.count / count), scatter)


def statistics_from_moments(moments: Moments) -> GaussianStatistics:
    """The Gaussian with these moments; the covariance divides by N - 1.

    Raises:
      ValueError: fewer than two samples.
    """
    if moments.count < 2:
        raise ValueError(f"found {moments.count} sample, expected [N, D] with N of 2 or more")
    return GaussianStatistics(moments.mean, moments.scatter / (moments.count - 1), moments.count)


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


def check_finite(samples: np.ndarray, first: int = 0) -> None:
    """Raises ValueError, with the count, if samples `[N, D]` hold NaN or infinity.

    Args:
      samples: features.
      first: what the first sample's index is called in the error.
    """
    finite = np.isfinite(samples).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise ValueError(
            f"sample {first + bad} is not finite, nor are {len(finite) - finite.sum() - 1} others "
            f"of {len(finite)}: look at the images that these features were computed from"
        )


def _checked(samples: np.ndarray, first: int = 0) -> np.ndarray:
    samples = np.asarray(samples)
    if samples.ndim != 2:
        raise ValueError(f"found samples {samples.shape}, expected [N, D] with N of 2 or more")
    check_finite(samples, first)
    return samples


def _moments(samples: np.ndarray) -> Moments:
    mean = samples.mean(axis=0, dtype=np.float64)
    centred = samples - mean
    return Moments(len(samples), mean, centred.T @ centred)


def _merged(a: Moments | None, b: Moments) -> Moments:
    return b if a is None else merge_moments(a, b)
