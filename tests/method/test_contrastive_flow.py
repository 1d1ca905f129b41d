"""Contrastive flow matching against the published program's values, loops and closed forms."""

import jax
import numpy as np
import pytest

from repulsor_jax.flows.sampler import scale_velocity
from repulsor_jax.method import contrastive_flow


@pytest.mark.parametrize("rows", ["all", "conditional_only"])
def test_as_published(reference_fixtures, rows):
    values = np.load(reference_fixtures / "contrastive_fm_visible.npz")
    prediction, target = values["prediction"], values["target"]
    negatives = target[values[f"{rows}/negatives"]]
    weights = None
    if rows == "conditional_only":
        weights = contrastive_flow.row_weights(values["labels"], int(values["null"]))

    def loss_fn(prediction):
        flow = ((prediction - target) ** 2).mean()
        term = contrastive_flow.contrast(prediction, negatives, weights)
        return flow + float(values["weight"]) * term, term

    (loss, term), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(prediction)
    np.testing.assert_allclose(term, -values[f"{rows}/contrast_per_sample"].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, values[f"{rows}/loss"], rtol=1e-5)
    expected = values[f"{rows}/grad"]
    assert np.linalg.norm(gradient - expected) <= 1e-4 * np.linalg.norm(expected)


def test_interference_as_published(reference_fixtures):
    values = np.load(reference_fixtures / "contrastive_fm_visible.npz")
    vector = values["interference/vector"]
    found = scale_velocity(values["prediction"], 0.95, -vector)
    expected = values["interference/reduced_0.95_0.05"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_negative_is_the_row_before_and_rows_without_label_do_not_count():
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal((2, 4, 3, 2))
    labels = np.array([0, 7, 2, 7])
    negatives = contrastive_flow.negative_targets(target)
    weights = contrastive_flow.row_weights(labels, 7)
    np.testing.assert_allclose(weights, [2, 0, 2, 0])
    squares = [((prediction[i] - target[i - 1]) ** 2).mean() for i in range(4)]
    found = contrastive_flow.contrast(prediction, negatives)
    np.testing.assert_allclose(found, -np.mean(squares), rtol=1e-6)
    found = contrastive_flow.contrast(prediction, negatives, weights)
    np.testing.assert_allclose(found, -np.mean([squares[0], squares[2]]), rtol=1e-6)


def test_a_batch_without_labels_contrasts_nothing():
    np.testing.assert_array_equal(contrastive_flow.row_weights(np.full(3, 9), 9), np.zeros(3))


def test_the_negatives_get_no_gradient():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 4))
    gradient = jax.grad(lambda b: contrastive_flow.contrast(a, b))(b)
    np.testing.assert_array_equal(gradient, np.zeros_like(b))


def test_a_shorter_velocity_takes_back_what_the_contrast_does_to_the_best_prediction():
    """For one row whose negatives are all rows alike, the minimiser v has zero gradient."""
    weight = 0.3
    targets = np.random.default_rng(0).standard_normal((5, 4))
    mean = targets.mean(0)
    best = (targets[0] - weight * mean) / (1 - weight)

    def loss_fn(v):
        negatives = contrastive_flow.contrast(np.ones((5, 1)) * v, targets)
        return ((v - targets[0]) ** 2).mean() + weight * negatives

    np.testing.assert_allclose(jax.grad(loss_fn)(best), np.zeros(4), atol=1e-6)
    found = scale_velocity(best, 1 - weight, mean)
    np.testing.assert_allclose(found, targets[0], rtol=1e-6)
