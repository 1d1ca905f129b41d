"""A plan as plain values: what is printed, written as JSON and drawn comes from here."""

import collections
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from repulsor_jax import sharding
from repulsor_jax.config import Config
from repulsor_jax.models.build import num_segments
from repulsor_jax.planning.estimate import estimate, mesh_axes, spread
from repulsor_jax.planning.programs import Program, may_not_fit
from repulsor_jax.planning.topology import Topology
from repulsor_jax.runtime import throughput
from repulsor_jax.runtime.chips import GIB

Values = dict[str, Any]


def describe_topology(topology: Topology) -> Values:
    """The devices of a plan."""
    chip, available = topology.chip, topology.device_bytes
    return {
        "name": topology.name,
        "chip": chip.name if chip else topology.devices[0].device_kind,
        "num_chips": topology.num_chips,
        "num_devices": len(topology.devices),
        "num_hosts": topology.num_hosts,
        "num_slices": topology.num_slices,
        "memory_bytes_per_chip": available and available * topology.devices_per_chip,
        "peak_flops_per_chip": chip and chip.peak_flops,
        "note": topology.note,
    }


def describe_program(program: Program, config: Config, topology: Topology) -> Values:
    """One program of a plan; a value without "per chip" or "per device" is of all devices."""
    per_chip, available = topology.devices_per_chip, topology.device_bytes
    values: Values = {
        "mesh": _mesh_sizes(program.mesh),
        "images": program.images,
        "compile_seconds": round(program.seconds, 1),
        "emitted": program.emitted,
        "may_not_fit": may_not_fit(program, topology),
        "fits": not program.refusal,
        "memory_bytes_per_chip": {kind: per_chip * n for kind, n in program.memory.items()},
        "total_bytes_per_chip": per_chip * program.total_bytes,
        "available_bytes_per_chip": available and per_chip * available,
    }
    if program.name == "train" and config.mesh.split_update:
        values["unsplit_bytes_per_chip"] = per_chip * unsplit_bytes(program)
    if program.refusal or program.cost is None:
        advice = _advice(program, config, topology) or ["more chips, or chips with more memory"]
        return values | {"refusal": program.refusal, "advice": advice}
    cost, devices = program.cost, program.mesh.size
    return values | {
        "flops": devices * cost.matmul_flops,
        "flops_per_image": devices * cost.matmul_flops / program.images,
        "elementwise_flops": devices * cost.other_flops,
        "bytes_accessed_per_chip": per_chip * cost.bytes_accessed,
        "collectives": describe_collectives(program),
        "collective_bytes_per_device": cost.collective_bytes,
        "carries_the_bank": program.carries_the_bank,
        "unknown_loops": cost.unknown_loops,
        "unknown_kernels": dict(cost.unknown_calls),
        "estimate": _describe_time(program, config, topology),
    }


def _describe_time(program: Program, config: Config, topology: Topology) -> Values | None:
    """Estimated seconds of one run and, for a train step, its utilisation."""
    assert program.cost is not None
    parts = estimate(program.cost, program.mesh, topology)
    if parts is None or topology.chip is None:
        return None
    bound = max(parts, key=lambda part: parts[part])
    seconds, serial = parts[bound], sum(parts.values())
    values: Values = {
        "seconds_by_part": parts,
        "bound": bound,
        "seconds": seconds,
        "serial_seconds": serial,
        "images_per_second": program.images / seconds,
    }
    if program.name == "train":
        useful = throughput.training_flops(config.model) * program.images
        rate = useful / (topology.num_chips * topology.chip.peak_flops)
        values |= {"mfu": rate / seconds, "serial_mfu": rate / serial}
    return values


