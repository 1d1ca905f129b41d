import dataclasses
import shutil

import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import encode as encode_lib
from repulsor_jax import experiment as experiment_lib
from tests.oracles import latent_sets, tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    encode_lib.encode(config_lib.parse(tiny.digits_dict()), folder)
    return folder


def prepare(workdir, **overrides):
    c = config_lib.parse(tiny.digits_dict(**overrides))
    return experiment_lib.prepare(c, workdir)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"data.dir": "/nowhere"}, "/nowhere/train.*--mode=encode"),
        ({"model.in_channels": 3}, r"shape \(8, 8, 1\).*config.model.in_channels"),
        ({"model.num_classes": 9}, "has 10 classes.*config.model.num_classes=9"),
        ({"data.autoencoder": "taesd"}, "taesd"),
        ({"sampling.solver": "rk9"}, "config.sampling.solver: expected one of dopri5"),
        ({"mesh.data": 3}, "config.mesh.data=3.*number of devices, 8"),
        (
            {"batch_size": 12, "repulsor.bank_rows": 24},
            "config.batch_size=12 must be a multiple",
        ),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name_before_device_work(workdir, overrides, expected):
    with pytest.raises((ValueError, OSError), match=expected):
        prepare(workdir, **overrides)


def test_evaluation_without_held_out_data_is_refused(workdir, tmp_path):
    shutil.copytree(workdir / "data" / "train", tmp_path / "data" / "train")
    with pytest.raises(config_lib.ConfigError, match="config.evaluation.*evaluation.every_steps=0"):
        prepare(tmp_path, **{"evaluation.every_steps": 5})


def test_data_sets_of_different_origin_are_refused(workdir, tmp_path):
    shutil.copytree(workdir / "data", tmp_path / "data")
    path = tmp_path / "data" / "test" / "dataset.json"
    text = path.read_text()
    for before, after, message in [
        ('"weights_sha256": ""', '"weights_sha256": "ab"', "different origin: weights_sha256"),
        ('"image_size": 0', '"image_size": 16', "different origin: image_size 0 and 16"),
        ('"9"\n', '"nine"\n', r"different classes, .*only one of them has \['9', 'nine'\]"),
    ]:
        assert before in text
        path.write_text(text.replace(before, after))
        with pytest.raises(config_lib.ConfigError, match=f"train and .*test .*{message}"):
            prepare(tmp_path)
    path.write_text(text)
    prepare(tmp_path)


def test_other_weights_than_those_that_encoded_are_refused(workdir, tmp_path, monkeypatch):
    shutil.copytree(workdir / "data", tmp_path / "data")
    for split in ("train", "test"):
        path = tmp_path / "data" / split / "dataset.json"
        path.write_text(path.read_text().replace('_sha256": ""', '_sha256": "0123456789abcdef"'))
    with pytest.raises(config_lib.ConfigError, match=r"whose SHA-256 is 0123456789ab.*weights"):
        prepare(tmp_path, **{"sampling.grid_every_steps": 5})
    # Without pictures to draw, the weights are not asked for.
    c = config_lib.parse(tiny.digits_dict(**{"data.autoencoder_weights": "/nowhere"}))
    assert experiment_lib.prepare(c, tmp_path)[0].autoencoder is None


@pytest.mark.parametrize("verify", [True, False])
def test_one_flipped_byte_is_refused_before_training(workdir, tmp_path, verify):
    shutil.copytree(workdir / "data", tmp_path / "data")
    shard = next((tmp_path / "data" / "train").glob("*.array_record"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    if verify:
        with pytest.raises(ValueError, match=rf"{shard.name}: damaged, its SHA-256"):
            prepare(tmp_path)
    else:
        prepare(tmp_path, **{"data.verify": False})
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name}: found 0 records"):
        prepare(tmp_path, **{"data.verify": False})


def write_latents(folder, std, **about):
    latents = (std * np.random.default_rng(0).standard_normal((30, 1, 8, 8, 1))).astype(np.float32)
    latent_sets.write(folder / "data" / "train", latents, np.arange(30) % 10, **about)


@pytest.mark.parametrize(
    ("std", "scale", "seen", "remedy"),
    [
        (1.0, 0.18215, "0.18", "source='npy:scaled'.*normalization='statistics'"),
        (5.5, 1.0, "5.5", "has: set config.data.normalization='statistics'"),
    ],
)
def test_latents_of_another_spread_than_the_noise_are_refused(tmp_path, std, scale, seen, remedy):
    about = {"scale": scale, "class_names": tuple("0123456789")}
    write_latents(tmp_path, std, **about)
    with pytest.raises(config_lib.ConfigError, match=f"deviation {seen}, and about 1.*{remedy}"):
        prepare(tmp_path)
    prepare(tmp_path, **{"data.normalization": "statistics"})
    write_latents(tmp_path / "good", 1 / scale, **about)
    prepare(tmp_path / "good")


def test_a_bank_larger_than_the_data_set_is_a_warning(workdir):
    for values, numbers in {
        (("repulsor.bank_rows", 16 * 200),): (
            "3,200 hold rows of 3,200 images",
            "1,300",
            "2.5 times",
        ),
        (("repulsor.bank_rows", 16 * 400), ("repulsor.pooling", "token")): ("1,600 images", "1.2"),
        (("repulsor.bank_rows", 16 * 80),): (),
        (("repulsor.bank_rows", 16 * 200), ("terms", "none")): (),
    }.items():
        c = config_lib.parse(tiny.digits_dict(**dict(values)))
        _, dataset = experiment_lib.prepare(c, workdir)
        _, *warnings = experiment_lib.describe_data(c, dataset)
        assert len(warnings) == bool(numbers)
        assert all(number in warnings[0] for number in numbers)


def test_training_shows_the_classes_and_room_that_is_left(workdir):
    c = config_lib.parse(tiny.digits_dict(**{"model.num_classes": 1000}))
    _, dataset = experiment_lib.prepare(c, workdir)
    first, warning, *_ = experiment_lib.describe_data(c, dataset)
    assert first.endswith("data/train: 1,300 images of 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")
    assert "10 of config.model.num_classes=1,000 classes" in warning


def test_a_late_teacher_of_layersync_is_a_warning_and_no_negatives_are_refused(workdir):
    values = {"terms": "layersync", "model.depth": 10, "layersync.student_block": 1}
    for block, count in ((7, 0), (8, 1)):
        c = config_lib.parse(tiny.digits_dict(**values | {"layersync.teacher_block": block}))
        _, dataset = experiment_lib.prepare(c, workdir)
        _, *warnings = experiment_lib.describe_data(c, dataset)
        assert len(warnings) == count
        assert all("layersync.teacher_block=8 is in the last fifth" in line for line in warnings)
    one_class = dataclasses.replace(dataset, class_names=("digit",))
    learned = {"source.name": "class", "source.alignment_axis": "width", "model.num_classes": 1}
    for values, count in ((learned, 1), ({"model.num_classes": 1}, 0)):
        c = config_lib.parse(tiny.digits_dict(terms="none", **values))
        _, *warnings = experiment_lib.describe_data(c, one_class)
        assert len(warnings) == count
        assert all("config.source.name='class' learns a start for each" in w for w in warnings)
    c = config_lib.parse(tiny.digits_dict(**{"repulsor.same_class_weight": 0.0}))
    experiment_lib.check_dataset(c, dataset)
    with pytest.raises(config_lib.ConfigError, match="same_class_weight=0 leaves no negatives"):
        experiment_lib.check_dataset(c, one_class)
