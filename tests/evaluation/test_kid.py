import numpy as np
import pytest

from repulsor_jax.evaluation.kid import kernel_distance
from tests.oracles.inception import import_torch_fidelity


def features(count, dim, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((count, dim)) + shift, 0).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_torch_fidelity(dtype):
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


def test_the_estimate_by_its_definition():
    x, y = features(6, 4, 2).astype(np.float64), features(6, 4, 3, 0.5).astype(np.float64)
    kernel = lambda a, b: (a @ b / 4 + 1) ** 3
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = (
        np.mean([kernel(x[i], x[j]) for i, j in pairs])
        + np.mean([kernel(y[i], y[j]) for i, j in pairs])
        - 2 * np.mean([kernel(a, b) for a in x for b in y])
    )
    found = kernel_distance(x, y, subsets=3, subset_size=6)
    assert found.mean == pytest.approx(expected, rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_unbiased_where_the_distributions_are_equal():
    sets = [features(2000, 16, 4), features(2000, 16, 5), features(2000, 16, 6, 1.0)]
    found, apart = (kernel_distance(sets[0], other, subset_size=100) for other in sets[1:])
    # The estimates of a hundred overlapping subsets are not independent, yet centred on zero: the
    # biased estimate would be about three standard deviations away.
    assert abs(found.mean) < found.std
    assert abs(found.mean) < 0.01 * apart.mean


def test_wrong_input():
    with pytest.raises(ValueError, match="found 999 samples and 1000 reference features for 100"):
        kernel_distance(features(999, 4, 0), features(1000, 4, 1))
    with pytest.raises(ValueError, match=r"features \(9, 4\) and \(9, 5\)"):
        kernel_distance(features(9, 4, 0), features(9, 5, 1), subset_size=5)
    bad = features(9, 4, 0)
    bad[1, 2] = np.inf
    with pytest.raises(ValueError, match="sample 1 is not finite"):
        kernel_distance(bad, features(9, 4, 1), subset_size=5)
