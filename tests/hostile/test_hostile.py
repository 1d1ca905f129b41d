"""Files that mean harm: refused with a message, nothing run, nothing written, bounded memory.

A row of the table is a file, the message of the program, and, where that can be shown, what a plain
reader does with the file.
"""

import contextlib
import functools
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
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from repulsor_jax.autoencoders import get_autoencoder, kl
from repulsor_jax.data import latents
from repulsor_jax.data.converted import open_latent_source
from repulsor_jax.data.preprocess import BadImageError, read_images
from repulsor_jax.data.sources import open_source
from repulsor_jax.evaluation import reference
from repulsor_jax.files import pictures, tensors, untrusted
from tests.oracles.latent_sets import edit, random_latents, write
from tests.oracles.torch_files import Call, dumps, tensor, write_legacy, write_zip

MARGIN = 96 * 2**20  # bytes
HUGE = 160 * 2**20
NESTED = "[" * 10**6
CONTROLS = "c\x1b[31mat"


class Case(NamedTuple):
    read: Callable[[pathlib.Path], Any]  # as the program does
    name: str
    write: Callable[[pathlib.Path], pathlib.Path]  # makes the file in a folder
    message: str  # of the ValueError that `read` raises
    plain: Callable[[pathlib.Path], None] | None = None  # asserts what a plain reader does


@contextlib.contextmanager
def little_memory():
    """Lets this process allocate `MARGIN` bytes more than it has, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize()
    held = []  # what earlier tests have freed, and the process still has
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))
        with contextlib.suppress(MemoryError):
            while True:
                held.append(np.empty(MARGIN + 2**20, np.uint8))
        resource.setrlimit(resource.RLIMIT_AS, (size + MARGIN, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tree(folder):
    return sorted(p for p in folder.rglob("*") if "cache" not in p.parts)


# What a plain reader does.


def runs(read):
    """It runs the file's command, `touch ran`."""

    def plain(path):
        with contextlib.suppress(Exception):
            read(path)
        pathlib.Path("ran").unlink()  # raises where nothing ran

    return plain


def exhausts(read):
    """It asks for more memory than there is."""

    def plain(path):
        with little_memory(), pytest.raises(MemoryError):
            read(path)

    return plain


def recurses(path):
    """It raises what readers of JSON do not expect."""
    with pytest.raises(RecursionError):
        json.loads(path.read_text())


def escapes(path):
    """It writes outside of the folder that a tar is extracted to."""
    before = tree(path.parents[1])
    with tarfile.open(path) as tar:
        tar.extractall(path.parent, filter="fully_trusted")
    new = [p for p in tree(path.parents[1]) if p not in before]
    assert any(path.parent not in p.parents for p in new)
    for p in reversed(new):
        p.rmdir() if p.is_dir() else p.unlink()


def maker(write):
    """Makes `write(folder, *arguments)` a function of its arguments, then of the folder."""
    return lambda *arguments, **options: lambda folder: write(folder, *arguments, **options)


