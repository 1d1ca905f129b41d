"""The devices to plan for: TPUs or GPUs, which need not be here, or the devices of this machine.

libtpu, the compiler of TPUs, describes any slice and compiles for it on an ordinary machine; JAX's
CUDA plugin does the same for GPUs.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from repulsor_jax.config import ConfigError
from repulsor_jax.planning import gpus
from repulsor_jax.runtime import chips
from repulsor_jax.runtime.chips import GIB, Chip

_KNOWN = (
    "v4:2x2x1 to v4:16x16x16; v5e:2x2 to v5e:16x16; v5p:2x2x1 to v5p:16x16x24; "
    "v6e:2x2 to v6e:16x16; tpu7x:2x2x1 to tpu7x:8x16x16; a100, h100, h200, b200 as h100:8 (GPUs of "
    "a host) or h100:4x8 (hosts x GPUs)"
)

# Without these, libtpu asks the cloud's metadata server for them and complains.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by default, one process a machine
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for. A host of GPUs is a slice: links join the GPUs in it."""

    name: str  # as "v5e:16x16", "2 x v5e:16x16", "h100:4x8" or "local"
    devices: tuple[jax.Device, ...]
    shape: tuple[int, ...] = ()  # chips of a slice along each dimension of its torus; () is none
    known_bytes: float | None = None  # of one device, as the compiler or the device states them

    @property
    def chip(self) -> Chip | None:
        """Published figures of the chips; None without any."""
        return chips.find(self.devices[0].device_kind)

    @property
    def num_chips(self) -> int:
        """Chips that hold the devices."""
        return len({(slice_index(d), str(getattr(d, "coords", d.id))) for d in self.devices})

    @property
    def num_hosts(self) -> int:
        """Number of machines."""
        return len({device.process_index for device in self.devices})

    @property
    def num_slices(self) -> int:
        """Parts that the data-centre network joins."""
        return len({slice_index(device) for device in self.devices})

    @property
    def devices_per_chip(self) -> int:
        """JAX devices on one chip."""
        return len(self.devices) // self.num_chips

    @property
    def device_bytes(self) -> float | None:
        """Memory that a program may use on one device; None if unknown."""
        published = self.chip.hbm_bytes / self.devices_per_chip if self.chip else None
        return self.known_bytes or published

    @property
    def note(self) -> str:
        """A line for the reader of a plan, or ""."""
        if self.devices[0].platform == "gpu" and self.name != "local":
            return (
                f"JAX takes {gpus.MEMORY_SHARE:.0%} of a GPU's memory unless "
                "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise: the plan is against that. The "
                "compiler could not try its kernels out, and XLA may choose others on the cards"
            )
        if self.chip is None or self.devices_per_chip <= self.chip.devices_per_chip:
            return ""
        return (
            f"libtpu compiles for the {self.devices_per_chip} cores of a {self.chip.name} chip as "
            "separate devices, while a real machine joins them to one device: there, mesh sizes "
            "count chips, and an array that every device holds whole is held once a chip"
        )


def describe_machine() -> None:
    """Tells libtpu that this machine is not part of a pod; to be called before JAX loads libtpu.

    JAX loads an installed libtpu at its first use of a device, on machines without a TPU too.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """Opens "local", some slices of a kind of TPU and a shape, as "v5e:16x16", or GPUs, "h100:4x8".

    Raises:
      ConfigError: the compiler is not installed or does not know the name; names the flag.
    """
    if num_slices < 1:
        raise ConfigError(f"--num_slices={num_slices} must be at least 1")
    if name == "local":
        if num_slices > 1:
            raise ConfigError(f"--num_slices={num_slices} has no meaning for --topology=local")
        devices, known_bytes = tuple(jax.devices()), None
        with contextlib.suppress(Exception):  # some backends have no statistics
            known_bytes = (devices[0].memory_stats() or {}).get("bytes_limit")
        return Topology("local", devices, known_bytes=known_bytes)
    if match := re.fullmatch(r"(\w+):(?:(\d+)x)?(\d+)", name):
        kind, hosts, count = match[1], int(match[2] or 1), int(match[3])
        if kind in gpus.GPUS:
            if num_slices > 1:
                raise ConfigError(
                    f"--num_slices={num_slices} has no meaning for GPUs: --topology={kind}:"
                    f"{hosts * num_slices}x{count} has as many hosts"
                )
            return _open_gpus(name, kind, hosts, count)
    match = re.fullmatch(r"([a-z]+\w*):(\d+(?:x\d+){1,2})", name)
    if not match:
        expected = f"'local', or a kind of chip and how many: {_KNOWN}"
        raise ConfigError(f"--topology={name!r}: expected {expected}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs libtpu, the compiler of TPUs, which is not installed here: "
            "pip install -e '.[plan]'; no TPU is needed"
        )
    describe_machine()
    try:
        several = {"num_slices": num_slices} if num_slices > 1 else {}
        description = topologies.get_topology_desc(name, "tpu", **several)
    except Exception as error:  # libtpu has no narrower type
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError(f"--topology={name}: {reason}; known are {_KNOWN}") from error
    return Topology(
        name=name if num_slices == 1 else f"{num_slices} x {name}",
        devices=tuple(description.devices),
        shape=tuple(int(n) for n in match[2].split("x")),
        known_bytes=_available_memory(description.devices[0]),
    )


def _open_gpus(name: str, kind: str, hosts: int, count: int) -> Topology:
    """Hosts of so many GPUs each."""
    gpu = gpus.GPUS[kind]
    if not 1 <= count <= gpu.per_host or hosts < 1:
        raise ConfigError(
            f"--topology={name}: expected 1 to {gpu.per_host} GPUs on each of 1 or more hosts, as "
            f"{kind}:8 or {kind}:4x8"
        )
    if not gpus.is_installed():
        raise ConfigError(
            f"--topology={name} needs JAX's CUDA plugin, the compiler of GPUs, which is not "
            "installed here: pip install -e '.[plan-gpu]'; no GPU is needed"
        )
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x{hosts}x{count}",
            target_config=gpus.target_config(gpu),
        )
    except Exception as error:  # the plugin has no narrower type
        raise ConfigError(f"--topology={name}: {str(error).splitlines()[0]}") from error
    known_bytes = gpus.MEMORY_SHARE * gpu.memory_bytes
    return Topology(name, tuple(description.devices), known_bytes=known_bytes)


def one_host(topology: Topology) -> Topology:
    """The devices of one host as a topology: libtpu compiles only for whole topologies."""
    process = topology.devices[0].process_index
    devices = [device for device in topology.devices if device.process_index == process]
    if len(devices) == len(topology.devices):
        return topology
    kind = topology.name.rpartition(" ")[2].partition(":")[0]
    if kind in gpus.GPUS:
        return open_topology(f"{kind}:{len(devices)}")
    if not topology.shape:
        return dataclasses.replace(topology, devices=tuple(devices))
    sides = [len({d.coords[axis] for d in devices}) for axis in range(len(topology.shape))]
    return open_topology(f"{kind}:{'x'.join(map(str, sides))}")


def slice_index(device: jax.Device) -> int:
    """Number of the slice, or of the host of GPUs, that a device belongs to; else 0."""
    if device.platform == "gpu":
        return device.process_index
    return getattr(device, "slice_index", 0) or 0


def _available_memory(device: jax.Device) -> float | None:
    """Bytes that a program may use, from the compiler's refusal of a program that is too large."""
    sharding = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: jnp.sin(x).T @ x).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return float(found[1]) * GIB
    return None
