"""A long run with everything on: memory, open files and the time of a step must not grow.

    python -m benchmarks.endurance --steps=12000 --output=runs/endurance

A process of its own runs `repulsor_jax.main` on two virtual devices and trains a tiny model on the
digits, with the bank, checkpoints (the newest two are kept), grids, evaluations, guidance, metrics,
event files, the watchdog, a profile, and limits that refuse a step, which no step here exceeds.

Once a second, the process is observed from outside through Linux's /proc. Memory is its anonymous
pages (arrays, heap, stacks), without the libraries that it shares with other processes. A save or a
picture opens files and threads for a moment: the least value of a quarter counts.

Prints one table of the second and the last quarter of the run, draws `<output>/endurance.png`, and
ends with 1 if a quantity grew by more than its bound. The first quarter does not count: Python's
garbage collector frees the objects of compilation only some thousands of steps later.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from PIL import Image
from tqdm import tqdm

from repulsor_jax.files.pictures import Curve, save_curves
from repulsor_jax.runtime.metrics import JSONL_NAME, read_jsonl

EVERY = 100  # steps between checkpoints, grids and evaluations
_DEVICES = 2
_CONFIG = {
    "batch_size": 32,
    "model.hidden_size": 32,
    "model.depth": 2,
    "mesh.data": _DEVICES,
    "repulsor.bank_rows": 128,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep_last": 2,
    "divergence.policy": "skip",
    "divergence.max_loss": 100.0,
    "divergence.max_grad_norm": 1000.0,
    "log.every_steps": 20,
    "log.watchdog_minutes": 1.0,
    "log.profile_steps": (20, 24),
    "sampling.num_steps": 4,
    "sampling.cfg_scale": 1.5,
    "sampling.grid_every_steps": EVERY,
    "evaluation.every_steps": EVERY,
    "evaluation.training_samples": 200,
}
_GROWING = ("samples", "evaluations")  # folders that should grow


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A watched quantity.

    Attributes:
      name: with its unit.
      bound: by how much it may grow, from the second to the last quarter.
      relative: median against median, in parts of the first; else least against least.
    """

    name: str
    bound: float
    relative: bool = False


MEMORY = Quantity("memory, MB", 0.02, relative=True)
HANDLES = Quantity("open files", 0)
THREADS = Quantity("threads", 2)  # idle threads in the pools of JAX and tensorstore come and go
FILES = Quantity("files of the run", 8)  # the number of files in a checkpoint varies
STEP = Quantity("ms per step", 0.05, relative=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/endurance"))
    args = parser.parse_args()
    workdir = args.output / "run"
    if workdir.exists():
        sys.exit(f"error: {workdir} is there: remove it, or choose another --output")
    curves = watch(workdir, args.steps)
    picture = args.output / "endurance.png"
    save_curves(picture, {q.name: {"": curve} for q, curve in curves.items()}, "training step")
    Image.open(picture).quantize(16).save(picture, optimize=True)  # small enough for docs/
    good = report(curves)
    print(f"\nthe picture: {picture}")
    sys.exit(not good)


def watch(workdir: pathlib.Path, steps: int) -> dict[Quantity, Curve]:
    """Runs the training, and returns the observed steps and values of each quantity."""
    job = start(workdir, steps)
    samples = []
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        while job.poll() is None:
            bar.update(last_step(workdir) - bar.n)
            seen = look(job.pid, workdir)
            if seen and 0 < bar.n < steps:  # not while the run ends
                samples.append((bar.n, *seen))
            time.sleep(1.0)
    finish(job, workdir)
    if len(samples) < 8:
        sys.exit(f"error: --steps={steps} took {len(samples)} s, which is too short to see growth")
    at, *columns = zip(*samples, strict=True)
    found: dict[Quantity, Curve] = {
        quantity: (at, column)
        for quantity, column in zip((MEMORY, HANDLES, THREADS, FILES), columns, strict=True)
    }
    lines = [line for line in read_jsonl(workdir / JSONL_NAME) if "seconds_per_step" in line]
    milliseconds = [1e3 * line["seconds_per_step"] for line in lines]
    return found | {STEP: ([line["step"] for line in lines], milliseconds)}


def last_step(workdir: pathlib.Path) -> int:
    """The newest step in the metrics file; 0 before the first. Reads only its end."""
    path = workdir / JSONL_NAME
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        whole = file.read().split(b"\n")[:-1]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def finish(job: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Waits; ends the benchmark with the output of the training if it failed."""
    if job.wait():
        log = workdir.with_name("log")
        sys.exit(f"error: training failed, {log}:\n{log.read_text()[-4000:]}")


def start(workdir: pathlib.Path, steps: int) -> subprocess.Popen:
    """Starts the training; its output goes to `log` beside the folder."""
    command = [sys.executable, "-m", "repulsor_jax.main", "--config=configs/digits.py"]
    command += [f"--workdir={workdir}", f"--config.total_steps={steps}"]
    command += [f"--config.{key}={value}" for key, value in _CONFIG.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(_DEVICES)}
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with workdir.with_name("log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def look(pid: int, workdir: pathlib.Path) -> tuple[float, int, int, int] | None:
    """MB of memory of the process alone, open files, threads, files of the run.

    None where it has just ended.
    """
    process = pathlib.Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        kibibytes = int(status["RssAnon"].split()[0])
        handles = len(os.listdir(process / "fd"))
        threads = len(os.listdir(process / "task"))
    except (OSError, KeyError):
        return None
    files = 0
    for _, folders, names in os.walk(workdir):
        folders[:] = [name for name in folders if name not in _GROWING]
        files += len(names)
    return kibibytes * 1024 / 1e6, handles, threads, files


def report(curves: dict[Quantity, Curve]) -> bool:
    """Prints the table; returns whether nothing grew by more than its bound."""
    print("\n| | second quarter | last quarter | growth | at most | slope per 1,000 steps |")
    print("|---|---|---|---|---|---|")
    good = True
    for quantity, curve in curves.items():
        steps, values = map(np.asarray, curve)
        quarter = steps[-1] / 4
        at, values = steps[steps > quarter], values[steps > quarter]
        parts = values[at <= 2 * quarter], values[at > 3 * quarter]
        first, last = (float(np.median(x) if quantity.relative else np.min(x)) for x in parts)
        growth = last / first - 1 if quantity.relative else last - first
        good &= growth <= quantity.bound
        form = "{:+.1%}" if quantity.relative else "{:+g}"
        print(
            f"| {quantity.name} | {first:.4g} | {last:.4g} | {form.format(growth)} "
            f"| {form.format(quantity.bound)} | {1e3 * np.polyfit(at, values, 1)[0]:+.3g} |"
        )
    return good


if __name__ == "__main__":
    main()
