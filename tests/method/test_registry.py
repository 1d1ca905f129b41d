import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax.method import head, memory_bank, registry, repulsion
from repulsor_jax.method.dispersive import dispersive_loss
from tests.oracles import tiny


def build(c):
    return registry.build(c.regularizer, hidden_size=c.model.hidden_size, batch_size=c.batch_size)


@pytest.mark.parametrize("off", [{"regularizer.name": "none"}, {"regularizer.weight": 0.0}])
def test_off_is_none(off):
    assert build(tiny.config(**off)) is None


def test_an_unknown_name_is_refused_with_the_names():
    message = "config.regularizer.name: expected one of .*none.*, found 'attr"
    with pytest.raises(config_lib.ConfigError, match=message):
        tiny.config(regularizer__name="attraction")


def test_repulsor_is_pool_head_and_loss():
    r = build(
        tiny.config(
            regularizer__pooling="flatten",
            regularizer__temperature=0.2,
            regularizer__distance="cosine",
        )
    )
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((tiny.BATCH, 4, 32)).astype(np.float32)
    params = jax.tree.map(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32),
        jax.eval_shape(r.init, jax.random.key(1), jax.ShapeDtypeStruct((1, 4, 32), jnp.float32)),
    )
    bank = r.create_bank()
    assert bank.features.shape == (tiny.SLOTS, tiny.BATCH, tiny.DIM)
    projection = head.ProjectionHead(tiny.DIM, hidden_size=32)

    @jax.jit
    def run(params, tokens, bank):
        z = projection.apply({"params": params}, tokens.reshape(tiny.BATCH, -1))
        bank = memory_bank.enqueue(bank, z[::-1])
        expected = repulsion.repulsion_loss(z, bank, temperature=0.2, distance="cosine")
        return r.loss(params, tokens, bank), (expected, z)

    (loss, found), (expected, z) = run(params, tokens, bank)
    np.testing.assert_allclose(found, z, atol=1e-6)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("variant", ["l2", "hinge"])
def test_dispersive_is_its_loss_without_parameters_or_bank(variant):
    r = build(
        tiny.config(
            regularizer__name="dispersive",
            regularizer__variant=variant,
            regularizer__temperature=0.2,
            regularizer__margin=1.7,
        )
    )
    tokens = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    assert r.create_bank is None
    assert r.init(jax.random.key(0), tokens) == {}
    loss, z = jax.jit(r.loss)({}, tokens, None)
    assert z is None
    loss_fn = functools.partial(dispersive_loss, variant=variant, temperature=0.2, margin=1.7)
    expected = jax.jit(loss_fn)(tokens)
    np.testing.assert_allclose(loss, expected)
