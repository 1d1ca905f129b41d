"""The KL autoencoder against diffusers: recorded values, and its model where it is installed."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from repulsor_jax.autoencoders import get_autoencoder, kl
from repulsor_jax.autoencoders import weights as weight_files
from tests.oracles import autoencoders as oracles

SMALL = pathlib.Path(__file__).parents[1] / "data" / "autoencoders_small.npz"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def write_folder(folder, config, state, **changes):
    """A model in diffusers' layout; changes replace keys of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS)
    described = {"_class_name": "AutoencoderKL", **config, **changes}
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def with_old_names(state, convolutions=False):
    renamed = {}
    for name, tensor in state.items():
        for new, old in OLD_NAMES.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, old)
                if convolutions and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        renamed[name] = np.ascontiguousarray(tensor)
    return renamed


def with_original_names(state, levels):
    """The names of CompVis/latent-diffusion, whose attention is made of convolutions."""
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    other = {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "resnets": "block",
    }
    renamed = {}
    for name, tensor in state.items():
        if ".attentions.0." in name:
            for new, old in attention.items():
                name = name.replace(f".{new}.", f".{old}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        for new, old in other.items():
            name = name.replace(new, old)
        for level in range(levels):
            name = name.replace(f"down_blocks.{level}", f"down.{level}")
            name = name.replace(f"up_blocks.{level}", f"up.{levels - 1 - level}")
        renamed[name] = np.ascontiguousarray(tensor)
    return renamed


@pytest.fixture(scope="module")
def values():
    return dict(np.load(SMALL))


@pytest.fixture(scope="module")
def config(values):
    return json.loads(str(values["kl/config"]))


@pytest.fixture(scope="module")
def state(values):
    return {k.removeprefix("kl/state/"): v for k, v in values.items() if k.startswith("kl/state/")}


def test_shapes_of_a_repository_need_its_configuration_alone(tmp_path, config, monkeypatch):
    def locate(name, weights, repository, wanted):
        assert (weights, wanted) == ("org/name", ["config.json"])
        return tmp_path

    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(weight_files, "locate", locate)
    found = get_autoencoder("kl", weights="org/name", abstract=True)
    assert found.scale == config["scaling_factor"]


@pytest.fixture(scope="module")
def small(tmp_path_factory, config, state):
    return get_autoencoder("kl", weights=write_folder(tmp_path_factory.mktemp("kl"), config, state))


def test_recorded_values(small, values, config):
    moments = jax.jit(small.encode)(small.params, values["images"])
    decoded = jax.jit(small.decode)(small.params, values["kl/latents"])
    assert moments.dtype == decoded.dtype == np.float32
    assert relative_error(moments, values["kl/moments"]) < 1e-5
    assert relative_error(decoded, values["kl/decoded"]) < 1e-5
    assert (small.name, small.stochastic) == ("kl", True)
    assert (small.scale, small.shift) == (config["scaling_factor"], 0.0)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_file_of_the_original_code(small, tmp_path, config, state, prefix):
    tensors = with_original_names(state, len(config["block_out_channels"]))
    assert set(tensors).isdisjoint(name for name in state if "mid_block" in name)
    beside = {"loss.logvar": np.zeros(1, np.float32)}
    if prefix:
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        beside["model.diffusion_model.out.0.bias"] = np.zeros(1, np.float32)
    found = get_autoencoder("kl", weights=write_folder(tmp_path, config, tensors | beside))
    jax.tree.map(np.testing.assert_array_equal, found.params, small.params)
    assert found.weights_sha256 == small.weights_sha256


def test_prefixed_names_are_said_to_be(tmp_path, config, state):
    prefixed = {f"vae.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: the names begin with 'vae\.', as vae\."):
        get_autoencoder("kl", weights=write_folder(tmp_path, config, prefixed))


def test_bfloat16(small, tmp_path, config, state, values):
    half = get_autoencoder("kl", weights=write_folder(tmp_path, config, state), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert half.weights_sha256 == small.weights_sha256
    for function, x, expected in (
        (half.encode, values["images"], values["kl/moments"]),
        (half.decode, values["kl/latents"], values["kl/decoded"]),
    ):
        found = jax.jit(function)(half.params, x)
        assert found.dtype == np.float32
        assert 1e-4 < relative_error(found, expected) < 0.05


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_the_attention(small, tmp_path, config, state, convolutions):
    old = with_old_names(state, convolutions)
    assert not set(old) >= set(state)
    found = get_autoencoder("kl", weights=write_folder(tmp_path, config, old))
    assert found.weights_sha256 == small.weights_sha256
    jax.tree.map(np.testing.assert_array_equal, found.params, small.params)


def test_digest_is_of_the_values(small, tmp_path, config, state):
    state = {name: tensor.astype(np.float32) for name, tensor in state.items()}
    folder = write_folder(tmp_path / "wider", config, state)
    for weights in (folder, f"{folder}/{WEIGHTS}"):  # a file stands for its folder
        assert get_autoencoder("kl", weights=weights).weights_sha256 == small.weights_sha256
    state["quant_conv.bias"][0] += 1e-6
    other = get_autoencoder("kl", weights=write_folder(tmp_path / "other", config, state))
    assert other.weights_sha256 != small.weights_sha256


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "_class_name: found 'AutoencoderKLWan'"),
        ({"act_fn": "gelu"}, "act_fn: found 'gelu', expected 'silu'"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types: found"),
    ],
)
def test_configs_of_other_models(tmp_path, found, complaint):
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        kl.read_config(tmp_path / "config.json")
    assert complaint in str(error.value)