@maker
def written(folder, name, content, size=0):
    """One file, filled up to a size with a hole."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if size:
        os.truncate(path, size)
    return path


# Files of tensors.


@maker
def pth(folder, value, storages=(), write=write_zip):
    content = value if isinstance(value, bytes) else dumps(value)
    return write(folder / "x.pth", content, storages)


old_pth = functools.partial(pth, write=write_legacy)


def unpickle(path):
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("archive/data.pkl"))


def unpickle_all(path):
    with path.open("rb") as stream:
        for _ in range(5):
            pickle.load(stream)


def weights_of_kl(folder):
    (folder / "config.json").write_text("{}")
    return write_zip(folder / "diffusion_pytorch_model.bin", dumps(SYSTEM))


def compressed_storage(folder):
    array = np.broadcast_to(ONE, HUGE // 4)
    path = write_zip(folder / "x.pth", dumps({"x": tensor("0", array, strides=(1,))}))
    add_zeros(path, "archive/data/0", HUGE)
    assert path.stat().st_size < HUGE // 100
    return path


def add_zeros(path, name, count, head=b""):
    """Adds to a zip a member of `count` zeros after `head`, a thousandth of it in the file."""
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w") as member,
    ):
        member.write(head)
        for _ in range(count // 2**22):
            member.write(bytes(2**22))


def read_beyond(path):
    """As if a view of a view were bounded by its number of values: 10 rows of 10, 4 bytes apart."""
    memory = np.arange(200, dtype=np.float32)
    view = np.lib.stride_tricks.as_strided(memory[:100], (10, 10), (40, 4))
    beyond = np.lib.stride_tricks.as_strided(view[9:], (50,), (4,))
    assert (view.size, beyond[-1]) == (100, 139)


ONE = np.ones(1, np.float32)
SIX = np.arange(6, dtype=np.float32).reshape(3, 2)
FILE = {"0": SIX}
SYSTEM = {"x": Call("os", "system", "touch ran"), "y": tensor("0", SIX)}
REBUILD = "torch._utils", "_rebuild_tensor_v2"
VIEW_OF_A_VIEW = {"x": Call(*REBUILD, tensor("0", SIX), 2, (50,), (1,), False, {})}
# Each has its own size, so that the bytes of one storage are asked for a hundred times.
MANY = {str(n): tensor("0", np.ones(1000 - n, np.float32)) for n in range(100)}
TOO_LARGE = {"x": tensor("0", np.broadcast_to(ONE, 10**12))}
RUN = r"os\.system, which is refused"

CALLS = (
    ("posix", "system", "touch ran"),
    ("builtins", "eval", "open('ran', 'w')"),
    ("builtins", "getattr", "x"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", "x"),
    ("torch", "load", "x"),
    ("torch", "Storage", "x"),
    ("numpy", "load", "x"),
)
TENSORS = (
    ({"shape": (10**12, 2), "strides": (0, 0)}, "beyond the 6 values"),
    ({"shape": (5, 2)}, r"a tensor \(5, 2\) beyond the 6 values"),
    ({"offset": 1}, r"a tensor \(3, 2\) beyond the 6 values"),
    ({"strides": (-2, 1)}, "odd strides"),
    ({"strides": ("2", 1)}, "odd strides"),
    ({"offset": -1}, "odd strides"),
    ({"strides": (1,)}, "shorter than argument 1"),
    ({"kind": "DoubleStorage"}, "buffer is smaller"),
)
PICKLES = {
    "long string": b"\x80\x02X\xff\xff\xff\x7fx.",
    "long bytes": b"\x80\x05\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "frame": b"\x80\x05\x95" + struct.pack("<Q", 2**40) + b".",
    "key so deep that the C stack overflows": b"\x80\x02}()" + b"\x85" * 10**6 + b"K\x01u.",
    "key as deep as is allowed": b"\x80\x02}()" + b"\x85" * 65_000 + b"K\x01u.",
    "deep list": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(S'touch ran'\nios\nsystem\n.",
    "attribute of a dtype": b"\x80\x02ctorch\nFloatStorage\n}b.",
    "attribute of a function": b"\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x01\0\0\0aK\x01sb.",
    "called dtype": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "copy of a dictionary": b"\x80\x02ccollections\nOrderedDict\n}\x85R.",
    "item of a list": b"\x80\x02]X\x01\x00\x00\x00aK\x01s.",
}
# Before Python 3.12 the unpickler makes room for the highest index at once.
FAR = b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b"."
TAKES_ALL = exhausts(unpickle) if sys.version_info < (3, 12) else None


def safetensors(*entries, length=None):
    header = json.dumps({k: {"dtype": "F32", "shape": s, "data_offsets": o} for k, s, o in entries})
    start = struct.pack("<Q", len(header) if length is None else length)
    return start + header.encode() + bytes(16)


SAFETENSORS = {
    "a huge header": safetensors(length=2**62),
    "overlaps": safetensors(("a", [4], [0, 16]), ("b", [2], [4, 12])),
    "an end beyond it": safetensors(("a", [2**40], [0, 2**42])),
    "an end before its begin": safetensors(("a", [4], [16, 0])),
    "a shape that overflows": safetensors(("a", [2**40, 2**40], [0, 16])),
    "a nested header": struct.pack("<Q", 10**6) + NESTED.encode(),
}
CONFIGS = (
    (NESTED, "nested too deeply"),
    ("3", "found int, expected a JSON object"),
    ('{"block_out_channels": 7}', "block_out_channels: expected a valid array, found 7"),
    ('{"block_out_channels": [1000000000]}', "less than or equal to 8192, found 1000000000"),
    (json.dumps({"block_out_channels": [8] * 60}), "block_out_channels: .* at most 8 items"),
    ('{"layers_per_block": 1000000000}', "layers_per_block: expected less than or equal to 8"),
    ('{"in_channels": "3"}', "in_channels: expected a valid integer, found '3'"),
    ('{"scaling_factor": 1e999}', "scaling_factor: .*, found inf"),
    ('{"act_fn": {"a": 1}}', "act_fn: found"),
)


# Arrays.


class Touch:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def npy(shape, descr="<f8"):
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


@maker
def objects(folder, name):
    array = np.array([Touch()], object)
    if name.endswith(".npy"):
        np.save(folder / name, array)
    else:
        np.savez(folder / name, **dict.fromkeys(("arr_0", "mu", "sigma", "count"), array))
    return folder / name


def huge_arrays(folder):
    add_zeros(folder / "x.npz", "mu.npy", HUGE, npy((HUGE // 8,)))
    with zipfile.ZipFile(folder / "x.npz", "a") as archive:
        archive.writestr("sigma.npy", npy((10**6, 10**6)))
        archive.writestr("arr_0.npy", npy((4, 10**6, 10**6, 3), "|u1"))
    return folder / "x.npz"


def load(name=None):
    """NumPy's reader, which is told that it may run code."""
    return lambda path: np.load(path, allow_pickle=True)[name or ...]


