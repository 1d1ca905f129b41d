"""Fingerprints: the same on any mesh, and another after every kind of change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax.checkpoints import manifest
from tests.oracles import tiny

RNG = np.random.default_rng(0)
TREE = {
    "a": RNG.standard_normal((6, 8, 4)).astype(np.float32),
    "b": {"half": RNG.standard_normal((16, 3)).astype(jnp.bfloat16), "count": np.int32(7)},
    "flags": np.array([True, False, True]),
}


def fingerprints(tree):
    return {name: each.fingerprint for name, (each, _) in manifest.measure(tree).items()}


def test_every_mesh_gives_the_same():
    whole = fingerprints(TREE)
    assert sorted(whole) == ["a", "b/count", "b/half", "flags"]
    for mesh in (tiny.mesh(8), tiny.mesh(2, 2, 2)):
        for spec in (
            PartitionSpec(None, ("data_minor", "fsdp")),
            PartitionSpec(None, None, "tensor"),
        ):
            array = jax.device_put(TREE["a"], NamedSharding(mesh, spec))
            assert fingerprints({"a": array}) == {"a": whole["a"]}


def test_every_single_bit_counts():
    bits = np.arange(0, TREE["a"].size * 32, 3)
    changed = np.tile(TREE["a"].ravel().view(np.uint32), (len(bits), 1))
    changed[np.arange(len(bits)), bits // 32] ^= np.uint32(1) << (bits % 32).astype(np.uint32)
    arrays = [TREE["a"][None], changed.view(np.float32).reshape(-1, *TREE["a"].shape)]
    sums = np.asarray(jax.jit(jax.vmap(manifest.sums))(np.concatenate(arrays)))
    assert len({(one, other) for one, other, _ in sums.tolist()}) == 1 + len(bits)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[::-1],
        lambda a: np.swapaxes(a, 0, 1),
        lambda a: a.reshape(8, 6, 4),
        lambda a: a.view(np.int32),
        lambda a: np.where(np.arange(4) == 1, 0, a).astype(np.float32),
        lambda a: -a,
    ],
)
def test_other_changes_are_found(change):
    changed = fingerprints({"x": np.ascontiguousarray(change(TREE["a"]))})
    assert changed["x"] != fingerprints({"x": TREE["a"]})["x"]


def test_keys_and_zeros_differ():
    pairs = [
        [jax.random.key(1), jax.random.key(2)],
        [np.zeros(8, np.float32), np.float32(8 * [-0.0])],
    ]
    for pair in pairs:
        one, other = fingerprints(pair).values()
        assert one != other


def test_arrays_that_are_not_finite_are_named():
    spread = NamedSharding(tiny.mesh(8), PartitionSpec(None, "data_minor"))
    tree = TREE | {"a": jax.device_put(TREE["a"], spread), "key": jax.random.key(0)}
    assert manifest.not_finite(tree) == ""
    tree["a"] = tree["a"].at[5, 7, :3].set(jnp.array([np.nan, np.inf, -np.inf]))
    assert manifest.not_finite(tree) == "a (3 numbers)"
    tree["b"] = {"half": jnp.asarray(TREE["b"]["half"]).at[0, 0].set(np.nan)}
    assert manifest.not_finite(tree) == "a (3 numbers) and 1 more array"


def test_nothing_but_sums_travels():
    array = jax.device_put(
        TREE["a"], NamedSharding(tiny.mesh(8), PartitionSpec(None, "data_minor"))
    )
    text = manifest.sums.lower(array).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text
