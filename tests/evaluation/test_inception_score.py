import numpy as np
import pytest

from repulsor_jax.evaluation.inception_score import adm_inception_score, inception_score
from tests.oracles.inception import import_torch_fidelity


def logits(count, classes=1008, scale=4.0):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, classes)) * scale).astype(np.float32)


@pytest.mark.parametrize("count", [1000, 537, 10])
def test_against_torch_fidelity(count):
    metric = import_torch_fidelity().metric_isc
    import torch

    values = logits(count)
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
    assert inception_score(certain, seed=None).mean == pytest.approx(7, rel=1e-12)
    assert inception_score(certain, seed=None).std == pytest.approx(0, abs=1e-12)
    assert inception_score(np.tile([1.0, 2.0, 3.0], (50, 1))).mean == pytest.approx(1, rel=1e-12)


def test_adm_cuts_at_a_fixed_size_in_order():
    # Six samples of two classes, then three of one: parts of 6 score 2 and 1.
    values = 100.0 * np.eye(3)[[0, 1, 0, 1, 0, 1, 2, 2, 2]]
    found = adm_inception_score(values, split_size=6)
    assert found.mean == pytest.approx((2 + 1) / 2, rel=1e-12)
    assert found.std == pytest.approx(0.5, rel=1e-12)
    # By the definition, on random ones, in its own words.
    values = logits(50, 20).astype(np.float64)
    p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    scores = []
    for part in (p[:20], p[20:40], p[40:]):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert adm_inception_score(values, split_size=20).mean == pytest.approx(np.mean(scores))


def test_wrong_input():
    with pytest.raises(ValueError, match="found 9 samples for 10 splits"):
        inception_score(logits(9, 5))
    with pytest.raises(ValueError, match="found 0 samples"):
        adm_inception_score(np.zeros((0, 5)))
    values = logits(20, 5)
    values[3] = np.nan
    with pytest.raises(ValueError, match="sample 3 is not finite, nor are 0 others of 20"):
        adm_inception_score(values)
