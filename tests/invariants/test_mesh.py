"""Invariant 1: the mesh changes speed, never results."""

import jax
import numpy as np
import pytest

from tests.oracles import tiny

# Data alone, fsdp alone, and all three at once.
MESHES = [(8, 1, 1), (1, 4, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def on_one_device():
    state, history = tiny.build(tiny.config(), tiny.mesh()).run(tiny.batches(5))
    return jax.device_get(state), history


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_any_mesh_gives_the_same_losses_and_bank(on_one_device, shape):
    expected_state, expected = on_one_device
    state, history = tiny.build(tiny.config(), tiny.mesh(*shape)).run(tiny.batches(5))
    for name in expected[0]:
        found = [m[name] for m in history]
        np.testing.assert_allclose(found, [m[name] for m in expected], rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(state.bank.features, expected_state.bank.features, atol=1e-4)
    assert int(state.bank.cursor) == int(expected_state.bank.cursor)
    # The very first loss has no rounding of earlier updates in it.
    np.testing.assert_allclose(history[0]["loss"], expected[0]["loss"], rtol=1e-6)
