"""The program as a user types it, in processes of their own."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from repulsor_jax.metrics import read_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = [
    "--config.total_steps=6",
    "--config.batch_size=16",
    "--config.model.hidden_size=16",
    "--config.model.depth=2",
    "--config.regularizer.bank_rows=64",
    "--config.log.every_steps=2",
    "--config.sampling.num_steps=2",
    "--config.sampling.num_samples=30",
    "--config.evaluation.training_samples=100",
]


def program(*arguments, config="configs/digits.py"):
    return subprocess.run(
        [sys.executable, "-m", "repulsor_jax.main", f"--config={config}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_encode_train_resume_and_sample(tmp_path):
    workdir = f"--workdir={tmp_path}"
    encoded = program(workdir, "--mode=encode")
    assert encoded.returncode == 0, encoded.stderr
    trained = program(workdir, *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "step 6/6" in trained.stdout
    assert "frechet_pixels" in trained.stdout
    for name in ("loss_curve.png", "metrics.jsonl", "samples/train_00000006.png"):
        assert (tmp_path / name).is_file()

    longer = [a.replace("total_steps=6", "total_steps=8") for a in TINY]
    resumed = program(workdir, *longer)
    assert resumed.returncode == 0, resumed.stderr
    assert "step 6 of 8" in resumed.stdout

    # Sampling needs neither the head nor the bank of the run.
    sampled = program(workdir, *longer, "--mode=sample", "--config.regularizer.name=none")
    assert sampled.returncode == 0, sampled.stderr
    archive = np.load(tmp_path / "samples" / "step_8.npz")
    assert archive["arr_0"].shape == (30, 8, 8, 1)
    assert archive["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(archive["arr_1"], np.arange(30) % 10)

    wrong = program(workdir, *longer, "--mode=sample", "--config.model.hidden_size=32")
    assert wrong.returncode == 1
    assert "does not fit this configuration" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.model.depht=3", "error: config.model.depht: unknown key 'depht'"),
        ("--config.optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("--config.model.patch_size=3", "error: config.model.patch_size=3 must divide"),
        ("--config.regularizer.name=attract", "error: config.regularizer.name='attract'"),
    ],
)
def test_bad_flags_fail_at_once_naming_the_key(tmp_path, argument, expected):
    result = program(f"--workdir={tmp_path}", argument)
    assert result.returncode != 0
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Two processes of 4 devices against one of 8: the same losses, through the same program."""
    arguments = [*TINY, "--config.log.every_steps=1", "--config.evaluation.every_steps=0"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "repulsor_jax.main", "--config=configs/digits.py", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [
                *command,
                f"--workdir={tmp_path / 'two'}",
                "--distributed",
                f"--coordinator_address={address}",
                "--num_processes=2",
                f"--process_id={rank}",
            ],
            cwd=ROOT,
            env=environment | {"JAX_NUM_CPU_DEVICES": "4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in pair:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    one = subprocess.run(
        [*command, f"--workdir={tmp_path / 'one'}"],
        cwd=ROOT,
        env=environment | {"JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert one.returncode == 0, one.stderr
    losses = [
        [line["loss"] for line in read_jsonl(tmp_path / run / "metrics.jsonl")]
        for run in ("one", "two")
    ]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
