import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from configs import imagenet256
from repulsor_jax import config as config_lib
from repulsor_jax.models.build import build_model, init_model_params
from repulsor_jax.runtime import flops
from tests.oracles import tiny


@pytest.mark.parametrize(
    ("variant", "gmacs"), [("s_2", 6.06), ("b_2", 23.01), ("l_2", 80.71), ("xl_2", 118.64)]
)
def test_published_counts(variant, gmacs):
    """arXiv 2212.09748, table 4: Gflops there are multiply-adds."""
    config = config_lib.parse(imagenet256.get_config(variant))
    assert flops.forward_flops(config.model) / 2e9 == pytest.approx(gmacs, rel=2e-3)


def test_agrees_with_what_xla_counts_of_an_unrolled_model():
    config = tiny.config(
        model__depth=2, model__hidden_size=64, model__latent_size=16, model__learn_sigma=True
    )
    model = build_model(dataclasses.replace(config.model, scan_blocks=False))
    params = jax.eval_shape(lambda key: init_model_params(model, key), jax.random.key(0))

    def products(params, x, t, labels):
        return model.apply({"params": params}, x, t, labels)

    x = jax.ShapeDtypeStruct((1, 16, 16, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(products)(params, x, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    assert flops.forward_flops(config.model) == sum(dot_flops(jaxpr.jaxpr))


def dot_flops(jaxpr):
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dot_flops(inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = equation.outvars[0].aval.size
            for axis in contracted:
                size *= equation.invars[0].aval.shape[axis]
            yield 2 * size