def test_configs_that_leave_keys_out(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"shift_factor": None, "block_out_channels": [8, 16]}))
    # diffusers' own defaults: one layer per block, shift none.
    assert kl.read_config(path) == kl.KLConfig(block_out_channels=(8, 16), layers_per_block=1)
    path.write_text(json.dumps({"shift_factor": 0.1159, "scaling_factor": 0.3611}))
    found = kl.read_config(path)
    assert (found.shift_factor, found.scaling_factor) == (0.1159, 0.3611)
    assert found.block_out_channels == (64,)


def test_a_named_model_with_another_config(tmp_path, config, state):
    folder = write_folder(tmp_path, config, state)
    with pytest.raises(ValueError, match=r"config\.json: .*set config\.data\.autoencoder='kl'"):
        get_autoencoder("sd-vae-ft-ema", weights=folder)


def test_tensors_that_do_not_fit(tmp_path, config, state):
    folder = write_folder(tmp_path, config, state, latent_channels=3)
    with pytest.raises(ValueError, match=r"safetensors: \S+: found shape \[.*\], expected \[.*6"):
        get_autoencoder("kl", weights=folder)
    folder = write_folder(tmp_path, config, state, mid_block_add_attention=False)
    with pytest.raises(ValueError, match=r"attentions.*: found shape .*, expected none"):
        get_autoencoder("kl", weights=folder)


def test_images_of_an_odd_size(small):
    with pytest.raises(ValueError, match="found 16 x 17 pixels, expected multiples of 2"):
        small.encode(small.params, np.zeros((1, 16, 17, 3), np.float32))


def compare_with_diffusers(tmp_path, config, shape, old_names=False):
    """Errors of moments and decoded images, against a diffusers model with random weights."""
    model = oracles.randomise(oracles.load_diffusers().AutoencoderKL(**config))
    import torch

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if old_names:
        state = with_old_names(state)
    ours = get_autoencoder("kl", weights=write_folder(tmp_path, config, state))
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        moments = model.encode(images).latent_dist.parameters
        latents = moments.chunk(2, 1)[0]
        decoded = model.decode(latents).sample
    nhwc = lambda x: x.permute(0, 2, 3, 1).numpy()
    return (
        relative_error(jax.jit(ours.encode)(ours.params, nhwc(images)), nhwc(moments)),
        relative_error(jax.jit(ours.decode)(ours.params, nhwc(latents)), nhwc(decoded)),
    )


NO_QUANT_CONV = {"use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"widths": (8, 8, 12), "layers_per_block": 2, "latent_channels": 3},
        {"mid_block_add_attention": False, **NO_QUANT_CONV},
    ],
    ids=["deeper", "without_options"],
)
def test_diffusers(tmp_path, changes):
    errors = compare_with_diffusers(tmp_path, oracles.kl_config(**changes), (2, 3, 16, 24))
    assert max(errors) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("old_names", [False, True])
def test_diffusers_at_full_size(tmp_path, old_names):
    full = {"layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32}
    config = oracles.kl_config((128, 256, 512, 512), scaling_factor=0.18215, **full)
    described = {"_class_name": "AutoencoderKL", **config}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert kl.read_config(tmp_path / "config.json") == kl.KLConfig()
    errors = compare_with_diffusers(tmp_path, config, (1, 3, 64, 64), old_names)
    print(errors)
    assert max(errors) < 1e-4, errors
