"""A plan as plain values: what is printed, written as JSON and drawn comes from here."""

import collections
import math
from typing import Any

from repulsor_jax import sharding
from repulsor_jax.config import Config
from repulsor_jax.planning.estimate import Estimate, estimate, mesh_axes, spread
from repulsor_jax.planning.programs import Program
from repulsor_jax.planning.topology import Topology
from repulsor_jax.runtime import flops

Values = dict[str, Any]
_STATE = ("parameters", "optimizer", "EMA")


def describe_topology(topology: Topology) -> Values:
    """What a plan says of its devices."""
    chip, per_chip = topology.chip, topology.devices_per_chip
    available = topology.device_bytes
    return {
        "name": topology.name,
        "chip": chip.name if chip else topology.devices[0].device_kind,
        "num_chips": topology.num_chips,
        "num_devices": len(topology.devices),
        "num_hosts": topology.num_hosts,
        "num_slices": topology.num_slices,
        "memory_bytes_per_chip": available * per_chip if available else None,
        "peak_flops_per_chip": chip.peak_flops if chip else None,
        "note": topology.note,
    }


def describe_program(program: Program, config: Config, topology: Topology) -> Values:
    """What a plan says of one program. Memory is per chip; FLOPs and bytes say of what they are."""
    per_chip = topology.devices_per_chip
    available = topology.device_bytes
    values: Values = {
        "mesh": {name: size for name, size in program.mesh.shape.items() if size > 1},
        "images": program.images,
        "compile_seconds": round(program.seconds, 1),
        "fits": not program.refusal,
        "memory_bytes_per_chip": {kind: per_chip * n for kind, n in program.memory.items()},
        "total_bytes_per_chip": per_chip * program.total_bytes,
        "available_bytes_per_chip": per_chip * available if available else None,
    }
    if program.cost is None:
        advice = {"train": _advise_training, "sample": _advise_sampling, "encode": _advise_encoding}
        lines = advice[program.name](program, config, topology)
        return values | {"refusal": program.refusal, "advice": lines}
    cost, devices = program.cost, program.mesh.size
    time = estimate(cost, program.mesh, topology)
    values |= {
        "flops": devices * cost.matmul_flops,
        "flops_per_image": devices * cost.matmul_flops / program.images,
        "elementwise_flops": devices * cost.other_flops,
        "bytes_accessed_per_chip": per_chip * cost.bytes_accessed,
        "collectives": describe_collectives(program),
        "collective_bytes_per_device": cost.collective_bytes,
        "carries_the_bank": carries_the_bank(program, config),
        "unknown_loops": cost.unknown_loops,
        "unknown_kernels": dict(cost.unknown_calls),
        "estimate": time and describe_estimate(time, program, config, topology),
    }
    return values


def describe_estimate(
    time: Estimate, program: Program, config: Config, topology: Topology
) -> Values:
    """Estimated seconds of one run of a program and, of a train step, its utilisation."""
    values: Values = {
        "seconds_by_part": time.parts,
        "bound": time.bound,
        "seconds": time.seconds,
        "serial_seconds": time.serial_seconds,
        "images_per_second": program.images / time.seconds,
    }
    if program.name == "train" and topology.chip:
        useful = flops.training_flops(config.model) * program.images
        rate = useful / (topology.num_chips * topology.chip.peak_flops)
        values |= {"mfu": rate / time.seconds, "serial_mfu": rate / time.serial_seconds}
    return values


