"""The encoder job: what the records hold, restarts, kills, worker processes and bad input."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tarfile
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from repulsor_jax import config as config_lib
from repulsor_jax import encode as encode_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax.autoencoders import Autoencoder, get_autoencoder
from repulsor_jax.config import ConfigError
from repulsor_jax.data.encoder import encode_images
from repulsor_jax.data.latents import decode_records, open_latent_dataset
from repulsor_jax.data.preprocess import BadImageError
from repulsor_jax.data.sources import Item, open_source
from repulsor_jax.data.writer import open_writer
from repulsor_jax.files.shards import fill
from tests.oracles import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Images:
    images: list
    class_names = ("a", "b", "c")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Item(self.images[index], index % 3, f"image-{index}")

    def signature(self):
        return "s"


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


def encode_share(writer, source, autoencoder, share, progress=False, **options):
    def produce(todo):
        given = {"batch_per_device": 1, **options}
        return encode_images(todo, source, autoencoder, writer.description, **given)

    fill(writer, produce, title="encode", share=share, progress=progress)


def read(dataset):
    source = dataset.open()
    return decode_records(source.__getitems__(range(len(source))), dataset.shape, dataset.dtype)


def test_digits_with_the_identity(tmp_path, capfd):
    source = open_source("digits", "test")
    dataset = run(source, get_autoencoder("identity"), tmp_path / "d", 100, progress=True)
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


class Dying(Images):
    def __getitem__(self, index):
        if index == 20:
            os._exit(9)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_reported(tmp_path):
    source = Dying([np.zeros((4, 4, 3), np.uint8)] * 40)
    autoencoder, _ = moments()
    with pytest.raises(OSError, match=r"worker process.*died.*config\.data\.encode_workers"):
        run(source, autoencoder, tmp_path / "d", num_workers=1)


def test_an_existing_directory_stops_it_before_any_encoding(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "note.txt").write_text("mine")
    autoencoder, shapes = moments()
    with pytest.raises(FileExistsError, match="already holds files"):
        run(Images([np.zeros((6, 4, 3), np.uint8)]), autoencoder, tmp_path / "d")
    assert shapes == []


def picture(rng, size=(13, 10)):
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder of train/ and test/ with two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 5)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:03d}.png").write_bytes(picture(rng))
    return tmp_path / "pictures"


def config(pictures, **overrides):
    return config_lib.parse(
        tiny.digits_dict(
            **{
                "data.source": "folder",
                "data.source_path": str(pictures),
                "data.image_size": 8,
                "data.images_per_shard": 8,
                "model.in_channels": 3,
                **overrides,
            }
        )
    )


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
    assert sorted(p.name for p in data.iterdir()) == [
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
            lambda p: (p / "train/cat/001.png").write_text("a letter"),
            {},
            r"001\.png: not an image in one of the formats",
        ),
        (
            lambda p: (p / "train/cat/001.png").write_bytes(
                (p / "train/cat/000.png").read_bytes()[:200]
            ),
            {},
            r"001\.png: damaged",
        ),
        (
            lambda p: [f.unlink() for f in (p / "train" / "dog").iterdir()],
            {},
            r"found no image in \['dog'\]",
        ),
        (
            lambda p: (p / "test" / "dog").rename(p / "test" / "fox"),
            {},
            "different classes, 2 and 2; only one of them has dog, fox",
        ),
        (lambda p: None, {"data.source_path": "/nowhere"}, "/nowhere not found"),
        (lambda p: None, {"data.train_split": "tarin"}, "no split 'tarin'.*test.*train"),
        (lambda p: None, {"data.image_size": 0, "data.autoencoder": "none"}, "'none'"),
        (lambda p: None, {"data.autoencoder": "vae"}, r"config\.data\.autoencoder='vae'"),
    ],
)
def test_bad_input_is_named(tmp_path, pictures, damage, overrides, message):
    damage(pictures)
    with pytest.raises(ValueError, match=message):
        encode_lib.encode(config(pictures, **overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "data" / "train").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.flips": True}, r"config\.data\.flips=True, and there it is False"),
        ({"data.image_size": 4}, r"config\.data\.image_size=4, and there it is 8"),
        (
            {"data.train_split": "test"},
            r"config\.data\.train_split='test', and there it is 'train'",
        ),
        ({"data.dtype": "float32"}, r"config\.data\.dtype='float32', and there it is 'float16'"),
        ({"data.source": "npy"}, r"config\.data\.source='npy', and there it is 'folder'"),
    ],
    ids=str,
)
def test_a_complete_data_set_is_not_taken_for_another(tmp_path, pictures, overrides, message):
    encode_lib.encode(config(pictures), tmp_path)
    with pytest.raises(ConfigError, match=rf"train holds another data set.*{message}"):
        encode_lib.encode(config(pictures, **overrides), tmp_path)


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
    (pictures / "train" / "cat" / "new.png").write_bytes(picture(np.random.default_rng(9)))
    with pytest.raises(ValueError, match="begun with other settings.*source_signature"):
        encode_lib.encode(config(pictures), tmp_path / "run")


def latents_on_disk(folder, scale=1.0):
    """fast-DiT's layout is one of many; class/*.npy of [c, h, w] is the plainest."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((6, 4, 8, 8)).astype(np.float32)
    for i, latent in enumerate(latents):
        (folder / "all" / "ab"[i // 3]).mkdir(parents=True, exist_ok=True)
        np.save(folder / "all" / "ab"[i // 3] / f"{i}.npy", latent * np.float32(scale))
    return latents


@pytest.mark.parametrize(
    ("source", "scale", "autoencoder"),
    [("npy", 1.0, "none"), ("npy", 1.0, "sd-vae-ft-ema"), ("npy:scaled", 0.18215, "sd-vae-ft-ema")],
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
    _, found = experiment_lib.prepare(chosen, tmp_path / "run")
    assert found == dataset
    with pytest.raises(ConfigError, match=f"config.data.autoencoder='{autoencoder}'"):
        experiment_lib.prepare(chosen, tmp_path / "run")


def test_latents_of_others_are_refused_before_any_is_converted(tmp_path):
    latents_on_disk(tmp_path)
    chosen = config(
        tmp_path,
        **{"data.source": "npy", "data.train_split": "all", "data.test_split": "validation"},
    )
    with pytest.raises(ValueError, match="no split 'validation'"):
        encode_lib.encode(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()


_PROCESS = """
import os, pathlib, sys, time, traceback
import jax

rank, address, workdir, kind, source, delay = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, 2, rank)
from repulsor_jax import encode
from repulsor_jax.data import archives
from tests.data.test_encode import config

prompt, decompress = encode.encode_images, archives._decompress
first_is_done = pathlib.Path(workdir) / "first_is_done"

def late(*args, **options):
    yield from prompt(*args, **options)
    if rank == 0:
        first_is_done.touch()
        return
    while not first_is_done.exists():
        time.sleep(0.1)
    time.sleep(int(delay))

def told(*args):
    print("decompresses", flush=True)
    time.sleep(1)
    return decompress(*args)

encode.encode_images, archives._decompress = late, told
chosen = config(source, **{"data.source": kind, "data.test_split": "", "data.preview_images": 0})
try:
    encode.encode(chosen, pathlib.Path(workdir))
except BaseException:
    traceback.print_exc()
    os._exit(1)  # an orderly end would wait for the other process
"""


def start_two(workdir, kind, source, delay):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workdir.mkdir()
    return [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(rank), address, workdir, kind, source, str(delay)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_two_processes(tmp_path, pictures):
    """They may finish far apart, where JAX grants half a minute; and decompress an archive once."""
    archive = tmp_path / "pictures.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(pictures, "pictures")
    sources = {"folder": (pictures, 36), "archive": (archive, 0)}
    pairs = {kind: start_two(tmp_path / kind, kind, *given) for kind, given in sources.items()}
    try:
        said = {kind: [p.communicate(timeout=200)[0] for p in pair] for kind, pair in pairs.items()}
    finally:
        for process in itertools.chain(*pairs.values()):
            process.kill()
    for kind, pair in pairs.items():
        outputs = said[kind]
        assert [process.returncode for process in pair] == [0, 0], "\n".join(outputs)
        assert ["decompresses" in output for output in outputs] == [kind == "archive", False]
        chosen = config(sources[kind][0], **{"data.source": kind, "data.test_split": ""})
        encode_lib.encode(chosen, tmp_path / "one" / kind)
        found = folder_digest(tmp_path / kind / "data" / "train")
        assert found == folder_digest(tmp_path / "one" / kind / "data" / "train")


def folder_digest(folder):
    content = sorted(tiny.files(folder).items())
    return [(name, hashlib.sha256(data).hexdigest()) for name, data in content]


_ENCODE = """
import json, pathlib, sys
from repulsor_jax import encode
from tests.data.test_encode import config

encode.encode(config(sys.argv[2], **json.loads(sys.argv[3])), pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, pictures):
    """`benchmarks/kill_encode.py` is the long drill, on real pictures and 20 kills."""

    options = {"data.images_per_shard": 2, "data.flips": True, "data.encode_workers": 1}
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", _ENCODE, str(folder), str(pictures), json.dumps(options)]
    draw = random.Random(0)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        incomplete = folder / "data" / ".train.incomplete"
        count = len(list(incomplete.glob("*")))
        while process.poll() is None and len(list(incomplete.glob("*"))) == count:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills
    for workdir in (folder, tmp_path / "whole"):
        encode_lib.encode(config(pictures, **options), workdir)
    for split in ("train", "test"):
        found = folder_digest(folder / "data" / split)
        assert found == folder_digest(tmp_path / "whole" / "data" / split)


def test_config_error_names_the_key(tmp_path, pictures):
    with pytest.raises(ConfigError, match=r"config\.data\.source is empty"):
        encode_lib.encode(config(pictures, **{"data.source": ""}), tmp_path)
