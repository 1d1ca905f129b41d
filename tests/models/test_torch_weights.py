import pathlib

import jax
import numpy as np
import pytest
from flax import linen as nn

from repulsor_jax.models import dit, torch_weights

TINY = pathlib.Path(__file__).parents[1] / "data" / "sit_tiny.npz"
SIZES = {"num_heads": 2, "patch_size": 2, "in_channels": 4}
BACK = {"num_heads": 2, "patch_size": 2, "latent_size": 8}


def read_state(path: pathlib.Path, *prefixes: str) -> dict[str, np.ndarray]:
    values = np.load(path)
    return {
        key.removeprefix(prefix): values[key].astype(np.float32)
        for prefix in prefixes
        for key in values.files
        if key.startswith(prefix)
    }


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    return read_state(TINY, "state/")


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("prefixes", [["state/"], ["state/", "qk_norm/state/"]])
def test_round_trips_are_exact(prefixes: list[str]) -> None:
    state = read_state(TINY, *prefixes)
    params = torch_weights.from_torch_state_dict(state, **SIZES)
    assert_same(torch_weights.to_torch_state_dict(params, **BACK), state)
    assert_same(
        torch_weights.to_torch_state_dict(torch_weights.stack_blocks(params), **BACK), state
    )
    again = torch_weights.to_torch_state_dict(params, **BACK)
    again = torch_weights.from_torch_state_dict(again, **SIZES)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_round_trip_of_the_published_layout(reference_fixtures: pathlib.Path) -> None:
    state = read_state(reference_fixtures / "sit_small.npz", "state/")
    params = torch_weights.from_torch_state_dict(state, num_heads=4, patch_size=2, in_channels=4)
    back = torch_weights.to_torch_state_dict(params, num_heads=4, patch_size=2, latent_size=8)
    assert_same(back, state)
    assert list(back) == list(state)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_converted_parameters_fit_the_model(learn_sigma: bool, qk_norm: bool) -> None:
    model = dit.DiT(8, 4, 2, 16, 2, 2, 5, 3.0, learn_sigma, qk_norm)
    inputs = (np.zeros((1, 8, 8, 4)), np.zeros(1), np.zeros(1, np.int32))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    state = torch_weights.to_torch_state_dict(params, **BACK)
    back = torch_weights.from_torch_state_dict(state, **SIZES)
    jax.tree.map(np.testing.assert_array_equal, back, params)


class Tensor:
    """What the converter may ask of a torch tensor that needs a gradient."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.calls: tuple[str, ...] = ()

    def detach(self) -> "Tensor":
        self.calls += ("detach",)
        return self

    def float(self) -> np.ndarray:
        assert self.calls == ("detach",)
        return self.array


def test_tensors_need_no_torch(state: dict[str, np.ndarray]) -> None:
    tensors = {name: Tensor(array) for name, array in state.items()}
    found = torch_weights.from_torch_state_dict(tensors, **SIZES)
    expected = torch_weights.from_torch_state_dict(state, **SIZES)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def refused(state: dict[str, np.ndarray], message: str, **changes: int) -> None:
    with pytest.raises(ValueError, match=message):
        torch_weights.from_torch_state_dict(state, **{**SIZES, **changes})


@pytest.mark.parametrize(
    "name", ["pos_embed", "blocks.0.mlp.fc1.bias", "final_layer.adaLN_modulation.1.weight"]
)
def test_a_missing_tensor_is_named(state: dict[str, np.ndarray], name: str) -> None:
    del state[name]
    refused(state, f"^{name}: found no such tensor")


@pytest.mark.parametrize("name", ["blocks.0.attn.q_norm.bias", "ema.decay"])
def test_a_superfluous_tensor_is_named(state: dict[str, np.ndarray], name: str) -> None:
    state[name] = np.zeros((3, 4), np.float32)
    refused(state, rf"^{name}: found a tensor of shape \[3, 4\], expected none of this name")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.1.attn.qkv.weight", (48, 17), r"\[48, 16\]"),
        ("pos_embed", (1, 16, 12), r"\[1, N, 16\]"),
        ("pos_embed", (16, 16), r"\[1, N, 16\]"),
        ("pos_embed", (1, 15, 16), r"\[1, N, 16\], N a square"),
        ("y_embedder.embedding_table.weight", (6,), r"\[6, 16\]"),
    ],
)
def test_a_misshapen_tensor_is_named(
    state: dict[str, np.ndarray], name: str, shape: tuple[int, ...], expected: str
) -> None:
    state[name] = np.zeros(shape, np.float32)
    found = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    refused(state, f"^{name}: found shape {found}, expected {expected}")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_prefixed(state: dict[str, np.ndarray], prefix: str) -> None:
    wrapped = {prefix + name: array for name, array in state.items()}
    with pytest.raises(ValueError, match=f"found names that begin with '{prefix}', as .* take it"):
        torch_weights.from_torch_state_dict(wrapped, **SIZES)


def test_a_whole_checkpoint_of_training(state: dict[str, np.ndarray]) -> None:
    whole = {"model": state, "ema": state, "opt": {}, "args": None}
    message = r"dictionaries under \['model', 'ema', 'opt'\].*such as state\['ema'\]"
    with pytest.raises(ValueError, match=message):
        torch_weights.from_torch_state_dict(whole, **SIZES)


def test_arguments_that_do_not_fit_are_named(state: dict[str, np.ndarray]) -> None:
    refused(state, "num_heads: found 3, expected a divisor", num_heads=3)
    refused(state, r"final_layer\.linear\.bias: found 8 output channels", in_channels=3)


def test_other_positions_are_refused(state: dict[str, np.ndarray]) -> None:
    state["pos_embed"] = state["pos_embed"][:, ::-1]
    refused(state, "pos_embed: found values up to")


def test_misfitting_parameters_are_named(state: dict[str, np.ndarray]) -> None:
    params = torch_weights.from_torch_state_dict(state, **SIZES)
    block = params["block_1"]
    missing = {**params, "block_1": {k: v for k, v in block.items() if k != "proj"}}
    with pytest.raises(ValueError, match="block_1/proj/kernel: found no such tensor"):
        torch_weights.to_torch_state_dict(missing, **BACK)
    extra = {**params, "head": {"kernel": np.zeros((2, 2), np.float32)}}
    with pytest.raises(ValueError, match=r"head/kernel: found a tensor of shape \[2, 2\]"):
        torch_weights.to_torch_state_dict(extra, **BACK)
    misshapen = {**params, "time_out": {**params["time_out"], "kernel": np.zeros((16, 4))}}
    with pytest.raises(
        ValueError, match=r"time_out/kernel: found shape \[16, 4\], expected \[16, 16\]"
    ):
        torch_weights.to_torch_state_dict(misshapen, **BACK)
