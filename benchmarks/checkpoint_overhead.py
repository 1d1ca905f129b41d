"""What checkpoints cost the training loop: blocks of steps with a save and without, in turns.

    python -m benchmarks.checkpoint_overhead                 # about 10 minutes on two cores
    python -m benchmarks.checkpoint_overhead --pairs=2 --steps=100 --hidden_size=64

One process, one compiled step, one state. As in training, a save begins between two steps and ends
in the background while the next steps run. Its cost is the time for which it blocks the loop, plus
the time by which the steps beside it are slower than the steps of blocks without a save.

For comparison, the same state is copied into the host's memory once a pair. CPU devices share the
host's memory: there, the copy protects the state from the next step, which overwrites it.
"""

import argparse
import collections
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import corrupt_checkpoint
from configs import default
from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.checkpoints import manifest
from repulsor_jax.checkpoints.checkpointer import Checkpointer
from repulsor_jax.data.latents import LatentFormat
from repulsor_jax.experiment import make_trainer
from repulsor_jax.train_state import TrainState
from repulsor_jax.train_step import compile_training

BATCH = 8
KEPT = 2  # number of checkpoints
_SHAPE = (8, 8, 4)  # of the latents


class Loop:
    """The training loop, with its clock: metrics are read one step late."""

    def __init__(self, hidden_size: int, depth: int) -> None:
        c = default.get_config()
        c.update_from_flattened_dict(
            {
                "batch_size": BATCH,
                "model.latent_size": _SHAPE[0],
                "model.hidden_size": hidden_size,
                "model.depth": depth,
                "model.num_heads": 4,
                "model.num_classes": 10,
                "model.dtype": "float32",
                "repulsor.bank_rows": 128 * BATCH,
            }
        )
        config = config_lib.parse(c)
        self.record = c.to_dict()
        mesh = sharding.create_mesh()
        latent_format = LatentFormat(False, np.zeros(4, np.float32), np.ones(4, np.float32))
        program = compile_training(
            make_trainer(config, mesh), latent_format, _SHAPE, "float32", mesh
        )
        self._step = program.step
        draw = np.random.default_rng(0)
        batch = {
            "latents": draw.standard_normal((BATCH, *_SHAPE), np.float32),
            "labels": draw.integers(10, size=BATCH, dtype=np.int32),
            "ids": np.arange(BATCH, dtype=np.int32),
        }
        self._batch = sharding.to_global(batch, mesh)
        self.state: TrainState = program.create_state()
        self.number = 0

    def run(self, steps: int, checkpointer: Checkpointer | None = None) -> tuple[list[float], int]:
        """Seconds of each step, and the number of first steps during which a save went on."""
        seconds: list[float] = []
        beside, pending = 0, None
        busy = checkpointer is not None
        last = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self._step(self.state, self._batch)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
            if checkpointer and busy:
                beside += 1
                busy = checkpointer.is_saving()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        jax.device_get(pending)
        seconds[-1] += time.perf_counter() - last
        self.number += steps
        return seconds, beside


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=4, help="of a block with and one without")
    parser.add_argument("--steps", type=int, default=1_000, help="of a block")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--measure_mb", type=int, default=500, help="checksums alone; 0: not")
    args = parser.parse_args()
    loop = Loop(args.hidden_size, args.depth)
    rows: dict[str, list[float]] = collections.defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpointer(folder, keep_last=KEPT, max_lost_steps=10 * args.steps) as checkpointer,
    ):
        loop.run(20)
        save(loop, checkpointer)  # compiles the fingerprints
        loop.run(20)
        for _ in tqdm(range(args.pairs), desc="pairs", dynamic_ncols=True):
            checkpointer.wait()
            plain = sum(loop.run(args.steps)[0])
            transfer = timed(lambda: jax.tree.map(copy_to_host, loop.state))
            fingerprints = timed(lambda: manifest.measure(loop.state))
            loop.run(1)  # its result is a state that is not on the host yet
            blocked = timed(lambda: save(loop, checkpointer))
            seconds, beside = loop.run(args.steps, checkpointer)
            slower = sum(seconds[:beside]) - beside * plain / args.steps
            cost = blocked + slower - transfer
            rows["ms per step without a save"].append(1e3 * plain / args.steps)
            rows["s for which a save blocks the loop"].append(blocked)
            rows["s of it, the fingerprints"].append(fingerprints)
            rows["steps beside the save"].append(beside)
            rows["s by which these are slower, in all"].append(slower)
            rows["s of the transfer alone"].append(transfer)
            rows[f"% of {args.steps:,} steps, all beyond the transfer"].append(100 * cost / plain)
            rows["% by which the block with the save is slower"].append(
                100 * ((blocked + sum(seconds)) / plain - 1)
            )
    leaves = jax.tree.leaves(loop.state)
    megabytes = sum(leaf.nbytes for leaf in leaves) / 1e6
    print(f"\n| {megabytes:,.0f} MB in {len(leaves)} arrays, {args.pairs} saves ", end="")
    print("| median | least | most |\n|---|---|---|---|")
    for name, values in rows.items():
        middle, least, most = statistics.median(values), min(values), max(values)
        print(f"| {name} | {middle:.3g} | {least:.3g} | {most:.3g} |")
    if args.measure_mb:
        print(f"\nchecksums alone: {corrupt_checkpoint.measure(args.measure_mb)}")


def save(loop: Loop, checkpointer: Checkpointer) -> None:
    """Checks the state and begins to save, as the training loop does."""
    if spoiled := manifest.not_finite(loop.state):
        raise RuntimeError(spoiled)
    position = {"next_index": loop.number}
    checkpointer.save(loop.number, loop.state, position, loop.record, {"factor": 1.0})


def copy_to_host(leaf: jax.Array) -> np.ndarray:
    """A copy of the array: on a CPU, the device's memory is the host's."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    found: np.ndarray = jax.device_get(leaf)
    return found if jax.default_backend() != "cpu" else found.copy()


def timed(do: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
