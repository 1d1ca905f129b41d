"""Where arrays live: the mesh, the rules from logical axis names to mesh axes, host-to-device.

A mesh has the sizes `data`, `fsdp` and `tensor`. The first two split the batch; `fsdp` also splits
parameters, optimizer state and EMA; `tensor` splits attention heads and the MLP's hidden width. The
state of training is split over `data` too (`split_params.py`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# `data` is two axes: few dimensions of a network divide by 256, but one may divide by 16, and
# another by the rest.
DATA_AXES = ("data_major", "data_minor")
BATCH_AXES = (*DATA_AXES, "fsdp")
AXES = (*BATCH_AXES, "tensor")
_MINOR_SIZE = 16  # of the axis `data_minor`, at most

# Logical axis name -> mesh axes. A name that is not here is replicated.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
)

_LOOPS = ("layers", "segment")  # logical axes

# Parameters with fewer elements stay replicated: gathering them costs more than it saves.
MIN_SHARDED_SIZE = 4096
MIN_SPLIT_SIZE = 2**16  # the same for what training splits over `data`


def mesh_shape(data: int, fsdp: int, tensor: int, num_devices: int) -> tuple[int, int, int]:
    """Fills the axis given as -1 so that the product is the number of devices.

    Raises:
      ValueError: more than one -1, or sizes that do not multiply to `num_devices`; names the key.
    """
    found = {"data": data, "fsdp": fsdp, "tensor": tensor}
    described = ", ".join(f"mesh.{name}={size}" for name, size in found.items())
    fill = [name for name, size in found.items() if size == -1]
    if len(fill) > 1 or any(size < 1 and size != -1 for size in found.values()):
        raise ValueError(f"{described}: sizes must be positive, and at most one may be -1 (fill)")
    known = math.prod(size for size in found.values() if size != -1)
    if fill:
        found[fill[0]] = num_devices // known
    if math.prod(found.values()) != num_devices:
        raise ValueError(
            f"{described}: the product must be the number of devices, {num_devices}; "
            "set one of them to -1 to fill it"
        )
    return found["data"], found["fsdp"], found["tensor"]


def create_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh with the axes `AXES`, laid out for the network of the devices.

    Several TPU slices are joined by the data-centre network, which carries `data` alone: gradients
    cross it once a step, while fsdp and tensor talk in every layer. On GPUs a slice is one host
    (JAX numbers slices by NVLink); the network between hosts is fast enough for fsdp, so fsdp may
    cross hosts.

    Raises:
      ValueError: the sizes do not fit the devices (see `mesh_shape`), or their slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(data, fsdp, tensor, len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if any(d.device_kind == "TPU v4" and d.core_on_chip for d in devices):
        # A plan's v4, described core by core: mesh_utils knows whole chips alone.
        array = np.array(devices).reshape(shape)
    elif num_slices > 1 and shape[0] % num_slices == 0:
        array = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // num_slices, *shape[1:]),
            (num_slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    elif num_slices > 1 and devices[0].platform == "tpu":
        asked = zip(("data", "fsdp", "tensor"), shape, strict=True)
        described = ", ".join(f"mesh.{name}={size}" for name, size in asked)
        raise ValueError(
            f"{described}: found {num_slices} slices of {len(devices) // num_slices} devices. The "
            "network between them carries mesh.data alone, which must be a multiple of "
            f"{num_slices}: lower mesh.fsdp or mesh.tensor"
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    minor = math.gcd(shape[0], _MINOR_SIZE)
    in_two = array.reshape(shape[0] // minor, minor, *shape[1:])
    return Mesh(in_two, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(mesh: Mesh) -> dict[str, int]:
    """The sizes `data`, `fsdp` and `tensor` of a mesh."""
    return {"data": _axes_size(DATA_AXES, mesh), **{name: mesh.shape[name] for name in AXES[2:]}}


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes the mesh and the logical rules current: models are traced and run inside it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces that the mesh cuts a batch into."""
    return _axes_size(BATCH_AXES, mesh)


