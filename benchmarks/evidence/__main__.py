"""Does it help, how much, and is it the bank? Settings x seeds through the program, measured.

    python -m benchmarks.evidence --bench=cifar16 --source=cifar10.tar.xz --arms=plain,control \\
        --rates=1.5e-3,3e-3,6e-3 --seeds=3 --workers=2

1. Pictures are read once; two small classifiers are trained on them.
2. Each arm is trained at each learning rate, on a seed that counts for nothing else, and keeps the
   rate with the smallest held-out flow loss. With a single rate there is no search.
3. Each arm is trained on every seed, which fixes parameters, order of the data, noise and times:
   the runs of a seed are a pair.
4. Every checkpoint is measured; the tables are printed, and drawn.

Arms are those of configs/evidence.py, with other values where an arm says so:
`positives_1024+repulsor.temperature=0.2`; a larger model is compared with one of its own size by
`--baseline=plain+model.hidden_size=128`. What is there already is not done again: a command that
was stopped, or is given more arms, seeds or steps, goes on; but where a weight or a rate falls over
the run, another number of steps is another run: it needs another --workdir. One run takes one core,
or --platform=cuda with --workers=1 the GPU. The table of equal seconds needs times of one machine
that does nothing else: --time_steps=1000. docs/evidence.md has results.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from tqdm import tqdm

from benchmarks.evidence import ledger, report
from benchmarks.evidence.report import SEARCH_SEED, run_folder
from configs import evidence as configs
from repulsor_jax import config as config_lib
from repulsor_jax.files import atomic

if TYPE_CHECKING:
    from benchmarks.evidence.measure import Yardstick


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a bench is made of, beside its configuration in configs/evidence.py."""

    size: int  # side of the pictures
    count: int  # training pictures that the runs see, the first
    labelled: bool
    classifier_steps: int
    flips: bool  # for the classifiers


BENCHES = {
    "cifar16": Bench(16, 5_000, False, 2_600, True),
    "cifar16_labels": Bench(16, 50_000, True, 2_600, True),
    "digits": Bench(8, 1_300, False, 600, False),
    "cifar32": Bench(32, 50_000, False, 8_000, True),
}


