import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("counts", "dim", "scale", "shift", "k", "block"),
    [
        ((180, 230), 2, 1.5, 0, 3, (64, 100)),
        ((180, 230), 200, 0.97, 1000, 1, (1000, 1000)),  # far from the origin
        ((4, 9), 3, 2.5, 0, 3, (1, 1)),
    ],
)
def test_by_the_definition(counts, dim, scale, shift, k, block):
    samples = features(0, counts[0], dim, scale, shift)
    reference = features(1, counts[1], dim, 1.0, shift)
    found = precision_recall(samples=samples, reference=reference, neighbours=k, block=block)
    assert (found.precision, found.recall) == pytest.approx(directly(samples, reference, k))
    assert 0 < found.precision < 1 or 0 < found.recall < 1


def test_a_line_by_hand():
    # Radii with k = 1: reference 1, 1, 8; samples 5.5, 5.5, 89.
    reference, samples = np.array([[0], [1], [9]]), np.array([[0.5], [6], [100]])
    found = precision_recall(samples=samples, reference=reference, neighbours=1)
    assert (found.precision, found.recall) == pytest.approx((2 / 3, 3 / 3))


def test_a_collapsed_model_has_no_recall():
    reference = features(4, 100, 5)
    found = precision_recall(samples=np.repeat(reference[:1], 40, axis=0), reference=reference)
    assert found.precision == 1.0
    assert found.recall <= 1 / 100  # of the reference that all samples are


def test_against_torch_fidelity():
    metric = import_torch_fidelity().metric_prc
    import torch

    samples, reference = features(11, 900, 128, 0.99, 0.01), features(12, 1000, 128)
    found = precision_recall(samples=samples, reference=reference, block=(256, 512))
    expected = metric.prc_features_to_metric(
        *(torch.from_numpy(x.astype(np.float64)) for x in (samples, reference)), verbose=False
    )
    assert found.precision == pytest.approx(expected["precision"], rel=1e-5)
    assert found.recall == pytest.approx(expected["recall"], rel=1e-5)
    assert 0.05 < found.precision < 0.95
    assert 0.05 < found.recall < 0.95


def test_wrong_input():
    good = features(0, 10, 4)
    with pytest.raises(ValueError, match="found 10 samples and 3 reference features for 3 neigh"):
        precision_recall(samples=good, reference=good[:3])
