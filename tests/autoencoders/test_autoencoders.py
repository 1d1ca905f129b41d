"""The registry, where weights are looked for, PyTorch's layouts, and decoding in slices."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from repulsor_jax.autoencoders import AUTOENCODERS, decode_in_slices, get_autoencoder, kl, weights
from repulsor_jax.autoencoders.base import to_linen, upsample
from repulsor_jax.sharding import batch_sharding, create_mesh, replicated, use_mesh
from tests.oracles import traffic


def test_identity():
    autoencoder = get_autoencoder("identity")
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(autoencoder.encode(autoencoder.params, x), x)
    np.testing.assert_array_equal(autoencoder.decode(autoencoder.params, x), x)
    assert (autoencoder.scale, autoencoder.shift, autoencoder.stochastic) == (1.0, 0.0, False)
    assert (autoencoder.params, autoencoder.weights_sha256) == ({}, "")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vae", {}, "found 'vae', expected one of identity, sd-vae-ft-ema"),
        ("identity", {"weights": "x.pth"}, "found 'x.pth', expected none for 'identity'"),
        ("kl", {}, r"autoencoder_weights: found none.*config\.json"),
        ("taesd", {"dtype": "float16"}, "dtype: found 'float16', expected float32 or bfloat16"),
    ],
)
def test_what_is_asked_for_is_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_autoencoder(name, **options)


class Hub:
    """In place of huggingface_hub: gives a folder, or raises."""

    def __init__(self, monkeypatch, answer):
        self.answer, self.asked = answer, []
        module = types.SimpleNamespace(snapshot_download=self.download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)

    def download(self, repository, allow_patterns):
        self.asked.append((repository, allow_patterns))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


MODEL = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "weights", "repository", "wanted"),
    [
        ("sd-vae-ft-ema", "", "stabilityai/sd-vae-ft-ema", ["config.json", MODEL]),
        ("kl", "org/my-vae_1.5", "org/my-vae_1.5", ["config.json", MODEL]),
        ("taesd", "", "madebyollin/taesd", [MODEL]),
        ("taef2", "", "madebyollin/taef2", ["taef2.safetensors"]),
    ],
)
def test_no_network(monkeypatch, name, weights, repository, wanted):
    hub = Hub(monkeypatch, ConnectionError("no route\nlong story"))
    with pytest.raises(FileNotFoundError) as error:
        get_autoencoder(name, weights=weights)
    assert hub.asked == [(repository, wanted)]
    message = str(error.value)
    assert "its weights could not be downloaded (ConnectionError: no route)" in message
    assert (f"there is no file or folder {weights} here, and as" in message) == bool(weights)
    assert f"Fetch {' and '.join(wanted)} from https://huggingface.co/{repository}/" in message
    assert "set config.data.autoencoder_weights to it" in message


def test_every_name_is_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in set(AUTOENCODERS) - {"identity", "kl"}:
        with pytest.raises(FileNotFoundError, match=f"autoencoder '{name}': .*(Import|NotFound)"):
            get_autoencoder(name)


def test_a_repository_becomes_a_folder(monkeypatch, tmp_path):
    save_file({"encoder.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, tmp_path / MODEL)
    Hub(monkeypatch, tmp_path)
    # The downloaded file is read: one tensor of many.
    with pytest.raises(ValueError, match=rf"{MODEL}: .*found no such tensor.* more that do not"):
        get_autoencoder("taesd")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*absent\.pth in .* a file"):
        get_autoencoder("taesd", weights=str(tmp_path / "absent.pth"))
    with pytest.raises(FileNotFoundError, match=rf"found no weights in .*, expected {MODEL}, or"):
        get_autoencoder("sd-vae-ft-ema", weights=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config\.json: found no such file"):
        get_autoencoder("kl", weights=str(tmp_path))


def test_a_local_path_comes_before_a_repository(monkeypatch, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(weights.locate("taesd", "org/name", "", ["x"])) == "org/name"


@pytest.mark.parametrize(
    "name", ["weights/my-vae", "here/my-vae", "org/vae.safetensors", "a/b/c", "./vae", "vae"]
)
def test_what_looks_like_a_path_is_never_asked_for_elsewhere(monkeypatch, tmp_path, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, ConnectionError("no route"))
    with pytest.raises(FileNotFoundError, match=f"found nothing at {name} in {tmp_path}, expected"):
        get_autoencoder("sd-vae-ft-ema", weights=name)
    assert not hub.asked
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        get_autoencoder("sd-vae-ft-ema", weights="hf://here/my-vae")
    assert hub.asked == [("here/my-vae", ["config.json", MODEL])]


@pytest.mark.parametrize(
    ("name", "abstract"), [("sd-vae-ft-ema", False), ("kl", False), ("taesd", False), ("kl", True)]
)
def test_a_whole_pipeline_is_called_one(tmp_path, name, abstract):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    message = f"{tmp_path}: is a whole pipeline of diffusers, .* its folder, {tmp_path / 'vae'}"
    with pytest.raises(ValueError, match=message):
        get_autoencoder(name, weights=str(tmp_path), abstract=abstract)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(1, name="norm.0")(nn.Conv(4, (3, 2), name="conv")(x))
        return nn.Dense(5, name="out")(x)


def test_pytorch_tensors_as_linen_parameters():
    abstract = jax.eval_shape(Layers().init, jax.random.key(0), np.zeros((1, 6, 6, 3)))["params"]
    shapes = {"conv.weight": (4, 3, 3, 2), "norm.0.weight": (4,), "out.weight": (5, 4)}
    shapes |= {"conv.bias": (4,), "norm.0.bias": (4,), "out.bias": (5,)}
    tensors = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    params = to_linen(tensors, abstract, "file")
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, abstract)
    assert params["conv"]["kernel"][2, 1, 0, 3] == tensors["conv.weight"][3, 0, 2, 1]
    np.testing.assert_array_equal(params["out"]["kernel"], tensors["out.weight"].T)
    np.testing.assert_array_equal(params["norm.0"]["scale"], tensors["norm.0.weight"])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def small_decode(params, latents):
    """A decoder that is quick to compile: each image is normed, and looks at itself alone."""
    mean, var = (f(latents, axis=(1, 2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
    x = upsample((latents - mean) * jax.lax.rsqrt(var + 1e-6))
    dimensions = jax.lax.conv_dimension_numbers(x.shape, params.shape, ("NHWC", "HWIO", "NHWC"))
    return jax.lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=dimensions)


KERNEL = normal(9, 3, 3, 3, 3)


def kl_decoder():
    """A small KL decoder with random parameters that keep activations near one."""
    config = kl.KLConfig(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=3
    )
    module = kl.AutoencoderKL(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    scale = lambda shape: np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.2
    draw = lambda leaf: (leaf.ndim == 1) + scale(leaf.shape) * normal(leaf.size, *leaf.shape)
    decode = lambda params, x: module.apply({"params": params}, x, method="decode")
    return decode, jax.tree.map(draw, shapes)


@pytest.mark.parametrize(("batch", "slice_size"), [(5, 2), (6, 3), (3, 8), (5, 1)])
def test_slices_give_the_same_images(batch, slice_size):
    latents = normal(1, batch, 4, 4, 3)
    seen = []

    def watched(params, part):
        seen.append(part.shape[0])
        return small_decode(params, part)

    @jax.jit
    def both(params, x):
        return decode_in_slices(watched, params, x, slice_size), small_decode(params, x)

    found, expected = both(KERNEL, latents)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(seen) <= slice_size


def test_slices_are_of_at_least_one():
    with pytest.raises(ValueError, match="slice_size: found 0, expected 1 or more"):
        decode_in_slices(lambda params, x: x, {}, jnp.zeros((1, 2, 2, 1)), 0)


@pytest.mark.parametrize(
    ("decoder", "fsdp", "batch", "slice_size", "rows"),
    [
        ("small", 1, 32, 16, 2),
        ("small", 4, 40, 20, 2),  # the last slice is filled up
        ("small", 4, 16, 4, 1),  # a slice is of at least one image a device
        ("kl", 2, 32, 16, 2),
    ],
)
def test_slices_on_a_mesh_move_nothing(decoder, fsdp, batch, slice_size, rows):
    decode, params = kl_decoder() if decoder == "kl" else (small_decode, KERNEL)
    latents = normal(2, batch, 4, 4, 3)
    mesh = create_mesh(fsdp=fsdp)
    split, whole = batch_sharding(mesh), replicated(mesh)
    with use_mesh(mesh):
        run = jax.jit(
            lambda p, x: decode_in_slices(decode, p, x, slice_size),
            in_shardings=(whole, split),
            out_shardings=split,
        )
        compiled = run.lower(params, latents).compile()
        found = compiled(jax.device_put(params, whole), jax.device_put(latents, split))
    text = compiled.as_text()
    assert traffic.collectives(text) == []
    assert "while(" in text
    # Each device decodes its part of a slice, not its whole share.
    assert f"f32[{rows},8,8,3]" in text
    np.testing.assert_allclose(found, jax.jit(decode)(params, latents), atol=1e-5)