class Job(NamedTuple):
    """One run."""

    arm: str
    rate: float
    seed: int
    steps: int


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--bench", choices=BENCHES, default="cifar16")
    parser.add_argument("--source", default="", help='archive, folder, "tfds:cifar10" or "digits"')
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/evidence"))
    parser.add_argument("--arms", type=_arms, default=tuple(configs.ARMS), help="or all")
    parser.add_argument("--baseline", default="plain", help="the arm that others are compared with")
    parser.add_argument("--rates", type=_rates, default=(1.5e-3, 3e-3, 6e-3), help="to search")
    parser.add_argument(
        "--stretches",
        type=_rates,
        default=(1.05, 1.1, 1.15, 1.2),
        help="velocity scales to sample at",
    )
    parser.add_argument("--seeds", type=int, default=5, help="0 searches alone")
    parser.add_argument("--first_seed", type=int, default=0, help="another to look around")
    parser.add_argument("--steps", type=int, default=0, help="0: those of the configuration")
    parser.add_argument("--search_steps", type=int, default=0, help="0: half of the steps")
    parser.add_argument("--every", type=int, default=0, help="steps between checkpoints")
    parser.add_argument("--samples", type=int, default=1_000, help="drawn for each distance")
    parser.add_argument("--classifier_steps", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--platform", default="cpu", help="cpu, cuda or tpu")
    parser.add_argument(
        "--ledger",
        type=pathlib.Path,
        help="file of numbers: runs in it count as done, and those measured here are added",
    )
    parser.add_argument(
        "--time_steps",
        type=int,
        default=0,
        help="then time so many steps of each arm, one arm at a time, for equal seconds",
    )
    parser.add_argument("--report", action="store_true", help="print what is there, and stop")
    args = parser.parse_args(argv)
    args.arms = tuple(dict.fromkeys((args.baseline, *args.arms)))
    try:
        parsed = [config_lib.parse(configs.get_config(f"{args.bench},{a}")) for a in args.arms]
    except ValueError as error:
        parser.error(f"--arms: {error}")
    config = parsed[0]
    for arm, other in zip(args.arms, parsed, strict=True):
        if "/" in arm or _set_by_bench(other) != _set_by_bench(config):
            parser.error(
                f"--arms: {arm}: seed, steps, batch, rate, prediction, data and checkpoints are "
                "set by the bench, and no value has a slash"
            )
    args.steps = args.steps or config.total_steps
    args.search_steps = args.search_steps or args.steps // 2
    args.batch_size = config.batch_size
    args.every = args.every or min(config.checkpoint.every_steps, args.steps)
    args.source = args.source or ("digits" if args.bench == "digits" else "tfds:cifar10")
    args.root = (args.workdir / args.bench).absolute()
    args.seeds = range(args.first_seed, args.first_seed + args.seeds)
    if SEARCH_SEED in args.seeds:
        parser.error(f"--first_seed, --seeds: {SEARCH_SEED} is the seed of the search")
    return args


def _arms(text: str) -> tuple[str, ...]:
    return tuple(configs.ARMS) if text == "all" else tuple(text.split(","))


def _set_by_bench(c: config_lib.Config) -> tuple[Any, ...]:
    """What no arm may set: flags of the bench set it, or it measures all arms by it."""
    rate, prediction = c.optimizer.learning_rate, c.flow.prediction
    return c.seed, c.total_steps, c.batch_size, rate, prediction, c.data, c.checkpoint


def _rates(text: str) -> tuple[float, ...]:
    return tuple(sorted(map(float, text.split(","))))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not args.report:
        # SIGTERM is taken as Ctrl-C is: the runs are told to stop, and save.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.environ["JAX_PLATFORMS"] = args.platform  # of the runs
        jax.config.update("jax_platforms", args.platform)  # and of this process
        jax.config.update("jax_compilation_cache_dir", str(args.root / "cache"))
        yardstick = prepare(args)
        _read_ledger(args)
        search = [Job(a, r, SEARCH_SEED, args.search_steps) for a in args.arms for r in args.rates]
        if len(args.rates) > 1:
            train_all(args, search)
            measure(args, search, yardstick)
        rates = report.best_rates(args.root, args.arms, args.rates)
        jobs = [Job(a, rates[a], s, args.steps) for s in args.seeds for a in args.arms]
        train_all(args, jobs)
        measure(args, jobs, yardstick)
        if args.time_steps:
            time_arms(args)
        _write_ledger(args)
    else:
        _read_ledger(args)
    print(report.write(args))


def _read_ledger(args: argparse.Namespace) -> None:
    if args.ledger and args.ledger.is_file():
        try:
            ledger.unpack(args.ledger, args.root)
        except ValueError as error:
            sys.exit(f"error: {error}")


def _write_ledger(args: argparse.Namespace) -> None:
    if args.ledger:
        ledger.pack(args.root, args.ledger)


def prepare(args: argparse.Namespace) -> "Yardstick":
    """Pictures, classifiers and the data set that the runs read; returns what measures them."""
    from benchmarks.evidence import classifier, pictures
    from benchmarks.evidence.measure import Yardstick

    bench, root = BENCHES[args.bench], args.root
    try:
        found = pictures.load_pictures(root / "pictures.npz", args.source, bench.size)
    except (ValueError, OSError) as error:
        sys.exit(f"error: --source={args.source}: {error}")
    steps = args.classifier_steps or bench.classifier_steps
    loaded = {}
    for name, seed, part in (("metric", 0, 1.0), ("control", 1, 0.5)):
        path = root / f"classifier_{name}.npz"
        classifier.train_classifier(
            path, found, seed=seed, steps=round(steps * part), flips=bench.flips
        )
        loaded[name] = classifier.load_classifier(path)
        accuracy = loaded[name].accuracy
        print(f"classifier {name}: accuracy {accuracy:.3f} on held-out pictures", flush=True)
    if not (root / "data" / "train" / "dataset.json").is_file():
        pictures.write_latents(root / "latents", found, bench.count, bench.labelled)
        arguments = ["--mode=encode", f"--config.data.source_path={root / 'latents'}"]
        _program(args, "repulsor_jax.main", "plain", root, arguments, [])
    yardstick = Yardstick(found, bench.count, loaded["metric"], args.samples)
    about = yardstick.floor() | {"accuracy": loaded["metric"].accuracy, "samples": args.samples}
    atomic.write_text(root / "floor.json", json.dumps(about) + "\n")
    return yardstick


def train_all(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Trains what is not trained yet, several at a time, each on a core of its own."""
    jobs = [
        job
        for job in jobs
        if not _is_measured(args, job) and steps_done(_folder(args, job)) < job.steps
    ]
    cores: queue.Queue[int | None] = queue.Queue()
    allowed = sorted(os.sched_getaffinity(0))
    for worker in range(args.workers):
        cores.put(allowed[worker % len(allowed)] if args.platform == "cpu" else None)
    running: list[subprocess.Popen] = []
    started, done = time.monotonic(), 0

    def run(job: Job) -> None:
        nonlocal done
        core = cores.get()
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread, from which the run inherits it
        try:
            train(args, job, running)
        finally:
            cores.put(core)
        done += 1
        spent = time.monotonic() - started
        left = spent / done * (len(jobs) - done)
        print(
            f"{done}/{len(jobs)} runs, {spent / 60:.0f} min, {left / 60:.0f} min left: {job.arm} "
            f"at {job.rate:g}, seed {job.seed}",
            flush=True,
        )

    with ThreadPoolExecutor(args.workers) as pool:
        try:
            list(pool.map(run, jobs))
        except BaseException:
            for process in running:
                process.terminate()  # a run that is told to stop saves first
            pool.shutdown(cancel_futures=True)
            raise


def time_arms(args: argparse.Namespace) -> None:
    """Trains each arm for some steps and keeps the times: of one machine, which does nothing else.

    The times of runs are of the machines and of the load that they happened to have.
    """
    if args.platform == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    path = args.root / report.SECONDS_NAME
    known = json.loads(path.read_text()) if path.is_file() else {}
    for arm in tqdm(args.arms, desc="time", unit="arm"):
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder)
            train(args, Job(arm, args.rates[0], 0, args.time_steps), [], workdir)
            known[arm] = report.read_run(workdir).seconds_per_step
        atomic.write_text(path, json.dumps(known) + "\n")


def train(
    args: argparse.Namespace,
    job: Job,
    running: list[subprocess.Popen],
    workdir: pathlib.Path | None = None,
) -> None:
    """One run, through the program; it goes on from its newest checkpoint.

    Its process is in `running` as long as it runs. `workdir` is another than the job's.
    """
    arguments = [f"--config.seed={job.seed}", f"--config.optimizer.learning_rate={job.rate}"]
    arguments += [f"--config.total_steps={job.steps}"]
    arguments += [f"--config.checkpoint.every_steps={args.every}"]
    module = "repulsor_jax.main"
    if job.arm.partition("+")[0] == "control":
        module = "benchmarks.evidence.train_control"
        arguments.append(f"--classifier={args.root / 'classifier_control.npz'}")
    _program(args, module, job.arm, workdir or _folder(args, job), arguments, running)


def steps_done(workdir: pathlib.Path) -> int:
    """The newest checkpoint of a run; 0 where there is none."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def measure(args: argparse.Namespace, jobs: Sequence[Job], yardstick: "Yardstick") -> None:
    """Measures every checkpoint of these runs that was not measured yet."""
    from benchmarks.evidence.measure import measure_run

    todo = [job for job in jobs if not _is_measured(args, job)]
    for number, job in enumerate(todo, 1):
        config = config_lib.parse(configs.get_config(f"{args.bench},{job.arm}"))
        measure_run(config, _folder(args, job), yardstick, args.stretches, job.steps)
        print(f"measured {number}/{len(todo)}", end="\r", flush=True)
        _write_ledger(args)


def _is_measured(args: argparse.Namespace, job: Job) -> bool:
    """Whether a run has all its numbers, here or from a ledger."""
    return report.is_whole(args, report.read_run(_folder(args, job)), job.steps)


def _folder(args: argparse.Namespace, job: Job) -> pathlib.Path:
    return run_folder(args.root, job.arm, job.rate, job.seed)


def _program(
    args: argparse.Namespace,
    module: str,
    arm: str,
    workdir: pathlib.Path,
    arguments: Sequence[str],
    running: list[subprocess.Popen],
) -> None:
    command = [sys.executable, "-m", module, f"--config=configs/evidence.py:{args.bench},{arm}"]
    command += [f"--workdir={workdir}", f"--config.data.dir={args.root / 'data'}"]
    command += [f"--compilation_cache_dir={args.root / 'cache'}", *arguments]
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / "log.txt"
    with (
        log.open("a") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        running.append(process)
        code = process.wait()
        running.remove(process)
    if code:
        sys.exit(f"error: a run ended with {code}; its last words are in {log}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
