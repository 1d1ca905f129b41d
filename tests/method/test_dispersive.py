"""Dispersive Loss against loops in NumPy float64, closed forms and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repulsor_jax.method import dispersive
from repulsor_jax.method.dispersive import VARIANTS

SHAPE = (5, 2, 3)  # of most tests here, which so share a program for each variant


def loss_and_gradient(features, variant="l2", temperature=0.5, margin=1.0):
    return _loss_and_gradient(features, variant, np.float32(temperature), np.float32(margin))


@functools.partial(jax.jit, static_argnums=1)
def _loss_and_gradient(features, variant, temperature, margin):
    loss_fn = functools.partial(
        dispersive.dispersive_loss, variant=variant, temperature=temperature, margin=margin
    )
    return jax.value_and_grad(loss_fn)(features)


def dispersive_loss(features, **options):
    return loss_and_gradient(np.asarray(features, np.float32), **options)[0]


def reference(features, variant, temperature, margin):
    """The definition, pair by pair and entry by entry."""
    rows = [np.asarray(row, np.float64).ravel() for row in features]
    size = len(rows)
    if variant == "covariance":
        rows = [row / np.linalg.norm(row) for row in rows]
        mean = sum(rows) / size
        total = 0.0
        for m in range(mean.size):
            for n in range(mean.size):
                if m != n:
                    c = sum((row[m] - mean[m]) * (row[n] - mean[n]) for row in rows) / size
                    total += c**2
        return total
    total = 0.0
    for a in rows:
        for b in rows:
            if variant == "cosine":
                distance = 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
            else:
                distance = np.sum((a - b) ** 2) / a.size
            if variant == "hinge":
                total += max(0.0, margin - distance) ** 2
            else:
                total += np.exp(-distance / temperature)
    return total / size**2 if variant == "hinge" else np.log(total / size**2)


def make_features(shape=SHAPE, offset=0.0):
    return offset + np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("temperature", "margin"), [(0.5, 1.0), (0.05, 3.0)])
def test_against_loops(variant, temperature, margin):
    features = make_features()
    found = dispersive_loss(features, variant=variant, temperature=temperature, margin=margin)
    assert found.shape == ()
    assert found.dtype == jnp.float32
    expected = reference(features, variant, temperature, margin)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["l2", "hinge"])
def test_a_large_common_offset_costs_no_precision(variant):
    features = make_features(offset=1000.0).astype(np.float32)  # the spread is 1
    found = dispersive_loss(features, variant=variant, margin=3.0)
    np.testing.assert_allclose(found, reference(features, variant, 0.5, 3.0), rtol=1e-4)


def test_the_published_l2_form():
    """log mean exp over [pairs, pairs, zeros], as the authors' PyTorch code builds it."""
    z = make_features().reshape(5, 6)
    pairs = [np.sum((z[i] - z[j]) ** 2) / 6 for i in range(5) for j in range(i)]
    expected = np.log(np.mean(np.exp(-np.array(pairs + pairs + [0.0] * 5))))
    found = dispersive_loss(z.reshape(SHAPE), temperature=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_against_finite_differences(variant):
    features = make_features()
    gradient = loss_and_gradient(features.astype(np.float32), variant, 0.4, 2.0)[1]
    step, expected = 1e-5, np.zeros_like(features)
    for index in np.ndindex(features.shape):
        moved = np.zeros_like(features)
        moved[index] = step
        ahead, behind = (reference(features + d, variant, 0.4, 2.0) for d in (moved, -moved))
        expected[index] = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max() + 1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_rows(variant, dtype):
    features = np.tile(np.linspace(-1.0, 2.0, 6), (5, 1)).reshape(SHAPE).astype(dtype)
    value, gradient = loss_and_gradient(features, variant)
    assert value.dtype == jnp.float32
    expected = 1.0 if variant == "hinge" else 0.0  # the margin squared, or nothing
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(gradient.astype(np.float32), np.zeros(SHAPE), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["one sample", "zero rows", "two equal rows", "huge"])
def test_values_and_gradients_are_finite(variant, kind):
    features = make_features().astype(np.float32)
    features = {
        "one sample": features[:1],
        "zero rows": np.zeros_like(features),
        "two equal rows": features[[0, 0, 1, 2, 3]],
        "huge": 1e6 * features,
    }[kind]
    value, gradient = loss_and_gradient(features, variant, 0.05)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_far_apart_rows_reach_minus_log_batch():
    far = 100.0 * np.eye(16)
    np.testing.assert_allclose(dispersive_loss(far), -np.log(16), rtol=1e-6)
    # Orthogonal rows have cosine distance 1: mean of B ones and B (B - 1) values exp(-1 / tau).
    expected = np.log((1 + 15 * np.exp(-2.0)) / 16)
    np.testing.assert_allclose(dispersive_loss(far, variant="cosine"), expected, rtol=1e-6)
    # Only the zero diagonal is inside the margin.
    np.testing.assert_allclose(dispersive_loss(far, variant="hinge", margin=3.0), 9 / 16, rtol=1e-6)


def test_covariance_of_two_opposite_rows():
    # Rows +u and -u: C = u u^T, so the sum over m != n is 1 - sum_m u_m^4.
    u = np.array([3.0, 4.0]) / 5
    found = dispersive_loss(np.stack([2 * u, -7 * u]), variant="covariance")
    np.testing.assert_allclose(found, 1 - np.sum(u**4), rtol=1e-6)


@pytest.mark.parametrize("variant", ["cosine", "covariance"])  # the others form as "cosine" does
def test_the_mesh_changes_nothing(variant):
    features = make_features((16, 4, 8)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(features, NamedSharding(mesh, PartitionSpec("data")))
    value, gradient = loss_and_gradient(sharded, variant)
    expected, expected_gradient = loss_and_gradient(features, variant)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)


def test_unknown_variant():
    with pytest.raises(ValueError, match="'l1'; expected one of l2, cosine, hinge, covariance"):
        dispersive_loss(np.ones((2, 2)), variant="l1")
