"""The model's FLOPs against published counts and a hand count; rates of steps by hand."""

from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from configs import imagenet256
from repulsor_jax import config as config_lib
from repulsor_jax.loss import Inputs, Teacher, make_residual_loss
from repulsor_jax.method.memory_bank import tag
from repulsor_jax.models.build import build_model, init_model_params
from repulsor_jax.runtime import throughput
from tests.oracles import tiny


@pytest.mark.parametrize(
    ("variant", "gmacs"), [("s_2", 6.06), ("b_2", 23.01), ("l_2", 80.71), ("xl_2", 118.64)]
)
def test_forward_flops_are_the_published_counts(variant, gmacs):
    """arXiv 2212.09748, table 4: Gflops there are multiply-adds."""
    config = config_lib.parse(imagenet256.get_config(variant))
    assert throughput.forward_flops(config.model) / 2e9 == pytest.approx(gmacs, rel=2e-3)


BLOCKWISE = {"model__architecture": "blockwise", "model__segments": 1, "model__learn_sigma": False}


@pytest.mark.parametrize("options", [{}, BLOCKWISE, BLOCKWISE | {"model__adaln_rank": 0}])
def test_forward_flops_are_the_products_of_the_jaxpr(options):
    shape = {"model__depth": 2, "model__hidden_size": 64, "model__latent_size": 16}
    config = tiny.config(**shape | {"model__learn_sigma": True} | options)
    model = build_model(config.model)
    params = jax.eval_shape(lambda key: init_model_params(model, key), jax.random.key(0))

    def forward(params, x, t, labels):
        return model.apply({"params": params}, x, t, labels)

    x = jax.ShapeDtypeStruct((1, 16, 16, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(forward)(params, x, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    assert throughput.forward_flops(config.model) == sum(dot_flops(jaxpr.jaxpr))


def test_a_residual_network_is_trained_beside_two_passes_of_the_frozen_trunk():
    shape = {"model__depth": 3, "model__hidden_size": 64, "model__latent_size": 16}
    second = {"model__residual_depth": 2, "residual__base_run": "base", "terms": "none"}
    c = tiny.config(**shape | BLOCKWISE | second, log__diagnostics_every_steps=0)
    trainer = tiny.trainer(c)
    params = tiny.random_params(c)
    x, zero = jnp.zeros((1, 16, 16, 2)), jnp.zeros(1, jnp.int32)
    inputs = Inputs(x, x, jnp.zeros(1), zero, tag(zero), {}, {}, {})

    def loss(residual):
        own = {"model": {"residual": residual}, "terms": {}}
        return make_residual_loss(trainer)(own, Teacher(params, {}), inputs, None, {})[0]

    forward, both = (
        sum(dot_flops(jax.make_jaxpr(f)(params["residual"]).jaxpr)) for f in (loss, jax.grad(loss))
    )
    found = throughput.training_flops(c.model)
    # Backward is twice forward, but for the network's inputs, which need no gradient.
    assert found == pytest.approx(both, rel=0.05)
    block = 2 * (64 * 12 * 64**2 + 2 * 64**2 * 64) + 12 * 64**2  # 64 tokens of width 64
    assert (found - forward) / 2 == 2 * block


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


def test_mfu_is_the_share_of_the_chips_peak():
    c = tiny.config()
    found = throughput.training_throughput(c.model, 16, SimpleNamespace(device_kind="TPU7x"), 8)
    assert found.num_chips == 4  # of two devices each
    rates = found.rates(1e-6)
    step_flops = 3 * 16 * throughput.forward_flops(c.model)
    assert rates["images_per_second_per_chip"] == pytest.approx(16e6 / 4)
    assert rates["mfu"] == pytest.approx(step_flops / 1e-6 / (4 * 2307e12))


def test_an_unknown_chip_has_no_mfu():
    cpu = SimpleNamespace(device_kind="cpu")
    rates = throughput.training_throughput(tiny.config().model, 16, cpu, 4).rates(0.5)
    assert "mfu" not in rates
    assert rates["images_per_second_per_chip"] == 8
