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
from repulsor_jax import encode as encode_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax.evaluate import evaluate
from repulsor_jax.metrics import read_jsonl
from repulsor_jax.monitor import make_monitor
from repulsor_jax.sample import sample
from repulsor_jax.train import train
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMON = {"total_steps": 6, "model.depth": 1, "checkpoint.every_steps": 4}


def run_processes(count, jobs, cache):
    """Starts the processes with 2 devices each, and returns what each of them said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.run_jobs", json.dumps(jobs), "--config=tests/tiny.py"]
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
    config = {key.replace("__", "."): value for key, value in overrides.items()}
    return {
        "mode": mode,
        "workdir": str(workdir),
        "shuffled": shuffled,
        "config": COMMON | {"mesh.fsdp": 1, "mesh.tensor": 1} | config,
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
        pictures = experiment_lib.draws_pictures(config)
        experiment, dataset = experiment_lib.prepare(config, workdir, draws_pictures=pictures)
        train(experiment, dataset, make_monitor(experiment) if pictures else None, values.to_dict())


def losses(workdir, name="loss"):
    return [line[name] for line in read_jsonl(workdir / "metrics.jsonl") if name in line]


@pytest.mark.slow
def test_two_processes_train_sample_and_evaluate_as_one_does(tmp_path):
    """Two of 2 devices against one of 4."""
    two = tmp_path / "two"
    data_dir = two / "data"
    # The first of them encodes the digits, too.
    measured = {"evaluation.every_steps": 6}
    jobs = [job(mode, two, **measured) for mode in ("train", "sample", "evaluate")]
    run_processes(2, jobs, tmp_path / "cache")
    one = tmp_path / "one"
    train_here(one, data_dir, 4, **measured)
    [distance] = losses(one, "frechet_pixels_32")
    np.testing.assert_allclose(losses(two, "frechet_pixels_32"), distance, rtol=1e-5)
    assert len(losses(one)) == 6
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)

    # The same checkpoint, drawn from and measured by one process.
    alone = tmp_path / "alone"
    shutil.copytree(two / "checkpoints", alone / "checkpoints")
    config = config_lib.parse(tiny.digits_dict(data_dir, **COMMON))
    with devices(4):
        path = sample(config, alone)
        [record] = evaluate(config, alone)
    assert path.read_bytes() == (two / "samples" / path.name).read_bytes()
    [found] = (json.loads(p.read_text()) for p in (two / "evaluations").glob("step_6-*.json"))
    assert found["metrics"] == record["metrics"]
    assert found["protocol"] == record["protocol"]


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_continues_on_one_and_back(tmp_path):
    """Four of 2 devices against one of 8, which goes on with 4.

    In the mesh of the four their devices are no neighbours, and some processes read the same rows.
    """
    encode_lib.encode(config_lib.parse(tiny.digits_dict()), tmp_path)
    data_dir = tmp_path / "data"
    one, from_one, from_four = (tmp_path / name for name in ("one", "from_one", "from_four"))
    train_here(one, data_dir, 8)
    shutil.copytree(one, from_one)
    shutil.rmtree(from_one / "checkpoints" / "6")
    options = {
        "data__dir": str(data_dir),
        "mesh__fsdp": 2,
        "mesh__tensor": 2,
        "shuffled": True,
    }
    jobs = [
        job("train", from_four, total_steps=4, **options),
        job("train", from_one, **options),
    ]
    said = run_processes(4, jobs, tmp_path / "cache")
    assert "step 4 of 6" in said[0]
    held = [next(line for line in text.splitlines() if "holds" in line) for text in said]
    assert any(line.count("range(") > 1 for line in held)  # they are not neighbours
    train_here(from_four, data_dir, 4)
    assert len(losses(one)) == 6
    np.testing.assert_allclose(losses(from_four), losses(one), rtol=1e-5)
    np.testing.assert_allclose(losses(from_one), losses(one), rtol=1e-5)
    for run in (from_one, from_four):
        position = json.loads((run / "checkpoints" / "6" / "data" / "metadata").read_text())
        assert position == {"next_index": 6}
