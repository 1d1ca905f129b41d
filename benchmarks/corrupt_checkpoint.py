"""Damages checkpoints at random, and counts the damages that go unnoticed: there must be none.

    python -m benchmarks.corrupt_checkpoint --damages=200 --seed=0

Each round copies two good checkpoints, damages a file of the newer one (truncated, deleted, or some
bytes changed, in its arrays, orbax's metadata, the records or the manifest), and restores as
training does. There are three outcomes:

    detected   the damage is reported, and the older checkpoint comes back, equal to the bit
    harmless   the newer one comes back, and every array and record of it is equal to the bit
    silent     anything else

It also prints what the checksums cost: MB/s of the fingerprints, beside those of saving.
"""

import argparse
import collections
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from configs import default
from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.checkpoints import manifest
from repulsor_jax.checkpoints.checkpointer import Checkpointer
from repulsor_jax.experiment import make_trainer
from repulsor_jax.train_state import TrainState, abstract_train_state, create_train_state

OLD, NEW = 1, 2
BATCH = 8
KINDS = ("truncated", "deleted", "changed")


def small_config() -> config_lib.Config:
    """A small model whose state has every part that a large model's has."""
    c = default.get_config()
    c.update_from_flattened_dict(
        {
            "batch_size": BATCH,
            "model.latent_size": 4,
            "model.hidden_size": 32,
            "model.depth": 2,
            "model.num_heads": 2,
            "model.num_classes": 3,
            "model.dtype": "float32",
            "repulsor.projection_dim": 8,
            "repulsor.bank_rows": 4 * BATCH,
        }
    )
    return config_lib.parse(c)


def abstract_state(config: config_lib.Config) -> TrainState:
    """Shapes of the state on all devices."""
    mesh = sharding.create_mesh()
    return abstract_train_state(make_trainer(config, mesh), mesh)


def random_states(config: config_lib.Config) -> dict[int, TrainState]:
    """Two states of other values everywhere, by their steps."""
    mesh = sharding.create_mesh()
    fresh = create_train_state(make_trainer(config, mesh), mesh)
    states = {}
    for step in (OLD, NEW):
        rng = np.random.default_rng(step)
        random = jax.tree.map(lambda leaf, rng=rng: _random(leaf, rng), fresh)
        states[step] = random.replace(step=jax.device_put(jnp.int32(step), fresh.step.sharding))
    return states


def save(folder: pathlib.Path, states: dict[int, TrainState]) -> None:
    """Saves states by their steps."""
    with Checkpointer(folder) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, *records(step))