# Git LFS pointers, which are cloned in place of the files where git-lfs is not there.

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


# Archives, folders and images.


def png(width=4, height=4):
    """A PNG, of which the header may say any size."""
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "png")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def tar(path, *members, mode="w"):
    """Members are a name and, of a link, its target."""
    with tarfile.open(path, mode) as archive:
        for name, *target in members:
            entry = tarfile.TarInfo(name)
            if target:
                entry.type, entry.linkname = tarfile.SYMTYPE, target[0]
            else:
                entry.size = len(png())
            archive.addfile(entry, io.BytesIO(png()))
    return path


@maker
def outside(folder, name, member):
    """An archive of an image and of another one that leads out of it."""
    names = "cat/1.png", member.format(folder=folder)
    if name != "x.zip":
        return tar(folder / name, *zip(names), mode="w:gz" if name.endswith("gz") else "w")
    with zipfile.ZipFile(folder / name, "w") as archive:
        for each in names:
            archive.writestr(each, png())
    return folder / name


def huge_header(kind):
    entry = tarfile.TarInfo("cat/1.png")
    entry.type, entry.size = kind, 2**36
    return written("x.tar", entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048))


@maker
def bomb(folder, stated):
    """A zip with an image of `HUGE` zeros, which states another size of it."""
    add_zeros(folder / "x.zip", "cat/1.png", HUGE)
    content, size = (folder / "x.zip").read_bytes(), struct.pack("<I", HUGE)
    assert content.count(size) == 2  # beside the member, and in the directory
    return written("x.zip", content.replace(size, struct.pack("<I", stated)))(folder)


@maker
def wrong_directory(folder, at):
    path = outside("x.zip", "cat/2.png")(folder)
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02") + at
    content[start : start + 4] = b"\xfe\xff\xff\xff"
    path.write_bytes(content)
    return path


