"""The diagnostics against loops in NumPy, scikit-learn and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from repulsor_jax.method import diagnostics


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pairs(count):
    return [(i, j) for i in range(count) for j in range(count) if i != j]


def test_alignment_and_uniformity_against_loops():
    a, b = normal(5, 3), normal(5, 3, seed=1)
    expected = np.mean([np.sum((x - y) ** 2) for x, y in zip(unit(a), unit(b), strict=True)])
    np.testing.assert_allclose(diagnostics.alignment(a, b), expected, rtol=1e-6)
    z = unit(a)
    expected = np.log(np.mean([np.exp(-1.5 * np.sum((z[i] - z[j]) ** 2)) for i, j in pairs(5)]))
    np.testing.assert_allclose(diagnostics.uniformity(a, t=1.5), expected, rtol=1e-6)


def test_uniformity_of_a_sphere_and_of_one_point():
    """On the sphere in 3 dimensions E exp(-t |x - y|^2) is (1 - exp(-4 t)) / (4 t)."""
    found = diagnostics.uniformity(normal(2000, 3))
    np.testing.assert_allclose(found, np.log((1 - np.exp(-8.0)) / 8), atol=0.01)
    np.testing.assert_allclose(diagnostics.uniformity(np.ones((4, 3))), 0.0, atol=1e-5)
    np.testing.assert_allclose(diagnostics.uniformity(np.ones((1, 3))), 0.0)


@pytest.mark.parametrize("shape", [(7, 20), (20, 7)])
def test_effective_rank_against_numpy(shape):
    x = normal(*shape) * np.logspace(0, -2, shape[1]) + 5.0
    p = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = p[p > 1e-9] / p.sum()
    expected = np.exp(-np.sum(p * np.log(p)))
    np.testing.assert_allclose(diagnostics.effective_rank(x), expected, rtol=1e-4)


def test_effective_rank_counts_directions():
    directions = np.linalg.qr(normal(64, 3))[0]
    steps = np.kron(np.eye(3), [[1.0], [-1.0]])  # rows +e_k and -e_k: three equal directions
    np.testing.assert_allclose(diagnostics.effective_rank(steps @ directions.T), 3.0, rtol=1e-4)
    one = np.linspace(-1, 1, 32)[:, None] * directions[:, 0] + 100.0
    np.testing.assert_allclose(diagnostics.effective_rank(one), 1.0, atol=1e-3)
    equal = np.tile(normal(1, 64), (32, 1))
    np.testing.assert_allclose(diagnostics.effective_rank(equal), 1.0)


def test_mean_cosines_and_isotropy_against_loops():
    tokens = normal(2, 5, 3) + 0.7
    u = unit(tokens)
    expected = np.mean([[u[b, i] @ u[b, j] for i, j in pairs(5)] for b in range(2)])
    found = diagnostics.mean_cosine_between_tokens(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(diagnostics.isotropy(tokens), 1 - expected, rtol=1e-5)
    expected = np.mean([u[1, i] @ u[1, j] for i, j in pairs(5)])
    found = diagnostics.mean_cosine_between_samples(tokens[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alike = np.tile(normal(1, 8), (6, 1))
    np.testing.assert_allclose(diagnostics.mean_cosine_between_samples(alike), 1.0, rtol=1e-5)


def test_perplexity_of_weighted_negatives_against_numpy():
    logits, weights = normal(3, 6), np.random.default_rng(1).random(6)
    logits[0, 2:] = -np.inf
    weights[1] = 0.0
    p = np.exp(logits) * weights
    p /= p.sum(1, keepdims=True)
    expected = [np.exp(-sum(x * np.log(x) for x in row if x > 0)) for row in p]
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    found = diagnostics.negatives_perplexity(jnp.asarray(logits), log_weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Negatives first, in two axes, as the bank has them.
    stacked = jnp.asarray(logits.T.reshape(2, 3, 3))
    found = diagnostics.negatives_perplexity(stacked, log_weights.reshape(2, 3, 1), axis=(0, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_perplexity_of_equal_of_one_and_of_no_negatives():
    logits = jnp.stack([jnp.full(5, 3.0), jnp.array([90.0, 0, 0, 0, 0]), jnp.full(5, -jnp.inf)])
    np.testing.assert_allclose(diagnostics.negatives_perplexity(logits), [5, 1, 0], rtol=1e-6)


def test_share_of_the_positive():
    positive, negatives = np.array([1.0, -2.0]), np.array([[0.5, 2.0], [0.0, 1.0]])
    sums = np.exp(negatives).sum(1)
    found = diagnostics.positive_share(jnp.asarray(positive), np.log(sums))
    np.testing.assert_allclose(found, np.exp(positive) / (np.exp(positive) + sums), rtol=1e-5)
    np.testing.assert_allclose(diagnostics.positive_share(jnp.zeros(1), -jnp.inf), [1.0])


def test_ridge_probe_is_that_of_scikit_learn():
    """Whose penalty is on a sum over rows, ours on the mean, and whose targets are -1 and 1."""
    labels = np.arange(90) % 3
    x = normal(90, 5) * [1, 10, 0.1, 1, 1] + 0.8 * labels[:, None] * [1, 10, 0, 0, 0] + 3.0
    train, test = slice(0, 60), slice(60, 90)
    scaler = StandardScaler().fit(x[train])
    probe = RidgeClassifier(alpha=0.1 * 60).fit(scaler.transform(x[train]), labels[train])
    expected = probe.score(scaler.transform(x[test]), labels[test])
    assert 0.4 < expected < 0.95  # neither chance nor certainty
    constant = np.concatenate([x, np.full((90, 1), 7.0)], axis=1)
    for features in (x, constant):
        found = diagnostics.ridge_probe(
            features[train], labels[train], features[test], labels[test], 3, 0.1
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    padded, padded_labels = np.concatenate([x, 50 + x]), np.concatenate([labels, 2 - labels])
    mask = np.arange(180) < 60
    found = diagnostics.ridge_probe(
        padded,
        padded_labels,
        padded,
        padded_labels,
        3,
        0.1,
        train_mask=mask,
        test_mask=np.roll(mask, 60) & (np.arange(180) < 90),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gradient_share_and_cosine():
    term, flow = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    a, b = np.linalg.norm(term), np.linalg.norm(flow)
    for scale in (1.0, 1e-30):  # squares of the second are zero in float32
        share, cosine = jax.jit(diagnostics.gradient_share)(scale * term, scale * flow)
        np.testing.assert_allclose(share, a / (a + b), rtol=1e-5)
        np.testing.assert_allclose(cosine, np.sum(term * flow) / (a * b), rtol=1e-5)
    zeros = jnp.zeros_like(term)
    assert diagnostics.gradient_share(zeros, zeros) == (0, 0)
    assert diagnostics.gradient_share(zeros, flow) == (0, 0)
    assert diagnostics.gradient_share(term, zeros) == (1, 0)


@pytest.mark.parametrize("kind", ["zeros", "one sample", "equal"])
def test_a_collapsed_run_has_finite_numbers(kind):
    tokens = jnp.asarray(normal(4, 3, 8), jnp.bfloat16)
    tokens = {"zeros": 0 * tokens, "one sample": tokens[:1], "equal": 0 * tokens + 1}[kind]
    pooled, labels = tokens.mean(1), np.zeros(len(tokens), np.int32)
    found = [
        diagnostics.alignment(pooled, pooled),
        diagnostics.uniformity(pooled),
        diagnostics.effective_rank(pooled),
        diagnostics.mean_cosine_between_samples(pooled),
        diagnostics.isotropy(tokens),
        diagnostics.ridge_probe(pooled, labels, pooled, labels, 2),
    ]
    assert all(value.dtype == jnp.float32 and np.isfinite(value) for value in found)
