"""Digits at equal steps: no regulariser, Dispersive Loss, Repulsor at several lambda, some seeds.

    python -m benchmarks.digits --seeds=3 --steps=2000 --workers=2

Trains each setting through the program itself and prints, for every setting, the Fréchet distance
to the held-out digits in pixel space along training: mean and standard deviation over seeds. Every
run keeps its folder under --workdir; runs that are there already are not run again.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import statistics
import subprocess
import sys

from tqdm import tqdm

from repulsor_jax.runtime.metrics import JSONL_NAME, read_jsonl

SETTINGS = [
    ("none", 0.0),
    ("dispersive", 0.1),
    ("dispersive", 0.5),
    ("repulsor", 0.05),
    ("repulsor", 0.1),
    ("repulsor", 0.5),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/digits_sweep"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--platform", default="cpu", help="cpu, cuda or tpu")
    args = parser.parse_args()

    jobs = [(name, weight, seed) for seed in range(args.seeds) for name, weight in SETTINGS]
    _program(args, "encode", args.workdir / "data", None)
    cores: queue.Queue[int | None] = queue.Queue()
    for worker in range(args.workers):
        cores.put(worker if args.workers > 1 else None)

    def run(job: tuple[str, float, int]) -> dict[int, float]:
        core = cores.get()
        try:
            return train(args, *job, core)
        finally:
            cores.put(core)

    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        results = list(tqdm(pool.map(run, jobs), total=len(jobs), unit="run"))
    print_table(dict(zip(jobs, results, strict=True)), args.seeds)


def train(
    args: argparse.Namespace, name: str, weight: float, seed: int, core: int | None
) -> dict[int, float]:
    """Trains one setting, unless its folder is complete; returns step -> distance."""
    workdir = args.workdir / f"{name}_{weight}_{seed}"
    distances = read_distances(workdir)
    if args.steps not in distances:
        overrides = {
            "seed": seed,
            "total_steps": args.steps,
            "terms": name,
            **({f"{name}.weight": weight} if name != "none" else {}),
            "data.dir": args.workdir / "data",
            "evaluation.every_steps": args.every,
            "sampling.grid_every_steps": args.steps,
            "checkpoint.every_steps": args.steps,
        }
        _program(args, "train", workdir, core, **overrides)
        distances = read_distances(workdir)
    return distances


def read_distances(workdir: pathlib.Path) -> dict[int, float]:
    return {
        int(line["step"]): value
        for line in read_jsonl(workdir / JSONL_NAME)
        for name, value in line.items()
        if name.startswith("frechet_pixels_")
    }


def print_table(results: dict[tuple[str, float, int], dict[int, float]], seeds: int) -> None:
    steps = sorted(next(iter(results.values())))
    print(f"Fréchet distance to held-out digits, pixels in [-1, 1], mean ± std of {seeds} seeds\n")
    print("| regulariser | lambda | " + " | ".join(f"{step:,} steps" for step in steps) + " |")
    print("|---|---|" + "---|" * len(steps))
    for name, weight in SETTINGS:
        cells = []
        for step in steps:
            values = [results[name, weight, seed][step] for seed in range(seeds)]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        print(f"| {name} | {weight:g} | " + " | ".join(cells) + " |")


def _program(
    args: argparse.Namespace,
    mode: str,
    workdir: pathlib.Path,
    core: int | None,
    **overrides: object,
) -> None:
    if mode == "encode":
        overrides = {"data.dir": workdir}
    command = [
        sys.executable,
        "-m",
        "repulsor_jax.main",
        "--config=configs/digits.py",
        f"--mode={mode}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]
    pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / f"{mode}.log").open("w") as log:
        subprocess.run(
            command,
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=pin,
            env=os.environ | {"JAX_PLATFORMS": args.platform},
        )


if __name__ == "__main__":
    main()
