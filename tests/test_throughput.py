"""FLOPs of the closed form against those of the program's own matrix products."""

import math
from types import SimpleNamespace

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from repulsor_jax import throughput
from repulsor_jax.train_state import build_model
from tests import tiny

MODELS = {
    "plain": {},
    "published head": {"model__learn_sigma": True, "model__mlp_ratio": 3.5, "model__patch_size": 4},
    "scanned": {"model__scan_blocks": True, "model__depth": 5, "model__in_channels": 3},
}


def product_flops(jaxpr, times=1):
    """FLOPs of the matrix products of a jaxpr, those in a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += product_flops(inner, repeats)
    return times * total


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_forward_flops_are_those_of_the_traced_model(options):
    c = tiny.config(**options)
    model, params = build_model(c.model), tiny.random_params(c)
    shape = (1, c.model.latent_size, c.model.latent_size, c.model.in_channels)
    x, t = jax.numpy.zeros(shape), jax.numpy.zeros((1,))
    traced = jax.make_jaxpr(lambda p, x: model.apply({"params": p}, x, t, t.astype(int)))(params, x)
    assert throughput.forward_flops(c.model) == product_flops(traced.jaxpr)


def test_the_published_model_has_its_published_flops():
    """DiT's table 1 gives 118.6 Gflops for XL/2 at 32x32x4, counting a multiply-add as one."""
    from configs import imagenet256
    from repulsor_jax import config as config_lib

    c = config_lib.parse(imagenet256.get_config("xl_2,none"))
    assert throughput.forward_flops(c.model) / 2e9 == pytest.approx(118.6, rel=0.005)


def test_mfu_is_the_share_of_the_chips_peak():
    c = tiny.config()
    device = SimpleNamespace(device_kind="TPU v4")
    found = throughput.training_throughput(c.model, 16, device, 8)
    flops = 3 * 16 * throughput.forward_flops(c.model)
    rates = found.rates(1e-6)
    assert rates["images_per_second_per_chip"] == pytest.approx(16e6 / found.num_chips)
    assert rates["mfu"] == pytest.approx(flops / 1e-6 / (found.num_chips * 275e12))


def test_an_unknown_chip_has_no_mfu():
    found = throughput.training_throughput(
        tiny.config().model, 16, SimpleNamespace(device_kind="cpu"), 4
    )
    assert "mfu" not in found.rates(0.5)
    assert found.rates(0.5)["images_per_second_per_chip"] == 8
