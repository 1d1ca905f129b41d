import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import memory_bank, repulsion
from repulsor_jax.dispersive import dispersive_loss


def reference(z, rows, temperature, distance):
    """The definition, pair by pair, in float64."""
    z, rows = z.astype(np.float64), rows.astype(np.float64)
    terms = []
    for i, anchor in enumerate(z):
        others = [z[j] for j in range(len(z)) if j != i] + list(rows)
        repulsions = []
        for other in others:
            if distance == "squared_l2":
                dist = ((anchor - other) ** 2).sum()
            else:
                dist = 1 - anchor @ other / np.linalg.norm(anchor) / np.linalg.norm(other)
            repulsions.append(np.exp(-dist / temperature))
        terms.append(np.log(np.mean(repulsions)))
    return np.array(terms)


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def filled_bank(rng, slots, written, batch_size, dim, dtype=jnp.float32):
    bank = memory_bank.create(slots, batch_size, dim, dtype)
    kept = []
    for _ in range(written):
        kept.append(unit(rng, batch_size, dim))
        bank = memory_bank.enqueue(bank, jnp.asarray(kept[-1]))
    return bank, np.concatenate(kept[-slots:]) if kept else np.zeros((0, dim))


@pytest.mark.parametrize("distance", repulsion.DISTANCES)
@pytest.mark.parametrize("written", [0, 1, 3, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_matches_the_definition(distance, written, temperature):
    rng = np.random.default_rng(written)
    z = unit(rng, 5, 4)
    bank, rows = filled_bank(rng, slots=3, written=written, batch_size=5, dim=4)
    terms = repulsion.repulsion_per_sample(
        jnp.asarray(z), bank, temperature=temperature, distance=distance
    )
    expected = reference(z, rows, temperature, distance)
    np.testing.assert_allclose(terms, expected, rtol=2e-5, atol=2e-6)
    loss = repulsion.repulsion_loss(
        jnp.asarray(z), bank, temperature=temperature, distance=distance
    )
    np.testing.assert_allclose(loss, expected.mean(), rtol=2e-5)


def test_matches_the_definition_without_unit_length():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4, 3)).astype(np.float32)
    terms = repulsion.repulsion_per_sample(jnp.asarray(z), temperature=2.0)
    np.testing.assert_allclose(terms, reference(z, np.zeros((0, 3)), 2.0, "squared_l2"), rtol=1e-5)


@pytest.mark.parametrize("distance", repulsion.DISTANCES)
@pytest.mark.parametrize("written", [0, 2])
def test_gradient_matches_finite_differences(distance, written):
    rng = np.random.default_rng(1)
    z = unit(rng, 4, 3)
    bank, rows = filled_bank(rng, slots=3, written=written, batch_size=4, dim=3)
    gradient = jax.grad(
        lambda x: repulsion.repulsion_loss(x, bank, temperature=0.5, distance=distance)
    )(jnp.asarray(z))
    numeric = np.zeros(z.shape)
    for index in np.ndindex(*z.shape):
        step = np.zeros(z.shape)
        step[index] = 1e-5
        up, down = (reference(z + s * step, rows, 0.5, distance).mean() for s in (1, -1))
        numeric[index] = (up - down) / 2e-5
    np.testing.assert_allclose(gradient, numeric, atol=2e-5)


def test_an_empty_bank_is_the_batch_alone():
    z = jnp.asarray(unit(np.random.default_rng(2), 6, 4))
    empty = memory_bank.create(3, 6, 4)
    np.testing.assert_allclose(
        repulsion.repulsion_loss(z, empty), repulsion.repulsion_loss(z), rtol=1e-6
    )
    with_bank, without = (
        jax.grad(lambda x, b=b: repulsion.repulsion_loss(x, b))(z) for b in (empty, None)
    )
    np.testing.assert_allclose(with_bank, without, atol=1e-6)


