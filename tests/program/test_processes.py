"""Several processes on this machine against one: the same program, losses, images and numbers."""

import contextlib
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax import sharding
from repulsor_jax.encode import encode
from repulsor_jax.evaluate import evaluate
from repulsor_jax.evaluation.monitor import make_monitor
from repulsor_jax.runtime.metrics import read_jsonl
from repulsor_jax.sample import sample
from repulsor_jax.train import train
from tests.oracles import processes, tiny

COMMON = {
    "total_steps": 6,
    "checkpoint.every_steps": 2,
    "repulsor.positives": "view",
    "repulsor.bank_keys": "teacher",
}


def run_processes(folder, count, jobs):
    """Runs the jobs in several processes of 2 devices each, and returns the output of each."""
    folder.mkdir()
    parent = processes.start(
        "tests.program.run_jobs",
        folder,
        count,
        json.dumps(jobs),
        "--config=tests/oracles/tiny.py",
        "--workdir=unused",
        f"--coordinator_address={processes.free_address()}",
        f"--compilation_cache_dir={folder / 'cache'}",  # jobs on the same mesh compile once
        JAX_NUM_CPU_DEVICES="2",
    )
    try:
        status = parent.wait(600)
    finally:
        parent.kill()
    said = [(folder / f"{rank}.txt").read_text() for rank in range(count)]
    assert status == 0, "\n".join(said)
    for rank, text in enumerate(said):
        assert f"process {rank} of {count} (0 to {count - 1}), joined by flags" in text
    return said


@contextlib.contextmanager
def devices(count):
    """As if this process had only the first `count` devices."""
    some = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: some)
        yield


def train_here(workdir, data_dir, num_devices, **overrides):
    """Trains in this process, with the first `num_devices` of its devices."""
    values = tiny.digits_dict(data_dir, **COMMON | overrides)
    workdir.mkdir(exist_ok=True)
    with devices(num_devices):
        config = config_lib.parse(values)
        encode(config, workdir)
        experiment, dataset = experiment_lib.prepare(config, workdir)
        pictures = experiment_lib.draws_pictures(config)
        train(experiment, dataset, make_monitor(experiment) if pictures else None, values.to_dict())


def read(workdir, name):
    """Values of a metric by step."""
    lines = read_jsonl(workdir / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if name in line}


def copy_checkpoint(step, source, target):
    shutil.copytree(source / "checkpoints" / str(step), target / "checkpoints" / str(step))


@pytest.mark.slow
def test_four_processes_train_sample_and_evaluate_as_one_does(tmp_path):
    """One process of 8 devices against a run that one process begins, four go on with, one ends.

    In the mesh of the four, the devices of a process are not neighbours, some processes read the
    same rows, and the parameters are split between them.
    """
    one, relay, alone = (tmp_path / name for name in ("one", "relay", "alone"))
    data_dir = relay / "data"  # the four encode the digits for themselves
    measured = {"evaluation.every_steps": 4, "log.diagnostics_every_steps": 4}
    train_here(one, one / "data", 8, **measured)
    copy_checkpoint(2, one, relay)
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2}
    config = COMMON | measured | mesh | {"total_steps": 4, "data.dir": str(data_dir)}
    job = {"workdir": str(relay), "config": config, "shuffled": True}
    jobs = [{"mode": "train"}, {"mode": "sample", "trajectory": True}, {"mode": "evaluate"}]
    said = run_processes(tmp_path / "said", 4, [each | job for each in jobs])
    assert "step 2 of 4" in said[0]
    held = [next(line for line in text.splitlines() if "holds" in line) for text in said]
    assert any(line.count("range(") > 1 for line in held)  # they are not neighbours
    saved = ocp.PyTreeCheckpointer().metadata(relay / "checkpoints" / "4" / "state")
    kernel = saved.item_metadata.tree["params"]["model"]["block_0"]["qkv"]["kernel"]
    assert set(sharding.DATA_AXES) <= set(jax.tree.leaves(kernel.sharding.partition_spec))
    assert len(list((relay / "samples").glob("*_trajectory.png"))) == 1
    copy_checkpoint(4, relay, alone)
    train_here(relay, data_dir, 4)
    expected, found = read(one, "loss"), read(relay, "loss")
    assert (list(expected), list(found)) == ([1, 2, 3, 4, 5, 6], [3, 4, 5, 6])
    np.testing.assert_allclose(list(found.values()), list(expected.values())[2:], rtol=1e-5)
    distances = [read(run, "frechet_pixels_32")[4] for run in (relay, one)]
    np.testing.assert_allclose(*distances, rtol=1e-5)
    names = {name for line in read_jsonl(one / "metrics.jsonl") for name in line}
    names = {name for name in names if name.startswith("diagnostics/")}
    assert "diagnostics/repulsor/drift" in names
    for name in names:  # the four read the images of the bank each for itself
        found = [read(run, name)[4] for run in (relay, one)]
        np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-4, err_msg=name)
    for run in (one, relay):
        position = json.loads((run / "checkpoints" / "6" / "data" / "metadata").read_text())
        assert position == {"next_index": 6}

    # One process draws from the checkpoint of the four, and measures it.
    values = tiny.digits_dict(data_dir, **COMMON | mesh)
    path = sample(config_lib.parse(values), alone)
    [record] = evaluate(config_lib.parse(values), alone)
    assert path.read_bytes() == (relay / "samples" / path.name).read_bytes()
    [text] = [p.read_text() for p in (relay / "evaluations").glob("step_4-*.json")]
    assert json.loads(text)["metrics"] == record["metrics"]
    assert json.loads(text)["protocol"] == record["protocol"]