def neighbours(folder):
    for name in ("outside/cat", "b", "data/a"):
        (folder / name).mkdir(parents=True)
    (folder / "outside" / "cat" / "1.png").write_bytes(png())
    return folder / "data"


def named_folder(folder):
    return written(f"data/{CONTROLS}/1.png", png())(folder).parents[1]


def opens(kind, split="."):
    """Opens an archive, or the folder that a file is in."""
    open_ = open_source if kind in ("archive", "folder") else open_latent_source

    def read(path):
        if kind == "archive":
            return open_(kind, split, path=str(path), cache_dir=path.parent / "cache")
        return open_(kind, split, path=str(path if path.is_dir() else path.parent))

    return read


def first_image(kind):
    """Opens a source and reads its first image; the error of a bad one is raised."""

    def read(path):
        (image,), _ = read_images(opens(kind)(path), [0], 16)
        if isinstance(image, BadImageError):
            raise image

    return read


def decode(path):
    with Image.open(path) as image:
        image._size = (20_000, 20_000)  # PIL itself refuses more than 13,000 or so
        image.load()


# Data sets.


@maker
def dataset(folder, shard_name=None, **changes):
    """A data set whose dataset.json was changed."""
    path = folder / "d" / "dataset.json"
    write(path.parent, *random_latents())
    if shard_name is not None:
        (shard,) = json.loads(path.read_text())["shards"]
        (folder / "d" / shard["name"]).rename(folder / "other")
        changes["shards"] = [shard | {"name": shard_name.format(folder=folder)}]
    edit(path.parent, **changes)
    return path


def nested_dataset(folder):
    return written("d/dataset.json", NESTED)(dataset()(folder).parents[1])


def labels_outside(folder):
    np.save(folder / "x.npy", np.zeros((2, 4, 4), np.float32))
    path = written("repa/dataset.json", json.dumps({"labels": [["../x.npy", 0]]}))(folder)
    return path.parent


DESCRIPTIONS = (
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
)
SHARDS = ("../other", "{folder}/other", "../../etc/passwd", "", ".", "a\x1b")
CODE = ("huggingface:a/b", "kubric:movi", "../x", "x/../../y", "x/a=True", "http://x/y")


# The table.

CASES: list[Case] = []


def rows(read, *cases):
    CASES.extend(Case(read, *case) for case in cases)


