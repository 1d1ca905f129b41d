"""The encoder job: what the records hold, restarts, kills, worker processes and bad input."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import random
import sys
import tarfile
import time

import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import encode as encode_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder, get_autoencoder
from repulsor_jax.config import ConfigError
from repulsor_jax.data.encoder import encode_images
from repulsor_jax.data.latents import decode_records, open_latent_dataset
from repulsor_jax.data.preprocess import BadImageError
from repulsor_jax.data.sources import open_source
from repulsor_jax.data.workers import read_in_order
from repulsor_jax.data.writer import open_writer
from repulsor_jax.files import locks
from repulsor_jax.files.shards import fill
from tests.oracles import images as image_files
from tests.oracles import processes, tiny
from tests.oracles.encode_job import config
from tests.oracles.images import Images

JOB = "tests.oracles.encode_job"


def moments():
    """Halves each side; the mean is the 2x2 block's, the log-variance is constant."""
    shapes = []

    def encode(params, images):
        shapes.append(images.shape)
        b, h, w, c = images.shape
        mean = images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        return jnp.concatenate([mean, jnp.full_like(mean, params)], axis=-1)

    made = Autoencoder("moments", jnp.float32(-3.0), encode, lambda p, z: z, True, 0.25)
    return made, shapes


def run(source, autoencoder, directory, images_per_shard=100, **options):
    about = tiny.description(
        stochastic=autoencoder.stochastic,
        autoencoder=autoencoder.name,
        class_names=tuple(source.class_names),
        **{k: options.pop(k) for k in ("dtype", "flipped", "image_size") if k in options},
    )
    writer = open_writer(
        directory, about, num_images=len(source), images_per_shard=images_per_shard
    )
    encode_share(writer, source, autoencoder, slice(None), **options)
    return writer.finish()


def encode_share(writer, source, autoencoder, share, **options):
    def produce(todo):
        given = {"batch_per_device": 1, **options}
        return encode_images(todo, source, autoencoder, writer.description, **given)

    fill(writer, produce, title="encode", share=share)


def read(dataset):
    source = dataset.open()
    return decode_records(source.__getitems__(range(len(source))), dataset.shape, dataset.dtype)


def test_digits_with_the_identity(tmp_path, capfd):
    source = open_source("digits", "test")
    dataset = run(source, get_autoencoder("identity"), tmp_path / "d", 100)
    assert open_latent_dataset(tmp_path / "d") == dataset
    assert (dataset.num_images, dataset.shape, len(dataset.shards)) == (497, (8, 8, 1), 5)
    batch = read(dataset)
    images = np.stack([source[i].image for i in range(497)])
    np.testing.assert_allclose(batch["latents"], images / 127.5 - 1, atol=2**-11)
    np.testing.assert_array_equal(batch["labels"], [source[i].label for i in range(497)])
    # float16 keeps the 256 grey levels apart.
    recovered = np.clip(127.5 * batch["latents"].astype(np.float32) + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(recovered, images)
    assert "497/497" in capfd.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 2])
def test_moments_of_images_and_their_mirror_images(tmp_path, num_workers):
    images = np.random.default_rng(0).integers(0, 256, (45, 6, 4, 3), np.uint8)
    autoencoder, shapes = moments()
    dataset = run(
        Images(list(images)),
        autoencoder,
        tmp_path / "d",
        20,
        dtype="float32",
        flipped=True,
        num_workers=num_workers,
    )
    assert set(shapes) == {(8, 6, 4, 3)}  # one compiled shape: 8 devices, one image each
    assert (dataset.shape, dataset.latent_shape) == ((3, 2, 6), (3, 2, 3))
    assert (dataset.num_images, dataset.num_records) == (45, 90)
    found = read(dataset)
    latents = found["latents"].reshape(45, 2, 3, 2, 6)
    for view, mirrored in enumerate((images, images[:, :, ::-1])):
        blocks = (mirrored / 127.5 - 1).reshape(45, 3, 2, 2, 2, 3).mean((2, 4))
        np.testing.assert_allclose(latents[:, view, ..., :3], blocks, atol=1e-6)
    np.testing.assert_array_equal(latents[..., 3:], np.full((45, 2, 3, 2, 3), -3.0))
    np.testing.assert_array_equal(found["labels"], np.repeat(np.arange(45) % 3, 2))


