"""What a checkpoint holds, and the proof that it was not changed.

The manifest is one of the records of a checkpoint, so that it is there exactly when the rest is:

    {"format": 1, "step": 10, "version": ..., "jax": ..., "mesh": {"data": 4, ...}, "processes": 2,
     "records": {"data": SHA-256, "config": ..., "latents": ...},
     "arrays": {"params/model/final/bias": {"shape": [32], "dtype": "float32", "fingerprint": ...}},
     "digest": SHA-256 of all of the above}

A fingerprint is 64 bits, computed where the array is: every device reads its own shards once, and
three integers per array travel. Each element's bits are mixed with its place in the whole array and
summed, so that no mesh, and no order of summing, makes a difference. Any change of one element
changes the fingerprint, because the mixing is one to one; any other change is missed with a
probability of 2^-64.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from repulsor_jax import __version__, sharding
from repulsor_jax.files import untrusted
from repulsor_jax.files.checksums import values_sha256

Array = jax.Array

# Odd constants of the golden ratio, and of murmur3's finaliser; the two lanes start elsewhere.
_LANES = (0x9E3779B9, 0x243F6A88), (0x85EBCA77, 0x13198A2E)


class CheckpointError(ValueError):
    """A checkpoint that is not there, cannot be saved, or does not fit; says which and why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be read, or was changed since it was saved."""


def _check_dtype(name: str) -> str:
    """Refuses a name that `SavedArray.abstract` cannot use: anybody may have written a manifest."""
    if not name.startswith("key<") and not isinstance(getattr(jnp, name, None), type(jnp.int8)):
        raise ValueError(f"expected a dtype of numbers, found {name[:40]!r}")
    return name


@untrusted.checked
class SavedArray:
    """One array; the dtype of a random key is as "key<fry>"."""

    shape: tuple[pydantic.NonNegativeInt, ...]
    dtype: Annotated[str, pydantic.AfterValidator(_check_dtype)]
    fingerprint: str

    def abstract(self, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
        """Shape and dtype; every random key gets this library's key dtype."""
        is_key = self.dtype.startswith("key<")
        dtype = jax.eval_shape(jax.random.key, 0).dtype if is_key else jnp.dtype(self.dtype)
        return jax.ShapeDtypeStruct(self.shape, dtype, sharding=sharding)


@untrusted.checked
class Manifest:
    """See the module. The format is the first field, so that errors name it first."""

    format: Literal[1]
    step: int
    version: str
    jax: str
    mesh: dict[str, int]
    processes: int
    records: dict[str, str]
    arrays: dict[str, SavedArray]
    digest: str


