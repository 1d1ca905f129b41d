"""The kill drill: `--mode=encode` is killed at random moments and must end with the same bytes.

python -m benchmarks.kill_encode --source=archive --source_path=cifar10.tar.xz --split=test

One job runs undisturbed. Then the same job, elsewhere, is killed (SIGKILL) again and again and
started anew, until it has been killed --kills times; one that completes before its kill is
compared, removed and begun again. The moments are uniform over the second half of an undisturbed
job's time, the first being Python's imports, so that they meet listing, encoding and finishing.
Prints one table; the exit code is 1 if a file differs or a process outlives its parent.
"""

import contextlib
import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from repulsor_jax.data.latents import METADATA

_SOURCE = flags.DEFINE_string("source", "folder", "folder or archive.")
_SOURCE_PATH = flags.DEFINE_string("source_path", None, "The folder or archive.", required=True)
_SPLIT = flags.DEFINE_string("split", "test", "Which part of it.")
_KILLS = flags.DEFINE_integer("kills", 20, "How often to kill.", lower_bound=1)
_IMAGES_PER_SHARD = flags.DEFINE_integer("images_per_shard", 500, "Images in a file.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

PHASES = (
    "before it wrote a file",
    "among the files",
    "while finishing",
    "after the data set was complete",
)
_MARK = "REPULSOR_DRILL"


def main(argv: list[str]) -> None:
    """Runs the drill."""
    del argv
    draw = random.Random(_SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        log = root / "log"
        started = time.perf_counter()
        if start(root / "whole", log).wait():
            sys.exit(f"error: the undisturbed job failed:\n{log.read_text()}")
        seconds = time.perf_counter() - started
        expected = digests(root / "whole")
        phases = dict.fromkeys(PHASES, 0)
        survivors = workers = completed = different = starts = kept = 0
        while True:
            before = records(root / "killed")
            job = start(root / "killed", log)
            starts += 1
            # The last start, after all kills, is left to complete: it too is compared.
            last = sum(phases.values()) >= _KILLS.value
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(None if last else seconds * draw.uniform(0.5, 1.0))
            alive = len(marked(root / "killed")) - 1
            job.kill()
            if job.wait() == -signal.SIGKILL:
                phases[phase(root / "killed", before)] += 1
                workers += alive
                survivors += wait_for_workers(root / "killed")
                continue
            if job.returncode:
                sys.exit(f"error: a job that was started again failed:\n{log.read_text()}")
            completed += 1
            kept += sum(name.endswith(".array_record") for name in before)
            different += digests(root / "killed") != expected
            shutil.rmtree(root / "killed")
            if last:
                break
    rows = {
        "an undisturbed job": f"{seconds:.1f} s, {len(expected)} files",
        **{f"kills {name}": count for name, count in phases.items()},
        "worker processes alive at the kills": workers,
        "files kept from before, at completion": kept,
        "starts": starts,
        "completed": completed,
        "of them with other bytes": different,
        "processes that outlived a kill": survivors,
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    sys.exit(1 if different or survivors else 0)


def start(workdir: pathlib.Path, log: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts the job."""
    command = [
        sys.executable,
        "-m",
        "repulsor_jax.main",
        "--config=configs/cifar10.py",
        f"--workdir={workdir}",
        "--mode=encode",
        f"--config.data.source={_SOURCE.value}",
        f"--config.data.source_path={_SOURCE_PATH.value}",
        f"--config.data.train_split={_SPLIT.value}",
        "--config.data.test_split=",
        f"--config.data.images_per_shard={_IMAGES_PER_SHARD.value}",
        "--config.data.encode_batch_per_device=50",
        "--config.data.preview_images=0",
    ]
    # The mark finds the worker processes, which inherit it.
    environment = os.environ | {_MARK: str(workdir)}
    with log.open("wb") as file:  # a pipe that nobody reads would stop a long job
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def records(workdir: pathlib.Path) -> set[str]:
    """Names of the ArrayRecord files, finished and not, of an incomplete data set."""
    return {path.name for path in (workdir / "data" / ".train.incomplete").glob("*.array_record*")}


def phase(workdir: pathlib.Path, before: set[str]) -> str:
    """Where the job was, as its files tell; `before` are those that it found."""
    if (workdir / "data" / "train").exists():
        return "after the data set was complete"
    if (workdir / "data" / ".train.incomplete" / METADATA).exists():
        return "while finishing"
    return "among the files" if records(workdir) - before else "before it wrote a file"


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file of the data set."""
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((workdir / "data").rglob("*"))
        if path.is_file()
    }


def marked(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The processes of the job: those that inherited its mark."""
    mark = f"{_MARK}={workdir}".encode()
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended, or is somebody else's
            if mark in path.read_bytes():
                found.append(path)
    return found


def wait_for_workers(workdir: pathlib.Path) -> int:
    """Returns how many worker processes are left some seconds after a kill."""
    for _ in range(20):
        if not marked(workdir):
            return 0
        time.sleep(0.25)
    return len(marked(workdir))


if __name__ == "__main__":
    app.run(main)
