"""The tiny autoencoders against torch: recorded values, diffusers' model, the published weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from repulsor_jax.autoencoders import get_autoencoder, tiny
from repulsor_jax.autoencoders.base import build
from repulsor_jax.files.tensors import read_tensors
from tests.oracles import autoencoders as oracles
from tests.oracles import fixtures
from tests.oracles.torch_files import write_state

SMALL = pathlib.Path(__file__).parents[1] / "data" / "autoencoders_small.npz"


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def nchw(x):
    import torch

    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def values():
    return dict(np.load(SMALL))


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_recorded_values(values, dtype, bound):
    prefix = "tiny/state/"
    state = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    width, channels = state["decoder.1.weight"].shape[:2]
    module = tiny.TinyAutoencoder(tiny.TinyConfig(channels, pooled=True, width=width), dtype)
    ours = build("tiny", module, (1, 8, 8, 3), state, "the fixture", stochastic=False)
    encoded = jax.jit(ours.encode)(ours.params, values["images"])
    decoded = jax.jit(ours.decode)(ours.params, values["tiny/latents"])
    assert encoded.dtype == decoded.dtype == jnp.float32
    assert relative_error(encoded, values["tiny/encoded"]) < bound
    assert relative_error(decoded, values["tiny/decoded"]) < bound


def test_diffusers(tmp_path):
    model = oracles.randomise(oracles.load_diffusers().AutoencoderTiny())
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    ours = get_autoencoder("taesd", weights=str(tmp_path))
    assert (ours.name, ours.stochastic, ours.scale, ours.shift) == ("taesd", False, 1.0, 0.0)
    import torch

    images = torch.rand((2, 3, 32, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images).latents
        decoded = model.decode(5 * latents).sample
    encode, decode = jax.jit(ours.encode), jax.jit(ours.decode)
    assert relative_error(encode(ours.params, nhwc(images)), nhwc(latents)) < 1e-5
    assert relative_error(decode(ours.params, 5 * nhwc(latents)), nhwc(decoded)) < 1e-5


@pytest.fixture(scope="module")
def state():
    """Random tensors of taesd by their published names."""
    rng, tensors = np.random.default_rng(0), {}
    params = get_autoencoder("taesd", abstract=True).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *parts, last = (entry.key for entry in path)
        kernel = last == "kernel"
        shape = [leaf.shape[i] for i in (3, 2, 0, 1)] if kernel else leaf.shape
        name = ".".join([*parts, "weight" if kernel else last])
        tensors[name] = rng.standard_normal(shape).astype(np.float32)
    return tensors


def half(state, part):
    """The file of one part, in the original layout."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_every_layout_gives_the_same(tmp_path, state):
    of_diffusers = {}
    for name, tensor in state.items():
        part, layer, rest = name.split(".", 2)
        of_diffusers[f"{part}.layers.{int(layer) - (part == 'decoder')}.{rest}"] = tensor
    save_file(of_diffusers, tmp_path / "any_name.safetensors")
    for layout, suffix, write in (("two", ".safetensors", None), ("torch", ".pth", write_state)):
        (tmp_path / layout).mkdir()
        for part in ("encoder", "decoder"):
            path, tensors = tmp_path / layout / f"taesdxl_{part}{suffix}", half(state, part)
            write(path, tensors) if write else save_file(tensors, path)
    found = [
        get_autoencoder("taesdxl", weights=str(tmp_path / path))
        for path in ("any_name.safetensors", "two", "torch")
    ]
    assert len({autoencoder.weights_sha256 for autoencoder in found}) == 1
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0].params, other.params)


def test_files_of_another_model(tmp_path, state):
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: decoder\.1\.weight: .*\[64, 16, 3, 3\]"):
        get_autoencoder("taesd3", weights=str(tmp_path / "x.safetensors"))
    save_file(half(state, "encoder"), tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half\.safetensors: .*the folder that holds both"):
        get_autoencoder("taesd", weights=str(tmp_path / "half.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"taef1_encoder\.pth and taef1_decoder\.pth"):
        get_autoencoder("taef1", weights=str(tmp_path))


def test_images_of_an_odd_size():
    autoencoder = get_autoencoder("taesd", abstract=True)
    images = jax.ShapeDtypeStruct((1, 32, 36, 3), np.float32)
    with pytest.raises(ValueError, match="found 32 x 36 pixels, expected multiples of 8"):
        jax.eval_shape(autoencoder.encode, autoencoder.params, images)


@pytest.fixture(scope="module")
def taef2():
    if not (fixtures.DATA / "taef2_encoder.pth").is_file():
        pytest.skip(f"the published weights of taef2 are not in {fixtures.DATA}")
    return get_autoencoder("taef2", weights=str(fixtures.DATA))


def published_state(torch):
    return {
        f"{part}.{name}": torch.from_numpy(tensor.astype(np.float32))
        for part in ("encoder", "decoder")
        for name, tensor in read_tensors(fixtures.DATA / f"taef2_{part}.pth").items()
    }


def picture():
    from PIL import Image

    path = sorted((fixtures.DATA / "imagenet_sample").iterdir())[0]
    image = Image.open(path).convert("RGB").resize((96, 64), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)[None] / 127.5 - 1


def test_published_weights(taef2):
    torch = pytest.importorskip("torch")
    state, images = published_state(torch), picture()
    latents = oracles.tiny_encode(state, nchw(images))
    decoded = oracles.tiny_decode(state, latents)
    assert latents.shape == (1, 32, 8, 12)
    encode, decode = jax.jit(taef2.encode), jax.jit(taef2.decode)
    assert relative_error(encode(taef2.params, images), nhwc(latents)) < 1e-5
    assert relative_error(decode(taef2.params, nhwc(latents)), nhwc(decoded)) < 1e-5


def test_a_picture_comes_back(taef2):
    images = picture()
    decoded = jax.jit(lambda p, x: taef2.decode(p, taef2.encode(p, x)))(taef2.params, images)
    error = np.mean(np.square(np.clip(decoded, -1, 1) - images))
    # A decibel figure that no wrong layer, range or order of channels lets through.
    assert 10 * np.log10(4 / error) > 20
    assert error < np.var(images) / 20
