"""The least time of one run of a program, from published rates: an estimate, not a measurement.

Four parts are computed apart, each as if it ran at its peak rate:

- compute: FLOPs of matrix products / peak FLOP/s of the chip, float32 products as often as a TPU's
  bfloat16 unit passes over them;
- memory: bytes to and from main memory / its rate;
- links: for each collective, the bytes that a ring of n devices sends / the rate of the links in
  use. A ring sends 2 (n - 1) / n of the array for an all-reduce, (n - 1) / n for an all-gather or
  all-to-all, (n - 1) of the result for a reduce-scatter. A group uses two links in each torus
  dimension that it wraps, one in any other;
- network between TPU slices, or hosts of GPUs: the same with n the number of slices, for the share
  that each device of a group holds, / the chip's part of its host's network.

If all parts overlap perfectly, the longest is the time; if none do, their sum is. Measured times
lie above the first, and often between the two.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from repulsor_jax.planning.cost import Cost
from repulsor_jax.planning.hlo import Collective
from repulsor_jax.planning.topology import Topology, slice_index
from repulsor_jax.sharding import DATA_AXES


def estimate(cost: Cost, mesh: Mesh, topology: Topology) -> dict[str, float] | None:
    """Seconds of one run of a program by part: "compute", "memory", "links" and "network".

    A part whose rate is not published is left out; None for a chip without any published rate.
    """
    chip = topology.chip
    if chip is None:
        return None
    devices = list(mesh.devices.flat)
    on_links = on_network = 0.0  # bytes that a device sends over one link, and to other slices
    for each, count in cost.collectives:
        in_slice, between = spread(each, devices)
        lanes = lanes_of(each, devices, topology)
        on_links += count * in_slice / lanes if lanes else 0.0
        on_network += count * between
    on_tpu = topology.devices[0].platform == "tpu"
    parts = {
        "compute": (cost.mxu_flops if on_tpu else cost.matmul_flops, chip.peak_flops),
        "memory": (cost.bytes_accessed, chip.hbm_bytes_per_second),
        "links": (on_links, chip.link_bytes_per_second),
        "network": (on_network, chip.dcn_bytes_per_second),
    }
    # The devices of a chip share its rates.
    return {
        name: topology.devices_per_chip * work / (rate or math.inf)
        for name, (work, rate) in parts.items()
        if rate or not work
    }


def spread(collective: Collective, devices: list[jax.Device]) -> tuple[float, float]:
    """Bytes that each device sends within its slice, and to other slices."""
    slices = len({slice_index(devices[i]) for i in collective.group})
    if slices < 2:
        return collective.sent_bytes, 0.0
    if collective.kind == "collective-permute":
        return 0.0, collective.sent_bytes
    share = len(collective.group) // slices  # devices of the group in each slice
    inside = dataclasses.replace(collective, groups=(tuple(range(share)),)).sent_bytes
    across = dataclasses.replace(collective, groups=(tuple(range(slices)),)).sent_bytes
    if collective.kind == "reduce-scatter":
        # The result is one device's; within a slice, the devices reduce the results of all slices.
        return slices * inside, across
    return inside, across / share


def lanes_of(collective: Collective, devices: list[jax.Device], topology: Topology) -> int:
    """Links that one chip sends on at once; 0 for a group on one chip."""
    group = collective.group
    if collective.kind == "collective-permute":
        return 1
    if not topology.shape:
        return 1 if len(group) > 1 else 0
    in_slice = [devices[i] for i in group]
    in_slice = [d for d in in_slice if slice_index(d) == slice_index(in_slice[0])]
    # 3-D tori have rings where every side is a multiple of 4; 2-D ones where a side is the pod's.
    is_3d = topology.chip is not None and topology.chip.name in ("v4", "v5p", "tpu7x")
    is_cube = is_3d and all(side % 4 == 0 for side in topology.shape)
    lanes = 0
    for axis, side in enumerate(topology.shape):
        extent = len({device.coords[axis] for device in in_slice})
        is_ring = extent == side and (is_cube or (not is_3d and side == 16))
        if extent > 1:
            lanes += 2 if is_ring else 1
    return lanes


def mesh_axes(collective: Collective, mesh: Mesh) -> str:
    """Names of the mesh axes along which a collective's groups lie, as "data" or "data,fsdp".

    "other" for groups along no combination of axes.
    """
    sizes = tuple(mesh.shape.values())
    if collective.kind == "collective-permute":
        ends = np.unravel_index(np.array(collective.groups).reshape(-1, 2), sizes)
        moved = [n for n, at in zip(mesh.shape, ends, strict=True) if (at[:, 0] != at[:, 1]).any()]
        return _named(moved, mesh) or "other"
    found = {frozenset(group) for group in collective.groups}
    places = np.arange(mesh.size).reshape(sizes)
    axes = [k for k, size in enumerate(sizes) if size > 1]
    for count in range(1, len(axes) + 1):
        for along in itertools.combinations(axes, count):
            rows = np.moveaxis(places, along, range(-count, 0))
            rows = rows.reshape(-1, math.prod(sizes[k] for k in along))
            if found == {frozenset(row) for row in rows.tolist()}:
                return _named([list(mesh.shape)[k] for k in along], mesh)
    return "other"


def _named(axes: list[str], mesh: Mesh) -> str:
    """The axes with "data" for those that make it up, of which some have one device."""
    if {axis for axis in DATA_AXES if mesh.shape.get(axis, 1) > 1} <= {*axes}:
        rest = [axis for axis in axes if axis not in DATA_AXES]
        axes = ["data", *rest] if len(rest) < len(axes) else rest
    return ",".join(axes)
