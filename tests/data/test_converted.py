"""Latents in the layouts of other programs, written here as their published code writes them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from repulsor_jax.data.converted import open_latent_source

LABELS = [2, 0, 1, 2, 0, 1, 2, 0, 1, 0, 2, 1]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_last(array):
    return np.moveaxis(array, -3, -1)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, **options)


def write_fast_dit(root, name="imagenet256"):
    """One image per file, with the batch axis of one, named by a counter."""
    latents = noise(len(LABELS), 4, 3, 2) * np.float32(0.18215)
    for i, label in enumerate(LABELS):
        save(root / f"{name}_features/{i}.npy", latents[i : i + 1])
        save(root / f"{name}_labels/{i}.npy", np.array([label]))
    return latents


def write_repa(root):
    """Means and standard deviations, in folders by the first digits of the index."""
    mean, std = noise(len(LABELS), 4, 3, 2), np.exp(noise(len(LABELS), 4, 3, 2, seed=1))
    pairs = []
    for i, label in enumerate(LABELS):
        index = f"{i * 1000:08d}"
        name = f"{index[:5]}/img-mean-std-{index}.npy"
        save(root / "vae-sd" / name, np.concatenate([mean[i], std[i]]))
        pairs.append([name, label])
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": pairs}))
    return mean, std


def write_lightning_dit(root, sizes=(5, 7)):
    latents, flipped = noise(len(LABELS), 8, 3, 2), noise(len(LABELS), 8, 3, 2, seed=1)
    start = 0
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        tensors = {
            "latents": latents[rows],
            "latents_flip": flipped[rows],
            "labels": np.array(LABELS[rows], np.int64),
        }
        save_file(tensors, root / f"latents_rank00_shard{i:03d}.safetensors")
        start += size
    return latents, flipped


def check(source, expected, labels, **facts):
    assert len(source) == len(labels)
    assert list(source.class_names) == ["0", "1", "2"]
    facts = {"stochastic": False, "views": 1, "scaled": False, **facts}
    assert {key: getattr(source, key) for key in facts} == facts
    for i, (latents, label) in enumerate(zip(expected, labels, strict=True)):
        found = source.read(i)
        assert found.dtype == np.float32
        assert found.shape[0] == source.views
        np.testing.assert_allclose(found, latents, rtol=1e-6, atol=1e-6)
        assert source.labels[i] == label


@pytest.mark.parametrize("split", [".", "imagenet256"])
def test_fast_dit(tmp_path, split):
    latents = write_fast_dit(tmp_path)
    source = open_latent_source("fast-dit", split, path=str(tmp_path))
    # In order of the numbers: 10 comes after 9.
    check(source, channels_last(latents)[:, None], LABELS, scaled=True)


def test_fast_dit_with_several_sizes(tmp_path):
    latents = write_fast_dit(tmp_path / "data")
    (tmp_path / "data/imagenet512_features").mkdir()
    with pytest.raises(ValueError, match="imagenet256_labels.*give <x> as split"):
        open_latent_source("fast-dit", "data", path=str(tmp_path))
    source = open_latent_source("fast-dit", "imagenet256", path=str(tmp_path / "data"))
    check(source, channels_last(latents)[:, None], LABELS, scaled=True)


@pytest.mark.parametrize("split", ["vae-sd", "."])
def test_repa(tmp_path, split):
    mean, std = write_repa(tmp_path)
    logvar = 2 * np.log(std.astype(np.float64))
    source = open_latent_source("repa", split, path=str(tmp_path))
    moments = channels_last(np.concatenate([mean, logvar], axis=1))
    check(source, moments[:, None], LABELS, stochastic=True)


def test_repa_where_the_spread_is_nothing(tmp_path):
    write_repa(tmp_path)
    path = tmp_path / "vae-sd/00000/img-mean-std-00000000.npy"
    np.save(path, np.zeros((8, 3, 2), np.float16))
    found = open_latent_source("repa", ".", path=str(tmp_path)).read(0)
    # The SD-VAE's least log-variance, where half precision has rounded the deviation to 0.
    np.testing.assert_allclose(found[..., 4:], -30, rtol=1e-6)
    np.save(path, np.full((8, 3, 2), -1, np.float32))
    with pytest.raises(
        ValueError, match="img-mean-std-00000000.npy: found -1.0 among the standard"
    ):
        open_latent_source("repa", ".", path=str(tmp_path)).read(0)


@pytest.mark.parametrize("sizes", [(5, 7), (4, 0, 8)])
def test_lightning_dit(tmp_path, sizes):
    latents, flipped = write_lightning_dit(tmp_path, sizes)
    source = open_latent_source("lightning-dit", ".", path=str(tmp_path))
    views = channels_last(np.stack([latents, flipped], axis=1))
    check(source, views, LABELS, views=2)


def test_lightning_dit_in_bfloat16(tmp_path):
    latents = noise(3, 4, 2, 2).astype(ml_dtypes.bfloat16)
    tensors = {"latents": latents, "latents_flip": latents, "labels": np.arange(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    source = open_latent_source("lightning-dit", ".", path=str(tmp_path))
    expected = channels_last(latents.astype(np.float32))[1]
    np.testing.assert_array_equal(source.read(1), np.stack([expected, expected]))


@pytest.mark.parametrize(
    ("name", "facts"),
    [("npy", {}), ("npy:moments", {"stochastic": True}), ("npy:scaled", {"scaled": True})],
)
def test_npy(tmp_path, name, facts):
    latents = noise(4, 6, 3, 2)
    for i, label in enumerate([0, 0, 1, 2]):
        save(tmp_path / f"train/{label}/{i}.npy", latents[i])
    source = open_latent_source(name, "train", path=str(tmp_path))
    check(source, channels_last(latents)[:, None], [0, 0, 1, 2], **facts)


def test_npy_without_classes_and_of_other_types(tmp_path):
    latents = noise(3, 4, 3, 2).astype(np.float16)
    save(tmp_path / "a.npy", latents[0])
    save(tmp_path / "b.npy", np.asfortranarray(latents[1].astype(np.float64)))
    save(tmp_path / "c.npy", latents[2][None].astype(">f4"))
    source = open_latent_source("npy", ".", path=str(tmp_path))
    assert list(source.class_names) == ["unlabelled"]
    for i in range(3):
        assert source.read(i).dtype == np.float32
        np.testing.assert_array_equal(source.read(i)[0], channels_last(latents[i]))


@pytest.mark.parametrize(
    ("name", "write"),
    [("fast-dit", write_fast_dit), ("repa", write_repa), ("lightning-dit", write_lightning_dit)],
)
def test_signature(tmp_path, name, write):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder)

    def signature(folder):
        return open_latent_source(name, ".", path=str(tmp_path / folder)).signature()

    before = signature("one")
    assert before == signature("two")
    # Another label for item 11, of the same number of bytes.
    if name == "fast-dit":
        save(tmp_path / "two/imagenet256_labels/11.npy", np.array([0]))
    elif name == "repa":
        path = tmp_path / "two/vae-sd/dataset.json"
        path.write_text(path.read_text().replace('0011000.npy", 1', '0011000.npy", 0'))
    else:
        tensors = {"latents": noise(7, 8, 3, 2), "labels": np.array([*LABELS[5:11], 0])}
        tensors["latents_flip"] = tensors["latents"]
        save_file(tensors, tmp_path / "two/latents_rank00_shard001.safetensors")
    assert before == signature("one") != signature("two")


def test_names_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"found 'dit', expected one of \['fast-dit', "):
        open_latent_source("dit", ".", path=str(tmp_path))
    for name in ("fast-dit", "repa", "lightning-dit", "npy"):
        with pytest.raises(ValueError, match=f"{name}: .*lost not found"):
            open_latent_source(name, ".", path=str(tmp_path / "lost"))
        with pytest.raises(ValueError, match=f"{name}: no split 'val'"):
            open_latent_source(name, "val", path=str(tmp_path))
    for name, message in {
        "fast-dit": "expected one named <x>_features",
        "repa": "vae-sd/dataset.json: cannot be read: No such file",
        "lightning-dit": "found no .safetensors file",
        "npy": "found no .npy file",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_latent_source(name, ".", path=str(tmp_path))


FEATURES, NUMBERS = "imagenet256_features", "imagenet256_labels"
FAST_DIT_ERRORS = {
    "label missing": (
        lambda r: (r / NUMBERS / "7.npy").unlink(),
        "features/7.npy has no label in .* \\(1 such files\\)",
    ),
    "feature missing": (
        lambda r: (r / FEATURES / "7.npy").unlink(),
        "features/7.npy is not there, though it has one in .*labels",
    ),
    "no labels": (lambda r: (r / NUMBERS).rename(r / "y"), "imagenet256_labels not found"),
    "float label": (
        lambda r: save(r / NUMBERS / "7.npy", np.array([1.0])),
        r"labels/7.npy: found float64 \[1\], expected one whole number",
    ),
    "a gap": (
        lambda r: save(r / NUMBERS / "7.npy", np.array([10**15])),
        "labels: found 4 different labels from 0 to 1000000000000000, but not 3; expected each",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FAST_DIT_ERRORS.values(), ids=FAST_DIT_ERRORS)
def test_fast_dit_errors(tmp_path, damage, message):
    write_fast_dit(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_latent_source("fast-dit", ".", path=str(tmp_path))


def write_labels(root, labels):
    (root / "vae-sd/dataset.json").write_text(json.dumps(labels))


ONE, TWO = (f"0000{i}/img-mean-std-0000{i}000.npy" for i in (1, 2))
REPA_ERRORS = {
    "no labels": (lambda r: write_labels(r, {}), r"dataset\.json: found no labels"),
    "no object": (lambda r: write_labels(r, [1]), r"dataset\.json: found no labels"),
    "negative": (lambda r: write_labels(r, {"labels": [[ONE, -1]]}), r"labels\.0\.1: .*found -1"),
    "file missing": (lambda r: (r / "vae-sd" / TWO).unlink(), "00002000.npy is not there, though"),
    "odd": (
        lambda r: save(r / "vae-sd/00000/img-mean-std-00000000.npy", noise(7, 3, 2)),
        "00000000.npy: found 7 channels, expected an even number",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REPA_ERRORS.values(), ids=REPA_ERRORS)
def test_repa_errors(tmp_path, damage, message):
    write_repa(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_latent_source("repa", ".", path=str(tmp_path))


TENSORS = {"latents": noise(2, 8, 3, 2), "latents_flip": noise(2, 8, 3, 2), "labels": np.arange(2)}
SHARD_ERRORS = {
    "no flip": ({"latents_flip": None}, r"but not \['latents_flip'\]"),
    "fewer flips": ({"latents_flip": noise(1, 8, 3, 2)}, r"latents_flip F32 \[1, 8, 3, 2\]"),
    "more labels": (
        {"labels": np.arange(3)},
        r"labels int64 \[3\], expected .* \[n, c, h, w\] twice",
    ),
    "shape": (
        {"latents": noise(2, 4, 3, 2), "latents_flip": noise(2, 4, 3, 2)},
        r"twice, with \[8, 3, 2\] as in latents_rank00_shard000.safetensors",
    ),
    "whole numbers": ({"latents": np.ones((2, 8, 3, 2), np.int32)}, "found latents I32"),
    "float labels": ({"labels": np.ones(2)}, "labels float64"),
}


@pytest.mark.parametrize(("change", "message"), SHARD_ERRORS.values(), ids=SHARD_ERRORS)
def test_lightning_dit_errors(tmp_path, change, message):
    write_lightning_dit(tmp_path)
    tensors = {k: v for k, v in {**TENSORS, **change}.items() if v is not None}
    save_file(tensors, tmp_path / "latents_rank00_shard002.safetensors")
    with pytest.raises(ValueError, match=f"shard002.safetensors: .*{message}"):
        open_latent_source("lightning-dit", ".", path=str(tmp_path))


def test_lightning_dit_with_damaged_files(tmp_path):
    write_lightning_dit(tmp_path)
    path = tmp_path / "latents_rank00_shard000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match="shard000.safetensors: damaged, cut short or no"):
        open_latent_source("lightning-dit", ".", path=str(tmp_path))
    save_file({**TENSORS, "labels": np.array([-1, 5])}, path)
    with pytest.raises(ValueError, match="found 5 different labels from -1 to 5, but not 0"):
        open_latent_source("lightning-dit", ".", path=str(tmp_path))
    save_file({**TENSORS, "latents": np.full((2, 8, 3, 2), np.inf, np.float32)}, path)
    with pytest.raises(
        ValueError, match=r"shard000.safetensors\[1\]: found values that are not fin"
    ):
        open_latent_source("lightning-dit", ".", path=str(tmp_path)).read(1)


ITEM_ERRORS = {
    "shape": (lambda p: np.save(p, noise(4, 3, 3)), r"latents of shape \[4, 3, 3\], expected"),
    "axes": (lambda p: np.save(p, noise(2, 4, 3, 2)), r"float32 \[2, 4, 3, 2\], expected latents"),
    "type": (lambda p: np.save(p, np.ones((4, 3, 2), np.uint8)), r"found uint8 \[4, 3, 2\]"),
    "nan": (lambda p: np.save(p, noise(4, 3, 2) * np.nan), "values that are not finite"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "damaged or no .npy file"),
    "cut header": (lambda p: p.write_bytes(p.read_bytes()[:40]), "damaged or no .npy file"),
    "gone": (lambda p: p.unlink(), "cannot be read: No such file"),
}


@pytest.mark.parametrize(("damage", "message"), ITEM_ERRORS.values(), ids=ITEM_ERRORS)
def test_bad_arrays(tmp_path, damage, message):
    for name in ("0.npy", "1.npy"):
        save(tmp_path / name, noise(4, 3, 2))
    source = open_latent_source("npy", ".", path=str(tmp_path))
    damage(tmp_path / "1.npy")
    assert source.labels[0] == 0
    with pytest.raises(ValueError, match=f"1.npy: .*{message}"):
        source.read(1)
    if "damaged" in message:  # the first file says what is expected of the others
        (tmp_path / "1.npy").rename(tmp_path / "0.npy")
        with pytest.raises(ValueError, match=f"0.npy: .*{message}"):
            open_latent_source("npy", ".", path=str(tmp_path))