def describe(step: int, state: Any, records: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a tree of arrays and of the other records, as plain values.

    Every device reads its shards once.
    """
    mesh = getattr(jax.tree.leaves(state)[0].sharding, "mesh", None)
    found: dict[str, Any] = {
        "format": 1,
        "step": step,
        "version": __version__,
        "jax": jax.__version__,
        "mesh": sharding.sizes(mesh) if mesh else {},
        "processes": jax.process_count(),
        "records": {name: values_sha256(value) for name, value in records.items()},
        "arrays": {name: dataclasses.asdict(each) for name, (each, _) in measure(state).items()},
    }
    return found | {"digest": values_sha256(found)}


def check(values: Mapping[str, Any], step: int, records: Mapping[str, Any], where: str) -> Manifest:
    """Checks a manifest, and other records of its checkpoint against it.

    Args:
      values: the manifest as it was read.
      step, where: of the checkpoint, and its name for an error.
      records: those of the others that were read.

    Raises:
      DamagedCheckpointError: names what was changed, or what is wrong with the manifest.
    """
    about = {name: value for name, value in values.items() if name != "digest"}
    if values.get("digest") != values_sha256(about):
        raise DamagedCheckpointError(f"{where}: its manifest was changed")
    try:
        found = untrusted.parse(Manifest, values, f"{where}/manifest")
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error
    if found.step != step:
        raise DamagedCheckpointError(f"{where}: it was saved as step {found.step}")
    for name, value in records.items():
        if found.records.get(name) != values_sha256(value):
            raise DamagedCheckpointError(f"{where}: its record {name!r} was changed")
    return found


def check_arrays(manifest: Manifest, tree: Any, where: str) -> None:
    """Compares arrays, all or a part of those that the manifest has, with it.

    Raises:
      DamagedCheckpointError: some were changed, or are not finite: training saves no such state,
        but older versions did.
    """
    found = measure(tree)
    changed = [name for name, (each, _) in found.items() if each != manifest.arrays[name]]
    if changed:
        more = f", and {len(changed) - 1} more" if changed[1:] else ""
        raise DamagedCheckpointError(f"{where}: its array {min(changed)!r} was changed{more}")
    if spoiled := _name_spoiled(found):
        raise DamagedCheckpointError(f"{where}: not finite: {spoiled}")


def misfit(manifest: Manifest, wanted: Any, within: str = "") -> str:
    """The first difference in names, shapes and dtypes between saved and wanted arrays, or "".

    Args:
      manifest: of the checkpoint.
      wanted: a tree of `jax.ShapeDtypeStruct`.
      within: start of the names that `wanted` has all of; "" for every name.
    """
    expected = named_leaves(wanted)
    for name, leaf in expected.items():
        saved, shape, dtype = manifest.arrays.get(name), tuple(leaf.shape), str(leaf.dtype)
        if saved is None:
            return f"{name} is missing"
        if saved.shape != shape:
            return f"{name} has shape {saved.shape}, expected {shape}"
        if saved.dtype != dtype:
            return f"{name} has dtype {saved.dtype}, expected {dtype}"
    others = [n for n in manifest.arrays if n.startswith(within) and n not in expected]
    return f"it also holds {min(others)}" if others else ""


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, in its order, by their names in a manifest."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def measure(tree: Any) -> dict[str, tuple[SavedArray, int]]:
    """What a manifest says of every array of a tree, and how many of its numbers are not finite.

    The arrays are on any mesh; random keys count as their data. Shape and dtype are part of a
    fingerprint. The result is by name, and the same on every process.
    """
    found = {}
    for name, leaf in named_leaves(tree).items():
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = jax.random.key_data(leaf) if is_key else leaf
        # One array at a time: arrays of one shape share a compiled program, and virtual CPU
        # devices, which share few threads, do not get stuck in many all-reduces at once.
        one, other, spoiled = jax.device_get(sums(array)).tolist()
        about = f"{array.dtype}{list(array.shape)}".encode()
        prefix = int.from_bytes(hashlib.sha256(about).digest()[:8])
        fingerprint = f"{prefix ^ (one << 32 | other):016x}"
        # The dtype is the leaf's: where orbax's metadata are damaged, a random key comes back as
        # its data, which has the same fingerprint.
        saved = SavedArray(shape=tuple(leaf.shape), dtype=str(leaf.dtype), fingerprint=fingerprint)
        found[name] = saved, spoiled
    return found


def not_finite(tree: Any) -> str:
    """Names arrays with numbers that are not finite: no training can go on from such a state.

    As "bank/features (3 numbers) and 2 more arrays"; "" where every number is finite.
    """
    return _name_spoiled(measure(tree))


def _name_spoiled(measured: Mapping[str, tuple[SavedArray, int]]) -> str:
    spoiled = [(name, count) for name, (_, count) in measured.items() if count]
    if not spoiled:
        return ""
    (name, count), *others = spoiled
    more = f" and {len(others)} more array{'s' * (len(others) > 1)}" if others else ""
    return f"{name} ({count:,} number{'s' * (count > 1)}){more}"


@jax.jit
def sums(array: Array) -> Array:
    """uint32 `[3]`: two sums of the mixed elements, modulo 2^32, and how many are not finite."""
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):  # modulo 2^32, which the mixing does not mind
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += index * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = [_mix(words ^ _mix(place * np.uint32(k) + np.uint32(start))) for k, start in _LANES]
    bad = ~jnp.isfinite(array) if jnp.issubdtype(array.dtype, jnp.inexact) else jnp.zeros(())
    return jnp.stack([each.sum(dtype=jnp.uint32) for each in (*mixed, bad)])


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
