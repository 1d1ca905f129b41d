import numpy as np
import pytest
import scipy.linalg

from repulsor_jax.evaluation.frechet import (
    BLOCK,
    GaussianStatistics,
    check_pair,
    fit_gaussian,
    frechet_distance,
    too_few_samples,
)
from tests.oracles.inception import import_torch_fidelity


def gaussian(mean, covariance):
    return GaussianStatistics(np.asarray(mean, float), np.asarray(covariance, float), 100)


def rotation(dim, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


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
    assert 0 <= frechet_distance(a, a) < 1e-6


def test_against_sqrtm():
    rng = np.random.default_rng(0)
    a, b = (fit_gaussian([rng.standard_normal((200, 16)) @ rotation(16, s)]) for s in (1, 2))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    for pair in ((a, b), (b, a)):
        assert frechet_distance(*pair) == pytest.approx(expected.real, rel=1e-8)


def test_fewer_samples_than_dimensions():
    samples = np.random.default_rng(5).standard_normal((2, 10, 30))
    a, b = (fit_gaussian([x]) for x in samples)
    # tr (C_a C_b)^(1/2) is the sum of the singular values of X_b X_a^T, with C = X^T X.
    factors = (samples - samples.mean(axis=1, keepdims=True)) / 3
    overlap = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    squared = np.square(a.mean - b.mean).sum()
    expected = squared + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shift", [0, 1e6])
def test_a_fit_is_numpys_and_does_not_depend_on_the_parts(shift):
    """A mean of a million standard deviations: sums of squares would lose the covariance."""
    samples = np.random.default_rng(6).standard_normal((3 * BLOCK + 77, 5)) + shift
    found = []
    for size in (1, 100, BLOCK, len(samples)):
        parts = [samples[k : k + size] for k in range(0, len(samples), size)]
        found.append(fit_gaussian([samples[:0], *parts]))
    for fit in found:
        assert fit.count == len(samples)
        np.testing.assert_array_equal(fit.mean, found[0].mean)
        np.testing.assert_array_equal(fit.covariance, found[0].covariance)
    np.testing.assert_allclose(found[0].mean, samples.mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found[0].covariance, np.cov(samples, rowvar=False), atol=1e-9)


def test_a_fit_of_float32_is_in_float64():
    samples = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32) + 100
    fit = fit_gaussian([samples])
    covariance = np.cov(samples.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(fit.covariance, covariance, rtol=1e-9)
    assert fit.mean.dtype == fit.covariance.dtype == np.float64


def test_wrong_input():
    good, bad = np.zeros((5, 3)), np.zeros((5, 3))
    bad[2, 0] = bad[4] = np.nan
    unit = gaussian(np.zeros(3), np.eye(3))
    for message, call in {
        r"dimensions \(3, 3\) and \(2, 2\)": lambda: frechet_distance(
            unit, gaussian(np.zeros(2), np.eye(2))
        ),
        "the statistics are not finite": lambda: frechet_distance(
            unit, gaussian([0, 0, np.nan], np.eye(3))
        ),
        "sample 7 is not finite, nor are 1 others of 5": lambda: fit_gaussian([good, bad]),
        "found 1 samples, expected .* 2 or more": lambda: fit_gaussian([good[:1]]),
        "found 0 samples": lambda: fit_gaussian([]),
        r"found samples \(5,\), expected \[N, D\]": lambda: fit_gaussian([good[:, 0]]),
        r"found samples \(5, 2\), expected \[N, 3\]": lambda: fit_gaussian([good, good[:, :2]]),
        r"found features \(5, 3\) and \(5, 2\)": lambda: check_pair(good, good[:, :2]),
        "sample 2 is not finite": lambda: check_pair(good, bad),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_too_few_samples_are_counted():
    samples = np.random.default_rng(8).standard_normal((9, 8))
    assert too_few_samples(fit_gaussian([samples])) is None
    few = fit_gaussian([samples[:8]])
    assert np.linalg.matrix_rank(few.covariance) == 7
    warning = too_few_samples(few)
    assert "found 8 samples for a covariance of 8 features, expected at least 9" in warning
    assert "rank 7 at most" in warning
    assert too_few_samples(GaussianStatistics(few.mean, few.covariance, None)) is None


@pytest.mark.parametrize(("count", "dim"), [(100, 128), (600, 400)])
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
    found = frechet_distance(*(fit_gaussian([x]) for x in samples))
    assert found == pytest.approx(expected, rel=1e-5)
