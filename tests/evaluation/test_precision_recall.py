import numpy as np
import pytest

from repulsor_jax.evaluation import precision_recall as module
from repulsor_jax.evaluation.precision_recall import precision_recall
from tests.oracles.inception import import_torch_fidelity


def directly(samples, reference, k):
    """By the definition, in float64, one distance at a time."""
    samples, reference = samples.astype(np.float64), reference.astype(np.float64)
    distances = lambda a, b: np.stack([np.square(b - x).sum(axis=1) for x in a])
    radii = [np.sort(distances(x, x), axis=1)[:, k] for x in (reference, samples)]
    between = distances(samples, reference)
    precision = (between <= radii[0]).any(axis=1).mean()
    recall = (between <= radii[1][:, None]).any(axis=0).mean()
    return precision, recall


def features(seed, count, dim, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dim)) * scale + shift).astype(np.float32)


def assert_equal(samples, reference, k=3, **kwargs):
    found = precision_recall(samples=samples, reference=reference, neighbours=k, **kwargs)
    assert (found.precision, found.recall) == directly(samples, reference, k)
    return found


def test_by_the_definition():
    for dim, scale in ((2, 1.5), (200, 0.97)):
        samples, reference = features(0, 180, dim, scale), features(1, 230, dim)
        found = assert_equal(samples, reference)
        assert 0 < found.precision < 1 or 0 < found.recall < 1
    for k in (1, 7):
        assert_equal(features(0, 180, 2, 1.5), features(1, 230, 2), k)


@pytest.mark.parametrize("block", [(1, 1), (7, 32), (1000, 1000)])
def test_blocks_do_not_matter(block):
    assert_equal(features(2, 64, 6, 1.4), features(3, 50, 6), block=block)


def test_a_line_by_hand():
    # Radii with k = 1: reference 1, 1, 8; samples 5.5, 5.5, 89.
    reference, samples = np.array([[0], [1], [9]]), np.array([[0.5], [6], [100]])
    found = precision_recall(samples=samples, reference=reference, neighbours=1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(3 / 3)


def test_copies_and_collapse():
    reference, rng = features(4, 100, 5), np.random.default_rng(0)
    # Distances between copies are exactly the radii, on whose far side nothing may fall.
    found = assert_equal(reference[rng.permutation(100)[:60]], reference)
    assert found.precision == 1
    collapsed = np.repeat(reference[:1], 40, axis=0)
    found = assert_equal(collapsed, reference)
    assert found == module.PrecisionRecall(1.0, 1 / 100)
    assert_equal(collapsed + features(5, 40, 5, 1e-6), reference)


def test_few_features():
    assert_equal(features(6, 4, 3), features(7, 9, 3))


def test_distances_that_float32_cannot_tell():
    """In two tight clusters far apart, float32 loses a distance within one altogether."""
    side = np.where(np.arange(90) % 2, 300, -300)[:, None]
    reference = features(9, 90, 16, 0.05) + side
    samples = features(10, 80, 16, 0.06) + side[:80]
    found = assert_equal(samples.astype(np.float32), reference.astype(np.float32))
    assert 0 < found.recall < 1
    assert 0 < found.precision < 1
    offset = np.float32(1000)
    assert_equal(features(9, 80, 16, 1.4) + offset, features(10, 90, 16) + offset)


def test_against_torch_fidelity():
    metric = import_torch_fidelity().metric_prc
    import torch

    samples, reference = features(11, 900, 128, 0.99, 0.01), features(12, 1000, 128)
    found = precision_recall(samples=samples, reference=reference, block=(256, 512))
    for dtype in ("float64", "float32"):
        expected = metric.prc_features_to_metric(
            *(torch.from_numpy(x.astype(dtype)) for x in (samples, reference)), verbose=False
        )
        assert found.precision == pytest.approx(expected["precision"], rel=1e-5)
        assert found.recall == pytest.approx(expected["recall"], rel=1e-5)
    assert 0.05 < found.precision < 0.95
    assert 0.05 < found.recall < 0.95


def test_wrong_input():
    good = features(0, 10, 4)
    with pytest.raises(ValueError, match=r"features \(10, 4\) and \(10, 5\)"):
        precision_recall(samples=good, reference=features(0, 10, 5))
    with pytest.raises(ValueError, match="found 10 samples and 3 reference features for 3 neigh"):
        precision_recall(samples=good, reference=good[:3])
    bad = good.copy()
    bad[:2] = np.nan
    with pytest.raises(ValueError, match="sample 0 is not finite, nor are 1 others of 10"):
        precision_recall(samples=bad, reference=good)