def describe_collectives(program: Program) -> list[Values]:
    """The collectives of one run, those of one kind and axis together, largest first."""
    if program.cost is None:
        return []
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
    rows = [
        {"kind": kind, "axis": axis, "over": over, **total}
        for (kind, axis, over), total in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def carries_the_bank(program: Program, config: Config) -> bool:
    """Whether a collective yields rows of the memory bank of two devices or more.

    They are known by their dtype, their length d and their number: a multiple of a device's rows,
    and of no other array of length d, which are the queries and the last layer of the head.
    """
    if program.cost is None or not program.bank_shape:
        return False
    slots, rows, dim = program.bank_shape
    dtype = {"bfloat16": "bf16", "float32": "f32"}[config.regularizer.bank_dtype]
    tokens = (config.model.latent_size // config.model.patch_size) ** 2
    width = config.model.hidden_size
    others = {program.images, width, width * tokens}
    for each, _ in program.cost.collectives:
        for array in each.arrays:
            if array.dtype != dtype or array.shape[-1:] != (dim,):
                continue
            count = math.prod(array.shape[:-1])
            in_slots = array.shape[0] == slots and len(array.shape) == 3
            whole = count >= 2 * slots * rows and count % (slots * rows) == 0
            if whole and (in_slots or count not in others):
                return True
    return False


def describe_run(program: Values, config: Config, topology: Topology, price: float) -> Values:
    """Time and cost of `total_steps`, from the estimate of a step; {} without one."""
    time = program.get("estimate")
    if not time:
        return {}
    hours = config.total_steps * time["seconds"] / 3600
    serial = config.total_steps * time["serial_seconds"] / 3600
    values = {
        "total_steps": config.total_steps,
        "hours": hours,
        "serial_hours": serial,
        "chip_hours": hours * topology.num_chips,
        "serial_chip_hours": serial * topology.num_chips,
    }
    if price:
        values["price_per_chip_hour"] = price
        values["cost"] = price * values["chip_hours"]
        values["serial_cost"] = price * values["serial_chip_hours"]
    return values


def _advise_sampling(program: Program, config: Config, topology: Topology) -> list[str]:
    del topology
    shards = sharding.batch_shards(program.mesh)
    advice = [] if config.sampling.decode_slice else [f"--config.sampling.decode_slice={shards}"]
    fsdp, tensor = program.mesh.shape["fsdp"], program.mesh.shape["tensor"]
    if config.sampling.gather_params and fsdp > 1 and tensor == 1:
        advice.append("--config.sampling.gather_params=False")
    if config.sampling.batch_size > shards:
        half = max(config.sampling.batch_size // 2 // shards, 1) * shards
        advice.append(f"--config.sampling.batch_size={half}")
    return advice or ["more chips"]


def _advise_encoding(program: Program, config: Config, topology: Topology) -> list[str]:
    del program, topology
    half = config.data.encode_batch_per_device // 2
    return [f"--config.data.encode_batch_per_device={max(half, 1)}"]


def _advise_training(program: Program, config: Config, topology: Topology) -> list[str]:
    """What to change of a train step that does not fit, what helps most first."""
    memory, available = program.memory, topology.device_bytes or math.inf
    shards = sharding.batch_shards(program.mesh)
    fsdp, per_shard = program.mesh.shape.get("fsdp", 1), config.batch_size // shards
    state = sum(memory.get(kind, 0) for kind in _STATE)
    temporaries = memory.get("temporaries", 0)
    gib = 2**30
    advice = []
    larger = [n for n in range(fsdp + 1, shards + 1) if n % fsdp == 0 and shards % n == 0]
    if larger and state > 0.25 * available:
        enough = [n for n in larger if state * fsdp / n < 0.2 * available]
        best = (enough or larger[-1:])[0]
        advice.append(
            f"--config.mesh.fsdp={best}: parameters, optimizer and EMA take {state / gib:.1f} GiB "
            f"of each device now, and about {state * fsdp / best / gib:.1f} GiB then"
        )
    if temporaries > 0.25 * available:
        stricter = {"none": "dots", "dots": "full"}.get(config.model.remat)
        if stricter:
            advice.append(
                f"--config.model.remat={stricter}: of the {temporaries / gib:.1f} GiB of "
                "temporaries, most are activations kept for the backward pass; it computes them "
                "again instead"
            )
        accumulation = config.optimizer.accumulation_steps
        # Activations shrink with the rows in flight: so many times fewer would do.
        free = available - (program.total_bytes - temporaries)
        times = temporaries / free if free > 0 else 2
        parts = [
            n // accumulation
            for n in range(2 * accumulation, per_shard + 1, accumulation)
            if per_shard % n == 0
        ]
        if parts:
            fewer = next((n for n in parts if n >= times), parts[-1])
            advice.append(
                f"--config.optimizer.accumulation_steps={fewer * accumulation}: about 1/{fewer} "
                "of the activations, with the same batch"
            )
            advice.append(
                f"--config.batch_size={per_shard // fewer * shards}: about 1/{fewer} of the "
                "activations"
            )
    if memory.get("bank", 0) > 0.1 * available:
        advice.append(
            f"--config.regularizer.bank_rows: the bank takes {memory['bank'] / gib:.1f} GiB of "
            "each device"
        )
    return advice or ["more chips, or chips with more memory"]
