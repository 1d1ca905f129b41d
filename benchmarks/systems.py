"""Neighbouring systems on the digits, by seed, through the program.

    python -m benchmarks.systems digits --seeds=3
    python -m benchmarks.systems inpaint --seeds=3

trains each arm on every seed, evaluates its last checkpoint, and prints the Fréchet distance of its
samples (pixels): mean and standard deviation over the seeds, and the ratio to the first arm, seed
by seed, with a 95 % interval; and the time of a step. Everything lies under --workdir; a run that
is there is not trained or evaluated again.

- `digits`: 2,000 samples by class, of the plain trainer, a learned source, blockwise networks, SRA,
  and SRA with dual times and attention separation.
- `inpaint`: composites of held-out digits, each of the 497 with four holes, filled by a network
  that is shown the hole, or by a plain one into whose steps the known pixels are put.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.evidence.statistics import paired_ratio

_QUIET = ("sampling.grid_every_steps", "evaluation.every_steps", "log.diagnostics_every_steps")

# Table -> arm -> flags of the program.
ARMS: dict[str, dict[str, list[str]]] = {
    "digits": {
        "plain": ["--config=digits:none"],
        "class source": ["--config=learned_source:digits"],
        "class source, no alignment": [
            "--config=learned_source:digits",
            "--config.source.alignment_weight=0",
        ],
        "blockwise": ["--config=blockwise:digits,none", "--config.optimizer.ema_decay=0.99"],
        "blockwise, semantic_teacher": [
            "--config=blockwise:digits",
            "--config.optimizer.ema_decay=0.99",
        ],
        "sra": ["--config=digits:sra"],
        "dual times": ["--config=digits:dual_times"],
    },
    "inpaint": {
        "channels": ["--config=inpaint"],
        "replace": [
            "--config=digits:none",
            "--config.conditioning.filling=replace",
            "--config.evaluation.num_samples=1988",
        ],
    },
}


class Result(NamedTuple):
    """What a run says of itself."""

    distance: float  # Fréchet, of its samples
    milliseconds: float  # of a step, a low percentile: other programs can only slow it down


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=ARMS)
    parser.add_argument("--arms", default="", help="names separated by ';'; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--samples", type=int, default=0, help="0: those of the configuration")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/systems"))
    parser.add_argument("--platform", default="cpu", choices=["cpu", "cuda", "tpu"])
    args = parser.parse_args(argv)
    arms = args.arms.split(";") if args.arms else list(ARMS[args.table])
    if unknown := {*arms} - ARMS[args.table].keys():
        parser.error(f"--arms: found {', '.join(unknown)}, expected {'; '.join(ARMS[args.table])}")
    found: dict[str, list[Result]] = {arm: [] for arm in arms}
    for seed in range(args.seeds):  # the arms in turn, so that a busy machine is busy for all
        for arm in found:
            found[arm].append(run(args, arm, seed))
            print(f"{args.table} {arm}, seed {seed}: {found[arm][-1]}", flush=True)
    print(f"\n{args.table}, {args.steps:,} steps, {args.seeds} seeds\n")
    print(f"| arm | Fréchet distance, mean | spread | of {arms[0]} | ms a step |")
    print("|---|---|---|---|---|")
    by_seed = {arm: dict(enumerate(r.distance for r in results)) for arm, results in found.items()}
    for arm, distances in by_seed.items():
        values = list(distances.values())
        spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
        ratio, low, high, _ = paired_ratio(distances, by_seed[arms[0]])
        interval = f"{ratio:.2f} [{low:.2f}, {high:.2f}]" if arm != arms[0] else ""
        step = min(result.milliseconds for result in found[arm])
        print(f"| {arm} | {statistics.mean(values):.3f} | {spread} | {interval} | {step:.1f} |")


def run(args: argparse.Namespace, arm: str, seed: int) -> Result:
    """Trains and evaluates one arm on one seed, or reads what is there."""
    root = args.workdir.absolute()
    folder = re.sub(r"\W+", "_", arm) + f"_{args.steps}"
    folder += f"_{args.samples}_samples" if args.samples else ""
    workdir = root / args.table / folder / f"seed_{seed}"
    flags = [
        *ARMS[args.table][arm],
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.total_steps={args.steps}",
        *([f"--config.evaluation.num_samples={args.samples}"] if args.samples else []),
    ]
    program = [sys.executable, "-m", "repulsor_jax.main", *flags]
    environment = os.environ | {"JAX_PLATFORMS": args.platform}
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log:
        for options in ([f"--config.{key}=0" for key in _QUIET], ["--mode=evaluate"]):
            done = subprocess.run([*program, *options], env=environment, stdout=log, stderr=log)
            if done.returncode:
                sys.exit(f"{arm}, seed {seed}: failed, see {workdir / 'log.txt'}")
    written = max((workdir / "evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime)
    distance = json.loads(written.read_text())["metrics"]["frechet_pixels"]
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    seconds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    return Result(distance, 1e3 * float(np.quantile(seconds, 0.1)))


if __name__ == "__main__":
    main()
