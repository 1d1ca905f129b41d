"""The manifest of a checkpoint: what was saved, by whom, and the checksums that prove it unchanged.

It is one of the records of a checkpoint, so that it is there exactly when the rest is:

    {"format": 1, "step": 10, "version": ..., "jax": ..., "mesh": {"data": 4, ...}, "processes": 2,
     "records": {"data": SHA-256, "config": ..., "latents": ...},
     "arrays": {"params/model/final/bias": {"shape": [32], "dtype": "float32", "fingerprint": ...}},
     "digest": SHA-256 of all of the above}

The configuration, and the identity of the data set, are the records "config" and "latents".
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repulsor_jax import __version__
from repulsor_jax.checkpoints import integrity
from repulsor_jax.files.checksums import values_sha256

FORMAT = 1


def describe(step: int, state: Any, records: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest; every device reads its shards once.

    Args:
      step: of the state.
      state: a tree of arrays.
      records: the other records, plain values.
    """
    mesh = getattr(jax.tree.leaves(state)[0].sharding, "mesh", None)
    fingerprints = integrity.fingerprints(state)
    found: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "version": __version__,
        "jax": jax.__version__,
        "mesh": dict(mesh.shape) if mesh else {},
        "processes": jax.process_count(),
        "records": {name: values_sha256(value) for name, value in records.items()},
        "arrays": {
            name: {"shape": list(shape), "dtype": dtype, "fingerprint": fingerprints[name]}
            for name, (shape, dtype) in shapes_and_dtypes(state).items()
        },
    }
    return found | {"digest": values_sha256(found)}


def shapes_and_dtypes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array by its name; the dtype of a random key is as "key<fry>"."""
    return {
        name: (tuple(leaf.shape), str(leaf.dtype))
        for name, leaf in integrity.named_leaves(tree).items()
    }


def record_problem(manifest: Mapping[str, Any], step: int, records: Mapping[str, Any]) -> str:
    """What is wrong with a checkpoint's records, its manifest first; "" where nothing is.

    Args:
      manifest: as read.
      step: of the checkpoint that it was read from.
      records: those of the others that were read.
    """
    about = {name: value for name, value in manifest.items() if name != "digest"}
    if manifest.get("digest") != values_sha256(about):
        return "its manifest was changed"
    if not _is_well_formed(manifest):
        return "its manifest is none"
    if manifest["format"] != FORMAT:
        return f"its manifest has format {manifest['format']}, this version reads {FORMAT}"
    if manifest["step"] != step:
        return f"it was saved as step {manifest['step']}"
    for name, value in records.items():
        if manifest["records"].get(name) != values_sha256(value):
            return f"its record {name!r} was changed"
    return ""


def array_problem(manifest: Mapping[str, Any], tree: Any) -> str:
    """Which arrays came back otherwise than saved, or are not finite; "" where all is well.

    Args:
      manifest: whose own digest was checked.
      tree: the arrays that were read, all or a part of those that the manifest has.
    """
    fingerprints = integrity.fingerprints(tree)
    found = {
        name: {"shape": list(shape), "dtype": dtype, "fingerprint": fingerprints[name]}
        for name, (shape, dtype) in shapes_and_dtypes(tree).items()
    }
    changed = sorted(name for name in found if found[name] != manifest["arrays"][name])
    if not changed:
        spoiled = integrity.not_finite(tree)  # training saves no such state; older versions did
        return f"not finite: {spoiled}" if spoiled else ""
    more = f" and {len(changed) - 1} more" if changed[1:] else ""
    return f"{changed[0]}{more} came back otherwise than saved"


def _is_well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether it has what the functions here ask of it: whoever can write files can make one."""
    try:
        arrays = manifest["arrays"]
        types = {"format": int, "step": int, "version": str, "mesh": dict, "records": dict}
        return all(isinstance(manifest[key], kind) for key, kind in types.items()) and all(
            isinstance(each["dtype"], str)
            and isinstance(each["fingerprint"], str)
            and all(type(size) is int and size >= 0 for size in each["shape"])
            and (each["dtype"].startswith("key<") or jnp.dtype(each["dtype"]).itemsize > 0)
            for each in arrays.values()
        )
    except (KeyError, TypeError, AttributeError):
        return False
