"""The registry, where weights are looked for, and decoding in slices and tiles."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from repulsor_jax.autoencoders import (
    AUTOENCODERS,
    decode_in_slices,
    decode_in_tiles,
    get_autoencoder,
    kl,
    weights,
)
from repulsor_jax.autoencoders.base import method, upsample
from repulsor_jax.planning import hlo
from repulsor_jax.sharding import batch_sharding, create_mesh, replicated, use_mesh


def test_identity():
    autoencoder = get_autoencoder("identity")
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(autoencoder.encode(autoencoder.params, x), x)
    np.testing.assert_array_equal(autoencoder.decode(autoencoder.params, x), x)
    assert (autoencoder.scale, autoencoder.shift, autoencoder.stochastic) == (1.0, 0.0, False)
    assert (autoencoder.params, autoencoder.weights_sha256) == ({}, "")


def test_names():
    with pytest.raises(ValueError, match="found 'vae', expected one of identity, sd-vae-ft-ema"):
        get_autoencoder("vae")
    with pytest.raises(ValueError, match="found 'x.pth', expected none for 'identity'"):
        get_autoencoder("identity", weights="x.pth")
    with pytest.raises(ValueError, match=r"autoencoder_weights: found none.*config\.json"):
        get_autoencoder("kl")
    for name in ("kl", "taesd"):
        with pytest.raises(ValueError, match="dtype: found 'float16', expected one of float32"):
            get_autoencoder(name, weights="x/y", dtype="float16")


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
        ("sd-vae-ft-mse", "", "stabilityai/sd-vae-ft-mse", ["config.json", MODEL]),
        ("kl", "org/my-vae_1.5", "org/my-vae_1.5", ["config.json", MODEL]),
        ("taesd", "", "madebyollin/taesd", [MODEL]),
        ("taef1", "", "madebyollin/taef1", [MODEL]),
        ("taef2", "", "madebyollin/taef2", ["taef2.safetensors"]),
    ],
)
def test_no_network(monkeypatch, name, weights, repository, wanted):
    hub = Hub(monkeypatch, ConnectionError("no route\nlong story"))
    with pytest.raises(FileNotFoundError) as error:
        get_autoencoder(name, weights=weights)
    assert hub.asked == [(repository, wanted)]
    message = str(error.value)
    assert f"{name!r}: its weights could not be downloaded (ConnectionError: no route)" in message
    assert f"Fetch {' and '.join(wanted)} from https://huggingface.co/{repository}/" in message
    assert "set config.data.autoencoder_weights to it" in message


def test_no_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"ImportError|ModuleNotFoundError"):
        get_autoencoder("taesd")


def test_a_repository_becomes_a_folder(monkeypatch, tmp_path):
    save_file({"encoder.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, tmp_path / MODEL)
    Hub(monkeypatch, tmp_path)
    # The downloaded file is read: one tensor of many.
    with pytest.raises(ValueError, match=rf"{MODEL}: .*found no such tensor.* more that do not"):
        get_autoencoder("taesd")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*absent\.pth, expected a file"):
        get_autoencoder("taesd", weights=str(tmp_path / "absent.pth"))
    with pytest.raises(FileNotFoundError, match=rf"found no weights in .*, expected {MODEL}, or"):
        get_autoencoder("sd-vae-ft-ema", weights=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config\.json: found no such file"):
        get_autoencoder("kl", weights=str(tmp_path))


def test_a_local_path_comes_before_a_repository(monkeypatch, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(weights.locate("taesd", "org/name", "", ["x"])) == "org/name"


def test_every_name_is_known(monkeypatch):
    Hub(monkeypatch, OSError("offline"))
    for name in set(AUTOENCODERS) - {"identity", "kl"}:
        with pytest.raises(FileNotFoundError, match=f"autoencoder '{name}'"):
            get_autoencoder(name)


def small_decode(params, latents):
    """A decoder that is quick to compile: each image is normed, and looks at itself alone."""
    mean, var = (f(latents, axis=(1, 2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
    x = upsample((latents - mean) * jax.lax.rsqrt(var + 1e-6))
    dimensions = jax.lax.conv_dimension_numbers(x.shape, params.shape, ("NHWC", "HWIO", "NHWC"))
    return jax.lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=dimensions)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


KERNEL = normal(9, 3, 3, 3, 3)


@pytest.fixture(scope="module")
def kl_model():
    """A small KL decoder with its own random parameters."""
    config = kl.KLConfig((4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=3)
    module = kl.AutoencoderKL(config)
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)

    def draw(leaf):
        """Biases, scales and kernels that keep activations near one."""
        if leaf.ndim == 1:
            return (1 + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
        return (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype(np.float32)

    return method(module, "decode"), jax.tree.map(draw, abstract)


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


def assert_slices_move_nothing(decode, params, fsdp, batch, slice_size, rows):
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
    assert hlo.collectives(text) == []
    assert "while(" in text
    # Each device decodes its part of a slice, not its whole share.
    assert f"f32[{rows},8,8,3]" in text
    np.testing.assert_allclose(found, jax.jit(decode)(params, latents), atol=1e-5)


@pytest.mark.parametrize(
    ("fsdp", "batch", "slice_size", "rows"),
    [(1, 32, 16, 2), (4, 40, 20, 2), (2, 24, 16, 2), (4, 16, 4, 1)],
)
def test_slices_on_a_mesh_move_nothing(fsdp, batch, slice_size, rows):
    assert_slices_move_nothing(small_decode, KERNEL, fsdp, batch, slice_size, rows)


def test_slices_of_the_kl_decoder_on_a_mesh_move_nothing(kl_model):
    assert_slices_move_nothing(*kl_model, fsdp=2, batch=32, slice_size=16, rows=2)


def triple(params, latents):
    """A decoder without surroundings: every position becomes 3 x 3 pixels of its own values."""
    columns = jnp.repeat(jnp.repeat(latents, 3, 1), 3, 2)
    pixels = np.tile(np.arange(9.0, dtype=np.float32).reshape(3, 3), latents.shape[1:3])
    return columns * pixels[None, :, :, None]


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [((9, 7), 4, 1), ((6, 5), 4, 3), ((9, 6), 5, 0), ((3, 8), 5, 2), ((4, 4), 8, 2)],
)
def test_tiles_of_a_pointwise_decoder_are_exact(size, tile, overlap):
    latents = normal(3, 2, *size, 3)
    found = jax.jit(lambda x: decode_in_tiles(triple, {}, x, tile, overlap))(latents)
    expected = np.kron(latents, np.arange(9.0).reshape(1, 3, 3, 1))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def averaging(params, latents):
    """A decoder that sees two positions to every side, and a border of zeros: a 5 x 5 mean."""
    mean = jax.lax.reduce_window(latents, 0.0, jax.lax.add, (1, 5, 5, 1), (1, 1, 1, 1), "SAME") / 25
    return jnp.repeat(jnp.repeat(mean, 2, 1), 2, 2)


def test_tiles_of_a_convolution_are_exact_away_from_overlaps():
    latents = normal(4, 1, 14, 14, 2)
    tile, overlap = 8, 2

    @jax.jit
    def both(x):
        return decode_in_tiles(averaging, {}, x, tile, overlap), averaging({}, x)

    found, expected = map(np.asarray, both(latents))
    error = np.abs(found - expected).max(axis=(0, 3))
    # Tiles cover 0 to 7 and 6 to 13: positions 6 and 7 are in both, pixels 12 to 15.
    away = [i for i in range(28) if not 12 <= i < 16]
    assert error[np.ix_(away, away)].max() < 1e-6
    assert error[12:16].max() > 1e-2


def test_tiles_blend_linearly():
    # Tiles of constant value: what is seen in an overlap is the weight of the second.
    latents = np.arange(10, dtype=np.float32).reshape(1, 1, 10, 1)

    def constant(params, part):
        return jnp.broadcast_to(part[:, :, :1], part.shape).repeat(2, 1).repeat(2, 2)

    found = jax.jit(lambda x: decode_in_tiles(constant, {}, x, 6, 2))(latents)[0, 0, :, 0]
    # Tiles begin at 0 and 4; pixels 8 to 11 are shared.
    expected = [0.0] * 8 + [4 * (i + 0.5) / 4 for i in range(4)] + [4.0] * 8
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tiles_of_the_kl_decoder_are_near(kl_model):
    decode, params = kl_model
    latents = normal(5, 1, 24, 24, 3)
    whole = jax.jit(decode)(params, latents)
    found = jax.jit(lambda p, x: decode_in_tiles(decode, p, x, 16, 8))(params, latents)
    assert found.shape == whole.shape
    # Group norm and attention see the tile alone: near, not equal.
    found, whole = np.asarray(found), np.asarray(whole)
    error = np.sqrt(np.mean((found - whole) ** 2)) / whole.std()
    assert 1e-3 < error < 0.2, error


def test_tiles_of_slices():
    latents = normal(6, 4, 6, 6, 3)
    sliced = lambda p, x: decode_in_slices(small_decode, p, x, 2)

    @jax.jit
    def both(params, x):
        return [decode_in_tiles(decode, params, x, 4, 2) for decode in (sliced, small_decode)]

    found, expected = both(KERNEL, latents)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_overlap_is_less_than_a_tile(overlap):
    with pytest.raises(ValueError, match=f"overlap: found {overlap} with tiles of 4"):
        decode_in_tiles(triple, {}, jnp.zeros((1, 8, 8, 1)), 4, overlap)
