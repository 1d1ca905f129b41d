"""Fingerprints: against NumPy, on any mesh, and against every kind of change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax.checkpoints import integrity
from tests.oracles import tiny

RNG = np.random.default_rng(0)
TREE = {
    "a": RNG.standard_normal((6, 8, 4)).astype(np.float32),
    "b": {"half": RNG.standard_normal((16, 3)).astype(jnp.bfloat16), "count": np.int32(7)},
    "flags": np.array([True, False, True]),
}


def numpy_lane(words, step, start):
    """The definition, once more, in Python's own integers."""
    total = 0
    for place, word in enumerate(words.ravel().tolist()):
        total += murmur(word ^ murmur((place * step + start) % 2**32))
    return total % 2**32


def murmur(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize(
    ("array", "view"),
    [(TREE["a"], np.uint32), (TREE["b"]["half"], np.uint16), (TREE["flags"], np.uint8)],
)
def test_sums_are_those_of_the_definition(array, view):
    words = array.view(view)
    expected = [
        numpy_lane(words, step, start)
        for step, start in zip(integrity._STRIDES, integrity._LANES, strict=True)
    ]
    np.testing.assert_array_equal(integrity._sum(jnp.asarray(array)), expected)


def test_every_mesh_gives_the_same():
    whole = integrity.fingerprints(TREE)
    assert sorted(whole) == ["a", "b/count", "b/half", "flags"]
    for mesh in (tiny.mesh(8), tiny.mesh(2, 2, 2)):
        for spec in (PartitionSpec(None, ("data", "fsdp")), PartitionSpec(None, None, "tensor")):
            array = jax.device_put(TREE["a"], NamedSharding(mesh, spec))
            assert integrity.fingerprints({"a": array}) == {"a": whole["a"]}


def test_every_single_bit_counts():
    whole = integrity.fingerprints({"x": TREE["a"]})["x"]
    seen = {whole}
    for place in range(0, TREE["a"].nbytes, 7):
        for bit in range(8):
            data = bytearray(TREE["a"].tobytes())
            data[place] ^= 1 << bit
            changed = np.frombuffer(bytes(data), np.float32).reshape(TREE["a"].shape)
            seen.add(integrity.fingerprints({"x": changed})["x"])
    assert len(seen) == 1 + 8 * len(range(0, TREE["a"].nbytes, 7))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[::-1],
        lambda a: np.swapaxes(a, 0, 1),
        lambda a: a.reshape(8, 6, 4),
        lambda a: a.astype(np.float16),
        lambda a: np.where(np.arange(4) == 1, 0, a).astype(np.float32),
        lambda a: -a,
    ],
)
def test_other_changes_are_found(change):
    changed = integrity.fingerprints({"x": np.ascontiguousarray(change(TREE["a"]))})
    assert changed["x"] != integrity.fingerprints({"x": TREE["a"]})["x"]


def test_keys_and_zeros():
    one, two = (integrity.fingerprints({"k": jax.random.key(seed)}) for seed in (1, 2))
    assert one != two
    zeros = integrity.fingerprints({"x": np.zeros(8, np.float32)})
    assert zeros != integrity.fingerprints({"x": -np.zeros(8, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_arrays_that_are_not_finite_are_named(value):
    spread = NamedSharding(tiny.mesh(8), PartitionSpec(None, "data"))
    tree = TREE | {"a": jax.device_put(TREE["a"], spread), "key": jax.random.key(0)}
    assert integrity.not_finite(tree) == ""
    tree["a"] = tree["a"].at[5, 7, :2].set(value)
    assert integrity.not_finite(tree) == "a (2 numbers)"
    tree["b"] = {"half": jnp.asarray(TREE["b"]["half"]).at[0, 0].set(value)}
    assert integrity.not_finite(tree) == "a (2 numbers) and 1 more array"


@pytest.mark.parametrize("program", [integrity._sum, integrity._count_not_finite])
def test_nothing_but_sums_travels(program):
    mesh = tiny.mesh(8)
    array = jax.device_put(TREE["a"], NamedSharding(mesh, PartitionSpec(None, "data")))
    text = program.lower(array).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text
