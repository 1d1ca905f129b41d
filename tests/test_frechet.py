import numpy as np
import pytest
import scipy.linalg

from repulsor_jax.evaluation.frechet import (
    GaussianStatistics,
    frechet_distance,
    gaussian_statistics,
)


def gaussian(mean, covariance):
    return GaussianStatistics(np.asarray(mean, float), np.asarray(covariance, float), 100)


def rotation(dim, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def test_statistics_are_numpys():
    samples = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32) * 3 + 100
    statistics = gaussian_statistics(samples)
    wide = samples.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(wide, rowvar=False), rtol=1e-9)
    assert statistics.count == 50
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64


def test_one_dimension():
    a, b = gaussian([1.0], [[4.0]]), gaussian([-2.0], [[0.25]])
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-12)


def test_diagonal():
    rng = np.random.default_rng(1)
    means, stds = rng.standard_normal((2, 9)), rng.uniform(0.1, 3, (2, 9))
    expected = np.square(means[0] - means[1]).sum() + np.square(stds[0] - stds[1]).sum()
    a, b = (gaussian(m, np.diag(s**2)) for m, s in zip(means, stds, strict=True))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_commuting_and_singular():
    # A shared basis: the distance is that of the standard deviations, zeros included.
    rng = np.random.default_rng(2)
    basis, stds = rotation(12, 3), rng.uniform(0.1, 3, (2, 12))
    stds[0, :5] = 0
    stds[1, 3:8] = 0
    a, b = (gaussian(np.zeros(12), (basis * s**2) @ basis.T) for s in stds)
    expected = np.square(stds[0] - stds[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)
    zero = gaussian(np.zeros(12), np.zeros((12, 12)))
    assert frechet_distance(a, zero) == pytest.approx(np.square(stds[0]).sum(), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_against_sqrtm(seed):
    rng = np.random.default_rng(seed)
    a, b = (gaussian_statistics(rng.standard_normal((200, 16)) @ rotation(16, s)) for s in (1, 2))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected.real, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected.real, rel=1e-8)


def test_equal_is_zero():
    samples = np.random.default_rng(4).standard_normal((40, 6))
    samples = np.concatenate([samples, np.ones((40, 2)), samples[:, :1]], axis=1)  # singular
    statistics = gaussian_statistics(samples)
    assert 0 <= frechet_distance(statistics, statistics) < 1e-6
    shifted = gaussian_statistics(samples + 2.0)
    assert frechet_distance(statistics, shifted) == pytest.approx(9 * 2.0**2, abs=1e-6)


def test_fewer_samples_than_dimensions():
    rng = np.random.default_rng(5)
    a, b = (gaussian_statistics(rng.standard_normal((10, 30))) for _ in range(2))
    # tr (C_a C_b)^(1/2) is the sum of the singular values of X_b X_a^T, with C = X^T X.
    factors = []
    rng = np.random.default_rng(5)
    for _ in range(2):
        x = rng.standard_normal((10, 30))
        factors.append((x - x.mean(0)) / 3)
    overlap = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    squared = np.square(a.mean - b.mean).sum()
    expected = squared + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-5)


def test_wrong_input():
    good = gaussian(np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match=r"dimensions \(3, 3\) and \(2, 2\)"):
        frechet_distance(good, gaussian(np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, gaussian([0, 0, np.nan], np.eye(3)))
    samples = np.zeros((5, 3))
    samples[3, 1] = np.inf
    with pytest.raises(ValueError, match="sample 3 is not finite"):
        gaussian_statistics(samples)
    for shape in [(1, 3), (4,), (2, 2, 2)]:
        with pytest.raises(ValueError, match="expected \\[N, D\\]"):
            gaussian_statistics(np.zeros(shape))
