"""Files of tensors against torch and safetensors, and against files that mean harm."""

import collections
import hashlib
import json
import os
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from repulsor_jax.files import tensors as tensor_files

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.normal(size=(3, 2)).astype(np.float32),
    "a.bias": RNG.normal(size=4).astype(np.float16),
    "count": np.array(7, np.int64),
}


class Global:
    """Pickles as a reference to `module.name`, which need not exist."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as the call of a global."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Storage:
    """Pickles as torch pickles a storage: by reference to a file of the zip."""

    def __init__(self, kind, key, array):
        self.id = ("storage", Global("torch", kind), key, "cpu", array.size)


class TorchPickler(pickle._Pickler):
    """The pickles that torch writes, without torch."""

    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
KINDS["bfloat16"] = "BFloat16Storage"


def tensor(key, array, shape=None, strides=None, offset=0, kind=None):
    """A call that rebuilds a tensor on the storage `array`, contiguous by default."""
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        Storage(kind or KINDS[array.dtype.name], key, array),
        offset,
        tuple(array.shape if shape is None else shape),
        tuple(strides),
        False,
        collections.OrderedDict(),
    )


def write_torch(path, value, storages):
    """Writes the zip that torch.save writes."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            TorchPickler(stream, protocol=2).dump(value)
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def write_state(path, tensors):
    value = collections.OrderedDict(
        (n, tensor(str(i), a)) for i, (n, a) in enumerate(tensors.items())
    )
    return write_torch(path, value, {str(i): a for i, a in enumerate(tensors.values())})


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_torch_files(tmp_path, suffix):
    assert_same(tensor_files.read_tensors(write_state(tmp_path / f"x{suffix}", TENSORS)), TENSORS)


def test_safetensors_files(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert_same(tensor_files.read_tensors(tmp_path / "x.safetensors"), TENSORS)


def test_bfloat16(tmp_path):
    values = np.array([1.0, -2.5, 3.1415926, 1e30], np.float32)
    # bfloat16 is the upper half of a float32, here truncated.
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    expected = (upper.astype(np.uint32) << 16).view(np.float32)
    array = upper.view(ml_dtypes.bfloat16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    data = struct.pack("<Q", len(header)) + header + upper.tobytes()
    (tmp_path / "x.safetensors").write_bytes(data)
    for path in (tmp_path / "x.safetensors", write_state(tmp_path / "x.pth", {"x": array})):
        found = tensor_files.read_tensors(path)["x"]
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_strides_offsets_and_shared_storages(tmp_path):
    base = np.arange(24, dtype=np.float32)
    value = {
        "transposed": tensor("0", base, (3, 4), (1, 3), offset=5),
        "expanded": tensor("0", base, (2, 3), (0, 4)),
        "empty": tensor("0", base, (0, 3), (3, 1), offset=24),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"), tensor("0", base), True, {}
        ),
    }
    found = tensor_files.read_tensors(write_torch(tmp_path / "x.pth", value, {"0": base}))
    np.testing.assert_array_equal(found["transposed"], base[5:17].reshape(4, 3).T)
    np.testing.assert_array_equal(found["expanded"], [[0, 4, 8], [0, 4, 8]])
    assert found["empty"].shape == (0, 3)
    np.testing.assert_array_equal(found["parameter"], base)


def test_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state = torch.nn.Conv2d(2, 3, 3).state_dict()  # an OrderedDict with an attribute
    state |= {
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "int": torch.arange(3),
        "bool": base > 0,
        "view": base[1:, ::2].T,
        "parameter": torch.nn.Parameter(base),
        "scalar": torch.tensor(2.5),
    }
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        found = tensor_files.read_tensors(path)
        assert list(found) == list(state)
        for name, expected in state.items():
            assert str(expected.dtype) in (f"torch.{found[name].dtype}", "torch.bool")
            assert found[name].shape == expected.shape
            np.testing.assert_array_equal(found[name].astype(float), expected.detach().double())
    content = path.read_bytes()
    for length in (20, 300, len(content) - 150, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"False\.pth: its pickle is not one of tensors"):
            tensor_files.read_tensors(path)


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("os", "system", ("touch {marker}",)),
        ("posix", "system", ("touch {marker}",)),
        ("builtins", "eval", ("open('{marker}', 'w')",)),
        ("builtins", "getattr", ()),
        ("torch._utils", "_rebuild_device_tensor_from_numpy", ()),
        ("torch", "load", ("{marker}",)),
        ("numpy", "load", ("{marker}",)),
    ],
)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, module, name, arguments):
    marker = tmp_path / "ran"
    call = Call(Global(module, name), *(a.format(marker=marker) for a in arguments))
    array = TENSORS["b.weight"]
    path = write_torch(tmp_path / "x.pth", {"x": tensor("0", array), "y": call}, {"0": array})
    with pytest.raises(ValueError, match=rf"x\.pth: .*{module}\.{name}, which is refused"):
        tensor_files.read_tensors(path)
    assert not marker.exists()


