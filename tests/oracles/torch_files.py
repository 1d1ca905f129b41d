"""Files as `torch.save` writes them, made without torch, and pickles that name what they like."""

import collections
import dataclasses
import struct
import zipfile

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
KINDS["bfloat16"] = "BFloat16Storage"
LEGACY_LEAD = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]


@dataclasses.dataclass
class Global:
    """Pickles as a reference to `module.name`, which need not exist."""

    module: str
    name: str


class Call:
    """Pickles as the call of a global."""

    def __init__(self, module, name, *arguments):
        self.function, self.arguments = Global(module, name), arguments


class Storage:
    """Pickles as torch pickles a storage: by reference to bytes elsewhere in the file."""

    def __init__(self, kind, key, size):
        self.id = ("storage", Global("torch", kind), key, "cpu", size)


def tensor(key, array, shape=None, strides=None, offset=0, kind=None):
    """A call that rebuilds a tensor on the storage `array`, contiguous by default."""
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    return Call(
        *("torch._utils", "_rebuild_tensor_v2"),
        Storage(kind or KINDS[array.dtype.name], key, array.size),
        offset,
        tuple(array.shape if shape is None else shape),
        tuple(strides),
        False,
        Call("collections", "OrderedDict"),
    )


def dumps(value):
    """A pickle of protocol 2."""
    return b"\x80\x02" + _dump(value) + b"."


def _dump(value):
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_dump, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_dump, value)) + b"e"
        case dict():
            items = b"(" + b"".join(_dump(k) + _dump(v) for k, v in value.items()) + b"u"
            if type(value) is dict:
                return b"}" + items
            notes = _dump({"_metadata": {"": {"version": 1}}})  # as of Module.state_dict
            return _dump(Call("collections", "OrderedDict")) + items + notes + b"b"
        case Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return _dump(value.function) + _dump(value.arguments) + b"R"
        case Storage():
            return _dump(value.id) + b"Q"
    raise TypeError(type(value))


def write_zip(path, content, storages=()):
    """Writes the zip that torch.save writes, around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, array in dict(storages).items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def write_legacy(path, content, storages=()):
    """Writes what torch.save wrote before PyTorch 1.6, around a pickle."""
    storages = dict(storages)
    pickles = [dumps(value) for value in LEGACY_LEAD] + [content, dumps(list(storages))]
    arrays = (struct.pack("<q", a.size) + a.tobytes() for a in storages.values())
    path.write_bytes(b"".join([*pickles, *arrays]))
    return path


def write_state(path, tensors, write=write_zip):
    """Writes arrays as a state dict, each on a storage of its own."""
    arrays = {str(i): array for i, array in enumerate(tensors.values())}
    calls = (tensor(key, array) for key, array in arrays.items())
    state = collections.OrderedDict(zip(tensors, calls, strict=True))
    return write(path, dumps(state), arrays)
