"""The verify mode: reads every checkpoint of a run, whole, and says which can be trusted."""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.checkpoints import manifest
from repulsor_jax.checkpoints.integrity import named_leaves
from repulsor_jax.checkpoints.storage import CheckpointError, DamagedCheckpointError, Storage

_GROUP_BYTES = 256 << 20  # read at a time
_WHOLE = "whole"


def verify(directory: str | pathlib.Path) -> bool:
    """Reads the checkpoints in a directory, or a bucket, and prints a table of what was found.

    No model is built: names, shapes and checksums are those of the manifests. Nothing is changed.

    Returns:
      Whether all are whole.

    Raises:
      CheckpointError: there are none.
    """
    storage = Storage(directory, keep_last=None, keep_every=None, read_only=True)
    steps = storage.steps()
    if not steps:
        raise CheckpointError(f"{storage.directory} holds no checkpoint: train first")
    found = {}
    is_main = jax.process_index() == 0
    with tqdm(total=len(steps), unit="checkpoint", delay=1, disable=not is_main) as bar:
        for step in steps:
            try:
                found[step] = _WHOLE, check(storage, step, bar)
            except DamagedCheckpointError as error:
                found[step] = "DAMAGED", str(error)
            bar.update()
    storage.close()
    if is_main:
        print(f"{'step':>10}  verdict")
        for step, (verdict, what) in found.items():
            print(f"{step:>10}  {verdict:<8} {what}")
    return all(verdict == _WHOLE for verdict, _ in found.values())


def check(storage: Storage, step: int, bar: Any = None) -> str:
    """Reads one checkpoint and compares all of it with its manifest.

    Args:
      storage: where it is.
      step: which.
      bar: a progress bar whose postfix says how far this is.

    Returns:
      What it holds, in a few words.

    Raises:
      DamagedCheckpointError: names the first thing that is damaged.
    """
    where = storage.directory / str(step)
    records = storage.read_records(step)
    about = records.pop("manifest")
    problem = manifest.record_problem(about, step, records)
    if problem:
        raise DamagedCheckpointError(f"{where}: {problem}")
    structure = storage.structure(step)
    missing = about["arrays"].keys() - named_leaves(structure).keys()
    if missing:
        raise DamagedCheckpointError(f"{where}: {min(missing)} is missing")
    total = sum(_bytes(each) for each in about["arrays"].values())
    done = 0
    for names in _groups(about["arrays"]):
        wanted = _abstract(structure, about["arrays"], names)
        tree = storage.read_arrays(step, wanted)
        read = named_leaves(tree)
        arrays = {name: read[name] for name in names}
        problem = manifest.array_problem(about, arrays)
        if problem:
            raise DamagedCheckpointError(f"{where}: {problem}")
        done += sum(_bytes(about["arrays"][name]) for name in names)
        if bar is not None:
            bar.set_postfix_str(f"step {step}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
    mesh = " x ".join(map(str, about["mesh"].values()))
    return (
        f"{len(about['arrays'])} arrays, {total / 1e6:,.1f} MB, saved by version "
        f"{about['version']} on a mesh of {mesh}"
    )


def _groups(arrays: dict[str, Any]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, each in arrays.items():
        if group and size + _bytes(each) > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += _bytes(each)
    yield group


def _abstract(structure: Any, arrays: dict[str, Any], names: list[str]) -> Any:
    """The tree with shapes for some arrays, on all devices, and placeholders for the others."""
    everywhere = sharding.replicated(Mesh(np.array(jax.devices()), "all"))
    wanted = [
        jax.ShapeDtypeStruct(
            tuple(arrays[name]["shape"]), _dtype(arrays[name]), sharding=everywhere
        )
        if name in names
        else ocp.PLACEHOLDER
        for name in named_leaves(structure)
    ]
    return jax.tree.unflatten(jax.tree.structure(structure), wanted)


def _dtype(each: dict[str, Any]) -> Any:
    """The dtype that the manifest names; of a random key, the one of this library's keys."""
    if each["dtype"].startswith("key<"):
        return jax.eval_shape(jax.random.key, 0).dtype
    return jnp.dtype(each["dtype"])


def _bytes(each: dict[str, Any]) -> int:
    return math.prod(each["shape"]) * _dtype(each).itemsize
