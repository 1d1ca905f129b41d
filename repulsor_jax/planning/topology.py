"""The devices to plan for: those of a TPU slice that need not be here, or the ones that are.

libtpu, the compiler of TPUs, describes any slice and compiles for it on an ordinary machine.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from repulsor_jax.config import ConfigError
from repulsor_jax.runtime import chips
from repulsor_jax.runtime.chips import GIB, Chip

KNOWN = {
    "v4": "v4:2x2x1 to v4:16x16x16",
    "v5e": "v5e:2x2 to v5e:16x16",
    "v5p": "v5p:2x2x1 to v5p:16x16x24",
    "v6e": "v6e:2x2 to v6e:16x16",
    "tpu7x": "tpu7x:2x2x1 to tpu7x:8x16x16",
}

# What libtpu would ask the cloud's metadata server.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it would else be one process a machine
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as "v5e:16x16", "2 x v5e:16x16" or "local".
      devices: all of them.
      chip: what is published of their kind; None where nothing is.
      num_chips: chips that they are on.
      num_hosts: machines.
      num_slices: parts that the data-centre network joins.
      shape: chips of a slice along each dimension of its torus; () where there is none.
      device_bytes: memory that the compiler lets a program use on one device; None if unknown.
      note: what else is to be known, one line; "" is nothing.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    num_chips: int
    num_hosts: int
    num_slices: int
    shape: tuple[int, ...]
    device_bytes: float | None
    note: str = ""

    @property
    def devices_per_chip(self) -> int:
        """JAX devices on one chip."""
        return len(self.devices) // self.num_chips


def describe_machine() -> None:
    """Tells libtpu that this is no machine of a pod, before it asks and complains.

    For machines without a TPU: where it is installed, JAX tries it at its first use of a device.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """Opens a topology by its name.

    Args:
      name: "local", or a kind of TPU and the shape of a slice, as "v5e:16x16".
      num_slices: slices of that shape, joined by the data-centre network.

    Raises:
      ConfigError: the name is none, or libtpu is not installed; names the flag.
    """
    if num_slices < 1:
        raise ConfigError(f"--num_slices={num_slices} must be at least 1")
    if name == "local":
        if num_slices > 1:
            raise ConfigError(f"--num_slices={num_slices} has no meaning for --topology=local")
        return _local()
    match = re.fullmatch(r"([a-z]+\w*):(\d+(?:x\d+){1,2})", name)
    if not match:
        raise ConfigError(
            f"--topology={name!r}: expected 'local', or a kind of TPU and the shape of a slice: "
            f"{'; '.join(KNOWN.values())}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs libtpu, the compiler of TPUs, which is not installed here: "
            "pip install -e '.[plan]'; no TPU is needed"
        )
    describe_machine()
    several = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        description = topologies.get_topology_desc(name, "tpu", **several)
    except Exception as error:  # libtpu has no narrower type
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError(
            f"--topology={name}: {reason}; known are {'; '.join(KNOWN.values())}"
        ) from error
    devices: tuple[jax.Device, ...] = tuple(description.devices)
    num_chips = len({(_slice(d), tuple(d.coords)) for d in devices})
    device_bytes = _available_memory(devices[0])
    chip = chips.find(devices[0].device_kind)
    if device_bytes is None and chip:
        device_bytes = chip.hbm_bytes * num_chips / len(devices)
    note = ""
    if chip and len(devices) // num_chips > chip.devices_per_chip:
        note = (
            f"libtpu compiles for the {len(devices) // num_chips} cores of a {chip.name} chip as "
            "devices of their own, while a machine joins them to one: there, mesh sizes are of "
            "chips, and what every device holds whole is held once a chip"
        )
    return Topology(
        name=name if num_slices == 1 else f"{num_slices} x {name}",
        devices=devices,
        chip=chip,
        num_chips=num_chips,
        num_hosts=len({device.process_index for device in devices}),
        num_slices=num_slices,
        shape=tuple(int(n) for n in match[2].split("x")),
        device_bytes=device_bytes,
        note=note,
    )


def one_host(topology: Topology) -> Topology:
    """The devices of one host, as a topology: libtpu compiles for whole topologies alone."""
    process = topology.devices[0].process_index
    devices = [device for device in topology.devices if device.process_index == process]
    if len(devices) == len(topology.devices):
        return topology
    if not topology.shape:
        return dataclasses.replace(topology, devices=tuple(devices))
    places: Any = zip(*(device.coords for device in devices), strict=True)
    sides = [len(set(along)) for along in places][: len(topology.shape)]
    kind = topology.name.rpartition(" ")[2].partition(":")[0]
    return open_topology(f"{kind}:{'x'.join(map(str, sides))}")


def _local() -> Topology:
    devices = tuple(jax.devices())
    chip = chips.find(devices[0].device_kind)
    coordinates = [getattr(device, "coords", device.id) for device in devices]
    num_chips = len({(_slice(d), str(at)) for d, at in zip(devices, coordinates, strict=True)})
    device_bytes = chip.hbm_bytes * num_chips / len(devices) if chip else None
    with contextlib.suppress(Exception):  # not every backend has it
        device_bytes = (devices[0].memory_stats() or {}).get("bytes_limit", device_bytes)
    return Topology(
        name="local",
        devices=devices,
        chip=chip,
        num_chips=num_chips,
        num_hosts=len({device.process_index for device in devices}),
        num_slices=len({_slice(device) for device in devices}),
        shape=(),
        device_bytes=device_bytes,
    )


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) or 0


def _available_memory(device: jax.Device) -> float | None:
    """Bytes that a program may use: the compiler says so when it refuses one that is too large."""
    side = 2**20
    x = jax.ShapeDtypeStruct((side, side), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: jnp.sin(x).T @ x).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"available HBM \(([\d.]+)G\)", str(error))
        return float(found[1]) * GIB if found else None
    return None