def records(step: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Position in the data, configuration, record of the latents."""
    return {"next_index": step}, {"batch_size": BATCH, "step": step}, {"shift": [step / 3]}


def damages(folder: pathlib.Path, rng: np.random.Generator) -> Iterator[tuple[str, pathlib.Path]]:
    """Damages a fresh copy of the checkpoints each time; yields the damage and the copy."""
    names = sorted(
        str(path.relative_to(folder)) for path in (folder / str(NEW)).rglob("*") if path.is_file()
    )
    parts: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        parts[_part(name)].append(name)
    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / "checkpoints"
        while True:
            part = list(parts)[rng.integers(len(parts))]
            name = parts[part][rng.integers(len(parts[part]))]
            kind = KINDS[rng.integers(len(KINDS))]
            shutil.copytree(folder, copy)
            _damage(copy / name, kind, rng)
            yield f"{part}: {kind}", copy
            shutil.rmtree(copy)


def outcome(
    copy: pathlib.Path, abstract: TrainState, states: dict[int, TrainState]
) -> tuple[str, str]:
    """Restores as training does; returns detected, harmless or silent, and what was said."""
    said: list[Any] = []

    def look(*found: Any) -> list[str]:
        said[:] = found
        return []

    try:
        with Checkpointer(copy) as checkpointer:
            state, data, notes = checkpointer.restore(abstract, BATCH, check=look)
    except Exception as error:  # noticed, but not by the promised error
        return "silent", f"{type(error).__name__}: {error}"
    step = int(state.step)
    config, latents = said
    equal = (data, config, latents) == records(step) and all(
        jax.tree.leaves(jax.tree.map(_equal, state, states[step]))
    )
    reported = any("DAMAGED" in note for note in notes)
    moved = (copy / "damaged").is_dir() and not (copy / str(NEW)).exists()
    if equal and step == NEW and not notes and not moved:
        return "harmless", ""
    if equal and step == OLD and reported and moved:
        return "detected", notes[0]
    return "silent", f"step {step}, equal: {equal}, said: {notes}"


def measure(megabytes: int) -> str:
    """Prints the time of the checksums of `megabytes` MB, and of saving them."""
    mesh = sharding.create_mesh()
    size = megabytes * 1_000_000 // 4 // mesh.size // 16 * mesh.size
    arrays = {
        str(k): jax.device_put(
            jnp.arange(size, dtype=jnp.float32) * k, sharding.batch_sharding(mesh)
        )
        for k in range(16)
    }
    jax.block_until_ready(arrays)
    manifest.measure(arrays)  # compiles
    times = []
    for _ in range(3):
        started = time.perf_counter()
        manifest.measure(arrays)
        times.append(time.perf_counter() - started)
    total = 16 * size * 4 / 1e6
    with tempfile.TemporaryDirectory() as scratch, Checkpointer(scratch) as checkpointer:
        started = time.perf_counter()
        checkpointer.save(1, arrays, {}, {}, {}, patience=0.0)  # type: ignore[arg-type]
        saved = time.perf_counter() - started
    low, middle, high = sorted(times)
    return (
        f"{total:,.0f} MB on {mesh.size} {jax.devices()[0].device_kind}: fingerprints at "
        f"{total / middle:,.0f} MB/s ({total / high:,.0f} to {total / low:,.0f}), "
        f"{middle / saved:.1%} of the {saved:.2f} s of saving"
    )


def _random(leaf: jax.Array, rng: np.random.Generator) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(int(rng.integers(1 << 30))), leaf.sharding)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jax.device_put(rng.integers(9, size=leaf.shape).astype(leaf.dtype), leaf.sharding)
    return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)


def _equal(one: jax.Array, other: jax.Array) -> bool:
    if one.dtype != other.dtype:
        return False
    if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    found, expected = (np.asarray(x) for x in (one, other))
    return found.tobytes() == expected.tobytes()


def _part(name: str) -> str:
    """The kind of a file of a checkpoint."""
    pieces = pathlib.PurePath(name).parts[1:]
    if pieces[0] == "manifest":
        return "manifest"
    if pieces[0] in ("data", "config", "latents"):
        return "records"
    return "arrays" if "d" in pieces else "metadata"


def _damage(path: pathlib.Path, kind: str, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
        return
    if kind == "truncated":
        path.write_bytes(content[: rng.integers(len(content))])
        return
    start, length = int(rng.integers(len(content))), int(rng.choice([1, 1, 8, 64]))
    for place in range(start, min(start + length, len(content))):
        content[place] ^= int(rng.integers(1, 256))
    path.write_bytes(content)


def main() -> None:
    """Runs the rounds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure_mb", type=int, default=1000, help="0: measure nothing")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    config = small_config()
    abstract = abstract_state(config)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "checkpoints"
        states = random_states(config)
        save(folder, states)
        rounds = zip(range(args.damages), damages(folder, rng), strict=False)
        for _, (what, copy) in tqdm(rounds, total=args.damages):
            verdict, said = outcome(copy, abstract, states)
            counts[what][verdict] += 1
            if verdict == "silent":
                tqdm.write(f"SILENT: {what}: {said}")
    print(f"{'damage':<24}{'detected':>9}{'harmless':>9}{'silent':>9}")
    verdicts = ("detected", "harmless", "silent")
    for what in sorted(counts):
        print(f"{what:<24}" + "".join(f"{counts[what][v]:>9}" for v in verdicts))
    total = sum(counts.values(), collections.Counter())
    print(f"{'all ' + str(args.damages):<24}" + "".join(f"{total[v]:>9}" for v in verdicts))
    if args.measure_mb:
        print(measure(args.measure_mb))
    sys.exit(total["silent"] > 0)


if __name__ == "__main__":
    main()
