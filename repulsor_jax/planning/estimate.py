"""How long one run of a program takes at the least, from published rates: an estimate, no measure.

Four parts are computed apart, each as if it ran at its peak rate:

- compute: FLOPs of matrix products / peak FLOP/s of the chip (float32 products at "highest"
  precision count 6 times on a TPU: so many passes does the bfloat16 unit make);
- memory: bytes to and from main memory / its rate;
- links: for each collective, the bytes that a ring sends, 2 (n - 1) / n of the array for an
  all-reduce, (n - 1) / n for an all-gather or all-to-all, (n - 1) of the result for a
  reduce-scatter, / the rate of the links in use: two in each dimension of the torus that the group
  goes all the way around, one in a dimension where it does not;
- network between slices: the same with n the number of slices, of the share that each device of a
  group holds, / the chip's part of its host's network.

If all overlap perfectly, the longest is the time: `seconds`. If none does, their sum:
`serial_seconds`. What is measured lies above the first, and often between the two.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from repulsor_jax.planning.cost import Cost
from repulsor_jax.planning.hlo import Collective
from repulsor_jax.planning.topology import Topology

_TORUS_3D = ("v4", "v5p", "tpu7x")  # closed where every side is a multiple of 4
_TORUS_2D_SIDE = 16  # v5e, v6e: closed where a side is the whole pod's


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run, part by part; None where no rate is published.

    Attributes:
      compute: of matrix products.
      memory: of main memory.
      links: of the links within a slice.
      network: of the network between slices.
    """

    compute: float
    memory: float
    links: float | None
    network: float | None

    @property
    def parts(self) -> dict[str, float]:
        """Those that are known, by name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @property
    def seconds(self) -> float:
        """With perfect overlap: the longest part."""
        return max(self.parts.values())

    @property
    def serial_seconds(self) -> float:
        """Without any overlap: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """Name of the longest part."""
        return max(self.parts, key=lambda part: self.parts[part])


def estimate(cost: Cost, mesh: Mesh, topology: Topology) -> Estimate | None:
    """Time of one run of a program; None where nothing is published of the chip."""
    chip = topology.chip
    if chip is None:
        return None
    share = 1.0 / topology.devices_per_chip  # of a chip's rates that one device has
    on_tpu = topology.devices[0].platform == "tpu"
    flops = cost.mxu_flops if on_tpu else cost.matmul_flops
    devices = list(mesh.devices.flat)
    links: float | None = 0.0
    network: float | None = 0.0
    for each, count in cost.collectives:
        in_slice, between = spread(each, devices)
        lanes = lanes_of(each, devices, topology)
        if in_slice and lanes:
            if chip.link_bytes_per_second is None or links is None:
                links = None
            else:
                links += count * in_slice / (lanes * chip.link_bytes_per_second * share)
        if between:
            if chip.dcn_bytes_per_second is None or network is None:
                network = None
            else:
                network += count * between / (chip.dcn_bytes_per_second * share)
    return Estimate(
        compute=flops / (chip.peak_flops * share),
        memory=cost.bytes_accessed / (chip.hbm_bytes_per_second * share),
        links=links,
        network=network,
    )


def spread(collective: Collective, devices: list[jax.Device]) -> tuple[float, float]:
    """Bytes that each device sends within its slice, and to other slices."""
    group = max(collective.groups, key=len, default=())
    slices = {getattr(devices[i], "slice_index", 0) or 0 for i in group}
    if len(slices) < 2:
        return collective.sent_bytes, 0.0
    if collective.kind == "collective-permute":
        return 0.0, collective.sent_bytes
    inside = dataclasses.replace(collective, groups=(group[: len(group) // len(slices)],))
    across = dataclasses.replace(collective, groups=(tuple(range(len(slices))),))
    share = len(group) // len(slices)
    # Of a reduce-scatter the result is one device's: within a slice it is that of all slices.
    factor = len(slices) if collective.kind == "reduce-scatter" else 1
    return factor * inside.sent_bytes, across.sent_bytes / (
        1 if collective.kind == "reduce-scatter" else share
    )


def lanes_of(collective: Collective, devices: list[jax.Device], topology: Topology) -> int:
    """Links that one chip sends on at once; 0 where the group does not leave the chip."""
    group = max(collective.groups, key=len, default=())
    if collective.kind == "collective-permute":
        return 1
    if not topology.shape:
        return 1 if len(group) > 1 else 0
    first = getattr(devices[group[0]], "slice_index", 0) if group else 0
    coordinates = [
        devices[i].coords for i in group if getattr(devices[i], "slice_index", 0) == first
    ]
    lanes = 0
    for places, side, closed in zip(
        zip(*coordinates, strict=True), topology.shape, closed_sides(topology), strict=False
    ):
        extent = len(set(places))
        if extent > 1:
            lanes += 2 if closed and extent == side else 1
    return lanes


def closed_sides(topology: Topology) -> tuple[bool, ...]:
    """For each dimension of a slice, whether its ends are joined to a ring."""
    name = topology.chip.name if topology.chip else ""
    if name in _TORUS_3D:
        return (all(side % 4 == 0 for side in topology.shape),) * len(topology.shape)
    return tuple(side == _TORUS_2D_SIDE for side in topology.shape)


def mesh_axes(collective: Collective, mesh: Mesh) -> str:
    """Names of the mesh axes along which a collective's groups lie, as "data" or "data,fsdp".

    "other" where they are not those of any axes.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    if collective.kind == "collective-permute":
        pairs = np.array(collective.groups).reshape(-1, 2)
        ends = np.unravel_index(pairs, tuple(mesh.shape.values()))
        moved = [n for n, at in zip(mesh.shape, ends, strict=True) if (at[:, 0] != at[:, 1]).any()]
        return ",".join(moved) or "other"
    found = {frozenset(group) for group in collective.groups}
    places = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            along = [list(mesh.shape).index(name) for name in axes]
            rows = np.moveaxis(places, along, range(-count, 0))
            rows = rows.reshape(-1, math.prod(mesh.shape[name] for name in axes))
            if found == {frozenset(row) for row in rows.tolist()}:
                return ",".join(axes)
    return "other"