rows(
    tensors.read_tensors,
    ("pickle that runs a command", pth(SYSTEM, FILE), RUN, runs(unpickle)),
    ("old pickle that runs a command", old_pth(SYSTEM, FILE), RUN, runs(unpickle_all)),
    *(
        (f"pickle that calls {m}.{n}", pth({"x": Call(m, n, x)}), rf"{m}\.{n}, which is refused")
        for m, n, x in CALLS
    ),
    ("view of a view", pth(VIEW_OF_A_VIEW, FILE), "a tensor on a _Tensor", read_beyond),
    *((f"tensor of {c}", pth({"x": tensor("0", SIX, **c)}, FILE), m) for c, m in TENSORS),
    (
        *("compressed storage", compressed_storage, "data/0 expands beyond the file's size"),
        exhausts(lambda path: zipfile.ZipFile(path).read("archive/data/0")),
    ),
    (
        "storage read often",
        pth(MANY, {"0": np.ones(1000, np.float32)}),
        "data/0 expands beyond the file's size",
    ),
    ("storage larger than an old file", old_pth(TOO_LARGE, FILE), "no storage 0 of 1000000000000"),
    ("far index of the memo", pth(FAR), "more than 65,536 opcodes or objects", TAKES_ALL),
    ("far index of an old memo", old_pth(FAR), "more than 65,536 opcodes or objects"),
    *((f"pickle: {k}", pth(v), "objects that are not") for k, v in PICKLES.items()),
    *((f"old pickle: {k}", old_pth(v), "objects that are not") for k, v in PICKLES.items()),
    *((f"it has {k}", written("x.safetensors", v), "damaged") for k, v in SAFETENSORS.items()),
)
rows(
    lambda path: get_autoencoder("kl", weights=str(path.parent)),
    ("weights that run a command", weights_of_kl, RUN, runs(unpickle)),
)
rows(
    kl.read_config,
    *(
        (f"config {c:.40}", written("config.json", c), m, recurses if c == NESTED else None)
        for c, m in CONFIGS
    ),
)
rows(
    opens("npy"),
    ("npy of objects", objects("evil.npy"), r"damaged or no \.npy file of numbers", runs(load())),
    ("huge npy", written("x.npy", npy((10**6, 10**6)) + bytes(64)), "damaged", exhausts(np.load)),
)
rows(
    reference.read_statistics,
    ("statistics of objects", objects("evil.npz"), "object", runs(load("mu"))),
    ("huge statistics", huge_arrays, r"mu: found float64 \[20971520\], exp", exhausts(load("mu"))),
)
rows(
    reference.open_images,
    ("images of objects", objects("evil.npz"), "object", runs(load("arr_0"))),
    ("huge images", huge_arrays, "found images of 1000000 x 1000000, expected"),
)
rows(
    opens("archive"),
    *(
        (
            f"{name}: {member}",
            outside(name, member),
            "found a member named .*which leads out",
            plain,
        )
        for name, plain in (("x.tar", escapes), ("x.tar.gz", escapes), ("x.zip", None))
        for member in ("../evil.png", "cat/../../evil.png", "{folder}/../evil.png")
    ),
    *(
        (f"header {k!r}", huge_header(k), "a header of 68,719,476,", exhausts(tarfile.open))
        for k in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
    ),
    ("zip with another size in its directory", wrong_directory(20), "damaged|ends early"),
    ("zip with another place in its directory", wrong_directory(42), "damaged|ends early"),
    ("class of a tar", lambda x: tar(x / "x.tar", (f"{CONTROLS}/1.png",)), "control characters"),
)
rows(
    first_image("archive"),
    (
        *("zip bomb", bomb(2**30), r"cat/1\.png: cannot be read: refused, as it has "),
        exhausts(lambda path: zipfile.ZipFile(path).read("cat/1.png")),
    ),
    ("zip bomb that lies", bomb(100), r"cat/1\.png: cannot be read: damaged: "),
)
rows(
    first_image("folder"),
    *(
        (f"image of {n}", written("1.png", png(n, n)), "refused before decoding", plain)
        for n, plain in ((2**31 - 1, None), (10**5, None), (12_000, exhausts(decode)))
    ),
    ("image of 1 TiB", written("1.png", b"", 2**40), "cannot be read: refused, as it has 1,099,"),
)
rows(
    opens("folder"),
    ("class of a folder", named_folder, "control characters"),
)
for kind in ("folder", "npy", "repa", "lightning-dit", "fast-dit"):
    for split in ("../outside", "/etc", "a/../../b")[: None if kind == "folder" else 1]:
        message = f"{kind}: found the split .* leads out of .*"
        rows(opens(kind, split), (f"{kind}: {split}", neighbours, message))
rows(
    lambda path: latents.open_latent_dataset(path.parent),
    *((f"shard {s!r}", dataset(s), r"shards\.0\.name: .* in this folder") for s in SHARDS),
    *((f"data set of {c!s:.40}", dataset(**c), *c) for c in DESCRIPTIONS),
    ("nested dataset.json", nested_dataset, "nested too deeply", recurses),
)
for read, name in (
    (tensors.read_tensors, "x.safetensors"),
    (tensors.read_tensors, "x.pth"),
    (kl.read_config, "config.json"),
    (opens("npy"), "x.npy"),
    (reference.open_images, "x.npz"),
    (reference.open_images, "x.npy"),
    (opens("archive"), "x.tar"),
    (first_image("folder"), "1.png"),
):
    message = f"{name}: is a Git LFS pointer, .* by `git lfs pull`"
    rows(read, (f"pointer {name}", written(name, POINTER), message))
