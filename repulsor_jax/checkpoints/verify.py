"""The verify mode: reads every checkpoint of a run, whole, and says which can be trusted."""

import collections
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.checkpoints.manifest import CheckpointError, DamagedCheckpointError, named_leaves
from repulsor_jax.checkpoints.places import open_folder
from repulsor_jax.checkpoints.storage import Storage


def verify(directory: str | os.PathLike[str], *, group_bytes: int = 256 << 20) -> bool:
    """Reads the checkpoints in a directory, or a bucket, and prints a table of what was found.

    No model is built: names, shapes and checksums are those of the manifests. Nothing is changed.

    About `group_bytes` of arrays are read at a time. Returns whether all are whole.

    Raises:
      CheckpointError: there are none.
    """
    storage = Storage(open_folder(directory), read_only=True)
    steps = storage.steps()
    if not steps:
        raise CheckpointError(f"{storage.directory} holds no checkpoint: train first")
    found = {}
    is_main = jax.process_index() == 0
    for step in tqdm(steps, unit="checkpoint", delay=1, disable=not is_main):
        try:
            found[step] = "whole", _read(storage, step, group_bytes)
        except DamagedCheckpointError as error:
            found[step] = "DAMAGED", str(error)
    storage.close()
    if is_main:
        print(f"{'step':>10}  verdict")
        for step, (verdict, what) in found.items():
            print(f"{step:>10}  {verdict:<8} {what}")
    return all(verdict == "whole" for verdict, _ in found.values())


def _read(storage: Storage, step: int, group_bytes: int) -> str:
    """Reads one checkpoint, compared with its manifest; returns what it holds, in a few words."""
    about, _ = storage.read_records(step)
    structure = storage.structure(step)
    names = named_leaves(structure)
    if missing := about.arrays.keys() - names.keys():
        raise DamagedCheckpointError(f"{storage.directory / str(step)}: {min(missing)} is missing")
    everywhere = sharding.replicated(Mesh(np.array(jax.devices()), "all"))
    abstract = {name: each.abstract(everywhere) for name, each in about.arrays.items()}
    groups: dict[int, set[str]] = collections.defaultdict(set)
    total = 0
    for name, each in abstract.items():
        groups[total // group_bytes].add(name)
        total += each.size * each.dtype.itemsize
    for group in groups.values():
        wanted = [abstract[name] if name in group else ocp.PLACEHOLDER for name in names]
        storage.read_arrays(step, about, jax.tree.unflatten(jax.tree.structure(structure), wanted))
    mesh = " x ".join(map(str, about.mesh.values()))
    return (
        f"{len(abstract)} arrays, {total / 1e6:,.1f} MB, saved by version {about.version} on a "
        f"mesh of {mesh}"
    )