def describe_collectives(program: Program) -> list[Values]:
    """The collectives of one run, summed by kind and mesh axis, largest sum first."""
    assert program.cost is not None
    devices = list(program.mesh.devices.flat)
    sums: dict[tuple[str, str, str], collections.Counter[str]] = {}
    for each, count in program.cost.collectives:
        _, between = spread(each, devices)
        key = each.kind, mesh_axes(each, program.mesh), "network" if between else "links"
        total = sums.setdefault(key, collections.Counter())
        total["count"] += count
        total["bytes"] += count * each.num_bytes
        total["sent_bytes"] += round(count * each.sent_bytes)
        total["largest_bytes"] = max(total["largest_bytes"], each.num_bytes)
    rows = [dict(kind=k, axis=axis, over=over, **n) for (k, axis, over), n in sums.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def describe_run(step: Values, config: Config, topology: Topology, price: float) -> Values:
    """Time and cost of `total_steps`, from a described train step; {} without an estimate."""
    time = step.get("estimate")
    if not time:
        return {}
    values: Values = {"total_steps": config.total_steps}
    for prefix in ("", "serial_"):
        hours = config.total_steps * time[f"{prefix}seconds"] / 3600
        values[f"{prefix}hours"] = hours
        values[f"{prefix}chip_hours"] = hours * topology.num_chips
        if price:
            values |= {"price_per_chip_hour": price}
            values[f"{prefix}cost"] = price * values[f"{prefix}chip_hours"]
    return values


def _mesh_sizes(mesh: Mesh) -> dict[str, int]:
    named = sharding.sizes(mesh) if sharding.AXES[0] in mesh.shape else dict(mesh.shape)
    return {name: size for name, size in named.items() if size > 1}


def unsplit_bytes(program: Program) -> int:
    """Bytes of parameters, optimizer and EMA on a device that lie on another one of a batch too."""
    trees = [program.kinds.get(kind) for kind in ("parameters", "optimizer", "EMA")]
    parts = [(x, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(trees)]
    devices = sharding.batch_shards(program.mesh)
    return sum(
        math.prod(part) * x.dtype.itemsize
        for x, part in parts
        if x.size < devices * math.prod(part)
    )


def _copy_bytes(program: Program, config: Config) -> float:
    """Bytes of a device's copy of the parameters in the model's dtype; see `split_params`."""
    count = sum(x.size for x in jax.tree.leaves(program.kinds.get("parameters")))
    split = program.mesh.shape.get("fsdp", 1) * program.mesh.shape.get("tensor", 1)
    return count * np.dtype(config.model.dtype).itemsize / split


def _advice(program: Program, config: Config, topology: Topology) -> list[str]:
    """Changes that make a program fit, the most helpful first."""
    if program.name == "train":
        return training_advice(program, config, topology)
    if program.name == "encode":
        half = max(config.data.encode_batch_per_device // 2, 1)
        return [f"--config.data.encode_batch_per_device={half}"]
    shards = sharding.batch_shards(program.mesh)
    advice = [] if config.sampling.decode_slice else [f"--config.sampling.decode_slice={shards}"]
    fsdp, tensor = program.mesh.shape["fsdp"], program.mesh.shape["tensor"]
    if config.sampling.gather_params and fsdp > 1 and tensor == 1:
        advice.append("--config.sampling.gather_params=False")
    if config.sampling.batch_size > shards:
        half = max(config.sampling.batch_size // 2 // shards, 1) * shards
        advice.append(f"--config.sampling.batch_size={half}")
    return advice


def training_advice(program: Program, config: Config, topology: Topology) -> list[str]:
    """Flags with which a train step that does not fit would take less memory, each with why."""
    memory, available = program.memory, topology.device_bytes or math.inf
    shards = sharding.batch_shards(program.mesh)
    fsdp, per_shard = program.mesh.shape.get("fsdp", 1), config.batch_size // shards
    state = sum(memory.get(kind, 0) for kind in ("parameters", "optimizer", "EMA"))
    temporaries = memory.get("temporaries", 0)
    advice = []
    larger = [n for n in range(fsdp + 1, shards + 1) if n % fsdp == 0 and shards % n == 0]
    if not config.mesh.split_update and shards > fsdp and state > 0.25 * available:
        advice.append(
            f"--config.mesh.split_update=True: parameters, optimizer and EMA take "
            f"{state / GIB:.1f} GiB of each device now, and about "
            f"{state * fsdp / shards / GIB:.1f} GiB then"
        )
    copy = _copy_bytes(program, config)
    if larger and copy > 0.1 * available:
        enough = [n for n in larger if copy * fsdp / n < 0.1 * available]
        best = (enough or larger[-1:])[0]
        rest = "" if config.mesh.data == -1 else " --config.mesh.data=-1"
        advice.append(
            f"--config.mesh.fsdp={best}{rest}: the parameters that a device computes with take "
            f"{copy / GIB:.1f} GiB of it now, and about {copy * fsdp / best / GIB:.1f} GiB then"
        )
    if temporaries > 0.25 * available:
        stricter = {"none": "dots_attention", "dots": "full", "dots_attention": "full"}
        if remat := stricter.get(config.model.remat):
            advice.append(
                f"--config.model.remat={remat}: of the {temporaries / GIB:.1f} GiB of "
                "temporaries, most are activations kept for the backward pass; it computes them "
                "again instead"
            )
        accumulation = config.optimizer.accumulation_steps
        segments = num_segments(config.model)
        # Activations shrink with the rows in flight: the least divisor that makes them fit.
        free = available - (program.total_bytes - temporaries)
        needed = temporaries / free if free > 0 else 2
        more = range(2 * accumulation, per_shard + 1, accumulation)
        divisors = [n // accumulation for n in more if per_shard % (n * segments) == 0]
        if divisors:
            fewer = next((n for n in divisors if n >= needed), divisors[-1])
            advice += [
                f"--config.optimizer.accumulation_steps={fewer * accumulation}: about 1/{fewer} "
                "of the activations, with the same batch",
                f"--config.batch_size={per_shard // fewer * shards}: about 1/{fewer} of the "
                "activations",
            ]
    if memory.get("bank", 0) > 0.1 * available:
        advice.append(
            f"--config.repulsor.bank_rows: the bank takes {memory['bank'] / GIB:.1f} GiB of "
            "each device"
        )
    return advice
