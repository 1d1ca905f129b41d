"""Reading pretrained tensors from files, and fitting them to Linen parameters.

Nothing here imports torch. A `.pth` file is a zip of a pickle and raw storages: the pickle is read
by an unpickler that knows how to build tensors and dictionaries, and refuses everything else. What
it takes is bounded by the size of the file.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import jax
import ml_dtypes
import numpy as np

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

_STORAGE_DTYPES = {
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

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a flat dictionary of tensors.

    Args:
      path: a `.safetensors` file, or a `.pth`, `.pt` or `.bin` file that holds a state dict, as
        `torch.save` writes it, or wrote it before PyTorch 1.6. No code of the file is run.

    Returns:
      Names to arrays in the file's shapes and dtypes (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another suffix, a damaged file, or content other than a dictionary of tensors;
        names the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a file of tensors")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _read_torch(path)
    raise ValueError(
        f"{path}: found suffix {path.suffix!r}, expected .safetensors or one of "
        f"{', '.join(_TORCH_SUFFIXES)}"
    )


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

    The error names the file `source`, the first tensor at fault, the shape found and the one
    expected, and says how many more there are.
    """
    faults = []
    for name, shape in expected.items():
        if name not in tensors:
            faults.append(f"{name}: found no such tensor, expected one of shape {list(shape)}")
        elif tensors[name].shape != shape:
            found = list(tensors[name].shape)
            faults.append(f"{name}: found shape {found}, expected {list(shape)}")
    for name in sorted(set(tensors) - set(expected)):
        shape = tensors[name].shape
        faults.append(f"{name}: found a tensor of shape {list(shape)}, expected none of this name")
    if faults:
        others = f" (and {len(faults) - 1} more that do not fit)" if len(faults) > 1 else ""
        raise ValueError(f"{source}: {faults[0]}{others}")


