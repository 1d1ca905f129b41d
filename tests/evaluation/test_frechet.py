import numpy as np
import pytest
import scipy.linalg

from repulsor_jax.evaluation.frechet import (
    BLOCK,
    GaussianStatistics,
    MomentAccumulator,
    Moments,
    frechet_distance,
    gaussian_statistics,
    merge_moments,
    statistics_from_moments,
    too_few_samples,
)
from tests.oracles.inception import import_torch_fidelity


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


def test_moments_do_not_depend_on_the_batches():
    rng = np.random.default_rng(6)
    samples = (rng.standard_normal((3 * BLOCK + 77, 5)) * 2 + 50).astype(np.float32)
    found = []
    for batch in (1, 100, BLOCK, len(samples)):
        accumulator = MomentAccumulator()
        for start in range(0, len(samples), batch):
            if start == 10 * batch:
                accumulator.moments()  # looking does not disturb
            accumulator.add(samples[start : start + batch])
        found.append(accumulator.moments())
    for moments in found[1:]:
        assert moments.count == len(samples)
        np.testing.assert_array_equal(moments.mean, found[0].mean)
        np.testing.assert_array_equal(moments.scatter, found[0].scatter)
    statistics = statistics_from_moments(found[0])
    wide = samples.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, wide.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(wide, rowvar=False), atol=1e-12)


def test_merged_moments_are_those_of_the_union():
    # A mean of a million standard deviations: sums of squares would lose the covariance.
    rng = np.random.default_rng(7)
    samples = rng.standard_normal((1000, 4)) + 1e6
    parts = []
    for part in np.split(samples, [1, 300]):
        accumulator = MomentAccumulator()
        accumulator.add(part)
        parts.append(accumulator.moments())
    merged = merge_moments(merge_moments(parts[0], parts[1]), parts[2])
    statistics = statistics_from_moments(merged)
    assert statistics.count == 1000
    np.testing.assert_allclose(statistics.mean, 1e6 + (samples - 1e6).mean(0), rtol=1e-14)
    expected = np.cov(samples - 1e6, rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, atol=1e-8)
    with pytest.raises(ValueError, match="moments of 4 and 3 features"):
        merge_moments(merged, Moments(1, np.zeros(3), np.zeros((3, 3))))


def test_wrong_batches():
    accumulator = MomentAccumulator()
    with pytest.raises(ValueError, match="no samples"):
        accumulator.moments()
    accumulator.add(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="found samples of 2 features, expected 3"):
        accumulator.add(np.zeros((1, 2)))
    bad = np.zeros((5, 3))
    bad[2, 0] = bad[4] = np.nan
    with pytest.raises(ValueError, match="sample 6 is not finite, nor are 1 others of 5"):
        accumulator.add(bad)
    assert accumulator.moments().count == 4
    with pytest.raises(ValueError, match="found 1 sample"):
        statistics_from_moments(Moments(1, np.zeros(3), np.zeros((3, 3))))


def test_too_few_samples_are_counted():
    samples = np.random.default_rng(8).standard_normal((9, 8))
    assert too_few_samples(gaussian_statistics(samples)) is None
    assert np.linalg.matrix_rank(gaussian_statistics(samples).covariance) == 8
    few = gaussian_statistics(samples[:8])
    assert np.linalg.matrix_rank(few.covariance) == 7
    warning = too_few_samples(few)
    assert "found 8 samples for a covariance of 8 features, expected at least 9" in warning
    assert "rank 7 at most" in warning
    assert too_few_samples(GaussianStatistics(few.mean, few.covariance, None)) is None


@pytest.mark.parametrize(
    ("count", "dim"), [(600, 128), (100, 128), pytest.param(1500, 1024, marks=pytest.mark.slow)]
)
def test_against_torch_fidelity(count, dim):
    metric = import_torch_fidelity().metric_fid
    import torch

    rng = np.random.default_rng(9)
    mix = rng.standard_normal((dim, dim)) / dim**0.5
    samples = [
        np.maximum(rng.standard_normal((count, dim)) @ mix + shift, 0).astype(np.float32)
        for shift in (0.3, 0.5)
    ]
    a, b = (metric.fid_features_to_statistics(torch.from_numpy(x)) for x in samples)
    expected = metric.fid_statistics_to_metric(a, b, False)["frechet_inception_distance"]
    found = frechet_distance(*(gaussian_statistics(x) for x in samples))
    assert found == pytest.approx(expected, rel=1e-5)
