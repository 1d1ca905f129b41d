"""Files of tensors: safetensors, and those that `torch.save` wrote and others published.

Nothing here imports torch or jax, and nothing that a file holds is run.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from repulsor_jax.files.untrusted import refuse_pointer

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_tensors(path: str | os.PathLike[str], parts: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads a flat dictionary of tensors.

    The file is `.safetensors`, or a `.pth`, `.pt` or `.bin` that holds a state dict, as
    `torch.save` writes it, or wrote it before PyTorch 1.6 (the FID Inception is so published).
    Shapes and dtypes are the file's, with bfloat16 as `ml_dtypes.bfloat16`.

    Args:
      path: the file.
      parts: where it is a checkpoint of training, a dictionary of dictionaries, the first of these
        that is there is read, as ("ema", "model"), and no other tensor.

    Raises:
      FileNotFoundError, ValueError: no such file, another suffix, damage, or content other than a
        dictionary of tensors; names the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a file of tensors")
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        return {name: file.get_tensor(name) for name in list(file.keys())}
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(
            f"{path}: found suffix {path.suffix!r}, expected .safetensors, .pth, .pt or .bin"
        )
    with path.open("rb") as stream:
        start = stream.read(64)
    refuse_pointer(start, path)
    try:
        read = _read_zip if start.startswith(b"PK") else _read_legacy
        return read(path, parts)
    except _NestedError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damage and malice raise nearly anything
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(
            f"{path}: damaged, or holds objects that are not tensors: {reason}. Fetch it again, or "
            "save its state dict as .safetensors"
        ) from error


def open_safetensors(path: str | os.PathLike[str]) -> Any:
    """Returns safetensors' `safe_open` for NumPy, or raises ValueError naming the file.

    A tensor is read when it is asked for.
    """
    try:
        return safetensors.safe_open(path, "np").__enter__()
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            refuse_pointer(file.read(64), path)
        problem = f"damaged, cut short or no safetensors file ({error})"
        raise ValueError(f"{path}: {problem}: fetch it again") from error


def tensors_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Hex digest of names, shapes and float32 values, in the order of the names.

    The same tensors have the same digest whatever the kind and the float type of their file.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.asarray(tensors[name], "<f4")
        digest.update(json.dumps([name, list(values.shape)]).encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def check_tensors(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    source: str | os.PathLike[str],
) -> None:
    """Raises ValueError unless `tensors` are those of `expected`: names and shapes.

    The error names the file `source` and the first tensor at fault, and counts the others.
    """
    first = next(iter(expected), "")
    if first not in tensors:
        for name in tensors:
            if name.endswith(f".{first}"):
                prefix = name.removesuffix(first)
                raise ValueError(
                    f"{source}: the names begin with {prefix!r}, as {name}, expected {first}: save "
                    f"the tensors again without it, {{name.removeprefix({prefix!r}): tensor, ...}}"
                )
    faults = []
    for name in [*expected, *sorted(set(tensors) - set(expected))]:
        found = f"shape {list(tensors[name].shape)}" if name in tensors else "no such tensor"
        wanted = list(expected[name]) if name in expected else "none of this name"
        if found != f"shape {wanted}":
            faults.append(f"{name}: found {found}, expected {wanted}")
    if faults:
        others = f" (and {len(faults) - 1} more that do not fit)" if len(faults) > 1 else ""
        raise ValueError(f"{source}: {faults[0]}{others}")


class _NestedError(ValueError):
    """A dictionary of dictionaries of tensors."""


class _Storage(NamedTuple):
    """A flat array of the file."""

    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; the offset counts elements, the strides bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StateDict(dict[str, Any]):
    """Stands for OrderedDict, and drops the attributes in which PyTorch notes versions."""

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"found a tensor on a {type(storage).__name__}, or with odd strides")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and max(last + 1, math.prod(shape)) > storage.size:
        raise ValueError(f"found a tensor {shape} beyond the {storage.size} values it is part of")
    itemsize = storage.dtype.itemsize
    return _Tensor(storage, offset, tuple(shape), tuple(stride * itemsize for stride in strides))


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries, tuples, numbers, strings and tensors, and calls nothing else.

    Each reference to a function gets a new one, so that a pickle that sets attributes of it
    changes nothing that outlives the file.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What a state dict refers to; raises ValueError for any other name."""
        match f"{module}.{name}":
            case "collections.OrderedDict":
                return lambda: _StateDict()
            case "torch._utils._rebuild_tensor_v2":
                return lambda *arguments: _tensor(*arguments)
            case "torch._utils._rebuild_parameter":
                return lambda tensor, *_: tensor
            case "argparse.Namespace":  # the arguments of a script, which nothing here reads
                return type("_Ignored", (), {"__setstate__": lambda self, state: None})
        if module == "torch" and name in _DTYPES:
            return name
        raise ValueError(f"found {module}.{name}, which is refused; nothing was run")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor is a view of."""
        _, kind, key, _, size, *_ = pid
        if type(key) is not str or type(size) is not int:
            raise ValueError("found a storage without a name and a size")
        return _Storage(np.dtype(_DTYPES[kind]), key, size)


def _load(stream: io.BytesIO) -> Any:
    """Unpickles the next value of a stream, if it is of few opcodes.

    The published files have at most 20,000. Keys of 100,000 nested tuples overflow the C stack;
    before Python 3.12, one large index of the memo makes the unpickler reserve gigabytes.
    """
    most, start = 2**16, stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        index = int(argument or 0) if opcode.name in ("PUT", "LONG_BINPUT") else 0
        if max(count, index) > most:
            raise ValueError(f"found a pickle of more than {most:,} opcodes or objects")
    stream.seek(start)
    return _Unpickler(stream).load()


def _load_tensors(stream: io.BytesIO, parts: Sequence[str]) -> dict[str, _Tensor]:
    value = _load(stream)
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}, expected a dict of tensors")
    value = next((value[part] for part in parts if isinstance(value.get(part), dict)), value)
    if nested := [name for name, part in value.items() if isinstance(part, dict)]:
        raise _NestedError(
            f"found dictionaries under {nested[:5]!r:.100}, as in a checkpoint of training, "
            "expected tensors: save the one of the weights, an average such as 'ema' where it is "
            "there, by itself as .safetensors"
        )
    for name, tensor in value.items():
        if type(name) is not str or not isinstance(tensor, _Tensor):
            shown = name if type(name) is str else type(name).__name__
            raise ValueError(f"found {shown!r}: a {type(tensor).__name__}, expected only tensors")
    return value


def _view(tensor: _Tensor, arrays: Mapping[_Storage, np.ndarray]) -> np.ndarray:
    array = arrays[tensor.storage][tensor.offset :]
    strided = np.lib.stride_tricks.as_strided
    return strided(array, tensor.shape, tensor.strides, writeable=False)


def _read_zip(path: pathlib.Path, parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads a zip of a pickle and raw storages."""
    left = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folders = [name[:-8] for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(folders) != 1:
            raise ValueError("found a zip without data.pkl, which torch.save writes")

        def read(name: str) -> bytes:
            # The file bounds the memory, also where its entries are compressed or overlap.
            nonlocal left
            entry = archive.getinfo(folders[0] + name)
            left -= max(entry.file_size, entry.compress_size)
            if left < 0:
                raise ValueError(f"{entry.filename} expands beyond the file's size")
            return archive.read(entry)

        if folders[0] + "byteorder" in names and (order := read("byteorder")) != b"little":
            raise ValueError(f"found byte order {order[:16]!r}, expected little")
        tensors = _load_tensors(io.BytesIO(read("data.pkl")), parts)
        arrays = {
            storage: np.frombuffer(read(f"data/{storage.key}"), storage.dtype, storage.size)
            for storage in {tensor.storage for tensor in tensors.values()}
        }
    return {name: _view(tensor, arrays) for name, tensor in tensors.items()}


def _read_legacy(path: pathlib.Path, parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads the format before PyTorch 1.6: five pickles in a row, then the storages' bytes.

    The pickles are a magic number, a version, the machine's sizes, the state dict, and the
    storages' keys; then, for each storage in key order, its element count and its bytes.
    """
    content = path.read_bytes()
    stream = io.BytesIO(content)
    magic, _, machine = (_load(stream) for _ in range(3))
    if magic != 0x1950A86A20F9469CFC6C or machine["little_endian"] is not True:
        raise ValueError("found no little-endian file of torch.save")
    tensors, keys = _load_tensors(stream, parts), _load(stream)
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    arrays = {}
    if parts and len(storages) < len(keys):
        raise ValueError("found a checkpoint of training in PyTorch's format before 1.6")
    for key in keys:
        storage = storages[key]
        if int.from_bytes(stream.read(8), "little") != storage.size:
            raise ValueError(f"found no storage {storage.key} of {storage.size} values")
        array = np.frombuffer(content, storage.dtype, storage.size, stream.tell())
        stream.seek(array.nbytes, io.SEEK_CUR)
        arrays[storage] = array
    return {name: _view(tensor, arrays) for name, tensor in tensors.items()}