def test_the_harmful_pickle_above_does_run_elsewhere(tmp_path):
    # Otherwise the test before this one could not fail.
    path = write_torch(
        tmp_path / "x.pth", Call(Global("os", "system"), f"touch {tmp_path}/ran"), {}
    )
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert os.path.exists(tmp_path / "ran")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"shape": (5, 2)}, "shape (5, 2) beyond the storage's 6"),
        ({"offset": 1}, "shape (3, 2) beyond the storage's 6"),
        ({"strides": (-2, 1)}, "strides (-2, 1)"),
        ({"offset": -1}, "offset -1"),
        ({"strides": (1,)}, "strides (1,)"),
        ({"kind": "DoubleStorage"}, "storage 0 with 3 x float64, expected 6 x float64"),
        ({"kind": "Storage"}, "torch.Storage, which is refused"),
    ],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, changes, complaint):
    array = TENSORS["b.weight"]
    path = write_torch(tmp_path / "x.pth", {"x": tensor("0", array, **changes)}, {"0": array})
    with pytest.raises(ValueError, match=r"x\.pth: ") as error:
        tensor_files.read_tensors(path)
    assert complaint in str(error.value)


def test_other_content(tmp_path):
    array = TENSORS["b.weight"]
    for value, complaint in [
        ([tensor("0", array)], "found a list, expected a dict"),
        ({"epoch": 3}, "'epoch': a int, expected only tensors"),
        ({"state_dict": {"x": tensor("0", array)}}, "'state_dict': a dict, expected only tensors"),
    ]:
        path = write_torch(tmp_path / "x.pth", value, {"0": array})
        with pytest.raises(ValueError, match=r"x\.pth: ") as error:
            tensor_files.read_tensors(path)
        assert complaint in str(error.value)


def test_a_storage_is_missing(tmp_path):
    path = write_torch(tmp_path / "x.pth", {"x": tensor("9", TENSORS["b.weight"])}, {})
    with pytest.raises(ValueError, match=r"x\.pth: .*archive/data/9"):
        tensor_files.read_tensors(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 2, 20, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, kept):
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        write_state(path, TENSORS)
    else:
        save_file(TENSORS, path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=rf"x\{suffix}: found \d+ bytes"):
        tensor_files.read_tensors(path)


def test_flipped_bytes_in_a_torch_file(tmp_path):
    path = write_state(tmp_path / "x.pth", TENSORS)
    data = path.read_bytes()
    where = data.index(TENSORS["b.weight"].tobytes())
    path.write_bytes(data[:where] + b"\xff\xff" + data[where + 2 :])
    with pytest.raises(ValueError, match=r"x\.pth: the zip is damaged .*CRC"):
        tensor_files.read_tensors(path)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pth: found no such file"):
        tensor_files.read_tensors(tmp_path / "x.pth")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.npz: found suffix '.npz', expected .safetensors"):
        tensor_files.read_tensors(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme", "no tensors")
    with pytest.raises(ValueError, match=r"x\.pt: found a zip without data\.pkl"):
        tensor_files.read_tensors(tmp_path / "x.pt")


def test_digest(tmp_path):
    digest = hashlib.sha256()
    for name in ("a.bias", "b.weight", "count"):
        array = TENSORS[name].astype(np.float32)
        digest.update(json.dumps([name, list(array.shape)]).encode() + array.tobytes())
    assert tensor_files.tensors_sha256(TENSORS) == digest.hexdigest()
    wider = {name: array.astype(np.float64) for name, array in reversed(TENSORS.items())}
    assert tensor_files.tensors_sha256(wider) == digest.hexdigest()
    for changed in (
        {**TENSORS, "count": np.array(8)},
        {**TENSORS, "count": np.array([7])},
        {"b.weight" if name == "b.weight" else name + "x": a for name, a in TENSORS.items()},
    ):
        assert tensor_files.tensors_sha256(changed) != digest.hexdigest()


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(1, name="norm.0")(nn.Conv(4, (3, 2), name="conv")(x))
        return nn.Dense(5, name="out")(x)


@pytest.fixture(scope="module")
def layers():
    params = jax.eval_shape(Layers().init, jax.random.key(0), np.zeros((1, 6, 6, 3)))["params"]
    shapes = {
        "conv.weight": (4, 3, 3, 2),
        "conv.bias": (4,),
        "norm.0.weight": (4,),
        "norm.0.bias": (4,),
        "out.weight": (5, 4),
        "out.bias": (5,),
    }
    return params, {name: RNG.normal(size=shape) for name, shape in shapes.items()}


def test_to_linen(layers):
    abstract, tensors = layers
    params = tensor_files.to_linen(tensors, abstract, "file")
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, abstract)
    kernel = params["conv"]["kernel"]
    assert kernel[2, 1, 0, 3] == np.float32(tensors["conv.weight"][3, 0, 2, 1])
    np.testing.assert_array_equal(params["out"]["kernel"], tensors["out.weight"].T.astype("f4"))
    np.testing.assert_array_equal(params["norm.0"]["scale"], tensors["norm.0.weight"].astype("f4"))


def test_tensors_that_do_not_fit(layers):
    abstract, tensors = layers
    missing = {name: a for name, a in tensors.items() if name != "out.bias"}
    for wrong, complaint in [
        (missing, "file.pth: out.bias: found no such tensor, expected one of shape [5]"),
        (
            tensors | {"conv.weight": np.zeros((4, 3, 2, 3))},
            "file.pth: conv.weight: found shape [4, 3, 2, 3], expected [4, 3, 3, 2]",
        ),
        (
            tensors | {"z": np.zeros((2, 2))},
            "file.pth: z: found a tensor of shape [2, 2], expected none of this name",
        ),
        (
            missing | {"z": np.zeros((2, 2))},
            "file.pth: out.bias: found no such tensor, expected one of shape [5] "
            "(and 1 more that do not fit)",
        ),
    ]:
        with pytest.raises(ValueError, match="file") as error:
            tensor_files.to_linen(wrong, abstract, "file.pth")
        assert str(error.value) == complaint
