import jax
import numpy as np
import pytest

from repulsor_jax import sharding
from tests import tiny


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