def to_linen(
    tensors: Mapping[str, np.ndarray], abstract_params: Any, source: str | os.PathLike[str]
) -> Any:
    """Arranges PyTorch tensors as the parameters of Linen modules that bear PyTorch's names.

    The path of a parameter, joined by dots, is its name in PyTorch, but that `kernel` and `scale`
    are there called `weight`. Kernels of convolutions [O, I, kh, kw] become [kh, kw, I, O], those
    of dense layers [O, I] become [I, O].

    Args:
      tensors: by PyTorch's names.
      abstract_params: unboxed parameters or their abstract arrays, as of `jax.eval_shape`.
      source: the file, for errors.

    Returns:
      A tree as `abstract_params`, of float32 NumPy arrays.

    Raises:
      ValueError: a tensor is missing, superfluous or of another shape, see `check_tensors`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_params)
    names = [_torch_name([str(key.key) for key in path]) for path, _ in leaves]
    shapes = [leaf.shape[::-1] if leaf.ndim != 4 else _oihw(leaf.shape) for _, leaf in leaves]
    check_tensors(tensors, dict(zip(names, shapes, strict=True)), source)
    arrays = (np.asarray(tensors[name], np.float32) for name in names)
    arranged = [np.transpose(a, (2, 3, 1, 0)) if a.ndim == 4 else np.transpose(a) for a in arrays]
    return jax.tree_util.tree_unflatten(structure, arranged)


def _torch_name(path: list[str]) -> str:
    leaf = "weight" if path[-1] in ("kernel", "scale") else path[-1]
    return ".".join([*path[:-1], leaf])


def _oihw(shape: tuple[int, ...]) -> tuple[int, ...]:
    height, width, inputs, outputs = shape
    return outputs, inputs, height, width


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    # safetensors' own NumPy reader knows no bfloat16; its parser hands out the bytes.
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(
            f"{path}: found {path.stat().st_size} bytes that are not a whole safetensors file "
            f"({error}); fetch it anew"
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(
                f"{path}: {name}: found dtype {entry['dtype']}, expected one of "
                f"{', '.join(_SAFETENSORS_DTYPES)}"
            )
        flat = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80":
            return _read_legacy(path)
        if start == b"PK":
            raise ValueError(
                f"{path}: found {size} bytes, the start of a zip without its end; the file is "
                "truncated, fetch it anew"
            )
        raise ValueError(f"{path}: found {size} bytes that are no zip, expected a torch.save file")
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpickle(path, archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: the zip is damaged ({error}); fetch it anew") from error


def _unpickle(path: pathlib.Path, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(f"{path}: found a zip without data.pkl, expected a torch.save file")
    folder = pickles[0].removesuffix("data.pkl")
    order = folder + "byteorder"
    if order in archive.namelist():
        with archive.open(_stored(archive, order)) as stream:
            found = stream.read(16)
        if found != b"little":
            raise ValueError(f"{path}: found byte order {found!r}, expected little")
    budget = _Budget(path.stat().st_size)

    def read(key: str, size: int, dtype: np.dtype) -> np.ndarray:
        entry = _stored(archive, f"{folder}data/{key}")
        if entry.file_size != size * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"found storage {key} with {entry.file_size // dtype.itemsize} x {dtype}, expected "
                f"{size} x {dtype}"
            )
        budget.spend(entry.file_size)
        return np.frombuffer(archive.read(entry), dtype)

    try:
        with archive.open(_stored(archive, pickles[0])) as stream:
            value = _Unpickler(stream, budget.total, read).load()
    except zipfile.BadZipFile:
        raise
    except Exception as error:
        raise _not_tensors(path, error) from error
    return _tensors_only(path, value)


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member that takes no more memory than it takes in the file, as torch.save writes all."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"found {name} compressed, expected it stored as it is")
    return entry


@dataclasses.dataclass
class _Budget:
    """Bytes of storages that a file may ask for: as many as it has itself."""

    total: int
    spent: int = 0

    def spend(self, size: int) -> None:
        self.spent += size
        if size < 0 or self.spent > self.total:
            raise pickle.UnpicklingError(
                f"found storages of {self.spent:,} bytes or more in a file of {self.total:,}"
            )


def _not_tensors(path: pathlib.Path, error: Exception) -> ValueError:
    """What to say of a pickle: hostile or damaged ones make the unpickler raise nearly anything."""
    reason = str(error) or ("it ends early" if type(error) is EOFError else type(error).__name__)
    return ValueError(f"{path}: its pickle is not one of tensors: {reason}")


def _read_legacy(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the format before PyTorch 1.6: pickles in a row, then the storages' bytes.

    The pickles are a magic number, a version, the machine's sizes, the object, and the storages'
    keys in the order of their bytes, each of which follows its length.
    """
    storages: dict[str, np.ndarray] = {}
    budget = _Budget(path.stat().st_size)

    def allocate(key: str, size: int, dtype: np.dtype) -> np.ndarray:
        # Tensors are views of storages whose bytes come after them.
        budget.spend(size * dtype.itemsize)
        storages[key] = np.empty(size, dtype)
        return storages[key]

    with path.open("rb") as file:
        try:
            magic, _, machine, value, keys = (
                _Unpickler(file, budget.total, allocate).load() for _ in range(5)
            )
            if magic != _LEGACY_MAGIC or not machine["little_endian"]:
                raise pickle.UnpicklingError("found no little-endian file of torch.save")
            for key in keys:
                storage = storages[key]
                length = int.from_bytes(file.read(8), "little")
                data = storage.view(np.uint8).data
                if length != storage.size or file.readinto(data) != len(data):
                    raise pickle.UnpicklingError(
                        f"storage {key} is not whole; the file is truncated, fetch it anew"
                    )
        except Exception as error:
            raise _not_tensors(path, error) from error
    if set(keys) != set(storages):
        raise ValueError(f"{path}: found no bytes for some tensors, expected all; fetch it anew")
    return _tensors_only(path, value)