rows(
    opens("repa"),
    ("labels of a file outside", labels_outside, "found no .npy file|is not there"),
)
rows(
    lambda path: open_latent_source("repa", ".", path=str(path.parents[1])),
    ("nested labels", written("vae-sd/dataset.json", NESTED), "nested too deeply", recurses),
)
for name in CODE:
    rows(
        lambda path, name=name: open_source(f"tfds:{name}", "train", path=str(path)),
        (f"tfds:{name}", lambda folder: folder, "expected the name of a data set"),
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_file_is_refused(tmp_path, monkeypatch, case):
    folder = tmp_path / "in"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = case.write(folder)
    if case.plain:
        case.plain(path)
    before = tree(tmp_path)
    with little_memory(), pytest.raises(ValueError, match=case.message) as error:
        case.read(path)
    assert tree(tmp_path) == before
    assert path.name in str(error.value)
    assert len(str(error.value)) < 800
    assert "\x1b" not in str(error.value)


# Files that are read without harm, or whose limit is set lower.


def test_attributes_of_a_state_dict_are_dropped(tmp_path):
    content = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    assert pickle.loads(content).items == 1
    assert tensors.read_tensors(write_zip(tmp_path / "x.pth", content)) == {}


def test_links_of_an_archive_lead_nowhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(png())
    links = ("cat", str(outside)), ("cat/secret.png", str(outside / "secret.png"))
    path = tar(tmp_path / "x.tar", links[0], ("cat/new.png",), links[1])
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "extracted", filter="fully_trusted")
    (outside / "new.png").unlink()  # raises where it was not written
    source = opens("archive")(path)
    assert [source[i].name for i in range(len(source))] == ["x.tar:cat/new.png"]
    assert [each.name for each in outside.iterdir()] == ["secret.png"]


def test_labels_of_a_grid_may_hold_anything(tmp_path):
    grid = np.zeros((2, 16, 16, 1), np.uint8)
    labels = ["two\nlines\x1b", "long" * 10**5]
    pictures.save_grid(grid, tmp_path / "x.png", columns=2, column_labels=labels)
    with Image.open(tmp_path / "x.png") as picture:
        assert math.prod(picture.size) < 10**4


def test_a_nested_note_of_a_verified_data_set_is_ignored(tmp_path):
    path = dataset()(tmp_path)
    opened = latents.open_latent_dataset(path.parent)
    written(".verified-0-of-1.json", NESTED)(path.parent)
    latents.check_files(opened)


def test_compressed_tar_that_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("repulsor_jax.files.untrusted.ALWAYS_EXPANDED", 2**20)
    path = written("x.tar.gz", gzip.compress(bytes(2**26), 9))(tmp_path)
    assert untrusted.most_expanded(path.stat().st_size) < 2**26
    with pytest.raises(ValueError, match=r"x\.tar\.gz: refused, as its .* if you trust it"):
        opens("archive")(path)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("hidden", [True, False])
def test_tfds_features_that_are_code(tmp_path, monkeypatch, hidden):
    """TFDS imports what features.json names, and the program runs with its folder on the path."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    written("evil_set/payload/evil_module.py", code)(tmp_path)
    evil = {"type": "evil_set.payload.evil_module.Image", "content": "{}"}
    if hidden:
        evil = {
            "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
            "jsonFeature": {"json": json.dumps({"image": evil})},
        }
    about = {"name": "evil_set", "version": "1.0.0", "fileFormat": "array_record"}
    written("evil_set/1.0.0/features.json", json.dumps(evil))(tmp_path)
    written("evil_set/1.0.0/dataset_info.json", json.dumps(about))(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if not hidden:
        with contextlib.suppress(Exception):
            tfds.builder("evil_set", data_dir=str(tmp_path))
        (tmp_path / "ran").unlink()  # raises where nothing ran
        del sys.modules["evil_set.payload.evil_module"]
        importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"features\.json: found the class 'evil_set.*imported"):
        open_source("tfds:evil_set", "train", path=str(tmp_path))
    assert not (tmp_path / "ran").exists()
