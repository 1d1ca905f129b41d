"""The fault drill: training is killed at random moments, and may lose only time.

    python -m benchmarks.drill                      # what `make drill` runs: most of an hour
    python -m benchmarks.drill --sigkills=4 --sigterms=2 --seed=1

A tiny model on the digits, with the data set written, a checkpoint every few steps and evaluations
on the way. One undisturbed run is the reference. Then runs are started and hit, again and again:
told to stop (SIGTERM) or killed (SIGKILL). One time in three, the moment is uniform over the time
of an undisturbed run; otherwise it is up to a second after the run begins to write the data set,
to train, to save or to evaluate. A complete run is removed, and another begins. With two processes,
one is hit; if it was killed, the other is ended up to five seconds later, as a launcher does.

Every logged loss must equal the reference's to the bit. A run must go on from the newest checkpoint
that was complete when it was hit, or from a newer one. It may lose the steps between two
checkpoints, and the steps that it took while the last checkpoint was being written. A process that
is told to stop in training must save and end with 75.

Prints one table; the exit code is 1 if one of these does not hold, or if a run cannot be restarted.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
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

from repulsor_jax.runtime.metrics import JSONL_NAME, read_jsonl
from repulsor_jax.runtime.preemption import EXIT_CODE

EVERY, LOOK_EVERY = 10, 40  # steps between checkpoints, and between evaluations
MOMENTS = ("starting", "data set", "steps", "save", "evaluation", "after the end")
_NAMES = ("loss", "flow_loss", "repulsor_loss", "grad_norm")
_CONFIG = {
    "batch_size": 32,
    "model.hidden_size": 32,
    "model.depth": 2,
    "repulsor.bank_rows": 128,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep_last": 2,
    "log.every_steps": 1,
    "evaluation.every_steps": LOOK_EVERY,
    "evaluation.training_samples": 200,
    "sampling.grid_every_steps": LOOK_EVERY,
    "sampling.num_steps": 4,
}
_GRACE_SECONDS = 120  # until processes that were told to stop are killed
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sigkills", type=int, default=100, help="half of them with two processes")
    parser.add_argument("--sigterms", type=int, default=30, help="likewise")
    parser.add_argument("--steps", type=int, default=200, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--jobs", type=int, default=1, help="of the table's rows, beside each other"
    )
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            root = pathlib.Path(folder) / str(processes)
            reference, seconds = undisturbed(root, processes, args.steps)
            for fault, count in (("SIGKILL", args.sigkills), ("SIGTERM", args.sigterms)):
                hits = count // 2 if processes == 2 else count - count // 2
                draw = random.Random(f"{args.seed} {processes} {fault}")
                rows.append(Row(root, processes, fault, hits, args.steps, reference, seconds, draw))
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(Row.drill, rows))
    print("\n| processes | fault | tried | survived | moments | lost at most | numbers equal |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(row.line())
    problems = [problem for row in rows for problem in row.problems]
    for problem in problems:
        print(f"error: {problem}")
    sys.exit(bool(problems))


@dataclasses.dataclass
class Row:
    """The hits of one fault on runs of one number of processes, and their outcomes."""

    root: pathlib.Path
    processes: int
    fault: str
    hits: int
    steps: int
    reference: dict[int, dict]
    seconds: float  # of an undisturbed run
    draw: random.Random
    tried: int = 0
    survived: int = 0
    lost: int = 0
    compared: int = 0
    moments: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    problems: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = f"{self.fault}, {self.processes} processes"
        self.workdir = self.root / self.fault / "run"
        self.log = self.root / self.fault / "log"

    def line(self) -> str:
        """A row of the table."""
        moments = ", ".join(f"{name} {n}" for name, n in self.moments.items() if n)
        equal = "no" if any("differ" in problem for problem in self.problems) else "yes"
        return (
            f"| {self.processes} | {self.fault} | {self.tried} | {self.survived} | {moments} "
            f"| {self.lost} steps | {equal}: {self.compared:,} |"
        )

    def drill(self) -> None:
        """Hits runs until there are enough hits, and lets the last run complete."""
        unproven = 0  # hits since the last start that made progress
        logged, newest, saving = 0, 0, False  # at the last hit
        with tqdm(total=self.hits, desc=self.name, dynamic_ncols=True) as bar:
            while True:
                run = Run(self.root, self.workdir, self.log, self.processes, self.steps)
                moment = self.strike(run) if self.tried < self.hits else ""
                codes = run.finish(_GRACE_SECONDS if moment else 20 * self.seconds, self.draw)
                now = losses(self.workdir)
                begun = run.begun()
                if begun is not None:
                    self.compared += sum(step > begun for step in now)  # steps of this start
                different = [step for step in now if now[step] != self.reference[step]]
                if different:
                    self.note(f"steps {different} differ from the undisturbed run")
                if unproven and begun is not None:
                    self.survived += unproven
                    self.lost = max(self.lost, logged - begun)
                    if begun < newest:
                        self.note(f"step {newest} was saved, but the run went on from {begun}")
                    if logged - begun > (2 * EVERY if saving else EVERY):
                        self.note(f"{logged - begun} steps lost")
                    unproven = 0
                if moment:
                    self.tried += 1
                    self.moments["after the end" if len(now) == self.steps else moment] += 1
                    bar.update(1)
                    unproven += 1
                    logged, newest = max(now, default=0), run.newest_when_hit
                    saving = run.saving_when_hit or run.is_saving()
                    if self.fault == "SIGTERM" and not self.ended_well(run, codes, begun, len(now)):
                        self.note(f"exit codes {codes} of SIGTERM in {moment!r}", run)
                elif any(codes):
                    self.note(f"a run failed by itself with {codes}", run)
                    return
                else:
                    if set(now) != set(self.reference):
                        self.note(f"steps {sorted(set(self.reference) - set(now))} are not logged")
                    shutil.rmtree(self.workdir)
                    logged, newest, saving = 0, 0, False
                    if self.tried == self.hits:
                        return

    def strike(self, run: "Run") -> str:
        """Waits, and signals one process; returns the moment, "" if the run ended first."""
        done = max(losses(self.workdir), default=0)
        if not (self.workdir / "data" / "train").exists():
            aim = self.draw.choice(["data set", ""])
        else:
            aim = self.draw.choice(["steps", "save", "evaluation", "evaluation", "", ""])
            aim = "" if aim == "evaluation" and done >= self.steps - LOOK_EVERY else aim
        deadline = time.time() + (10 * self.seconds if aim else self.draw.uniform(0, self.seconds))
        while run.lives() and time.time() < deadline:
            time.sleep(0.02)
            if aim and run.moment() == aim:
                deadline, aim = time.time() + self.draw.uniform(0, 1), ""
        moment = run.moment()
        run.saving_when_hit, run.newest_when_hit = run.is_saving(), run.newest()
        victim = self.draw.choice(run.jobs)
        if victim.poll() is not None:
            return ""
        victim.send_signal(signal.Signals[self.fault])
        return moment

    def ended_well(self, run: "Run", codes: list[int], begun: int | None, logged: int) -> bool:
        """Whether these exit codes are those of a run that was told to stop."""
        if logged == self.steps and run.newest() == self.steps:
            return set(codes) <= {0, EXIT_CODE, -signal.SIGTERM}
        if begun is None and -signal.SIGTERM in codes:  # there was nothing to save yet
            return True
        return set(codes) == {EXIT_CODE}

    def note(self, problem: str, run: "Run | None" = None) -> None:
        """Notes a problem, and prints it with the end of the run's log."""
        self.problems.append(f"{self.name}: {problem}")
        tail = f"\n{self.log.read_text()[-3000:]}" if run else ""
        tqdm.write(f"error: {self.problems[-1]}{tail}")


