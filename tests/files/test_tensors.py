"""Files of tensors against torch and safetensors; those that mean harm are in `tests/hostile`."""

import hashlib
import json
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from repulsor_jax.files import tensors as tensor_files
from tests.oracles.torch_files import Call, dumps, tensor, write_legacy, write_state, write_zip

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.normal(size=(3, 2)).astype(np.float32),
    "a.bias": RNG.normal(size=4).astype(np.float16),
    "none": np.zeros((0, 3), np.float32),
    "count": np.array(7, np.int64),
}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", ["x.pth", "legacy.pt", "x.safetensors"])
def test_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        write_state(path, TENSORS, write_legacy if path.stem == "legacy" else write_zip)
    assert_same(tensor_files.read_tensors(path), TENSORS)


def test_bfloat16(tmp_path):
    values = np.array([1.0, -2.5, 3.1415926, 1e30], np.float32)
    # bfloat16 is the upper half of a float32, here truncated.
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    expected = (upper.astype(np.uint32) << 16).view(np.float32)
    array = upper.view(ml_dtypes.bfloat16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    data = struct.pack("<Q", len(header)) + header + upper.tobytes()
    (tmp_path / "x.safetensors").write_bytes(data)
    for path in (tmp_path / "x.safetensors", write_state(tmp_path / "x.bin", {"x": array})):
        found = tensor_files.read_tensors(path)["x"]
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_part_of_a_safetensors_file(tmp_path):
    save_file({"x": np.arange(12.0).reshape(4, 3)}, tmp_path / "x.safetensors")
    file = tensor_files.open_safetensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file.get_slice("x")[1:3], [[3, 4, 5], [6, 7, 8]])


def test_strides_offsets_and_shared_storages(tmp_path):
    base = np.arange(24, dtype=np.float32)
    parameter = Call("torch._utils", "_rebuild_parameter", tensor("0", base), True, {})
    value = {
        "transposed": tensor("0", base, (3, 4), (1, 3), offset=5),
        "expanded": tensor("0", base, (2, 3), (0, 4)),
        "empty": tensor("0", base, (0, 3), (3, 1), offset=24),
        "parameter": parameter,
    }
    for write in (write_zip, write_legacy):
        found = tensor_files.read_tensors(write(tmp_path / "x.pth", dumps(value), {"0": base}))
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


def test_other_content(tmp_path):
    array = TENSORS["b.weight"]
    for value, complaint in [
        ([tensor("0", array)], "found a list, expected a dict"),
        ({"epoch": 3}, "'epoch': a int, expected only tensors"),
    ]:
        path = write_zip(tmp_path / "x.pth", dumps(value), {"0": array})
        with pytest.raises(ValueError, match=r"x\.pth: .*holds objects that are not t") as error:
            tensor_files.read_tensors(path)
        assert complaint in str(error.value)
    nested = {"ema": {"x": tensor("0", array)}, "step": 3}
    path = write_zip(tmp_path / "x.pth", dumps(nested), {"0": array})
    with pytest.raises(
        ValueError, match=r"x\.pth: found dictionaries under \['ema'\], as in a chec"
    ):
        tensor_files.read_tensors(path)


def test_a_storage_is_missing(tmp_path):
    path = write_zip(tmp_path / "x.pth", dumps({"x": tensor("9", TENSORS["b.weight"])}))
    with pytest.raises(ValueError, match=r"x\.pth: .*archive/data/9"):
        tensor_files.read_tensors(path)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "x.safetensors"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    if name == "x.safetensors":
        save_file(TENSORS, path)
    else:
        write_state(path, TENSORS, write_zip if name == "zip.pth" else write_legacy)
    data = path.read_bytes()
    for length in (0, 1, 2, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"{name}: damaged, .*[Ff]etch it again"):
            tensor_files.read_tensors(path)


def test_flipped_bytes_in_a_torch_file(tmp_path):
    path = write_state(tmp_path / "x.pth", TENSORS)
    data = path.read_bytes()
    where = data.index(TENSORS["b.weight"].tobytes())
    path.write_bytes(data[:where] + b"\xff\xff" + data[where + 2 :])
    with pytest.raises(ValueError, match=r"x\.pth: damaged, .*CRC"):
        tensor_files.read_tensors(path)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pth: found no such file"):
        tensor_files.read_tensors(tmp_path / "x.pth")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.npz: found suffix '.npz', expected .safetensors"):
        tensor_files.read_tensors(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme", "no tensors")
    with pytest.raises(ValueError, match=r"x\.pt: .*found a zip without data\.pkl"):
        tensor_files.read_tensors(tmp_path / "x.pt")


def test_digest():
    digest = hashlib.sha256()
    for name in sorted(TENSORS):
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


def test_tensors_that_do_not_fit():
    expected = {"a": (5,), "b": (4, 3)}
    fitting = {"a": np.zeros(5), "b": np.zeros((4, 3))}
    tensor_files.check_tensors(fitting, expected, "x.pth")
    for changes, complaint in [
        ({"a": None}, "x.pth: a: found no such tensor, expected [5]"),
        ({"b": np.zeros((4, 2))}, "x.pth: b: found shape [4, 2], expected [4, 3]"),
        ({"z": np.zeros(())}, "x.pth: z: found shape [], expected none of this name"),
        (
            {"a": None, "z": np.zeros(2)},
            "x.pth: a: found no such tensor, expected [5] (and 1 more that do not fit)",
        ),
    ]:
        wrong = {name: a for name, a in (fitting | changes).items() if a is not None}
        with pytest.raises(ValueError, match="x.pth") as error:
            tensor_files.check_tensors(wrong, expected, "x.pth")
        assert str(error.value) == complaint
