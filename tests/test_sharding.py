import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from repulsor_jax import sharding
from tests.oracles import tiny


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 1), (2, 4, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((8, 1, 1), (8, 1, 1)),
    ],
)
def test_minus_one_fills(sizes, expected):
    assert sharding.mesh_shape(*sizes, num_devices=8) == expected


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (3, 1, 1), (-1, 3, 1), (0, 1, 1), (-2, 1, 1)])
def test_sizes_that_do_not_fit_are_refused_by_name(sizes):
    with pytest.raises(ValueError, match=rf"mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}"):
        sharding.mesh_shape(*sizes, num_devices=8)


def test_a_host_batch_becomes_a_global_array_in_order():
    mesh = tiny.mesh(data=2, fsdp=4)
    rows = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    array = sharding.to_global({"x": rows}, mesh)["x"]
    assert array.sharding.spec == jax.sharding.PartitionSpec(sharding.BATCH_AXES)
    assert {s.data.shape for s in array.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(array, rows)


def test_rows_go_to_the_devices_of_a_permuted_mesh():
    order = np.random.default_rng(0).permutation(8)
    devices = np.array(jax.devices())[order].reshape(2, 2, 2, 1)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    rows = np.arange(16)
    array = sharding.to_global(rows, mesh)
    np.testing.assert_array_equal(array, rows)
    for shard in array.addressable_shards:
        place = order.tolist().index(shard.device.id)
        np.testing.assert_array_equal(shard.data, [2 * place, 2 * place + 1])


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device: one of a job that is not here."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "stand-in"


def fake_mesh(processes, *, tensor=1):
    """A mesh whose devices belong to these processes, in the order of the mesh."""
    devices = np.empty(len(processes), object)
    devices[:] = [Device(i, process) for i, process in enumerate(processes)]
    return Mesh(devices.reshape(-1, 1, 1, tensor), sharding.AXES)


@pytest.mark.parametrize(
    ("processes", "tensor", "expected"),
    [
        ([0, 0, 1, 1], 1, [[range(4)], [range(4, 8)]]),
        ([1, 1, 0, 0], 1, [[range(4, 8)], [range(4)]]),
        # Hosts of 2 x 2 chips on a 4 x 2 torus, and a ring through it.
        ([0, 0, 1, 1, 1, 1, 0, 0], 1, [[range(2), range(6, 8)], [range(2, 6)]]),
        # Rows that processes share.
        ([0, 0, 1, 1], 4, [[range(8)], [range(8)]]),
        ([0, 1, 2, 3], 2, [[range(4)], [range(4)], [range(4, 8)], [range(4, 8)]]),
        ([0, 0, 0, 0, 1, 1, 1, 1, 1], 3, [[range(6)], [range(3, 9)]]),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(processes, tensor, expected):
    mesh = fake_mesh(processes, tensor=tensor)
    size = 9 if tensor == 3 else 8
    for process, rows in enumerate(expected):
        assert list(sharding.local_rows(mesh, size, process)) == rows


def slices(count, size, platform="gpu"):
    """Slices of so many devices, in an order that nobody promises to be sorted; two a process."""
    devices = [Device(i, i // 2, i // size, platform) for i in range(count * size)]
    return devices[1::2] + devices[::2]


@pytest.mark.parametrize("sizes", [(-1, 1, 1), (2, 4, 1), (-1, 2, 1), (4, -1, 2)])
def test_data_alone_crosses_the_network_between_slices(sizes):
    mesh = sharding.create_mesh(*sizes, devices=slices(2, 4))
    assert tuple(sharding.sizes(mesh).values()) == sharding.mesh_shape(*sizes, num_devices=8)
    assert mesh.axis_types == (AxisType.Auto,) * 4
    by_size = mesh.devices.reshape(tuple(sharding.sizes(mesh).values()))
    place = np.vectorize(lambda device: device.slice_index)(by_size)
    half = len(place) // 2
    assert (place[:half] == 0).all()
    assert (place[half:] == 1).all()


def test_slices_that_data_does_not_divide():
    with pytest.raises(
        ValueError,
        match=r"mesh.data=1, mesh.fsdp=8, mesh.tensor=1: found 2 slices of 4 .* multiple of 2",
    ):
        sharding.create_mesh(1, -1, devices=slices(2, 4, "tpu"))
    # Hosts of GPUs: neighbours stay in one as far as they fit.
    mesh = sharding.create_mesh(1, 4, 2, devices=slices(2, 4))
    assert [d.id for d in mesh.devices.flat] == list(range(8))


def test_slices_of_real_chips(monkeypatch):
    """Two slices of 16 chips and their hosts as libtpu describes them, without one here."""
    pytest.importorskip("libtpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=2
    ).devices
    hosts = {d.process_index for d in described}
    scattered = False
    for sizes in ((-1, 1, 1), (-1, 4, 1), (2, 4, 4), (4, 2, 4), (2, 1, 16)):
        mesh = sharding.create_mesh(*sizes, devices=described)
        place = np.vectorize(lambda device: device.slice_index)(mesh.devices)
        assert np.array_equal(place[..., :1, :1] + 0 * place, place)  # fsdp, tensor stay in a slice
        by_row = np.vectorize(lambda device: device.process_index)(mesh.devices)
        by_row = by_row.reshape(sharding.batch_shards(mesh), -1)
        for host in hosts:
            runs = sharding.local_rows(mesh, len(by_row), host)
            expected = np.flatnonzero((by_row == host).any(axis=1))
            np.testing.assert_array_equal(np.concatenate(runs), expected)
            scattered |= len(runs) > 1
    assert scattered  # or contiguous rows would have been enough
    with pytest.raises(ValueError, match="found 2 slices of 16 devices"):
        sharding.create_mesh(1, -1, 1, devices=described)


def test_the_first_process_is_the_first(monkeypatch):
    order = []
    monkeypatch.setattr(sharding, "any_process", lambda flag: order.append("all") or flag)
    for rank, expected in ((0, ["made", "all", "all"]), (1, ["all", "made", "all"])):
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        make = lambda: order.append("made") or 7
        assert sharding.first_process_first(make) == 7
        assert order == expected
        order.clear()
    assert sharding.first_process_first(lambda: 3, enabled=False) == 3
    assert order == ["all"]


def test_an_error_in_one_process_is_raised_on_all(monkeypatch):
    with pytest.raises(ValueError, match="mine"), sharding.raised_on_all():
        raise ValueError("mine")
    with sharding.raised_on_all():
        pass
    monkeypatch.setattr(sharding, "any_process", lambda flag: True)  # as another one's
    with pytest.raises(OSError, match="another process failed"), sharding.raised_on_all():
        pass
