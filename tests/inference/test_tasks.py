"""Samples for given images and maps: composites, their masks and labels, their pictures."""

import functools
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from repulsor_jax import config as config_lib
from repulsor_jax.config import ConfigError
from repulsor_jax.data.latents import open_latent_dataset
from repulsor_jax.data.pipeline import read_records
from repulsor_jax.sample import sample
from tests.oracles import latent_sets, tiny

COUNT = 20
KINDS = {
    "latent": {"conditioning__kind": "inpaint"},
    "image": {"conditioning__kind": "inpaint", "conditioning__masked": "image"},
    "replace": {"conditioning__filling": "replace"},
    "semantic": {"conditioning__kind": "semantic", "conditioning__classes": 4},
}


def values(kind, **overrides):
    options = {
        "sampling__num_samples": COUNT,
        "sampling__grid_samples": 4,
        "sampling__grid_columns": 7,
        "model__in_channels": 1,
        "mesh__data": 8,
        "terms": "none",
        "sampling__solver": "euler",
        "sampling__num_steps": 2,
    }
    return tiny.config_dict(**options | KINDS[kind] | overrides)


def random_params(c):
    params = tiny.random_params(c)
    rng = np.random.default_rng(5)
    grown = {"latent": 2, "image": 2, "semantic": 4}
    kind = "semantic" if c.conditioning.kind == "semantic" else "latent"
    if c.conditioning.kind == "none":
        return params
    kernel = rng.standard_normal((4 * grown[kind], 32)).astype(np.float32)
    params |= {"condition_embed": {"kernel": kernel}}
    if kind == "semantic":
        params |= {"condition_map": {"kernel": rng.standard_normal((4, 4)).astype(np.float32)}}
    return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of each kind, in folders of their names, and held-out images of 4 x 4 pixels."""
    root = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (7, 1, 4, 4, 1))
    latents = levels / 127.5 - 1
    shares = np.eye(4)[rng.integers(0, 4, (7, 1, 4, 4))]
    about = {"scale": 1.0, "dtype": "float32", "class_names": ("a", "b", "c")}
    labels = np.array([2, 1, 0, 2, 2, 1, 0])
    latent_sets.write(root / "plain" / "test", latents, labels, **about)
    both = np.concatenate([latents, shares], axis=-1)
    shown = {"condition": "semantic", "condition_channels": 4}
    latent_sets.write(root / "mapped" / "test", both, labels, **about, **shown)
    np.savez(root / "truth.npz", images=levels[:, 0].astype(np.uint8), labels=labels)
    for kind in KINDS:
        config_dict = values(kind)
        tiny.save_run(root / kind, config_dict, {3: random_params(config_lib.parse(config_dict))})
    return root


def draw(folder, tmp_path, kind, **overrides):
    """Images, labels and the protocol of samples for the held-out images."""
    shutil.copytree(folder / kind, tmp_path / "run", dirs_exist_ok=True)
    data = folder / ("mapped" if kind == "semantic" else "plain")
    c = config_lib.parse(values(kind, data__dir=str(data), **overrides))
    path = sample(c, tmp_path / "run")
    with np.load(path) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    return images, labels, path


@pytest.fixture(scope="module")
def truth(folder):
    with np.load(folder / "truth.npz") as file:
        return {name: file[name][np.arange(COUNT) % 7] for name in ("images", "labels")}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Kind -> its samples for the held-out images, drawn once."""
    return functools.cache(lambda kind: draw(folder, tmp_path_factory.mktemp(kind), kind))


@pytest.mark.parametrize("kind", ["latent", "image", "replace"])
def test_known_pixels_are_those_of_the_image_to_the_bit(folder, tmp_path, truth, whole, kind):
    images, labels, path = whole(kind)
    np.testing.assert_array_equal(labels, truth["labels"])
    differs = (images != truth["images"])[..., 0]
    assert 0.02 < differs.mean() < 0.5
    # The grid says where the holes are: grey, at the left of each three.
    picture = np.asarray(Image.open(path.with_suffix(".png")).convert("L"))
    assert picture.shape[1] == 6 * 49 + 1  # of seven columns, two threes
    protocol = json.loads(path.with_suffix(".json").read_text())["conditioning"]
    assert protocol["measured"] == "composites"
    assert protocol["filling"] == ("replace" if kind == "replace" else "channels")

    if kind != "latent":
        return
    # Images and masks of a file: all of an image, half of it or nothing is a hole.
    masks = np.zeros((7, 4, 4), np.uint8)
    masks[1], masks[2, :2] = 1, 255
    given = tmp_path / "given.npz"
    np.savez(given, masks=masks, images=truth["images"][:7])
    images, labels, _ = draw(folder, tmp_path, kind, conditioning__images=str(given))
    np.testing.assert_array_equal(labels, np.arange(COUNT) % 3)  # balanced, as none are known
    known = np.tile(masks, (3, 1, 1))[:COUNT] == 0
    np.testing.assert_array_equal(images[known], truth["images"][known])
    assert (images != truth["images"])[~known].mean() > 0.9
    assert len({images[k].tobytes() for k in (1, 8, 15)}) == 3  # several fillings for one hole


def test_a_sample_is_of_its_seed_and_number_on_any_mesh(folder, tmp_path, whole):
    one, _, _ = whole("latent")
    found, _, _ = draw(
        folder, tmp_path, "latent", mesh__data=4, mesh__fsdp=2, sampling__batch_size=16
    )
    assert (one == found).mean() > 0.99  # of rounding to 8 bits, a level may differ
    assert np.abs(one.astype(int) - found).max() <= 1


