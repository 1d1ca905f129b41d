"""Files that mean harm: refused with a message, nothing run, nothing outside, bounded memory.

Where it can be shown, a test first does with a plain reader what the file was made for.
"""

import contextlib
import gc
import gzip
import importlib
import io
import json
import math
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from repulsor_jax import config as config_lib
from repulsor_jax import main
from repulsor_jax.autoencoders import get_autoencoder, kl
from repulsor_jax.autoencoders import weights as weight_files
from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.data import latents
from repulsor_jax.data.converted import open_latent_source
from repulsor_jax.data.preprocess import BadImageError, read_images
from repulsor_jax.data.sources import open_source
from repulsor_jax.evaluation import reference
from repulsor_jax.files import pictures, tensors, untrusted
from repulsor_jax.files.checksums import values_sha256
from repulsor_jax.inference import run as run_lib
from tests.oracles import tiny
from tests.oracles.latent_sets import edit, random_latents, write
from tests.oracles.torch_files import Call, dumps, tensor, write_legacy, write_zip

MARGIN = 96 * 2**20  # bytes
HUGE = 160 * 2**20


@contextlib.contextmanager
def little_memory():
    """Lets this process allocate `MARGIN` bytes more than it has, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MARGIN, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def png(width=4, height=4):
    """A PNG, of which the header may say any size."""
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "png")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def zeros_zip(path, name, count, head=b""):
    """A zip with a member of `count` zeros after `head`: a thousandth of it in the file."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w") as member,
    ):
        member.write(head)
        for _ in range(count // 2**22):
            member.write(bytes(2**22))
    return path


def npy_header(shape, descr="<f8"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def read_error(source, index=0):
    (image,), _ = read_images(source, [index], 16)
    assert isinstance(image, BadImageError)
    return str(image)


# Weights.


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_pth_that_calls_a_function(tmp_path, write):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    content = dumps({"x": Call("os", "system", f"touch {marker}")})
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    write(path, content)
    path.with_name("config.json").write_text("{}")
    path.with_name("diffusion_pytorch_model.bin").write_bytes(path.read_bytes())
    for read in (tensors.read_tensors, lambda x: get_autoencoder("kl", weights=str(x.parent))):
        with pytest.raises(ValueError, match=r"\.(pth|bin): .*os\.system, which is refused"):
            read(path)
        assert not marker.exists()


def test_a_view_of_a_view_does_not_read_other_memory(tmp_path):
    """Ten rows of ten from row nine on begin at 90; 50 values from there are 40 too many."""
    memory = np.arange(200, dtype=np.float32)
    view = np.lib.stride_tricks.as_strided(memory[:100], (10, 10), (40, 4))
    beyond = np.lib.stride_tricks.as_strided(view[9:], (50,), (4,))
    assert view.size > 9 + 49
    assert beyond[-1] == 139
    inner = tensor("0", memory[:100], (10, 10), (10, 1))
    value = {"x": Call("torch._utils", "_rebuild_tensor_v2", inner, 9, (50,), (1,), False, {})}
    with pytest.raises(ValueError, match=r"x\.pth: .*a tensor on a _Tensor"):
        tensors.read_tensors(write_zip(tmp_path / "x.pth", dumps(value), {"0": memory[:100]}))


def test_tensors_take_no_more_than_the_file(tmp_path):
    one = np.ones(1, np.float32)
    value = {"x": tensor("0", one, (10**12,), (0,))}
    path = write_zip(tmp_path / "y.pth", dumps(value), {"0": one})
    with pytest.raises(ValueError, match=r"y\.pth: .*beyond the 1 values"):
        tensors.read_tensors(path)
    value = {"x": tensor("0", np.broadcast_to(one, HUGE // 4), strides=(1,))}
    write_zip(path, dumps(value))
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data/0", "w") as member,
    ):
        for _ in range(HUGE // 2**22):
            member.write(bytes(2**22))
    assert path.stat().st_size < HUGE // 100
    with little_memory():
        with zipfile.ZipFile(path) as archive, pytest.raises(MemoryError):
            archive.read("archive/data/0")
        with pytest.raises(ValueError, match=r"y\.pth: .*found archive/data/0 compressed"):
            tensors.read_tensors(path)
    # Storages of the older format lie in one file, too.
    write_legacy(path, dumps(value), {"0": one})
    with little_memory(), pytest.raises(ValueError, match=r"y\.pth: .*found no storage 0 of 41,?9"):
        tensors.read_tensors(path)


PICKLES = {
    "long string": b"\x80\x02X\xff\xff\xff\x7fx.",
    "long bytes": b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "frame": b"\x80\x05\x95" + struct.pack("<Q", 2**40) + b".",
    "deep": b"\x80\x02}(" + b")" + b"\x85" * 10**5 + b"K\x01u.",
    "deep list": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(S'touch ran'\nios\nsystem\n.",
    "attributes of a dtype": b"\x80\x02ctorch\nFloatStorage\n}b.",
    "called dtype": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "items of a storage": b"\x80\x02]X\x01\x00\x00\x00aK\x01s.",
}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_pickles_of_tensors_that_are_none(tmp_path, content, legacy):
    path = tmp_path / "x.pth"
    (write_legacy if legacy else write_zip)(path, content)
    with little_memory(), pytest.raises(ValueError, match=r"x\.pth: ") as error:
        tensors.read_tensors(path)
    assert len(str(error.value)) < 500


def test_a_small_pickle_takes_little_memory(tmp_path):
    """The unpickler in C makes room for the highest index at once, or did."""
    content = b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b"."
    write_zip(tmp_path / "x.pth", content)
    with little_memory():
        if sys.version_info < (3, 12):
            with pytest.raises(MemoryError):
                pickle.loads(content)
        with pytest.raises(ValueError, match="a pickle of more than 65,536"):
            tensors.read_tensors(tmp_path / "x.pth")


def test_attributes_of_a_state_dict_are_dropped(tmp_path):
    content = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    assert pickle.loads(content).items == 1
    write_zip(tmp_path / "x.pth", content)
    assert tensors.read_tensors(tmp_path / "x.pth") == {}


def safetensors(*entries, length=None, data=bytes(16)):
    header = json.dumps({k: {"dtype": "F32", "shape": s, "data_offsets": o} for k, s, o in entries})
    return struct.pack("<Q", len(header) if length is None else length) + header.encode() + data


SAFETENSORS = {
    "huge header": safetensors(length=2**62),
    "overlap": safetensors(("a", [4], [0, 16]), ("b", [2], [4, 12])),
    "beyond": safetensors(("a", [2**40], [0, 2**42])),
    "before": safetensors(("a", [4], [16, 0])),
    "overflow": safetensors(("a", [2**40, 2**40], [0, 16])),
    "nested": struct.pack("<Q", 10**6) + b"[" * 10**6,
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors_that_lie(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match=r"x\.safetensors: damaged, cut"):
        tensors.read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 10**6, "nested too deeply"),
        ("3", "found int, expected a JSON object"),
        ('{"block_out_channels": 7}', "block_out_channels: expected a valid array, found 7"),
        ('{"block_out_channels": [1000000000]}', "less than or equal to 8192, found 1000000000"),
        (json.dumps({"block_out_channels": [8] * 60}), "block_out_channels: .* at most 8 items"),
        ('{"layers_per_block": 1000000000}', "layers_per_block: expected less than or equal to 8"),
        ('{"in_channels": "3"}', "in_channels: expected a valid integer, found '3'"),
        ('{"scaling_factor": 1e999}', "scaling_factor: .*, found inf"),
        ('{"act_fn": {"a": 1}}', "act_fn: found"),
    ],
)
def test_config_json_of_an_autoencoder(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        kl.read_config(tmp_path / "config.json")


# Arrays.


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    marker = tmp_path / "ran"
    evil = np.array([Touch(marker)], object)
    folder = tmp_path / "latents"
    folder.mkdir()
    np.save(folder / "evil.npy", evil, allow_pickle=True)
    np.load(folder / "evil.npy", allow_pickle=True)
    assert marker.exists()
    marker.unlink()
    with pytest.raises(ValueError, match=r"evil\.npy: damaged or no \.npy file of numbers"):
        open_latent_source("npy", ".", path=str(folder))
    with zipfile.ZipFile(tmp_path / "evil.npz", "w") as archive:
        for name in ("arr_0", "mu", "sigma", "count"):
            archive.write(folder / "evil.npy", f"{name}.npy")
    for read in (reference.read_statistics, reference.open_images):
        with pytest.raises(ValueError, match=r"evil\.npz: .*object"):
            read(tmp_path / "evil.npz")
    assert not marker.exists()


def test_arrays_larger_than_memory(tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    (folder / "big.npy").write_bytes(npy_header((10**6, 10**6)) + bytes(64))
    with pytest.raises(MemoryError), little_memory():
        np.load(folder / "big.npy")
    with pytest.raises(ValueError, match=r"big\.npy: damaged"), little_memory():
        open_latent_source("npy", ".", path=str(folder))

    path = zeros_zip(tmp_path / "x.npz", "mu.npy", HUGE, npy_header((HUGE // 8,)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sigma.npy", npy_header((10**6, 10**6)))
        archive.writestr("arr_0.npy", npy_header((4, 10**6, 10**6, 3), "|u1"))
    with little_memory():
        with np.load(path) as archive, pytest.raises(MemoryError):
            archive["mu"]
        with pytest.raises(ValueError, match=r"x\.npz: mu: found float64 \[20971520\], expected"):
            reference.read_statistics(path)
        with pytest.raises(
            ValueError, match=r"x\.npz: found images of 1000000 x 1000000, expected"
        ):
            reference.open_images(path)


# Archives and folders.


def tar_with(path, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data, link in members:
            entry = tarfile.TarInfo(name)
            if link:
                entry.type, entry.linkname = tarfile.SYMTYPE, link
            else:
                entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
@pytest.mark.parametrize("absolute", [True, False])
def test_members_that_lead_out_of_an_archive(tmp_path, name, absolute):
    inside, outside = tmp_path / "in", tmp_path / "evil.png"
    inside.mkdir()
    path, member = inside / name, str(outside) if absolute else "../evil.png"
    if name == "x.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cat/1.png", png())
            archive.writestr(member, png())
    else:
        mode = "w:gz" if name.endswith("gz") else "w"
        tar_with(path, ("cat/1.png", png(), ""), (member, png(), ""), mode=mode)
        with tarfile.open(path) as tar:
            tar.extractall(inside, filter="fully_trusted")
        assert outside.exists()
        outside.unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{name}: found a member named .*which leads out"):
        open_source("archive", ".", path=str(path), cache_dir=inside / "cache")
    after = [each for each in sorted(tmp_path.rglob("*")) if "cache" not in str(each)]
    assert after == before


def test_links_of_an_archive_lead_nowhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(png())
    path = tar_with(
        tmp_path / "x.tar",
        ("cat", b"", str(outside)),
        ("cat/new.png", png(), ""),
        ("cat/secret.png", b"", str(outside / "secret.png")),
    )
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "extracted", filter="fully_trusted")
    assert (outside / "new.png").exists()
    (outside / "new.png").unlink()
    source = open_source("archive", ".", path=str(path))
    assert [source[i].name for i in range(len(source))] == ["x.tar:cat/new.png"]
    assert [each.name for each in outside.iterdir()] == ["secret.png"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_tar_with_a_header_larger_than_memory(tmp_path, kind):
    entry = tarfile.TarInfo("cat/1.png")
    entry.type, entry.size = kind, 2**36
    path = tmp_path / "x.tar"
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with little_memory():
        with pytest.raises(MemoryError):
            tarfile.open(path)  # noqa: SIM115
        with pytest.raises(ValueError, match=r"x\.tar: found a header of 68,719,476,\d+ bytes"):
            open_source("archive", ".", path=str(path))


def test_compressed_tar_that_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("repulsor_jax.data.archives._ALWAYS_EXPANDED", 2**20)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(bytes(2**26), 9))
    assert 200 * path.stat().st_size < 2**26
    with pytest.raises(ValueError, match=r"x\.tar\.gz: refused, as its .* if you trust it"):
        open_source("archive", ".", path=str(path), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_bombs_in_a_zip(tmp_path, monkeypatch):
    monkeypatch.setattr("repulsor_jax.data.archives.MAX_FILE_BYTES", HUGE // 2)
    path = zeros_zip(tmp_path / "x.zip", "cat/1.png", HUGE)  # honest, and a thousandfold
    source = open_source("archive", ".", path=str(path))
    with little_memory():
        with zipfile.ZipFile(path) as archive, pytest.raises(MemoryError):
            archive.read("cat/1.png")
        assert "x.zip:cat/1.png: cannot be read: refused, as it has" in read_error(source)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", png())
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    for at, width in ((20, 4), (42, 4)):  # sizes in the archive and offset, as the directory has it
        wrong = bytearray(content)
        wrong[directory + at : directory + at + width] = b"\xfe\xff\xff\xff"
        path.write_bytes(wrong)
        with little_memory(), pytest.raises(ValueError, match=r"x\.zip: (damaged|ends early)"):
            open_source("archive", ".", path=str(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_larger_than_memory(tmp_path):
    """The largest header there is, the 100,000 x 100,000 of a bomb, and a file of 1 TiB."""
    for k, size in enumerate([(2**31 - 1, 2**31 - 1), (100_000, 100_000), (12_000, 12_000)]):
        (tmp_path / f"{k}.png").write_bytes(png(*size))
    with (tmp_path / "3.png").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "4.png").write_bytes(png())
    source = open_source("folder", ".", path=str(tmp_path))
    with little_memory():
        found, _ = read_images(source, range(5), 16)
    assert [isinstance(image, BadImageError) for image in found] == [True] * 4 + [False]
    for k in range(3):
        assert str(found[k]).startswith(f"{tmp_path}/{k}.png: refused before decoding")
    assert f"{tmp_path}/3.png: cannot be read: refused, as it has 1,099," in str(found[3])
    # Without the limit, this much memory is asked for.
    with Image.open(tmp_path / "2.png") as image, little_memory():
        image._size = (20_000, 20_000)
        with pytest.raises(MemoryError):
            image.load()


@pytest.mark.parametrize("split", ["../outside", "/etc", "a/../../b"])
@pytest.mark.parametrize("kind", ["folder", "npy", "repa", "lightning-dit", "fast-dit"])
def test_a_split_outside(tmp_path, split, kind):
    (tmp_path / "data").mkdir()
    for name in ("outside/cat", "data/a", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outside" / "cat" / "1.png").write_bytes(png())
    opened = open_source if kind == "folder" else open_latent_source
    with pytest.raises(ValueError, match=f"{kind}: found the split .* leads out of .*data"):
        opened(kind, split, path=str(tmp_path / "data"))


CONTROLS = "c\x1b[31mat"


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_class_names_that_move_the_cursor(tmp_path, kind):
    (tmp_path / "data" / CONTROLS).mkdir(parents=True)
    (tmp_path / "data" / CONTROLS / "1.png").write_bytes(png())
    path = tmp_path / "data"
    if kind == "archive":
        path = tar_with(tmp_path / "x.tar", (f"{CONTROLS}/1.png", png(), ""))
    with pytest.raises(ValueError, match="found the class name .*control characters") as error:
        open_source(kind, ".", path=str(path))
    assert "\x1b" not in str(error.value)


def test_labels_of_a_grid_may_hold_anything(tmp_path):
    grid = np.zeros((2, 16, 16, 1), np.uint8)
    labels = ["two\nlines\x1b", "long" * 10**5]
    pictures.save_grid(grid, tmp_path / "x.png", columns=2, column_labels=labels)
    with Image.open(tmp_path / "x.png") as picture:
        assert math.prod(picture.size) < 10**4


# Data sets and checkpoints.


@pytest.fixture
def dataset(tmp_path):
    write(tmp_path / "d", *random_latents())
    return tmp_path / "d"


def test_shards_outside_of_a_data_set(dataset):
    (shard,) = json.loads((dataset / "dataset.json").read_text())["shards"]
    (dataset / shard["name"]).rename(dataset.parent / "other")
    for name in ("../other", str(dataset.parent / "other"), "../../etc/passwd", "", ".", "a\x1b"):
        edit(dataset, shards=[shard | {"name": name}])
        with pytest.raises(ValueError, match=r"dataset\.json\.shards\.0\.name: .* in this folder"):
            latents.open_latent_dataset(dataset)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [10**12, 4, 4]},
        {"shape": [-4, 4, 4]},
        {"shape": []},
        {"shape": "444"},
        {"num_images": "23"},
        {"num_images": 23.0},
        {"mean": [10**400] * 4},
        {"mean": [math.nan] * 4},
        {"mean": []},
        {"class_names": [1, 2, 3]},
        {"class_names": [CONTROLS]},
        {"class_names": {"a": 1}},
        {"skipped": [{"index": 0, "name": ["x" * 10**6], "reason": ""}]},
        {"autoencoder": None},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_values_of_a_data_set(dataset, changes):
    edit(dataset, **changes)
    with little_memory(), pytest.raises(ValueError, match=r"dataset\.json") as error:
        latents.open_latent_dataset(dataset)
    assert len(str(error.value)) < 600
    assert next(iter(changes)) in str(error.value)
    assert "\x1b" not in str(error.value)


NESTED = "[" * 10**6


def test_metadata_that_is_nested(dataset, tmp_path):
    opened = latents.open_latent_dataset(dataset)
    (dataset / ".verified-0-of-1.json").write_text(NESTED)
    latents.check_files(opened)
    (dataset / "dataset.json").write_text(NESTED)
    with pytest.raises(RecursionError):
        json.loads(NESTED)
    with pytest.raises(ValueError, match=r"dataset\.json: .*nested too deeply"):
        latents.open_latent_dataset(dataset)
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "dataset.json").write_text(NESTED)
    with pytest.raises(ValueError, match=r"dataset\.json: .*nested too deeply"):
        open_latent_source("repa", ".", path=str(tmp_path))


def test_labels_of_latents_outside(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4), np.float32))
    (tmp_path / "repa").mkdir()
    (tmp_path / "repa" / "dataset.json").write_text(json.dumps({"labels": [["../x.npy", 0]]}))
    with pytest.raises(ValueError, match="found no .npy file|is not there"):
        open_latent_source("repa", ".", path=str(tmp_path / "repa"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint that stands for a run."""
    folder = tmp_path_factory.mktemp("run")
    params = {"a": jax.numpy.arange(4.0)}
    record = {"autoencoder": "identity", "weights_sha256": "", "shift": [0.0], "factor": [1.0]}
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(
            2,
            {"ema_params": params},
            {"next_index": 2},
            tiny.config_dict().to_dict(),
            record | {"class_names": ["cat"]},
        )
    return folder, params


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("content", [NESTED, '{"a":' * 10**5, "[]", "3", "9" * 10**5, "\x00"])
def test_files_of_a_checkpoint_that_are_hostile(run, content):
    folder, params = run
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )

    def read():
        with Checkpointer(folder / "checkpoints", read_only=True) as checkpointer:
            run_lib.read_records(checkpointer, 2)
            return checkpointer.restore_ema(abstract, 2)[0]

    np.testing.assert_array_equal(read()["a"], params["a"])
    refused = 0
    for file in [f for f in (folder / "checkpoints").rglob("*") if f.is_file()]:
        whole = file.read_bytes()
        file.write_text(content)
        message = ""
        try:
            read()
        except (CheckpointError, config_lib.ConfigError) as error:
            message = str(error)
        file.write_bytes(whole)
        assert not message or str(folder / "checkpoints") in message
        assert len(message) < 800
        refused += bool(message)
    gc.collect()  # orbax leaves coroutines
    assert refused >= 6  # metadata of step, state, config, latents, arrays; the arrays themselves


@pytest.mark.parametrize(
    ("item", "changes"),
    [
        ("latents", {"class_names": [CONTROLS]}),
        ("latents", {"class_names": []}),
        ("latents", {"shift": "0"}),
        ("latents", {"autoencoder": ["identity"]}),
        ("config", {"model": {}}),
        ("config", {"flow": [1]}),
        ("config", {"optimizer": {"ema_decay": None}}),
    ],
)
def test_records_of_a_checkpoint_that_are_hostile(run, item, changes):
    file = run[0] / "checkpoints" / "2" / item / "metadata"
    whole = file.read_text()
    values = json.loads(whole) | changes
    file.write_text(json.dumps(values))
    manifest = run[0] / "checkpoints" / "2" / "manifest" / "metadata"
    whole_manifest = manifest.read_text()
    about = json.loads(whole_manifest)
    del about["digest"]
    about["records"][item] = values_sha256(values)
    manifest.write_text(json.dumps(about | {"digest": values_sha256(about)}))
    try:
        with (
            Checkpointer(run[0] / "checkpoints", read_only=True) as checkpointer,
            pytest.raises(ValueError, match=r"checkpoints/2\.\w+") as error,
        ):
            run_lib.read_records(checkpointer, 2)
        assert "\x1b" not in str(error.value)
        assert "manifest" not in str(error.value)
        assert "was changed" not in str(error.value)
    finally:
        file.write_text(whole)
        manifest.write_text(whole_manifest)


@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": 3},
        {"arrays": {"ema_params/a": {"shape": "4", "dtype": "float32", "fingerprint": ""}}},
        {"arrays": {"ema_params/a": {"shape": [4], "dtype": CONTROLS, "fingerprint": ""}}},
        {"arrays": {"ema_params/a": {"shape": [-4], "dtype": "float32", "fingerprint": ""}}},
        {"records": []},
        {"step": "2"},
        {"format": None},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_manifests_that_are_hostile(run, changes):
    """Whoever can write files can make digests, too."""
    folder, params = run
    manifest = folder / "checkpoints" / "2" / "manifest" / "metadata"
    whole = manifest.read_text()
    about = json.loads(whole) | changes
    del about["digest"]
    manifest.write_text(json.dumps(about | {"digest": values_sha256(about)}))
    try:
        with (
            Checkpointer(folder / "checkpoints", read_only=True) as checkpointer,
            pytest.raises(CheckpointError, match="checkpoints/2: its manifest is none"),
        ):
            checkpointer.restore_ema(params)
    finally:
        manifest.write_text(whole)


# Data sets of TensorFlow Datasets.

FEATURE = {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image"}


@pytest.mark.parametrize("hidden", [True, False])
def test_tfds_features_that_are_code(tmp_path, monkeypatch, hidden):
    """TFDS imports what features.json names, and the program runs with its folder on the path."""
    folder = tmp_path / "evil_set" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    evil = {"type": "evil_set.payload.evil_module.Image", "content": "{}"}
    (tmp_path / "evil_set" / "payload").mkdir()
    (folder / "evil_module.py").rename(tmp_path / "evil_set" / "payload" / "evil_module.py")
    if hidden:
        evil = FEATURE | {"jsonFeature": {"json": json.dumps({"image": evil})}}
    (folder / "features.json").write_text(json.dumps(evil))
    (folder / "dataset_info.json").write_text(
        json.dumps({"name": "evil_set", "version": "1.0.0", "fileFormat": "array_record"})
    )
    monkeypatch.syspath_prepend(tmp_path)
    if not hidden:
        with contextlib.suppress(Exception):
            tfds.builder("evil_set", data_dir=str(tmp_path))
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
        del sys.modules["evil_set.payload.evil_module"]
        importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"features\.json: found the class 'evil_set.*imported"):
        open_source("tfds:evil_set", "train", path=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_tfds_names_that_fetch_code(tmp_path):
    for name in ("huggingface:a/b", "kubric:movi", "../x", "x/../../y", "x/a=True", "http://x/y"):
        with pytest.raises(ValueError, match="found 'tfds:.*', expected the name of a data set"):
            open_source(f"tfds:{name}", "train", path=str(tmp_path))


# Secrets.

SECRETS = [
    "https://me:hunter2hunter2@host/x.tar",
    "https://hunter2hunter2@host/x",
    "https://host/x.tar?X-Amz-Signature=hunter2hunter2&a=1",
    "https://host/x?access_token=hunter2hunter2",
    "hf_hunter2hunter2hunter2hunter2",
    "ghp_hunter2hunter2hunter2hunter2",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_neither_taken_nor_shown(text):
    for key in ("data.source_path", "data.autoencoder_weights", "evaluation.reference"):
        with pytest.raises(config_lib.ConfigError, match=f"config.{key}: found a pass") as error:
            tiny.config(**{key: text})
        assert "hunter2" not in str(error.value)
    shown = untrusted.printable(f"error: {text}: 404 for url {text!r}")
    assert "hunter2" not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c",
        "/data/user@host/images",
        "gs://bucket/train?generation=17",
        "org/name",
        "runs/hf_cache/token=3",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_is_no_secret(text):
    assert untrusted.printable(text) == text
    assert tiny.config(**{"data.source_path": text}).data.source_path == text


def test_errors_of_the_hub_show_no_secret(monkeypatch):
    def download(repository, allow_patterns):
        assert all(pattern.endswith((".safetensors", ".json")) for pattern in allow_patterns)
        url = "https://me:hunter2@mirror/a?token=hunter2"
        raise OSError(f"401 for url: {url}, hf_hunter2hunter2hunter2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="401 for url: https://") as error:
        weight_files.locate("x", "org/name", "", ["config.json", "x.safetensors"])
    assert "hunter2" not in str(error.value)


def test_messages_do_not_obey_a_name(capsys):
    with pytest.raises(SystemExit):
        main._stop("error: a\x1b]0;title\x07 b\u202e \udcff, café\r at https://me:pw@host", 1)
    assert capsys.readouterr().err == (
        "error: a\\x1b]0;title\\x07 b\\u202e \\udcff, café\\r at https://***@host\n"
    )


def test_no_configuration_asks_for_a_secret():
    words = {"token", "secret", "password", "credential", "api_key", "wandb"}
    keys = str(tiny.config_dict().to_dict()).lower()
    flags = subprocess.run(
        ["grep", "-rhoE", r'DEFINE_\w+\(\s*"\w+"', "repulsor_jax"], capture_output=True, text=True
    ).stdout
    assert not [word for word in words if word in keys + flags]