def test_dispersive_loss_is_the_empty_bank_limit():
    """The same pairs; Dispersive adds each sample's pair with itself and takes the log last."""
    tokens = np.random.default_rng(3).standard_normal((6, 4, 5)).astype(np.float32)

    def from_repulsion(tokens):
        z = repulsion.pool(tokens, "flatten")
        z = z / jnp.sqrt(z.shape[1])  # Dispersive divides squared distances by the feature size
        terms = repulsion.repulsion_per_sample(z, memory_bank.create(2, *z.shape), temperature=0.5)
        batch_size = z.shape[0]
        return jnp.log(jnp.mean((1.0 + (batch_size - 1) * jnp.exp(terms)) / batch_size))

    def direct(tokens):
        return dispersive_loss(tokens, variant="l2", temperature=0.5)

    value, gradient = jax.value_and_grad(from_repulsion)(jnp.asarray(tokens))
    expected, expected_gradient = jax.value_and_grad(direct)(jnp.asarray(tokens))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_the_loss_is_continuous_while_the_bank_fills():
    """A bank filled with copies of the batch's own spread changes the mean little at each step."""
    rng = np.random.default_rng(4)
    z = jnp.asarray(unit(rng, 64, 8))
    bank = memory_bank.create(4, 64, 8)
    losses = [float(repulsion.repulsion_loss(z, bank))]
    for _ in range(4):
        bank = memory_bank.enqueue(bank, jnp.asarray(unit(rng, 64, 8)))
        losses.append(float(repulsion.repulsion_loss(z, bank)))
    assert np.abs(np.diff(losses)).max() < 0.1


def test_a_lone_sample_without_negatives_costs_nothing():
    z = jnp.ones((1, 3))
    for bank in (None, memory_bank.create(2, 1, 3)):
        value, gradient = jax.value_and_grad(lambda x, b=bank: repulsion.repulsion_loss(x, b))(z)
        assert float(value) == 0.0
        assert not gradient.any()


def test_identical_rows_repel_at_zero_distance_with_finite_gradient():
    z = jnp.ones((4, 3)) / jnp.sqrt(3.0)
    for distance in repulsion.DISTANCES:
        value, gradient = jax.value_and_grad(
            lambda x, d=distance: repulsion.repulsion_loss(x, distance=d)
        )(z)
        np.testing.assert_allclose(value, 0.0, atol=1e-5)
        assert np.isfinite(gradient).all()


def test_a_bfloat16_bank_is_close_to_float32():
    rng = np.random.default_rng(5)
    z = jnp.asarray(unit(rng, 16, 32))
    half, rows = filled_bank(np.random.default_rng(6), 4, 4, 16, 32, jnp.bfloat16)
    exact = reference(np.asarray(z), rows, 0.5, "squared_l2").mean()
    np.testing.assert_allclose(repulsion.repulsion_loss(z, half), exact, rtol=2e-3)


def test_unknown_distance_and_pooling_are_refused():
    with pytest.raises(ValueError, match="squared_l2"):
        repulsion.repulsion_loss(jnp.ones((2, 2)), distance="manhattan")
    with pytest.raises(ValueError, match="flatten"):
        repulsion.pool(jnp.ones((2, 2, 2)), "max")


def test_head_gives_unit_vectors_of_its_dense_silu_dense():
    rng = np.random.default_rng(7)
    pooled = rng.standard_normal((5, 6)).astype(np.float32)
    head = repulsion.ProjectionHead(3, hidden_size=7)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32),
        jax.eval_shape(head.init, jax.random.key(0), pooled)["params"],
    )
    z = head.apply({"params": params}, pooled.astype(jnp.bfloat16))
    assert z.dtype == jnp.float32
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), _plain(params))
    pooled = np.asarray(pooled.astype(jnp.bfloat16), np.float64)
    hidden = pooled @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    out = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    expected = out / np.linalg.norm(out, axis=-1, keepdims=True)
    np.testing.assert_allclose(z, expected, atol=1e-5)


def _plain(params):
    import flax.linen as nn

    return nn.unbox(params)
