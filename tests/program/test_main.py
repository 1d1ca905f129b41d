"""The program in processes of its own, as a user starts it; some run several jobs in one."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from repulsor_jax import config as config_lib
from repulsor_jax.files import locks
from tests.oracles import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = [
    "--config.total_steps=6",
    "--config.batch_size=16",
    "--config.model.hidden_size=16",
    "--config.model.depth=1",
    "--config.repulsor.bank_rows=64",
    "--config.log.every_steps=2",
    "--config.sampling.num_steps=2",
    "--config.sampling.num_samples=30",
    "--config.evaluation.training_samples=100",
]


SECRET = "not-to-be-found-anywhere"


def program(*arguments, start=("repulsor_jax.main",), environment=None):
    return subprocess.run(
        [sys.executable, "-m", *start, "--config=configs/digits.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
        | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_encode_train_resume_and_sample(tmp_path):
    workdir = f"--workdir={tmp_path}"
    # Sampling needs neither the head nor the bank of the run.
    modes = ["encode", "train", "train", "sample"]
    changes = [{}, {"log.page": True}, {"total_steps": 8}, {"terms": "none"}]
    jobs = [
        {"mode": mode, "workdir": str(tmp_path), "config": config}
        for mode, config in zip(modes, changes, strict=True)
    ]
    done = program(workdir, *TINY, start=["tests.program.run_jobs", ".", "1", json.dumps(jobs)])
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stdout
    assert "frechet_pixels" in done.stdout
    for name in ("loss_curve.png", "metrics.jsonl", "samples/train_00000006.png"):
        assert (tmp_path / name).is_file()
    page = (tmp_path / "report.html").read_text()
    for text in ("finished", "step 8 of 8", "1,300 images of 10 classes", "data:image/", "<svg"):
        assert text in page
    assert "is not" not in done.stdout  # written, nor made anew

    assert SECRET not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]

    assert "step 6 of 8" in done.stdout
    (path,) = (tmp_path / "samples").glob("step_8-*.npz")
    archive = np.load(path)
    assert archive["arr_0"].shape == (30, 8, 8, 1)
    assert archive["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(archive["arr_1"], np.arange(30) % 10)

    longer = [a.replace("total_steps=6", "total_steps=8") for a in TINY]
    wrong = program(workdir, *longer, "--mode=sample", "--config.model.hidden_size=32")
    assert wrong.returncode == 1
    assert "does not fit this configuration" in wrong.stderr
    assert "Traceback" not in wrong.stderr

    # Killed in the middle and started again, against a run that was not: the same bytes, the same
    # number.
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "checkpoints", whole / "checkpoints")
    many = ["--config.sampling.num_samples=4000", "--config.evaluation.num_samples=4000"]
    many += ["--config.sampling.images_per_shard=200", "--checkpoint_step=8"]
    many += [f"--config.data.dir={tmp_path / 'data'}"]
    work = {"sample": "samples/.*.incomplete", "evaluate": "evaluations/.*.incomplete"}
    for mode, incomplete in work.items():
        kill_at_work(tmp_path, incomplete, *longer, *many, f"--mode={mode}")
        assert list(tmp_path.glob(incomplete))
    modes = [(mode, folder) for folder in (tmp_path, whole) for mode in work]
    jobs = [{"mode": mode, "workdir": str(folder), "config": {}} for mode, folder in modes]
    done = program(
        workdir, *longer, *many, start=["tests.program.run_jobs", ".", "1", json.dumps(jobs)]
    )
    assert done.returncode == 0, done.stderr
    assert not [path for incomplete in work.values() for path in tmp_path.glob(incomplete)]
    (samples,) = (whole / "samples").glob("*.npz")
    assert (tmp_path / "samples" / samples.name).read_bytes() == samples.read_bytes()
    (record,) = (whole / "evaluations").glob("*.json")
    metrics, same = (
        json.loads((folder / "evaluations" / record.name).read_text())["metrics"]
        for folder in (whole, tmp_path)
    )
    assert metrics == same


def kill_at_work(tmp_path, pattern, *arguments):
    """Starts the program and kills it when a first shard is there."""
    command = [sys.executable, "-m", "repulsor_jax.main", "--config=configs/digits.py"]
    job = subprocess.Popen(
        [*command, f"--workdir={tmp_path}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"{pattern}/*.npz")):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.kill()
    job.wait()


BAD_FLAGS = {
    "--config.checkpoint.directory=s3://x/y": "error: config.checkpoint.directory='s3://x/y': exp",
    "--config.model.depht=3": "error: config.model.depht: unknown key 'depht'",
    "--config.optimizer.learning_rate=fast": "config.optimizer.learning_rate=fast: ",
    "--config.optimizer.learning_rate=inf": "config.optimizer.learning_rate: expected a finite",
    "--config.optimizer.lr=1": "error: config.optimizer.lr: unknown key",
    "--config=absent.py": f"error: --config=absent.py: found no file {ROOT / 'absent.py'};",
    "--config=digit": "the name of one that is shipped: blockwise, cifar10, default, ",
    "--config=imagenet256:zz_9": "the size 'zz_9' must be one of s, b, l, xl",
    "--config.data.dir=None": "error: config.data.dir: found the word 'None'; expected a text",
    "--workdir=None": "error: --workdir: found the word 'None'; expected a path",
    "--compilation_cache_dir=~nobody0/x": "error: --compilation_cache_dir: found '~nobody0/x'",
    "--config.evaluation.cfg_intervals=(0.2,0.9)": "error: config.evaluation.cfg_intervals: expec",
    "--config=configs/imagenet256.py:zz_9": "the size 'zz_9' must be one of s, b, l, xl",
    "--workdir=": "error: --workdir is empty",
    "--nope=1": "error: Unknown command line flag 'nope'",
    "--config.model.patch_size=3": "error: config.model.patch_size: found 3, expected a divisor",
    "--config.terms=attract": "error: config.terms: expected none, or a sum of",
    "--config.data.source_path=https://me:hunter2@host/x": "error: config.data.source_path: f",
}
BAD_PLANS = {
    "--topology=v5e-256": "error: --topology='v5e-256': expected 'local', or a kind of chip",
    "--price_per_chip_hour=-1": "error: --price_per_chip_hour=-1 must be at least 0",
    "--compare=mesh.fsdq=2": "error: --compare='mesh.fsdq=2': config.mesh.fsdq: unknown key",
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What the program does with each bad argument: a folder with its work and what it said."""
    folder = tmp_path_factory.mktemp("complaints")
    lists = [
        ["--config=configs/digits.py", f"--workdir={folder / str(number)}", *mode, argument]
        for number, (mode, argument) in enumerate(
            [([], argument) for argument in BAD_FLAGS]
            + [(["--mode=plan"], argument) for argument in BAD_PLANS]
        )
    ]
    command = [sys.executable, "-m", "tests.program.run_forks", folder, json.dumps(lists)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=env, timeout=300, check=True)
    return folder


