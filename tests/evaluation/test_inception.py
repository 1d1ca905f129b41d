import pathlib

import jax
import numpy as np
import pytest

from repulsor_jax.evaluation import inception
from tests.oracles.inception import LAYERS, import_torch_fidelity, random_tensor, torch_inception

FIXTURE = pathlib.Path(__file__).parents[1] / "data" / "inception.npz"


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return {name: random_tensor(name, s) for name, s in inception.tensor_shapes().items()}


@pytest.fixture(scope="module")
def params(state):
    return inception.params_from_state_dict(state)


@pytest.fixture(scope="module")
def activations():
    """One compilation serves every image size: they differ in the preprocessing only."""
    return jax.jit(inception.activations)


def assert_layers_close(found, expected, tolerance):
    for name in (*LAYERS, "spatial"):
        a, b = np.asarray(found[name]), expected[name]
        assert a.shape == b.shape, name
        assert a.dtype == np.float32, name
        assert np.abs(a - b).max() < tolerance * np.abs(b).max(), name
        # What tells images apart is a small part of random features: it must be right too.
        own, other = a - a.mean(0), b - b.mean(0)
        assert np.abs(other).max() > 1e-3 * np.abs(b).max(), name
        assert np.abs(own - other).max() < 10 * tolerance * np.abs(other).max(), name


def test_every_layer_against_stored_features(params, activations):
    stored = np.load(FIXTURE)
    images = stored["images"]
    assert_layers_close(activations(params, inception.preprocess(images)), stored, 1e-5)


def resized(image: np.ndarray) -> np.ndarray:
    """TensorFlow 1's bilinear resize to 299 of `[H, W, C]`, one pixel at a time, in float64."""
    height, width, _ = image.shape
    image = image.astype(np.float64)
    out = np.empty((299, 299, image.shape[2]))
    for i in range(299):
        y = i * height / 299
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(299):
            x = j * width / 299
            left, right = int(x), min(int(x) + 1, width - 1)
            above = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[i, j] = above + (below - above) * (y - top)
    return out


@pytest.mark.parametrize("size", [(8, 5), (300, 420), (1, 1)])
def test_resize_by_hand(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    found = inception.preprocess(image[None])[0]
    np.testing.assert_allclose(found, (resized(image) - 128) / 128, atol=2e-4)


def test_images_of_299_are_not_resampled():
    image = np.random.default_rng(1).integers(0, 256, (2, 299, 299, 3), np.uint8)
    found = np.asarray(inception.preprocess(image))
    np.testing.assert_array_equal(found, (image.astype(np.float32) - 128) / 128)


def test_features_are_those_of_the_preprocessed_images(params, activations):
    images = np.random.default_rng(2).integers(0, 256, (2, 299, 299, 3), np.uint8)
    # Only what is returned is computed: the shallowest layer compiles quickly.
    first = jax.jit(lambda params, images: inception.features(params, images)["64"])
    found = first(params, images)
    expected = activations(params, (images.astype(np.float32) - 128) / 128)["64"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert first.lower(params, images).compile().cost_analysis()["flops"] < 4e9  # all layers: 23e9


@pytest.mark.parametrize("save", ["zip", "legacy"])
def test_a_file_of_the_published_names_and_shapes_loads(tmp_path, state, params, save):
    torch = pytest.importorskip("torch")
    # torch.save wrote the published file before its format became a zip.
    saved = {name: torch.from_numpy(tensor) for name, tensor in state.items()}
    saved["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    path = tmp_path / inception.WEIGHTS_NAME
    torch.save(saved, path, _use_new_zipfile_serialization=save == "zip")
    jax.tree.map(np.testing.assert_array_equal, inception.load_params(path), params)


def test_names_and_shapes_are_the_pytorch_ports(state):
    import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    blocks = {
        "Conv2d_1a_3x3": module.BasicConv2d(3, 32, kernel_size=3, stride=2),
        "Conv2d_2a_3x3": module.BasicConv2d(32, 32, kernel_size=3),
        "Conv2d_2b_3x3": module.BasicConv2d(32, 64, kernel_size=3),
        "Conv2d_3b_1x1": module.BasicConv2d(64, 80, kernel_size=1),
        "Conv2d_4a_3x3": module.BasicConv2d(80, 192, kernel_size=3),
        "Mixed_5b": module.InceptionA(192, pool_features=32),
        "Mixed_5c": module.InceptionA(256, pool_features=64),
        "Mixed_5d": module.InceptionA(288, pool_features=64),
        "Mixed_6a": module.InceptionB(288),
        "Mixed_6b": module.InceptionC(768, channels_7x7=128),
        "Mixed_6c": module.InceptionC(768, channels_7x7=160),
        "Mixed_6d": module.InceptionC(768, channels_7x7=160),
        "Mixed_6e": module.InceptionC(768, channels_7x7=192),
        "Mixed_7a": module.InceptionD(768),
        "Mixed_7b": module.InceptionE_1(1280),
        "Mixed_7c": module.InceptionE_2(2048),
    }
    expected = {
        f"{block}.{name}": tuple(tensor.shape)
        for block, value in blocks.items()
        for name, tensor in value.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    expected |= {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert inception.tensor_shapes() == expected


@pytest.fixture(scope="module")
def reference(tmp_path_factory, state):
    import_torch_fidelity()
    import torch

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: torch.from_numpy(tensor) for name, tensor in state.items()}, path)
    return torch_inception(path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(299, 299), (32, 32), (200, 340)])
def test_every_layer_against_torch_fidelity(size, params, activations, reference):
    images = np.random.default_rng(3).integers(0, 256, (2, *size, 3), np.uint8)
    images[0] = np.linspace(0, 255, size[1])[:, None].astype(np.uint8)
    found = activations(params, inception.preprocess(images))
    assert_layers_close(found, reference(images), 2e-5)


def test_wrong_weights(tmp_path, state):
    convert = inception.params_from_state_dict
    name = "Mixed_6d.branch1x1.conv.weight"
    expected = r"\[192, 768, 1, 1\]"
    with pytest.raises(ValueError, match=rf"{name}: found no such tensor, expected .*{expected}"):
        convert({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name}: found shape \[2, 3\], expected {expected}"):
        convert({**state, name: np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match=r"AuxLogits.fc.weight: found .*\[5\], expected none"):
        convert({**state, "AuxLogits.fc.weight": np.zeros(5, np.float32)})
    broken = state["fc.bias"].copy()
    broken[7] = np.nan
    with pytest.raises(ValueError, match="file.pth: fc.bias: found values that are not finite"):
        convert({**state, "fc.bias": broken}, source="file.pth")
    with pytest.raises(FileNotFoundError, match=r"get pt_inception-2015-12-05-6726825d.pth from h"):
        inception.load_params(tmp_path / "nowhere.pth")
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="wrong.pth"):
        inception.load_params(wrong)


def test_wrong_images():
    for images in (
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 1), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[B, H, W, 3\]"):
            inception.preprocess(images)
