"""Conditions on disk: masked images with their masks, label maps as shares of classes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from repulsor_jax import encode
from repulsor_jax.config import ConfigError, parse
from repulsor_jax.data import preprocess
from repulsor_jax.data.latents import open_latent_dataset
from repulsor_jax.data.pipeline import read_records
from tests.oracles import tiny


def test_masked_images_are_stored_with_their_masks(tmp_path, data_dir):
    """Of each view some records: the latent, and what the autoencoder makes of the masked image."""
    shown = {"conditioning.kind": "inpaint", "conditioning.masked": "image"}
    shown |= {"conditioning.masks_per_image": 3, "data.flips": True, "data.preview_images": 0}
    config = parse(tiny.digits_dict(tmp_path, **shown))
    encode.encode(config, tmp_path)
    dataset = open_latent_dataset(tmp_path / "test")
    assert (dataset.condition, dataset.condition_channels, dataset.masks) == ("inpaint", 2, 3)
    assert (dataset.views, dataset.shape, dataset.record_shape) == (6, (8, 8, 1), (8, 8, 3))
    source = dataset.open()
    found = read_records(dataset, source, np.arange(4 * 6))
    latents = found["latents"].reshape(4, 2, 3, 8, 8, 1)
    hidden, sign = np.split(found["condition"].reshape(4, 2, 3, 8, 8, 2), 2, axis=-1)
    np.testing.assert_array_equal(latents, latents[:, :, :1].repeat(3, axis=2))
    np.testing.assert_array_equal(latents[:, 1], latents[:, 0, :, :, ::-1])
    np.testing.assert_array_equal(hidden, np.where(sign > 0, -1, latents))  # a black hole
    assert set(np.unique(sign)) == {-1, 1}
    assert len(np.unique(sign.reshape(24, -1), axis=0)) > 12
    np.testing.assert_array_equal(found["ids"], np.arange(4).repeat(6))
    plain = open_latent_dataset(data_dir / "test")
    np.testing.assert_allclose(dataset.mean, plain.mean)  # of the latents, over all views alike
    assert "condition" not in json.loads((data_dir / "test" / "dataset.json").read_text())
    more = parse(tiny.digits_dict(tmp_path, **shown | {"conditioning.masks_per_image": 5}))
    with pytest.raises(ConfigError, match="its masks is 3, but config.conditioning asks for 5"):
        encode.encode(more, tmp_path)


def write_mapped(folder, count=5, classes=4):
    """Images of 8 x 8 in two folders, and their maps: [count, 8, 8]."""
    maps = np.random.default_rng(0).integers(0, classes, (count, 8, 8)).astype(np.uint8)
    for k, label_map in enumerate(maps):
        name = f"{'ab'[k % 2]}/{k}.png"
        for kind, pixels in (("images", np.stack([label_map * 50] * 3, -1)), ("maps", label_map)):
            path = folder / kind / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return maps


def mapped_config(folder, **options):
    shown = {
        "conditioning.kind": "semantic",
        "conditioning.classes": 4,
        "conditioning.maps_path": str(folder / "maps"),
        "data.source": "folder",
        "data.source_path": str(folder / "images"),
        "data.test_split": "",
        "data.preview_images": 0,
        "model.in_channels": 3,
        "model.num_classes": 2,
    }
    return parse(tiny.digits_dict(folder / "data", **shown | options))


def test_label_maps_are_stored_as_shares_of_classes(tmp_path):
    maps = write_mapped(tmp_path)
    encode.encode(mapped_config(tmp_path, **{"data.flips": True}), tmp_path)
    dataset = open_latent_dataset(tmp_path / "data" / "train")
    found = read_records(dataset, dataset.open(), np.arange(10))
    order = [0, 2, 4, 1, 3]  # by class
    expected = np.eye(4)[maps[order]]  # a cell is a pixel
    condition = found["condition"].reshape(5, 2, 8, 8, 4)
    np.testing.assert_array_equal(condition[:, 0], expected)
    np.testing.assert_array_equal(condition[:, 1], expected[:, :, ::-1])
    pixels = np.stack([maps[order] * 50.0] * 3, -1) / 127.5 - 1
    np.testing.assert_allclose(found["latents"].reshape(5, 2, 8, 8, 3)[:, 0], pixels, atol=1e-3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_bytes(b"no"), "map of .*: no label map can be read"),
        (lambda path: Image.new("RGB", (8, 8)).save(path), "found colour mode RGB"),
        (
            lambda path: Image.new("L", (8, 9)).save(path),
            "found 8 x 9 pixels, expected the image's 8 x 8",
        ),
        (lambda path: Image.new("L", (8, 8), 4).save(path), "found the class 4, expected 0 to 3"),
    ],
)
def test_a_label_map_that_is_none_is_named(tmp_path, spoil, message):
    write_mapped(tmp_path)
    spoil(tmp_path / "maps" / "train" / "b" / "3.png")
    with pytest.raises(ValueError, match=message):
        encode.encode(mapped_config(tmp_path), tmp_path)


def test_an_image_that_would_be_turned_has_no_label_map(tmp_path):
    """The map would not be turned with it, in silence where both are square."""
    write_mapped(tmp_path)
    path = tmp_path / "images" / "train" / "b" / "3.png"
    image = Image.open(path)
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(path, exif=turned)
    with pytest.raises(ValueError, match="b/3.png: found an EXIF orientation of 6"):
        encode.encode(mapped_config(tmp_path), tmp_path)


def test_a_label_map_is_cropped_as_its_image_is_and_gets_no_new_class():
    label_map = np.zeros((20, 30), np.uint8)
    label_map[:, 15:] = 7
    buffer = io.BytesIO()
    Image.fromarray(label_map).save(buffer, format="PNG")
    found = preprocess.prepare_map(buffer.getvalue(), 10, "map")
    np.testing.assert_array_equal(found, np.where(np.arange(10) < 5, 0, 7) + np.zeros((10, 1)))


def test_a_label_map_halves_to_the_whole_pixels_of_its_image():
    """1023 x 512 becomes 511 x 256, of which 127 on the left are cut."""
    columns = (np.arange(1023) // 4).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.broadcast_to(columns, (512, 1023))).save(buffer, format="PNG")
    found = preprocess.prepare_map(buffer.getvalue(), 256, "map")
    places = (np.arange(127, 383) + 0.5) * 1023 / 511
    np.testing.assert_array_equal(found, np.broadcast_to(columns[places.astype(int)], (256, 256)))
