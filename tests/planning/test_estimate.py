"""Times against hand calculations from the published rates; axes and links against hand cases."""

import itertools
import types

import pytest

from repulsor_jax.planning.cost import Cost
from repulsor_jax.planning.estimate import estimate, lanes_of, mesh_axes, spread
from repulsor_jax.planning.hlo import Array, Collective
from repulsor_jax.planning.topology import Topology
from tests.oracles import tiny

MIB = 2**20


def fake_slice(kind, *sides, num_slices=1):
    """A topology of made-up devices, which have coordinates and slices."""
    devices = tuple(
        types.SimpleNamespace(
            id=0, coords=at[::-1], slice_index=s, platform="tpu", device_kind=kind
        )
        for s in range(num_slices)
        for at in itertools.product(*(range(side) for side in sides[::-1]))
    )
    return Topology("test", devices, sides)


def mesh_of(topology, **axes):
    """What `estimate` needs of a mesh of such devices, in their order."""
    return types.SimpleNamespace(
        devices=types.SimpleNamespace(flat=list(topology.devices)), shape=axes
    )


def collective(kind, group, num_bytes=MIB):
    return Collective(kind, (Array("u8", (num_bytes,)),), (tuple(group),))


def test_compute_and_memory_are_work_over_rate():
    topology = fake_slice("TPU v5 lite", 4, 4)
    cost = Cost(matmul_flops=1e12, mxu_flops=2e12, bytes_accessed=819e6)
    parts = estimate(cost, mesh_of(topology), topology)
    assert parts == pytest.approx(
        {"compute": 2e12 / 197e12, "memory": 1e-3, "links": 0, "network": 0}
    )


def test_one_of_two_devices_on_a_chip_has_half_its_rates():
    chips = fake_slice("TPU7x", 2, 2, 1)
    topology = Topology("test", 2 * chips.devices, chips.shape)
    parts = estimate(Cost(mxu_flops=2307e9, bytes_accessed=7380e6), mesh_of(topology), topology)
    assert (parts["compute"], parts["memory"]) == pytest.approx((2e-3, 2e-3))


def test_an_all_reduce_over_a_whole_pod_uses_all_links():
    """v5e 16 x 16: rings in both dimensions, 4 links of 50 GB/s."""
    topology = fake_slice("TPU v5 lite", 16, 16)
    cost = Cost(collectives=[(collective("all-reduce", range(256)), 3)])
    parts = estimate(cost, mesh_of(topology), topology)
    assert parts["links"] == pytest.approx(3 * 2 * MIB * (255 / 256) / (4 * 50e9))


@pytest.mark.parametrize(
    ("kind", "sides", "group", "lanes"),
    [
        ("TPU v5 lite", (16, 16), range(16), 2),  # one whole row: a ring, both ways around
        ("TPU v5 lite", (16, 16), range(8), 1),  # half a row: a line
        ("TPU v5 lite", (16, 16), range(0, 256, 16), 2),  # one whole column
        ("TPU v5 lite", (4, 4), range(16), 2),  # a part of a pod has open ends: one way each
        ("TPU v4", (4, 4, 4), range(64), 6),
        ("TPU v4", (4, 4, 4), range(16), 4),  # a plane
        ("TPU v4", (2, 2, 1), range(4), 2),  # smaller than a cube: open
        ("TPU v5 lite", (8, 16), range(128), 3),  # a line and a ring
    ],
)
def test_links_in_use(kind, sides, group, lanes):
    topology = fake_slice(kind, *sides)
    found = lanes_of(collective("all-gather", group), list(topology.devices), topology)
    assert found == lanes


def test_each_device_sends_its_share_between_slices():
    """2 slices of 4: within a slice 4 reduce to a quarter each, which crosses and comes back."""
    topology = fake_slice("TPU v5 lite", 2, 2, num_slices=2)
    devices = list(topology.devices)
    inside, between = spread(collective("all-reduce", range(8)), devices)
    assert inside == 2 * MIB * 3 / 4
    assert between == 2 * (MIB / 4) * 1 / 2
    cost = Cost(collectives=[(collective("all-reduce", range(8)), 1)])
    parts = estimate(cost, mesh_of(topology), topology)
    assert parts["network"] == pytest.approx(MIB / 4 / 3.125e9)
    # Of a gather over both slices, three quarters of a quarter come from within, the rest crosses.
    inside, between = spread(collective("all-gather", range(8)), devices)
    assert (inside, between) == (MIB * 3 / 4, MIB / 2 / 4)
    assert spread(collective("all-reduce", range(4)), devices) == (2 * MIB * 3 / 4, 0)
    # One row of 8 as the result of a reduce-scatter: 8 rows in all.
    inside, between = spread(collective("reduce-scatter", range(8)), devices)
    assert (inside, between) == (2 * 3 * MIB, MIB)


def test_a_rate_that_is_not_published_gives_no_estimate():
    cpus = fake_slice("cpu", 4)
    assert estimate(Cost(mxu_flops=1), mesh_of(cpus), cpus) is None
    two = fake_slice("TPU v4", 2, 2, 1, num_slices=2)  # the rate of its network is not published
    cost = Cost(collectives=[(collective("all-reduce", range(8)), 1)])
    assert set(estimate(cost, mesh_of(two), two)) == {"compute", "memory", "links"}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([(0, 1), (2, 3), (4, 5), (6, 7)], "tensor"),
        ([(0, 2), (1, 3), (4, 6), (5, 7)], "fsdp"),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], "data"),
        ([(0, 1, 2, 3), (4, 5, 6, 7)], "fsdp,tensor"),
        ([(4, 0, 6, 2), (1, 3, 5, 7)], "data,fsdp"),
        ([tuple(range(8))], "data,fsdp,tensor"),
        ([(0, 3), (1, 2), (4, 7), (5, 6)], "other"),
    ],
)
def test_groups_are_named_by_the_axes_of_the_mesh(groups, axes):
    found = Collective("all-reduce", (), tuple(groups))
    assert mesh_axes(found, tiny.mesh(2, 2, 2)) == axes


def test_a_permutation_is_named_by_the_axes_along_which_it_moves():
    found = Collective("collective-permute", (), ((0, 4), (1, 5)))
    assert mesh_axes(found, tiny.mesh(2, 2, 2)) == "data"
    ring = Collective("collective-permute", (), ((0, 1), (1, 2), (2, 3), (3, 0)))
    assert mesh_axes(ring, tiny.mesh(1, 8)) == "fsdp"