def test_processes_share_the_shards(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
    source, (autoencoder, _) = Images(list(images)), moments()
    whole = run(source, autoencoder, tmp_path / "whole", 4)
    writer = open_writer(
        tmp_path / "d",
        tiny.description(stochastic=True, autoencoder="moments"),
        num_images=23,
        images_per_shard=4,
    )
    for index in (2, 0, 1):
        encode_share(writer, source, autoencoder, slice(index, None, 3))
    assert writer.finish().shards == whole.shards
    assert tiny.files(tmp_path / "d") == tiny.files(tmp_path / "whole")


def test_images_of_several_sizes_need_a_size(tmp_path):
    images = [np.zeros((6, 4, 3), np.uint8)] * 8
    images[5] = np.zeros((8, 6, 3), np.uint8)
    autoencoder, _ = moments()
    with pytest.raises(ValueError, match=r"image-5: found \(8, 6, 3\).*config\.data\.image_size"):
        run(Images(images), autoencoder, tmp_path / "d")
    dataset = run(Images(images), autoencoder, tmp_path / "sized", image_size=4)
    assert dataset.latent_shape == (2, 2, 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_fatal_or_skipped_and_never_lost(tmp_path, num_workers, capsys):
    images = list(np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), np.uint8))
    images[13] = b"this is no picture"
    images[14] = b""
    autoencoder, _ = moments()
    source = Images(images)
    with pytest.raises(BadImageError, match=r"image-13: not an image.*on_bad_image='skip'"):
        run(source, autoencoder, tmp_path / "d", 10, num_workers=num_workers)
    # The first shard was finished, and is not encoded again.
    assert (tmp_path / ".d.incomplete/data-00000-of-00003.array_record.json").exists()
    dataset = run(
        source, autoencoder, tmp_path / "d", 10, num_workers=num_workers, skip_bad_images=True
    )
    assert "skipped image-13: not an image" in capsys.readouterr().out
    assert [(s.index, s.name) for s in dataset.skipped] == [(13, "image-13"), (14, "image-14")]
    assert "the file is empty" in dataset.skipped[1].reason
    kept = [i for i in range(30) if i not in (13, 14)]
    assert [s.records for s in dataset.shards] == [10, 8, 10]
    found = read(dataset)
    np.testing.assert_array_equal(found["labels"], np.array(kept) % 3)
    expected = np.stack([images[i] for i in kept]) / 127.5 - 1
    expected = expected.reshape(28, 2, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(found["latents"][..., :3], expected, atol=1e-3)


def test_a_worker_that_dies_is_reported(tmp_path):
    source = Images([np.zeros((4, 4, 3), np.uint8)] * 40, fatal=20)
    autoencoder, _ = moments()
    with pytest.raises(OSError, match=r"worker process.*died.*config\.data\.encode_workers"):
        run(source, autoencoder, tmp_path / "d", num_workers=1)


def test_without_worker_processes_this_one_reads(capsys):
    def executor(*unused, **options):
        raise OSError(30, "Read-only file system")

    images = [np.full((4, 4, 3), k, np.uint8) for k in range(5)]
    chunks = [range(2), range(2, 5)]
    found = read_in_order(Images(images), chunks, 0, num_workers=2, ahead=1, executor=executor)
    np.testing.assert_array_equal([image for part, _ in found for image in part], images)
    said = capsys.readouterr().out
    assert "warning: no worker processes ([Errno 30] Read-only file system)" in said
    assert "/dev/shm" in said
    assert "config.data.encode_workers=0" in said


@pytest.fixture
def pictures(tmp_path):
    """A folder of train/ and test/ with two classes."""
    return image_files.write_pictures(tmp_path / "pictures")


def test_the_mode_encodes_a_folder_and_shows_what_it_did(tmp_path, pictures, capsys):
    encode_lib.encode(config(pictures, **{"data.flips": True}), tmp_path / "run")
    data = tmp_path / "run" / "data"
    dataset = open_latent_dataset(data / "train")
    assert (dataset.num_images, dataset.num_records, dataset.class_names) == (
        22,
        44,
        ("cat", "dog"),
    )
    assert (dataset.image_size, dataset.source, dataset.split) == (8, "folder", "train")
    assert sorted(p.name for p in data.iterdir() if p.name != ".locks") == [
        "test",
        "test_preview.png",
        "train",
        "train_preview.png",
    ]
    said = capsys.readouterr().out
    assert "22 images and their mirror images" in said
    # The identity loses what float16 does: less than half a grey level, which rounds back.
    assert "PSNR of these" in said
    before = tiny.files(data / "train")
    encode_lib.encode(config(pictures, **{"data.flips": True}), tmp_path / "run")
    assert tiny.files(data / "train") == before


def test_a_bad_image_whose_name_is_not_utf8_is_skipped(tmp_path, pictures, monkeypatch):
    os.rename(pictures / "train/cat/001.png", os.fsencode(pictures / "train/cat") + b"/\xff.png")
    (pictures / "train/cat" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    console = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", console)
    encode_lib.encode(config(pictures, **{"data.on_bad_image": "skip"}), tmp_path / "run")
    monkeypatch.undo()
    console.flush()
    assert b"\\udcff.png: the file is empty" in console.buffer.getvalue()
    skipped = open_latent_dataset(tmp_path / "run" / "data" / "train").skipped
    assert [os.fsencode(s.name)[-8:] for s in skipped] == [b"cat/\xff.png"[-8:]]


def test_the_preview_is_of_the_right_images_when_some_were_skipped(tmp_path, pictures, capsys):
    (pictures / "train" / "cat" / "003.png").write_bytes(b"")
    chosen = config(pictures, **{"data.on_bad_image": "skip", "data.preview_images": 100})
    encode_lib.encode(chosen, tmp_path / "run")
    said = capsys.readouterr().out
    assert "1 images could not be read" in said
    dataset = open_latent_dataset(tmp_path / "run" / "data" / "train")
    assert dataset.skipped[0].index == 3
    # A record taken for another image's would show as a PSNR of 10 dB or so.
    lowest = [
        float(line.split("from ")[1].split()[0]) for line in said.splitlines() if "PSNR" in line
    ]
    assert min(lowest) > 60


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (lambda p: (p / "train/cat/001.png").write_bytes(b""), {}, r"001\.png: the file is empty"),
        (
            lambda p: (p / "test" / "dog").rename(p / "test" / "fox"),
            {},
            "different classes, 2 classes: cat, dog, and 2 classes: cat, fox; only one .*dog.*fox",
        ),
        (lambda p: None, {"data.train_split": "tarin"}, "no split 'tarin'.*test.*train"),
        (lambda p: None, {"data.image_size": 0, "data.autoencoder": "none"}, "'none'"),
        (lambda p: None, {"data.autoencoder": "vae"}, r"config\.data\.autoencoder='vae'"),
        (lambda p: None, {"data.source": ""}, r"config\.data\.source is empty"),
    ],
)
def test_bad_input_is_named(tmp_path, pictures, damage, overrides, message):
    damage(pictures)
    with pytest.raises(ValueError, match=message):
        encode_lib.encode(config(pictures, **overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "data" / "train").exists()


def test_a_complete_data_set_is_not_taken_for_another(tmp_path, pictures):
    encode_lib.encode(config(pictures), tmp_path)
    for key, value, there in (
        ("flips", True, False),
        ("image_size", 4, 8),
        ("train_split", "test", "train"),
        ("source", "npy", "folder"),
    ):
        other = config(pictures, **{f"data.{key}": value})
        message = rf"train holds another.*config\.data\.{key}={value!r}, and there it is {there!r}"
        with pytest.raises(ConfigError, match=message):
            encode_lib.encode(other, tmp_path)


def test_processes_that_see_other_folders_are_told_so(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(sharding, "agree", np.zeros_like)  # the first process sees all made
    with pytest.raises(ConfigError, match="data.dir must be one folder that all processes see"):
        encode_lib.encode(config(pictures), tmp_path)


def test_paths_may_begin_with_a_tilde(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = config("~/pictures", **{"data.dir": "~/latents"})
    encode_lib.encode(chosen, tmp_path / "run")
    assert open_latent_dataset(tmp_path / "latents" / "train").num_images == 22


def test_a_worker_for_each_core_that_it_may_use(tmp_path, pictures, monkeypatch):
    found = []
    encode = encode_lib.encode_images
    monkeypatch.setattr(
        encode_lib,
        "encode_images",
        lambda *args, **options: (
            found.append(options["num_workers"]) or encode(*args, **options | {"num_workers": 0})
        ),
    )
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        encode_lib.encode(config(pictures, **{"data.encode_workers": -1}), tmp_path)
    finally:
        os.sched_setaffinity(0, cores)
    assert found == [1, 1]


def test_a_source_that_changed_is_not_gone_on_with(tmp_path, pictures):
    (pictures / "train" / "dog" / "010.png").write_bytes(b"")
    with pytest.raises(BadImageError):
        encode_lib.encode(config(pictures), tmp_path / "run")
    (pictures / "train" / "cat" / "new.png").write_bytes(image_files.png(np.random.default_rng(9)))
    with pytest.raises(ValueError, match="begun with other settings.*source_signature"):
        encode_lib.encode(config(pictures), tmp_path / "run")


def latents_on_disk(folder, scale=1.0):
    """Six latents as all/class/*.npy, which have unit variance once they are scaled."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((6, 4, 8, 8)).astype(np.float32) / np.float32(scale)
    for i, latent in enumerate(latents):
        (folder / "all" / "ab"[i // 3]).mkdir(parents=True, exist_ok=True)
        np.save(folder / "all" / "ab"[i // 3] / f"{i}.npy", latent * np.float32(scale))
    return latents


@pytest.mark.parametrize(
    ("source", "scale", "autoencoder"),
    [("npy", 1.0, "none"), ("npy:scaled", 0.18215, "sd-vae-ft-ema")],
)
def test_latents_of_others_are_converted(tmp_path, source, scale, autoencoder):
    latents = latents_on_disk(tmp_path, scale)
    chosen = config(
        tmp_path,
        **{
            "data.source": source,
            "data.train_split": "all",
            "data.test_split": "",
            "data.autoencoder": autoencoder,  # its weights are not needed
            "data.images_per_shard": 4,
            "data.dtype": "float32",
            "model.in_channels": 4,
            "sampling.grid_every_steps": 0,
        },
    )
    encode_lib.encode(chosen, tmp_path / "run")
    dataset = open_latent_dataset(tmp_path / "run" / "data" / "train")
    assert dataset.scale == (1.0 if autoencoder == "none" else 0.18215)
    assert [s.records for s in dataset.shards] == [4, 2]
    found = read(dataset)
    np.testing.assert_allclose(found["latents"], latents.transpose(0, 2, 3, 1), rtol=1e-6)
    np.testing.assert_array_equal(found["labels"], [0, 0, 0, 1, 1, 1])
    # Training reads them; only pictures ask for a decoder.
    assert experiment_lib.prepare(chosen, tmp_path / "run")[1] == dataset
    drawn = dataclasses.replace(
        chosen, sampling=dataclasses.replace(chosen.sampling, grid_every_steps=1)
    )
    with pytest.raises(ConfigError, match=f"config.data.autoencoder='{autoencoder}'"):
        experiment_lib.prepare(drawn, tmp_path / "run")


def test_latents_of_others_are_refused_before_any_is_converted(tmp_path):
    latents_on_disk(tmp_path)
    chosen = config(
        tmp_path,
        **{"data.source": "npy", "data.train_split": "all", "data.test_split": "validation"},
    )
    with pytest.raises(ValueError, match="no split 'validation'"):
        encode_lib.encode(chosen, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "data").iterdir()] == [".locks"]


@pytest.mark.slow
def test_two_processes(tmp_path, pictures):
    """They may finish far apart, where JAX grants half a minute; and decompress an archive once."""
    archive = tmp_path / "pictures.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(pictures, "pictures")
    sources = {"folder": (pictures, 36), "archive": (archive, 0)}
    started, options = [], {}
    for kind, (path, delay) in sources.items():
        options[kind] = {"data.source": kind, "data.test_split": "", "data.preview_images": 0}
        address = processes.free_address()
        (tmp_path / kind).mkdir()
        job = (JOB, tmp_path / kind, path, json.dumps(options[kind]))
        started += [
            processes.start(*job, rank, address, delay, JAX_NUM_CPU_DEVICES="1")
            for rank in range(2)
        ]
    said = processes.wait(started)
    assert ["decompresses" in output for output in said] == [False, False, True, False]
    for kind, (path, _) in sources.items():
        encode_lib.encode(config(path, **options[kind]), tmp_path / "one" / kind)
        found = digests(tmp_path / kind / "data" / "train")
        assert found == digests(tmp_path / "one" / kind / "data" / "train")


def digests(folder):
    return {name: hashlib.sha256(data).hexdigest() for name, data in tiny.files(folder).items()}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, pictures):
    options = {"data.images_per_shard": 2, "data.flips": True, "data.encode_workers": 1}
    folder = tmp_path / "killed"
    draw = random.Random(0)
    kills = 0
    for _ in range(4):
        mark = f"REPULSOR_JAX_TEST={tmp_path}"
        job = processes.start(JOB, folder, pictures, json.dumps(options), **dict([mark.split("=")]))
        incomplete = folder / "data" / ".train.incomplete"
        count = len(list(incomplete.glob("*")))
        while job.poll() is None and len(list(incomplete.glob("*"))) == count:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        kills += job.poll() is None
        job.kill()
        job.wait()
        for _ in range(50):  # its worker processes, which inherit the mark, end by themselves
            if not (outlived := marked(mark)):
                break
            time.sleep(0.1)
        assert not outlived
    assert kills
    for workdir in (folder, tmp_path / "whole"):
        encode_lib.encode(config(pictures, **options), workdir)
    for split in ("train", "test"):
        found = digests(folder / "data" / split)
        assert found == digests(tmp_path / "whole" / "data" / split)


def marked(mark):
    """Processes with a variable of the environment."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended, or of another user
            if mark.encode() in path.read_bytes():
                found.append(path)
    return found


def test_one_job_at_a_time_encodes_a_data_set(tmp_path, pictures, capsys):
    data = tmp_path / "run" / "data"
    with (
        locks.sole(data, "encoding", ""),
        pytest.raises(
            locks.BusyError, match=r"data: another job is encoding here .*config\.data\.dir"
        ),
    ):
        encode_lib.encode(config(pictures), tmp_path / "run")
    encode_lib.encode(config(pictures), tmp_path / "run")
    with locks.sole(data, "encoding", ""):
        encode_lib.encode(config(pictures), tmp_path / "run")  # all is there: nothing to hold
    assert "data/train: is there already, and is left as it is" in capsys.readouterr().out


def test_what_is_encoded_is_shown_with_its_classes_and_what_looks_wrong(tmp_path, capsys):
    pictures = image_files.write_pictures(tmp_path / "pictures")
    whole = {"data.train_split": ".", "data.test_split": ""}
    encode_lib.encode(config(pictures, **whole), tmp_path / "run")
    said = capsys.readouterr().out
    assert "data/train: 32 images of 2 classes: test, train\n" in said
    assert "warning: " in said
    assert "every image lies in a folder below its class" in said


def test_a_split_one_level_too_deep_is_refused(tmp_path, pictures):
    (pictures / "train").rename(pictures / "pets")
    (pictures / "train").mkdir()
    (pictures / "pets").rename(pictures / "train" / "pets")
    with pytest.raises(ConfigError, match=r"1 class: pets, and 2 classes: cat, dog; only one"):
        encode_lib.encode(config(pictures), tmp_path / "run")


def test_a_class_that_lost_all_its_images_is_known(tmp_path, pictures, capsys):
    for path in (pictures / "train" / "cat").iterdir():
        path.write_bytes(b"<html>404</html>")
    chosen = config(pictures, **{"data.on_bad_image": "skip", "data.test_split": ""})
    encode_lib.encode(chosen, tmp_path / "run")
    assert "train has no image of 1 class: cat: they are not sampled" in capsys.readouterr().out
    dataset = open_latent_dataset(tmp_path / "run" / "data" / "train")
    assert (dataset.class_counts, dataset.absent_classes) == ((0, 11), (0,))
    experiment, _ = experiment_lib.prepare(chosen, tmp_path / "run")
    assert experiment_lib.latents_record(experiment)["absent_classes"] == [0]


def test_an_error_about_one_image_names_its_file(tmp_path, pictures):
    latents = latents_on_disk(tmp_path)
    np.save(tmp_path / "all" / "b" / "5.npy", latents[5] * np.float32(1e6))
    values = {"data.source": "npy", "data.train_split": "all", "data.test_split": ""}
    values |= {"data.autoencoder": "none", "model.in_channels": 4}
    with pytest.raises(ValueError, match=r"all/b/5\.npy: the latents overflow float16"):
        encode_lib.encode(config(tmp_path, **values), tmp_path / "run")


@pytest.mark.parametrize(
    ("source", "shape", "message"),
    [
        ("npy", (8, 8, 4), r"a/0\.npy: found \[8, 8, 4\], .* x\.transpose\(2, 0, 1\)"),
        ("npy", (8, 8, 8), r"found \[8, 8, 8\], expected \[4, 8, 8\].*npy:moments"),
        ("npy:moments", (4, 8, 8), r"found \[4, 8, 8\], expected \[8, 8, 8\].*latents: npy is"),
        ("npy:scaled", (1, 8, 8, 4), r"found \[8, 8, 4\], expected \[4, 8, 8\]"),
    ],
)
def test_latents_in_another_layout_are_recognised(tmp_path, source, shape, message):
    (tmp_path / "all" / "a").mkdir(parents=True)
    np.save(tmp_path / "all" / "a" / "0.npy", np.zeros(shape, np.float32))
    values = {"data.source": source, "data.train_split": "all", "data.test_split": ""}
    values |= {"data.autoencoder": "none", "model.in_channels": 4}
    with pytest.raises(ValueError, match=message):
        encode_lib.encode(config(tmp_path, **values), tmp_path / "run")
