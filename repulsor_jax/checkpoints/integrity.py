"""Fingerprints of arrays: by them a checkpoint that came back otherwise is found out.

A fingerprint is 64 bits, computed where the array is: every device reads its own shards once, and
two integers per array travel. Each element's bits are mixed with its place in the whole array and
summed, so that no mesh, and no order of summing, makes a difference.

Any change of one element changes the fingerprint, for the mixing is one to one; any other change is
missed with a probability of 2^-64.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Odd constants of the golden ratio, and of murmur3's finaliser (both lanes start elsewhere).
_STRIDES = (0x9E3779B9, 0x85EBCA77)
_LANES = (0x243F6A88, 0x13198A2E)


def fingerprints(tree: Any) -> dict[str, str]:
    """Fingerprint of every array of a tree, by its name: 16 hexadecimal digits each.

    Args:
      tree: arrays on the devices, on any mesh; random keys count as their data. Shape and dtype
        are part of a fingerprint.

    Returns:
      name, as "params/model/final/kernel", to fingerprint; the same on every process.
    """
    found = {}
    for name, leaf in named_leaves(tree).items():
        array = _plain(leaf)
        # One at a time: what has the same shape is compiled once, and virtual CPU devices, which
        # share few threads, do not get stuck in many all-reduces at once.
        lanes = jax.device_get(_sum(array))
        about = f"{array.dtype}{list(array.shape)}".encode()
        prefix = int.from_bytes(hashlib.sha256(about).digest()[:8])
        value = prefix ^ (int(lanes[0]) << 32 | int(lanes[1]))
        found[name] = f"{value:016x}"
    return found


def not_finite(tree: Any) -> str:
    """Names arrays with numbers that are not finite: such a state is none to go on from.

    Args:
      tree: arrays on the devices, on any mesh; every device reads its own shards once.

    Returns:
      As "bank/features (3 numbers) and 2 more arrays"; "" where every number is finite.
    """
    found = []
    for name, leaf in named_leaves(tree).items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            count = int(_count_not_finite(leaf))  # one at a time, as above
            found += [f"{name} ({count:,} number{'s' * (count > 1)})"] * (count > 0)
    more = len(found) - 1
    return "".join(found[:1]) + (f" and {more} more array{'s' * (more > 1)}" if more > 0 else "")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, in its order, by the names that manifests and digests have for them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _plain(leaf: Any) -> Any:
    """Random keys as their data; host arrays as they are."""
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


@jax.jit
def _sum(array: Array) -> Array:
    """uint32 `[2]`: in each lane the sum, modulo 2^32, of the mixed elements."""
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):  # modulo 2^32, which the mixing does not mind
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += index * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    lanes = []
    for step, start in zip(_STRIDES, _LANES, strict=True):
        mixed = _mix(words ^ _mix(place * np.uint32(step) + np.uint32(start)))
        lanes.append(mixed.sum(dtype=jnp.uint32))
    return jnp.stack(lanes)


@jax.jit
def _count_not_finite(array: Array) -> Array:
    return jnp.sum(~jnp.isfinite(array))


def _words(array: Array) -> Array:
    """The bits of each element in uint32 words; 64-bit elements become two, on a last axis."""
    array = jnp.asarray(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if array.dtype.itemsize in (4, 8):
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    narrow = {1: jnp.uint8, 2: jnp.uint16}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """Murmur3's finaliser: one to one on 32 bits, every bit of the result depends on all."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
