"""Inception Score and KID against their definitions and torch-fidelity."""

import numpy as np
import pytest

from repulsor_jax.evaluation.scores import adm_inception_score, inception_score, kernel_distance
from tests.oracles.inception import import_torch_fidelity


def random_logits(count, classes=1008, scale=4.0):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, classes)) * scale).astype(np.float32)


def features(count, dim, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((count, dim)) + shift, 0).astype(np.float32)


@pytest.mark.parametrize("count", [537, 10])
def test_inception_score_against_torch_fidelity(count):
    metric = import_torch_fidelity().metric_isc
    import torch

    values = random_logits(count)
    for seed in (2020, None):
        expected = metric.isc_features_to_metric(
            torch.from_numpy(values), splits=10, shuffle=seed is not None, rng_seed=seed
        )
        found = inception_score(values, seed=seed)
        assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
        assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-8, abs=1e-12)


def test_known_scores():
    # Certain and evenly spread over 7 classes: 7. The same distribution for all samples: 1.
    certain = 1000.0 * np.eye(7)[np.arange(70) % 7]
    found = inception_score(certain, seed=None)
    np.testing.assert_allclose([found.mean, found.std], [7, 0], atol=1e-12)
    assert inception_score(np.tile([1.0, 2.0, 3.0], (50, 1))).mean == pytest.approx(1, rel=1e-12)


def test_adm_cuts_at_a_fixed_size_in_order():
    # Six samples of two classes, then three of one: parts of 6 score 2 and 1.
    values = 100.0 * np.eye(3)[[0, 1, 0, 1, 0, 1, 2, 2, 2]]
    found = adm_inception_score(values, split_size=6)
    np.testing.assert_allclose([found.mean, found.std], [1.5, 0.5], rtol=1e-12)
    # By the definition, on random ones, in its own words.
    values = random_logits(50, 20).astype(np.float64)
    p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    scores = []
    for part in (p[:20], p[20:40], p[40:]):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert adm_inception_score(values, split_size=20).mean == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kid_against_torch_fidelity(dtype):
    metric = import_torch_fidelity().metric_kid
    import torch

    samples, reference = features(400, 256, 0), features(330, 256, 1, 0.2)
    expected = metric.kid_features_to_metric(
        *(torch.from_numpy(x.astype(dtype)) for x in (samples, reference)),
        kid_subsets=10,
        kid_subset_size=200,
        verbose=False,
    )
    found = kernel_distance(samples, reference, subsets=10, subset_size=200)
    # In float32, torch-fidelity's default, it subtracts sums that have lost their last digits.
    tolerance = 1e-10 if dtype == "float64" else 1e-3
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=tolerance)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=tolerance)


def test_the_estimate_of_kid_by_its_definition():
    x, y = features(6, 4, 2).astype(np.float64), features(6, 4, 3, 0.5).astype(np.float64)
    kernel = lambda a, b: (a @ b / 4 + 1) ** 3
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = (
        np.mean([kernel(x[i], x[j]) for i, j in pairs])
        + np.mean([kernel(y[i], y[j]) for i, j in pairs])
        - 2 * np.mean([kernel(a, b) for a in x for b in y])
    )
    found = kernel_distance(x, y, subsets=3, subset_size=6)
    np.testing.assert_allclose([found.mean, found.std], [expected, 0], rtol=1e-12, atol=1e-12)


def test_kid_is_unbiased_where_the_distributions_are_equal():
    sets = [features(2000, 16, 4), features(2000, 16, 5), features(2000, 16, 6, 1.0)]
    found, apart = (kernel_distance(sets[0], other, subset_size=100) for other in sets[1:])
    # The estimates of a hundred overlapping subsets are not independent, yet centred on zero: the
    # biased estimate would be about three standard deviations away.
    assert abs(found.mean) < found.std
    assert abs(found.mean) < 0.01 * apart.mean


def test_wrong_input():
    bad = features(20, 5, 0)
    bad[3] = np.nan
    for message, call in {
        "found 9 samples for 10 splits": lambda: inception_score(random_logits(9, 5)),
        "found 0 samples": lambda: adm_inception_score(np.zeros((0, 5))),
        "sample 3 is not finite, nor are 0 others of 20": lambda: adm_inception_score(bad),
        "found 999 samples and 1000 reference features for 100": lambda: kernel_distance(
            features(999, 4, 0), features(1000, 4, 1)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
