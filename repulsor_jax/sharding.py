"""Where arrays live: the mesh, the rules from logical axis names to mesh axes, host-to-device.

The mesh has three axes. `data` and `fsdp` both split the batch; `fsdp` also splits parameters,
optimizer state and EMA; `tensor` splits attention heads and the MLP's hidden width.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis name -> mesh axes. A name that is not here is replicated.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
)

# Parameters with fewer elements stay replicated: gathering them costs more than it saves.
MIN_SHARDED_SIZE = 4096


def mesh_shape(data: int, fsdp: int, tensor: int, num_devices: int) -> tuple[int, int, int]:
    """Fills the axis given as -1 so that the product is the number of devices.

    Raises:
      ValueError: more than one -1, or sizes that do not multiply to `num_devices`; names the key.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    described = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    fill = [name for name, size in sizes.items() if size == -1]
    if len(fill) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{described}: sizes must be positive, and at most one may be -1 (fill)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if fill:
        sizes[fill[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"{described}: the product must be the number of devices, {num_devices}; "
            "set one of them to -1 to fill it"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def create_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh with axes `(data, fsdp, tensor)`; see `mesh_shape` for sizes and errors."""
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(data, fsdp, tensor, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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


def tree_shardings(abstract_tree: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of (boxed) abstract arrays by their logical axis names.

    A dimension that its mesh axes do not divide is replicated, and so is every small parameter.

    Args:
      abstract_tree: output of `jax.eval_shape`; parameters boxed by `nn.with_logical_partitioning`.
      mesh: the mesh.

    Returns:
      A tree of `NamedSharding` with the structure of `flax.linen.unbox(abstract_tree)`.
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

    return jax.tree.map(fit, nn.unbox(abstract_tree), shardings)


def abstract_arrays(abstract_tree: Any, shardings: Any) -> Any:
    """Unboxes a tree of abstract arrays and gives each its sharding: what a restore asks for."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(abstract_tree),
        shardings,
    )


def _axes_size(axes: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Host arrays of this process `[B / processes, ...]` -> global arrays `[B, ...]`.

    Every process passes its own rows; row order is process order. Starts the transfer and returns.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def to_host(tree: Any) -> Any:
    """Global arrays -> whole NumPy arrays, on every process; waits for what makes them."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def agree(value: Any) -> Any:
    """What the first process passes, as a NumPy array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(value)
    return multihost_utils.broadcast_one_to_all(np.asarray(value))