def tree_shardings(abstract_tree: Any, mesh: Mesh, *, over_data: bool = False) -> Any:
    """Shardings of a tree of (boxed) abstract arrays by their logical axis names.

    A dimension that its mesh axes do not divide is replicated, and so is every small parameter.

    Args:
      abstract_tree: output of `jax.eval_shape`; parameters boxed by `nn.with_logical_partitioning`.
      mesh: the result has a `NamedSharding` for each leaf of `flax.linen.unbox(abstract_tree)`.
      over_data: split named arrays over `data` too, see `split_over_data`.
    """
    specs = nn.get_partition_spec(abstract_tree)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def fit(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        if leaf.size < MIN_SHARDED_SIZE and BATCH_AXES not in sharding.spec:
            return replicated(mesh)
        spec = list(sharding.spec) + [None] * (len(leaf.shape) - len(sharding.spec))
        fitted = [
            axes if axes is None or size % _axes_size(axes, mesh) == 0 else None
            for size, axes in zip(leaf.shape, spec, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fitted))

    fitted = jax.tree.map(fit, nn.unbox(abstract_tree), shardings)
    if not over_data:
        return fitted

    def split(box: Any, sharding: NamedSharding) -> NamedSharding:
        if not isinstance(box, nn.LogicallyPartitioned):
            return sharding
        return split_over_data(box.value, sharding, box.names)

    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
    return jax.tree.map(split, abstract_tree, fitted, is_leaf=is_box)


def split_axes(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each dimension of an array; () for a dimension that is whole."""
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


def split_over_data(
    leaf: jax.ShapeDtypeStruct, sharding: NamedSharding, names: Sequence[str | None]
) -> NamedSharding:
    """The sharding of an array with logical axis names, further split over `data`.

    Both its axes split one dimension where they divide it, else each another, else one alone. An
    array that neither divides stays as it is, and so does every small one. What a loop runs over,
    layers and segments, is not split.
    """
    mesh: Any = sharding.mesh
    major, minor = DATA_AXES
    if leaf.size < MIN_SPLIT_SIZE:
        return sharding
    dims = split_axes(sharding, len(leaf.shape))
    if names[-1] == "modulation" and leaf.shape[-1] % _axes_size(BATCH_AXES, mesh) == 0:
        # By columns alone: such a layer is computed where its parameters lie (`split_params`).
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(dims) - 1), ("fsdp", minor, major)))
    parts = {
        k: leaf.shape[k] // _axes_size(dims[k], mesh)
        for k, name in enumerate(names)
        if name not in _LOOPS
    }
    # First along a dimension whose parts fill the tiles of a TPU, and the last.
    order = sorted(parts, key=lambda k: (parts[k] // mesh.shape[minor] % 16 != 0, -k))
    options: list[dict[int, tuple[str, ...]]] = [{k: (minor, major)} for k in order]
    options += [{k: (minor,), j: (major,)} for k in order for j in order if j != k]
    options += [{k: (axis,)} for axis in (minor, major) for k in order]
    for option in options:
        if all(parts[k] % _axes_size(axes, mesh) == 0 for k, axes in option.items()):
            found = [(*dim, *option.get(k, ())) or None for k, dim in enumerate(dims)]
            return NamedSharding(mesh, PartitionSpec(*found))
    return sharding


def abstract_arrays(abstract_tree: Any, shardings: Any) -> Any:
    """Unboxes a tree of abstract arrays and gives each its sharding: what a restore asks for."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(abstract_tree),
        shardings,
    )


def _axes_size(axes: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


@functools.lru_cache(maxsize=64)
def local_rows(mesh: Mesh, batch_size: int, process_index: int | None = None) -> tuple[range, ...]:
    """The rows of a global batch that a process holds on its devices, and so has to read.

    On a torus, a host's devices, and so its rows, need not be adjacent. Processes that share rows
    (for example where `tensor` is larger than a host) each get them.

    Args:
      mesh: the mesh.
      batch_size: B, a multiple of `batch_shards`.
      process_index: the process; this one by default.

    Returns:
      Ascending ranges in [0, B), as few as possible.
    """
    process_index = jax.process_index() if process_index is None else process_index
    shards: Any = batch_sharding(mesh).devices_indices_map((batch_size,))
    held = {
        rows.indices(batch_size)[:2]
        for device, (rows,) in shards.items()
        if device.process_index == process_index
    }
    found: list[range] = []
    for start, stop in sorted(held):
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(range(start, stop))
    return tuple(found)


def local_row_numbers(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of `local_rows`, one by one, for this process: int `[b]`."""
    return np.concatenate([np.arange(run.start, run.stop) for run in local_rows(mesh, batch_size)])


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Host arrays with this process's rows -> global arrays `[B, ...]`.

    Every process passes the rows of `local_rows`, in that order. Starts the transfer and returns.
    """
    sharding = batch_sharding(mesh)
    count = batch_shards(mesh)
    held = local_row_numbers(mesh, count).tolist()

    def place(x: np.ndarray) -> jax.Array:
        shard_size = len(x) // len(held)

        def rows(index: Any) -> np.ndarray:
            k = held.index((index[0].start or 0) // shard_size)
            return x[k * shard_size : (k + 1) * shard_size]

        return jax.make_array_from_callback((shard_size * count, *x.shape[1:]), sharding, rows)

    return jax.tree.map(lambda x: place(np.asarray(x)), batch)


def to_host(tree: Any) -> Any:
    """Global arrays -> whole NumPy arrays, on every process; waits for what makes them.

    NumPy arrays are whole, and stay as they are.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    return jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else gather(x), tree)


def agree(value: Any) -> Any:
    """What the first process passes, as a NumPy array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(value)
    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def agree_numbers(values: Sequence[int]) -> list[int]:
    """The whole numbers that the first process passes, however many, on every process."""
    count = int(agree(len(values)))
    if not count:
        return []
    padded = np.zeros(count, np.int64)
    padded[: len(values)] = values[:count]
    return agree(padded).tolist()


@contextlib.contextmanager
def raised_on_all() -> Iterator[None]:
    """All processes enter this block and leave it together: an error in one is raised on each.

    Raised on one alone, it would leave the others waiting in their next collective for good. Who
    catches it catches an OSError as well, which the others raise.

    Raises:
      OSError: another process failed here; it says why itself.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    if any_process(fault is not None):
        raise fault or OSError("another process failed; its own message says why")


def first_process_first(make: Callable[[], T], *, enabled: bool = True) -> T:
    """What `make` returns, on every process: the others begin when the first is done.

    For what leaves files behind that the others then find, as a decompressed copy. Not `enabled`,
    all begin together. An error of one process is raised on all.
    """
    is_first = jax.process_index() == 0
    made: Any = None
    for is_my_turn in (is_first, not is_first) if enabled else (True,):
        with raised_on_all():
            if is_my_turn:
                made = make()
    return made


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; the same answer on all, which ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