def _tensors_only(path: pathlib.Path, value: Any) -> dict[str, np.ndarray]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a {type(value).__name__}, expected a dict of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise ValueError(
                f"{path}: found {name!r}: a {type(tensor).__name__}, expected only tensors by "
                "name; save the state dict alone"
            )
    return dict(value)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The flat array that tensors are views of; only `persistent_load` makes one."""

    array: np.ndarray


def _empty_dict() -> dict[str, Any]:
    return {}


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    # A view of a view could reach beyond the memory of the storage: no other array will do.
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"found a tensor on a {type(storage).__name__}")
    array = storage.array
    if offset < 0 or min((*shape, *strides), default=0) < 0 or len(shape) != len(strides):
        raise pickle.UnpicklingError(f"found offset {offset}, shape {shape}, strides {strides}")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= array.size or math.prod(shape) > array.size):
        raise pickle.UnpicklingError(f"found shape {shape} beyond the storage's {array.size}")
    steps = [stride * array.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(array[offset:], shape, steps, writeable=False)


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


class _Opcodes(dict[int, Callable[[Any], None]]):
    """The opcodes that a pickle of tensors needs; any other is refused."""

    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"found the opcode {bytes([opcode])!r}, which is refused")


# Python's own unpickler, not the one in C: that one allocates what a pickle of a few bytes asks
# for, and its opcodes cannot be chosen.
class _Unpickler(pickle._Unpickler):
    """Builds dictionaries of tensors, and nothing else."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, stream: IO[bytes], size: int, read_storage: Callable[[str, int, np.dtype], np.ndarray]
    ):
        super().__init__(_Clipped(stream, size))
        self._read_storage = read_storage
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few things a state dict refers to; raises UnpicklingError for any other."""
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(
                f"found {module}.{name}, which is refused; nothing was run"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor is a view of."""
        kind, dtype, key, _, size, *view = pid
        # The old format ends with a view into another storage, long unused and so None.
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise pickle.UnpicklingError(f"found a persistent {kind!r}, expected a storage")
        if type(key) is not str or type(size) is not int:
            raise pickle.UnpicklingError("found a storage without a name and a size")
        if key not in self._storages:
            self._storages[key] = _Storage(self._read_storage(key, size, dtype))
        array = self._storages[key].array
        if array.dtype != dtype or array.size != size:
            raise pickle.UnpicklingError(
                f"found storage {key} with {array.size} x {array.dtype}, expected {size} x {dtype}"
            )
        return self._storages[key]

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # To hash another key can take any depth of recursion.
            if type(target) is not dict or type(key) is not str:
                raise pickle.UnpicklingError(
                    f"found a {type(key).__name__} as key of a {type(target).__name__}, expected "
                    "names of tensors"
                )
            target[key] = value

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _load_build(self) -> None:
        """Drops the attributes of a state dict, PyTorch's notes on versions."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError(f"found attributes of a {type(self.stack[-1]).__name__}")

    dispatch = _Opcodes(
        {
            opcode[0]: pickle._Unpickler.dispatch[opcode[0]]
            for opcode in (
                *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE),
                *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
                *(pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
                *(pickle.SHORT_BINSTRING, pickle.BINSTRING, pickle.EMPTY_TUPLE, pickle.TUPLE),
                *(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND),
                *(pickle.APPENDS, pickle.EMPTY_DICT, pickle.BINPUT, pickle.LONG_BINPUT),
                *(pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL),
                *(pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BINPERSID),
            )
        }
        | {
            pickle.SETITEM[0]: _load_setitem,
            pickle.SETITEMS[0]: _load_setitems,
            pickle.BUILD[0]: _load_build,
        }
    )


class _Clipped:
    """A stream that is asked for no more than the file has: who asks may allocate it first."""

    def __init__(self, stream: IO[bytes], size: int):
        self._stream, self._size = stream, size

    def read(self, size: int) -> bytes:
        return self._stream.read(min(size, self._size))

    def readline(self) -> bytes:
        return self._stream.readline(self._size)