def said(complaints, argument):
    number = [*BAD_FLAGS, *BAD_PLANS].index(argument)
    parts = ("status", "stdout", "stderr")
    return number, *((complaints / f"{number}.{part}").read_text() for part in parts)


@pytest.mark.parametrize("argument", BAD_FLAGS)
def test_bad_flags_fail_at_once_naming_the_key(complaints, argument):
    number, status, stdout, stderr = said(complaints, argument)
    assert int(status) > 0
    assert BAD_FLAGS[argument] in stderr
    assert "Traceback" not in stderr
    assert "hunter2" not in stdout + stderr
    assert not (complaints / str(number) / "data").exists()


@pytest.mark.parametrize("argument", BAD_PLANS)
def test_a_plan_that_cannot_be_made_is_one_line(complaints, argument):
    _, status, _, stderr = said(complaints, argument)
    assert status == "1"
    assert stderr.startswith(BAD_PLANS[argument]), stderr
    assert "Traceback" not in stderr


def test_names_that_the_locale_cannot_write(tmp_path):
    """In a folder one image is bad, and its name is printed; in a zip the names are UTF-8."""
    for path in ("\u732b/a.png", "dog/a.png"):
        (tmp_path / "in" / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / path)
    shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path / "in")
    (tmp_path / "in" / "\u732b" / "b.png").write_text("no image")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for kind, path in (("folder", "in"), ("archive", "in.zip")):
        done = program(
            *(f"--workdir={tmp_path / kind}", "--mode=encode", f"--config.data.source={kind}"),
            *(f"--config.data.source_path={tmp_path / path}", "--config.data.train_split=."),
            *("--config.data.test_split=", "--config.data.on_bad_image=skip"),
            environment=ascii_locale,
        )
        assert done.returncode == 0, done.stderr
        (data,) = (tmp_path / kind).glob("data/train/dataset.json")
        assert json.loads(data.read_bytes())["num_images"] == 2


