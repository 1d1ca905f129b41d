"""The kill drill: `--mode=encode` is killed at random moments and must end with the same bytes.

python -m benchmarks.kill_encode --source=archive --source_path=cifar10.tar.xz --split=test

One job runs undisturbed. Then the same job, elsewhere, is killed (SIGKILL) again and again and
started anew, until it has been killed --kills times; one that completes before its kill is
compared, removed and begun again. The moments are uniform over the second half of an undisturbed
job's time, the first being Python's imports, so that they meet listing, encoding and finishing.
Prints one table; the exit code is 1 if a file differs or a process outlives its parent.
"""

import hashlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from repulsor_jax.data.latent_dataset import METADATA

_SOURCE = flags.DEFINE_string("source", "folder", "folder or archive.")
_SOURCE_PATH = flags.DEFINE_string("source_path", None, "The folder or archive.", required=True)
_SPLIT = flags.DEFINE_string("split", "test", "Which part of it.")
_KILLS = flags.DEFINE_integer("kills", 20, "How often to kill.", lower_bound=1)
_IMAGES_PER_SHARD = flags.DEFINE_integer("images_per_shard", 500, "Images in a file.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")


def main(argv: list[str]) -> None:
    """Runs the drill."""
    del argv
    draw = random.Random(_SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        started = time.perf_counter()
        whole = start(root / "whole")
        output = whole.communicate()[0]
        if whole.returncode:
            sys.exit(f"error: the undisturbed job failed:\n{output}")
        seconds = time.perf_counter() - started
        expected = digests(root / "whole")
        phases = dict.fromkeys(("before the first file", "among the files", "finishing"), 0)
        survivors = completed = different = starts = 0
        while sum(phases.values()) < _KILLS.value or not completed:
            job = start(root / "killed")
            starts += 1
            # The last start, after all kills, is left to complete.
            last = sum(phases.values()) >= _KILLS.value
            try:
                job.wait(None if last else seconds * draw.uniform(0.5, 1.0))
            except subprocess.TimeoutExpired:
                phases[phase(root / "killed")] += 1
                job.kill()
                job.wait()
                survivors += wait_for_workers(root / "killed")
                continue
            completed += 1
            different += digests(root / "killed") != expected
            shutil.rmtree(root / "killed")
    rows = {
        "an undisturbed job": f"{seconds:.1f} s, {len(expected)} files",
        **{f"kills {name}": count for name, count in phases.items()},
        "starts": starts,
        "completed": completed,
        "of them with other bytes": different,
        "processes that outlived a kill": survivors,
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    sys.exit(1 if different or survivors else 0)


def start(workdir: pathlib.Path) -> subprocess.Popen[str]:
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
    environment = os.environ | {"REPULSOR_DRILL": str(workdir)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def phase(workdir: pathlib.Path) -> str:
    """Where the job is, as its files tell."""
    work = workdir / "data" / ".train.incomplete"
    if (work / METADATA).exists() or (workdir / "data" / "train").exists():
        return "finishing"
    return "among the files" if any(work.glob("*.array_record*")) else "before the first file"


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file of the data set."""
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((workdir / "data").rglob("*"))
        if path.is_file()
    }


def wait_for_workers(workdir: pathlib.Path) -> int:
    """Returns how many worker processes are left some seconds after a kill."""
    mark = f"REPULSOR_DRILL={workdir}".encode()
    left: list[pathlib.Path] = []
    for _ in range(20):
        left = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes():
                    left.append(path)
            except OSError:
                continue  # it ended, or is somebody else's
        if not left:
            break
        time.sleep(0.25)
    return len(left)


if __name__ == "__main__":
    app.run(main)
