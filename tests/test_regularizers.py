import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import regularizers, repulsion
from repulsor_jax.dispersive import dispersive_loss
from tests import tiny


@pytest.mark.parametrize("off", [{"regularizer.name": "none"}, {"regularizer.weight": 0.0}])
def test_off_is_none(off):
    assert regularizers.build(tiny.config(**off)) is None


def test_an_unknown_name_is_refused_with_the_names():
    with pytest.raises(config_lib.ConfigError, match="'dispersive', 'none', 'repulsor'"):
        regularizers.build(tiny.config(regularizer__name="attraction"))


def test_repulsor_is_pool_head_and_loss():
    r = regularizers.build(tiny.config(regularizer__pooling="flatten"))
    tokens = jax.random.normal(jax.random.key(0), (tiny.BATCH, 4, 32))
    params = r.init(jax.random.key(1), jax.ShapeDtypeStruct((1, 4, 32), jnp.float32))
    bank = r.create_bank()
    assert bank.features.shape == (tiny.SLOTS, tiny.BATCH, tiny.DIM)
    loss, z = r.loss(params, tokens, bank)
    assert z.shape == (tiny.BATCH, tiny.DIM)
    np.testing.assert_allclose(loss, repulsion.repulsion_loss(z, bank), rtol=1e-6)


def test_dispersive_is_its_loss_without_parameters_or_bank():
    r = regularizers.build(
        tiny.config(regularizer__name="dispersive", regularizer__variant="cosine")
    )
    tokens = jax.random.normal(jax.random.key(0), (4, 3, 8))
    assert r.create_bank is None
    assert r.init(jax.random.key(0), tokens) == {}
    loss, z = r.loss({}, tokens, None)
    assert z is None
    np.testing.assert_allclose(loss, dispersive_loss(tokens, variant="cosine", temperature=0.5))