@pytest.mark.parametrize("config", ["digits", "imagenet256:s_2,none"])
def test_a_shipped_configuration_is_found_from_any_folder(tmp_path, config):
    """The run ends at what `--workdir=None` says, after the configuration was read."""
    done = subprocess.run(
        [sys.executable, "-m", "repulsor_jax.main", "--config", config, "--workdir=None"],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stderr.startswith("error: --workdir: found the word 'None'")


def test_the_configurations_are_part_of_the_package():
    setuptools = pytest.importorskip("setuptools")
    assert "repulsor_jax.configs" in setuptools.find_packages(ROOT, include=["repulsor_jax*"])
    assert (ROOT / "repulsor_jax" / "configs").resolve() == ROOT / "configs"


@pytest.mark.parametrize("held", ["run", "elsewhere"])
def test_a_second_training_in_a_folder_ends_with_one_line(tmp_path, held):
    elsewhere = tmp_path / "elsewhere"
    with locks.sole(tmp_path / held, "training", ""):
        done = program(
            f"--workdir={tmp_path / 'run'}", f"--config.checkpoint.directory={elsewhere}"
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / held}: another job is training here (proc")
    assert done.stderr.count("\n") == 1
    assert not list(elsewhere.glob("*")) if held == "run" else True


@pytest.mark.slow
def test_a_run_of_digits_goes_on_filling_holes(tmp_path):
    """As docs/systems.md has it: trained without a condition, then with one, then sampled."""
    few = [*TINY, "--config.evaluation.every_steps=0", "--config.log.diagnostics_every_steps=0"]
    shown = {"conditioning.kind": "inpaint", "total_steps": 8}
    modes = {"train": [{}, shown], "sample": [shown]}
    jobs = [
        {"mode": mode, "workdir": str(tmp_path), "config": config}
        for mode, configs in modes.items()
        for config in configs
    ]
    start = ["tests.program.run_jobs", ".", "1", json.dumps(jobs)]
    done = program(f"--workdir={tmp_path}", *few, "--force", start=start)
    assert done.returncode == 0, done.stderr
    assert "forced: config.conditioning.kind: 'none' -> 'inpaint'" in done.stdout
    assert "its kernel begins at zero" in done.stdout
    (path,) = (tmp_path / "samples").glob("step_8-*.npz")
    assert np.load(path)["arr_0"].shape == (30, 8, 8, 1)
    assert json.loads(path.with_suffix(".json").read_text())["conditioning"]["images"] == "test"
    # Hole, filling and image of each: three in a row, of 48 dots and a border.
    width = Image.open(tmp_path / "samples" / "train_00000008.png").size[0]
    assert width == 9 * 49 + 1


@pytest.mark.slow
def test_a_run_knows_itself(tmp_path):
    values = tiny.config_dict(model__in_channels=3)
    tiny.save_run(tmp_path, values, {4: tiny.random_params(config_lib.parse(values))})
    command = [sys.executable, "-m", "repulsor_jax.main", "--mode=sample", f"--workdir={tmp_path}"]

    def run(*arguments):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([*command, *arguments], timeout=300, check=False, **options)

    done = run('--config.sampling.classes=("b",)', "--config.sampling.num_samples=4")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "samples").glob("step_4-*.npz")
    np.testing.assert_array_equal(np.load(path)["arr_1"], [1] * 4)
    refused = run("--config.model.depth=3")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: --config.model.depth: without --config the run's own")
