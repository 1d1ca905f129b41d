"""The fault drill: training is killed at random moments, and must lose nothing but time.

    python -m benchmarks.drill                      # what `make drill` runs: most of an hour
    python -m benchmarks.drill --sigkills=4 --sigterms=2 --seed=1

A tiny model on the digits, with the data set written, a checkpoint every few steps and evaluations
on the way. One undisturbed run is the reference. Then runs are started again and again and told to
stop (SIGTERM) or killed (SIGKILL) at moments uniform over the time of an undisturbed run, so that
they meet imports, encoding, compiling, steps, saves and evaluations. A run that completes is
removed, and another begun. With two processes one of them is hit, while the other lives.

Every loss that a run has logged must equal the reference's to the bit, whatever happened before.
Prints one table; the exit code is 1 if a number differs, more steps are lost than lie between two
checkpoints, or something is left that a restart cannot get past.
"""

import argparse
import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

from repulsor_jax.metrics import JSONL_NAME, read_jsonl
from repulsor_jax.preemption import EXIT_CODE

EVERY = 10  # steps between checkpoints
_NAMES = ("loss", "flow_loss", "regularizer_loss", "grad_norm")
_CONFIG = {
    "batch_size": 32,
    "model.hidden_size": 32,
    "model.depth": 2,
    "regularizer.bank_rows": 128,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep_last": 2,
    "log.every_steps": 1,
    "evaluation.every_steps": 40,
    "evaluation.training_samples": 200,
    "sampling.grid_every_steps": 40,
    "sampling.num_steps": 4,
}
_GRACE_SECONDS = 60  # for the processes that were not hit to notice


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sigkills", type=int, default=100, help="half of them with two processes")
    parser.add_argument("--sigterms", type=int, default=30, help="likewise")
    parser.add_argument("--steps", type=int, default=200, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    rows, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for processes in (1, 2):
            reference, seconds = undisturbed(root, processes, args.steps)
            for number, count in (("SIGKILL", args.sigkills), ("SIGTERM", args.sigterms)):
                hits = count // 2 if processes == 2 else count - count // 2
                found = drill(root, processes, args.steps, number, hits, reference, seconds, draw)
                rows.append((processes, number, found))
                good &= not found["different"] and found["lost"] <= EVERY
                good &= found["survived"] == found["tried"] == hits
    print(
        "\n| processes | fault | tried | survived | moments | steps lost at most | numbers equal |"
    )
    print("|---|---|---|---|---|---|---|")
    for processes, number, found in rows:
        moments = ", ".join(f"{name} {n}" for name, n in found["moments"].items() if n)
        equal = "yes" if not found["different"] else f"{found['different']} differ"
        print(
            f"| {processes} | {number} | {found['tried']} | {found['survived']} | {moments} "
            f"| {found['lost']} | {equal} of {found['compared']:,} |"
        )
    sys.exit(not good)


def undisturbed(root: pathlib.Path, processes: int, steps: int) -> tuple[dict[int, dict], float]:
    """Runs twice, the second time with everything compiled; losses by step, and its seconds."""
    for attempt in range(2):
        started = time.perf_counter()
        workdir = root / f"reference_{processes}_{attempt}"
        codes = [job.wait() for job in start(root, workdir, processes, steps)]
        if any(codes):
            sys.exit(f"error: the undisturbed run failed:\n{(root / 'log').read_text()[-4000:]}")
    return losses(workdir), time.perf_counter() - started


def drill(
    root: pathlib.Path,
    processes: int,
    steps: int,
    number: str,
    hits: int,
    reference: dict[int, dict],
    seconds: float,
    draw: random.Random,
) -> dict:
    """Hits runs until it has done so `hits` times, and compares all that they log."""
    workdir = root / "victim"
    found: dict = {"tried": 0, "survived": 0, "lost": 0, "different": 0, "compared": 0}
    found["moments"] = dict.fromkeys(("before training", "in training", "after the end"), 0)
    bar = tqdm(total=hits, desc=f"{number}, {processes} processes", dynamic_ncols=True)
    shutil.rmtree(workdir, ignore_errors=True)
    open_hits, logged_before = 0, 0  # hits that no later start has got past yet
    while True:
        jobs = start(root, workdir, processes, steps)
        deadline = time.perf_counter() + draw.uniform(0, seconds)
        victim = draw.choice(jobs)
        while time.perf_counter() < deadline and all(job.poll() is None for job in jobs):
            time.sleep(0.02)
        struck = found["tried"] < hits and victim.poll() is None
        if struck:
            victim.send_signal(signal.Signals[number])
            found["tried"] += 1
            bar.update(1)
        codes = finish(jobs, struck)
        now = losses(workdir)
        found["compared"] += len(now)
        found["different"] += sum(reference[step] != values for step, values in now.items())
        resumed = resumed_from(root)
        if open_hits and resumed is not None:
            found["survived"] += open_hits
            found["lost"] = max(found["lost"], logged_before - resumed)
            open_hits = 0
        logged_before = max(now, default=0)
        if struck:
            open_hits += 1
            moment = "in training" if now else "before training"
            found["moments"]["after the end" if len(now) == steps else moment] += 1
            if number == "SIGTERM" and processes == 1 and codes[0] not in (EXIT_CODE, 0, -15):
                tqdm.write(f"warning: exit code {codes[0]} after SIGTERM")
        elif all(code == 0 for code in codes):
            if set(now) != set(reference):
                found["different"] += len(set(reference) - set(now))
            shutil.rmtree(workdir)
            logged_before = 0
            if found["tried"] == hits:
                bar.close()
                return found
        else:
            tqdm.write(f"error: a run failed by itself:\n{(root / 'log').read_text()[-3000:]}")
            found["different"] += 1
            bar.close()
            return found


def finish(jobs: list[subprocess.Popen], struck: bool) -> list[int]:
    """Waits for all; where one was hit, as a launcher does, the others get their time to notice."""
    deadline = time.perf_counter() + _GRACE_SECONDS
    while struck and any(job.poll() is None for job in jobs):
        if time.perf_counter() > deadline or any(job.poll() in (-9, 137) for job in jobs):
            # A launcher that sees one task killed kills the job.
            for job in jobs:
                with contextlib.suppress(ProcessLookupError):
                    job.kill()
            break
        time.sleep(0.05)
    return [job.wait() for job in jobs]


def losses(workdir: pathlib.Path) -> dict[int, dict]:
    """What was logged of every step."""
    return {
        int(line["step"]): {name: line[name] for name in _NAMES}
        for line in read_jsonl(workdir / JSONL_NAME)
        if "loss" in line
    }


def resumed_from(root: pathlib.Path) -> int | None:
    """The step that the last start said it goes on from; None where it did not get so far."""
    for line in (root / "log").read_text().splitlines():
        if line.startswith("step ") and " of " in line and ", in " in line:
            return int(line.split()[1])
    return None


def start(
    root: pathlib.Path, workdir: pathlib.Path, processes: int, steps: int
) -> list[subprocess.Popen]:
    """Starts the processes of a run; what they say goes to `<root>/log`."""
    command = [sys.executable, "-m", "repulsor_jax.main", "--config=configs/digits.py"]
    command += [f"--workdir={workdir}", f"--compilation_cache_dir={root / 'cache'}"]
    command += [f"--config.total_steps={steps}"]
    command += [f"--config.{key}={value}" for key, value in _CONFIG.items()]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command += [f"--coordinator_address={address}", f"--num_processes={processes}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // processes),
    }
    log = (root / "log").open("w")
    jobs = []
    for rank in range(processes):
        own = [f"--process_id={rank}"] if processes > 1 else []
        jobs.append(
            subprocess.Popen(
                [*command, *own], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        )
    log.close()
    return jobs


if __name__ == "__main__":
    main()