def test_images_are_drawn_for_label_maps(folder, tmp_path, truth, whole):
    images, labels, path = whole("semantic")
    np.testing.assert_array_equal(labels, truth["labels"])
    assert Image.open(path.with_suffix(".png")).size[0] == 6 * 49 + 1  # map, drawn and image
    dataset = open_latent_dataset(folder / "mapped" / "test")
    assert dataset.latent_shape == (4, 4, 1)
    maps = read_records(dataset, dataset.open(), np.arange(7))["condition"].argmax(-1)
    given = tmp_path / "maps.npz"
    np.savez(given, maps=maps.astype(np.uint8), labels=truth["labels"][:7])
    again, _, path = draw(folder, tmp_path, "semantic", conditioning__images=str(given))
    np.testing.assert_array_equal(again, images)
    assert Image.open(path.with_suffix(".png")).size[0] == 6 * 49 + 1  # three pairs


@pytest.mark.parametrize(
    ("kind", "arrays", "message"),
    [
        ("latent", None, "found no such file, expected an .npz with images and masks"),
        ("latent", {"images": (2, 4, 4, 1)}, "found no masks, expected images and masks"),
        ("latent", {"images": (2, 8, 8, 1), "masks": (2, 8, 8)}, r"images: found uint8 \[2, 8, 8"),
        ("latent", {"images": (2, 4, 4, 1), "masks": (1, 4, 4)}, "masks: found 1, but as many"),
        (
            "latent",
            {"images": (2, 4, 4, 1), "masks": (2, 4, 4), "labels": (3,)},
            r"labels: found uint8 \[3\]",
        ),
        ("semantic", {"maps": (2, 4, 4)}, "maps: found the class 7, expected less than"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_its_key(folder, tmp_path, kind, arrays, message):
    given = tmp_path / "given.npz"
    if arrays:
        filled = {name: np.full(shape, 7, np.uint8) for name, shape in arrays.items()}
        for array in filled.values():
            array.flat[0] = 255  # no class of a map, and none that is too large
        np.savez(given, **filled)
    with pytest.raises(ConfigError, match=f"config.conditioning.images=.*{message}"):
        draw(folder, tmp_path, kind, conditioning__images=str(given))


def wide(path):
    np.savez(path, images=np.full((2, 4, 4, 1), 700, np.uint16), masks=np.ones((2, 4, 4), bool))


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 4, 4, 1), np.uint8))


def encrypted(path):
    wide(path)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # headers of zip, and their flags
        for found in re.finditer(re.escape(mark), bytes(content)):
            content[found.start() + offset] |= 1
    path.write_bytes(content)


def huge(path):
    """Headers of 17 and 1 GB, and nothing after them: the arrays are not read."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("images", (2**30, 4, 4, 1)), ("masks", (2**30, 4, 4))):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (huge, "images: refused, as it becomes 17,179,869,184 bytes, more than 1,073,741,824"),
        (wide, r"images: found uint16 \[2, 4, 4, 1\], expected uint8"),
        (one_array, "damaged or no .npz"),
        (encrypted, "damaged or no .npz .*encrypted"),
    ],
)
def test_a_file_of_another_kind_is_refused(folder, tmp_path, write, message):
    write(tmp_path / "given.npz")
    with pytest.raises(ConfigError, match=f"config.conditioning.images=.*{message}"):
        draw(folder, tmp_path, "latent", conditioning__images=str(tmp_path / "given.npz"))


def test_classes_are_not_chosen_where_images_have_theirs(folder, tmp_path):
    given = tmp_path / "given.npz"
    arrays = {"images": np.zeros((2, 4, 4, 1), np.uint8), "masks": np.ones((2, 4, 4), bool)}
    chosen = {"sampling__classes": (1,), "conditioning__images": str(given)}
    np.savez(given, labels=[0, 1], **arrays)
    with pytest.raises(ConfigError, match=r"sampling.classes=\(1,\): a sample has the class of"):
        draw(folder, tmp_path, "latent", **chosen)
    np.savez(given, **arrays)
    assert set(draw(folder, tmp_path, "latent", **chosen)[1].tolist()) == {1}


def test_a_data_set_without_what_is_asked_for_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="conditioning.images='train': .* not found"):
        draw(folder, tmp_path, "latent", conditioning__images="train")
    shutil.copytree(folder / "semantic", tmp_path / "run", dirs_exist_ok=True)
    c = config_lib.parse(values("semantic", data__dir=str(folder / "plain")))
    with pytest.raises(ConfigError, match="holds no label maps of 4 classes"):
        sample(c, tmp_path / "run")


def test_another_condition_than_the_runs_is_refused(folder, tmp_path):
    shutil.copytree(folder / "replace", tmp_path / "run", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"conditioning.kind is 'inpaint', but the run has 'none'"):
        sample(config_lib.parse(values("latent")), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning__kind": "semantic"}, "conditioning.classes=0"),
        ({"conditioning__kind": "semantic", "conditioning__classes": 256}, "at most 255"),
        ({"conditioning__kind": "inpaint", "conditioning__filling": "replace"}, "without a cond"),
        ({"conditioning__filling": "replace", "sampling__solver": "dopri5"}, "fixed steps"),
        ({"conditioning__images": "pictures"}, "expected 'test', 'train' or the path of an .npz"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**changes)