class Run:
    """The processes of a run, from their start."""

    def __init__(
        self,
        root: pathlib.Path,
        workdir: pathlib.Path,
        log: pathlib.Path,
        processes: int,
        steps: int,
    ) -> None:
        """Starts the processes; their output goes to `log`."""
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
        self.workdir, self.log = workdir, log
        self.saving_when_hit, self.newest_when_hit = False, 0
        self.started = time.time()
        self.jobs = []
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            for rank in range(processes):
                own = [f"--process_id={rank}"] if processes > 1 else []
                self.jobs.append(
                    subprocess.Popen(
                        [*command, *own], env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def lives(self) -> bool:
        """Whether all processes run."""
        return all(job.poll() is None for job in self.jobs)

    def finish(self, seconds: float, draw: random.Random) -> list[int]:
        """Waits at most `seconds`. After a kill it ends the other processes, as a launcher does."""
        deadline, lone = time.time() + seconds, False
        while any(job.poll() is None for job in self.jobs):
            if not lone and any(job.poll() in _KILLED for job in self.jobs):
                lone, deadline = True, time.time() + draw.uniform(0, 5)
            if time.time() > deadline:
                for job in self.jobs:
                    with contextlib.suppress(ProcessLookupError):
                        job.kill()
            time.sleep(0.05)
        return [job.wait() for job in self.jobs]

    def begun(self) -> int | None:
        """The step that the run goes on from, by its log; None if it ended before."""
        for line in self.log.read_text().splitlines():
            if line.startswith("step ") and " of " in line and ", in " in line:
                return int(line.split()[1])
        return None

    def moment(self) -> str:
        """The phase of the run, by its files."""
        if self._writes("evaluations/.step_*.incomplete"):
            return "evaluation"
        if self.is_saving():
            return "save"
        if self._writes("data/.*.incomplete"):
            return "data set"
        return "starting" if self.begun() is None else "steps"

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or was being written when the run ended."""
        return self._writes("checkpoints/*.orbax-checkpoint-tmp*")

    def newest(self) -> int:
        """The newest checkpoint; 0 before the first."""
        names = (path.name for path in (self.workdir / "checkpoints").glob("*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _writes(self, pattern: str) -> bool:
        for path in self.workdir.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= self.started:  # not left by an earlier start
                    return True
        return False


def undisturbed(root: pathlib.Path, processes: int, steps: int) -> tuple[dict[int, dict], float]:
    """Runs twice, the second time with all programs compiled; losses by step, and seconds."""
    for attempt in range(2):
        started = time.perf_counter()
        workdir = root / f"reference_{attempt}"
        run = Run(root, workdir, root / "log", processes, steps)
        if any(job.wait() for job in run.jobs):
            sys.exit(f"error: the undisturbed run failed:\n{run.log.read_text()[-4000:]}")
    return losses(workdir), time.perf_counter() - started


def losses(workdir: pathlib.Path) -> dict[int, dict]:
    """The logged losses by step."""
    return {
        int(line["step"]): {name: line[name] for name in _NAMES}
        for line in read_jsonl(workdir / JSONL_NAME)
        if "loss" in line
    }


if __name__ == "__main__":
    main()
