"""Several processes on this machine against one: the same program, losses, images and numbers."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax.encode import encode
from repulsor_jax.evaluate import evaluate
from repulsor_jax.evaluation.monitor import make_monitor
from repulsor_jax.runtime.metrics import read_jsonl
from repulsor_jax.sample import sample
from repulsor_jax.train import train
from tests.oracles import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMON = {"total_steps": 6, "model.depth": 1, "checkpoint.every_steps": 4}


def run_processes(count, jobs, cache):
    """Starts the processes with 2 devices each, and returns what each of them said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "tests.program.run_jobs",
        json.dumps(jobs),
        "--config=tests/oracles/tiny.py",
    ]
    command += ["--workdir=unused", f"--coordinator_address={address}", f"--num_processes={count}"]
    command += [f"--compilation_cache_dir={cache}"]  # jobs on the same mesh compile once
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={rank}"],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    said = []
    for rank, process in enumerate(processes):
        said.append(process.communicate(timeout=300)[0])
        assert process.returncode == 0, said[-1]
        assert f"process {rank} of {count} (0 to {count - 1}), joined by flags" in said[-1]
    return said


def job(mode, workdir, *, shuffled=False, **overrides):
    return {
        "mode": mode,
        "workdir": str(workdir),
        "shuffled": shuffled,
        "config": COMMON | overrides,
    }


@contextlib.contextmanager
def devices(count):
    """As though this process had so many devices only."""
    some = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: some)
        yield


def train_here(workdir, data_dir, num_devices, **overrides):
    """One process with so many devices."""
    values = tiny.digits_dict(data_dir, **COMMON | overrides)
    workdir.mkdir(exist_ok=True)
    with devices(num_devices):
        config = config_lib.parse(values)
        encode(config, workdir)
        pictures = experiment_lib.draws_pictures(config)
        experiment, dataset = experiment_lib.prepare(config, workdir)
        train(experiment, dataset, make_monitor(experiment) if pictures else None, values.to_dict())


def losses(workdir, name="loss"):
    return [line[name] for line in read_jsonl(workdir / "metrics.jsonl") if name in line]


@pytest.mark.slow
def test_four_processes_train_sample_and_evaluate_as_one_does(tmp_path):
    """Four of 2 devices against one of 8; each goes on with a checkpoint of the other.

    In the mesh of the four their devices are no neighbours, and some processes read the same rows.
    """
    # They encode the digits, each side for itself.
    one, from_one, from_four = (tmp_path / name for name in ("one", "from_one", "from_four"))
    data_dir = from_four / "data"
    measured = {"evaluation.every_steps": 6}
    train_here(one, one / "data", 8, **measured)
    shutil.copytree(one / "checkpoints", from_one / "checkpoints")
    shutil.rmtree(from_one / "checkpoints" / "6")
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2}
    options = {"shuffled": True, "data.dir": str(data_dir), **mesh}
    jobs = [
        job("train", from_four, total_steps=4, **options),
        job("train", from_one, **measured, **options),
        job("sample", from_one, **options),  # on the same mesh: what is compiled serves again
        job("evaluate", from_one, **options),
    ]
    said = run_processes(4, jobs, tmp_path / "cache")
    assert "step 4 of 6" in said[0]
    held = [next(line for line in text.splitlines() if "holds" in line) for text in said]
    assert any(line.count("range(") > 1 for line in held)  # they are not neighbours
    train_here(from_four, data_dir, 4)
    assert len(losses(one)) == 6
    assert len(losses(from_four)) == 6
    assert [len(losses(run, "frechet_pixels_32")) for run in (one, from_one)] == [1, 1]
    np.testing.assert_allclose(losses(from_four), losses(one), rtol=1e-5)
    np.testing.assert_allclose(losses(from_one), losses(one)[4:], rtol=1e-5)
    distances = [losses(run, "frechet_pixels_32") for run in (from_one, one)]
    np.testing.assert_allclose(*distances, rtol=1e-5)
    for run in (from_one, from_four):
        position = json.loads((run / "checkpoints" / "6" / "data" / "metadata").read_text())
        assert position == {"next_index": 6}

    # The same checkpoint, drawn from and measured by one process.
    alone = tmp_path / "alone"
    shutil.copytree(from_one / "checkpoints", alone / "checkpoints")
    config = config_lib.parse(tiny.digits_dict(data_dir, **COMMON | mesh))
    path = sample(config, alone)
    [record] = evaluate(config, alone)
    assert path.read_bytes() == (from_one / "samples" / path.name).read_bytes()
    [found] = (json.loads(p.read_text()) for p in (from_one / "evaluations").glob("step_6-*.json"))
    assert found["metrics"] == record["metrics"]
    assert found["protocol"] == record["protocol"]
