import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax.method import head, memory_bank, registry, repulsion
from repulsor_jax.method.dispersive import dispersive_loss
from repulsor_jax.method.term import Seen
from tests.oracles import tiny


@pytest.mark.parametrize("off", [{"terms": "none"}, {"terms": ""}, {"repulsor.weight": 0.0}])
def test_off_is_no_term(off):
    assert registry.build(tiny.config(**off)) == ()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("attraction", "config.terms: expected none, or a sum of .*repulsor.*, found 'attr"),
        ("sra+sra", "config.terms: expected each term once, found 'sra' twice"),
    ],
)
def test_an_unknown_or_repeated_name_is_refused(terms, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        tiny.config(terms=terms)


def seen(rng, blocks, **parts):
    """What a step shows its terms, made up: 4 x 4 x 2 latents, 4 tokens of width 32."""
    data = rng.standard_normal((tiny.BATCH, *tiny.SHAPE)).astype(np.float32)
    tokens = {b: rng.standard_normal((tiny.BATCH, 4, 32)).astype(np.float32) for b in blocks}
    t = rng.uniform(size=tiny.BATCH).astype(np.float32)
    ids = rng.integers(0, 10, tiny.BATCH)
    tags = memory_bank.tag(jnp.asarray(ids), jnp.asarray(ids % 3), jnp.asarray(t))
    return Seen(data, t, tags, data, tokens, {}, None)._replace(**parts)


def random_params(rng, term):
    abstract = nn.unbox(jax.eval_shape(term.init, jax.random.key(1)))
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), abstract)


def test_repulsor_is_pool_head_and_loss():
    c = tiny.config(
        repulsor__pooling="flatten", repulsor__temperature=0.2, repulsor__distance="cosine"
    )
    (term,) = registry.build(c)
    rng = np.random.default_rng(0)
    params, shown = random_params(rng, term), seen(rng, term.taps)
    bank = term.create_bank()
    assert bank.features.shape == (tiny.SLOTS, tiny.BATCH, tiny.DIM)
    projection = head.ProjectionHead(tiny.DIM, hidden_size=32)

    @jax.jit
    def run(params, shown, bank):
        z = projection.apply({"params": params["head"]}, shown.tokens[0].reshape(tiny.BATCH, -1))
        bank = memory_bank.enqueue(bank, z[::-1])
        expected = repulsion.repulsion_loss(z, bank, shown.tags, temperature=0.2, distance="cosine")
        return term.loss(params, None, shown, bank), (expected, z)

    (loss, rows), (expected, z) = run(params, shown, bank)
    np.testing.assert_allclose(rows.features, z, atol=1e-6)
    np.testing.assert_array_equal(rows.times, shown.t)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("variant", ["l2", "hinge"])
def test_dispersive_is_its_loss_without_parameters_or_bank(variant):
    c = tiny.config(
        terms="dispersive",
        dispersive__variant=variant,
        dispersive__temperature=0.2,
        dispersive__margin=1.7,
    )
    (term,) = registry.build(c)
    shown = seen(np.random.default_rng(0), term.taps)
    assert term.create_bank is None
    assert term.init(jax.random.key(0)) == {}
    loss, rows = jax.jit(lambda shown: term.loss({}, None, shown, None))(shown)
    assert rows is None
    loss_fn = functools.partial(dispersive_loss, variant=variant, temperature=0.2, margin=1.7)
    np.testing.assert_allclose(loss, jax.jit(loss_fn)(shown.tokens[0]))
