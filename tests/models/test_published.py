"""Published layouts: what a file is, and that its network, made ours, gives what PyTorch gives."""

import numpy as np
import pytest

from repulsor_jax.models import dit, published, torch_weights
from tests.oracles import sit

SIZES = {"num_heads": 2, "patch_size": 2, "in_channels": 4}
SHAPES = {"latent_size": 8, "in_channels": 4, "patch_size": 2}
SHAPES |= {"hidden_size": 16, "depth": 2, "num_heads": 2}
MODEL = dit.DiT(**SHAPES, num_classes=5, mlp_ratio=3.0, learn_sigma=True)


def ours(state, x, t, labels, *, reverse=False, model=MODEL):
    params = torch_weights.from_torch_state_dict(state, **SIZES)
    if reverse:
        params = published.reverse(params)
    out = model.apply({"params": params}, x.transpose(0, 2, 3, 1), np.float32(t), labels)
    return np.asarray(out).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def state():
    return sit.tiny_state()


@pytest.fixture(scope="module")
def inputs():
    values = np.load(sit.TINY)
    return {name: values[name] for name in ("x", "t", "y", "out")}


def test_a_reversed_network_is_ours_with_the_time_and_the_sign_in_its_weights(state, inputs):
    """REPA and SRA: the published values at t are those of ours at 1 - t, with the other sign."""
    found = ours(state, inputs["x"], 1 - inputs["t"], inputs["y"], reverse=True)
    np.testing.assert_allclose(found, -inputs["out"], atol=2e-5)
    plain = ours(state, inputs["x"], inputs["t"], inputs["y"])
    assert np.abs(found + plain).max() < 2e-5
    params = torch_weights.from_torch_state_dict(state, **SIZES)
    again = published.reverse(published.reverse(params))
    np.testing.assert_allclose(again["time_in"]["kernel"], params["time_in"]["kernel"], atol=1e-6)


def test_dit_reads_the_index_of_its_step(inputs):
    pytest.importorskip("torch")
    state, labels = sit.tiny_state(), inputs["y"]
    index = np.array([999, 500, 0])
    expected = sit.evaluate(state, inputs["x"], index.astype(float), labels)
    model = MODEL.clone(time_steps=1_000)
    found = ours(state, inputs["x"], 1 - (index + 1) / 1000, labels, model=model)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_index_is_an_integer_at_all_discrete_times():
    index = np.arange(1000)
    found = dit.step_index(np.float32(1 - (index + 1) / 1000), 1_000)
    np.testing.assert_array_equal(found, index)
    between = dit.step_index(np.float32([0.25 - 1 / 4000, 0.5]), 1_000)
    np.testing.assert_allclose(between, [749.25, 499], atol=1e-3)


def without_sigma(state):
    """The file of a model that predicts no variance, as REPA's and SRA's."""
    weight, bias = (state[f"final_layer.linear.{x}"] for x in ("weight", "bias"))
    keep = np.arange(32) % 8 < 4
    return state | {
        "final_layer.linear.weight": weight[keep],
        "final_layer.linear.bias": bias[keep],
    }


REPA_HEAD = {"projectors.0.0.weight": np.zeros((3, 16)), "projectors.0.4.bias": np.zeros(7)}
SRA_HEAD = {"ap_head.linear.0.weight": np.zeros((32, 16))}


@pytest.mark.parametrize(
    ("make", "convention", "is_certain", "said"),
    [
        (lambda s: s, "sit", False, "SiT, or DiT"),
        (lambda s: without_sigma(s) | REPA_HEAD, "reversed", True, "REPA's SiT, without its head"),
        (lambda s: without_sigma(s) | SRA_HEAD, "reversed", True, "SRA's SiT"),
        (lambda s: s | SRA_HEAD, "dit", True, "SRA's DiT"),
        (without_sigma, "sit", False, "or that of REPA or SRA without its head"),
        (lambda s: {f"module._orig_mod.{n}": a for n, a in s.items()}, "sit", False, "SiT"),
    ],
)
def test_what_a_file_is(state, make, convention, is_certain, said):
    given = make(state)
    found = published.recognise(given)
    assert (found.convention, found.is_certain) == (convention, is_certain)
    assert said in found.description
    assert set(found.state) == set(state)
    expected = SHAPES | {"num_classes": 5, "mlp_ratio": 3.0, "qk_norm": False}
    expected["learn_sigma"] = len(found.state["final_layer.linear.bias"]) == 32
    del expected["num_heads"]
    assert found.sizes == expected


def test_the_first_version_of_repa_counted_the_blocks_in_two_parts(state):
    renamed = {n.replace("blocks.1.", "decoder_blocks.0."): a for n, a in state.items()}
    assert set(renamed) != set(state)
    found = published.recognise(renamed | REPA_HEAD)
    assert set(found.state) == set(state)
    np.testing.assert_array_equal(
        found.state["blocks.1.mlp.fc1.bias"], state["blocks.1.mlp.fc1.bias"]
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"encoder.conv_in.weight": np.zeros(3)}, "1 tensors, as encoder.conv_in.weight, expected"),
        ({"transformer_blocks.0.norm1.linear.bias": np.zeros(3)}, "diffusers' names"),
    ],
)
def test_another_network_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        published.recognise(tensors)
