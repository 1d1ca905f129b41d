"""Rates of steps, by hand."""

from types import SimpleNamespace

import pytest

from repulsor_jax.runtime import flops, throughput
from tests.oracles import tiny


def test_mfu_is_the_share_of_the_chips_peak():
    c = tiny.config()
    device = SimpleNamespace(device_kind="TPU v4")
    found = throughput.training_throughput(c.model, 16, device, 8)
    step_flops = 3 * 16 * flops.forward_flops(c.model)
    rates = found.rates(1e-6)
    assert rates["images_per_second_per_chip"] == pytest.approx(16e6 / found.num_chips)
    assert rates["mfu"] == pytest.approx(step_flops / 1e-6 / (found.num_chips * 275e12))


def test_an_unknown_chip_has_no_mfu():
    found = throughput.training_throughput(
        tiny.config().model, 16, SimpleNamespace(device_kind="cpu"), 4
    )
    assert "mfu" not in found.rates(0.5)
    assert found.rates(0.5)["images_per_second_per_chip"] == 8
