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
from repulsor_jax.sample import sample
from repulsor_jax.train import train
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMON = {"total_steps": 6, "model.num_heads": 4}


def run_processes(count, jobs):
    """Starts the processes with 2 devices each, and returns what each of them said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.run_jobs", json.dumps(jobs), "--config=tests/tiny.py"]
    command += ["--workdir=unused", f"--coordinator_address={address}", f"--num_processes={count}"]
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
        parts = experiment_lib.prepare(config_lib.parse(values), workdir, draws_pictures=False)
        train(*parts, None, values.to_dict())


def losses(workdir):
    return [line["loss"] for line in read_jsonl(workdir / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_two_processes_train_sample_and_evaluate_as_one_does(tmp_path):
    """Two of 2 devices against one of 4 and one of 8."""
    two, wide = tmp_path / "two", tmp_path / "wide"
    data_dir = two / "data"
    run_processes(
        2,
        [
            job("train", two),  # which encodes the digits first
            job("sample", two),
            job("evaluate", two),
            # More devices for a layer than a process has: both read every row.
            job("train", wide, data__dir=str(data_dir), mesh__tensor=4),
        ],
    )
    for num_devices in (4, 8):
        one = tmp_path / f"one_{num_devices}"
        train_here(one, data_dir, num_devices)
        assert len(losses(one)) == 6
        np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
        np.testing.assert_allclose(losses(wide), losses(one), rtol=1e-5)

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
    """Four of 2 devices, on a mesh in which those of a process are not neighbours."""
    encode_lib.encode(config_lib.parse(tiny.digits_dict()), tmp_path)
    data_dir = tmp_path / "data"
    reference, from_one, from_four = (tmp_path / n for n in ("one", "from_one", "from_four"))
    train_here(reference, data_dir, 8)
    train_here(from_one, data_dir, 8, total_steps=4)
    options = {"data__dir": str(data_dir), "mesh__fsdp": 2}
    said = run_processes(
        4,
        [
            job("train", from_four, shuffled=True, total_steps=4, **options),
            job("train", from_one, **options),
        ],
    )
    assert "step 4 of 6" in said[0]
    assert sum("), range(" not in text for text in said) < 4  # or the mesh was not shuffled
    train_here(from_four, data_dir, 4)
    assert len(losses(reference)) == 6
    np.testing.assert_allclose(losses(from_four), losses(reference), rtol=1e-5)
    np.testing.assert_allclose(losses(from_one), losses(reference), rtol=1e-5)
    for run in (from_one, from_four):
        position = json.loads((run / "checkpoints" / "6" / "data" / "metadata").read_text())
        assert position == {"next_index": 6}
