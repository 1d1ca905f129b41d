"""The program in processes of its own, as a user starts it; some run several jobs in one."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from repulsor_jax import config as config_lib
from repulsor_jax import main
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


def start_forks(folder, lists, environment=None):
    """Starts `run_forks` with lists of arguments."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.program.run_forks", folder, json.dumps(lists)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (environment or {}),
    )


def forks(folder, lists, environment=None):
    """Runs the program with each list of arguments: its exit status, output and errors."""
    assert start_forks(folder, lists, environment).wait(300) == 0
    return [said(folder / str(number)) for number in range(len(lists))]


def said(folder):
    return tuple((folder / part).read_text() for part in ("status", "stdout", "stderr"))


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

    # One that does not fit, and two that are killed in the middle.
    whole, children = tmp_path / "whole", tmp_path / "children"
    children.mkdir()
    shutil.copytree(tmp_path / "checkpoints", whole / "checkpoints")
    longer = [a.replace("total_steps=6", "total_steps=8") for a in TINY]
    many = ["--config.sampling.num_samples=2000", "--config.evaluation.num_samples=2000"]
    many += ["--config.sampling.images_per_shard=100", "--checkpoint_step=8"]
    many += [f"--config.data.dir={tmp_path / 'data'}"]
    work = {"sample": "samples/.*.incomplete", "evaluate": "evaluations/.*.incomplete"}
    common = [f"--config={ROOT / 'configs/digits.py'}", workdir, *longer]
    wrong = [*common, "--mode=sample", "--config.model.hidden_size=32"]
    job = start_forks(children, [wrong, *([*common, *many, f"--mode={mode}"] for mode in work)])
    for child, incomplete in enumerate(work.values(), 1):
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(f"{incomplete}/*.npz")):
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(int((children / str(child) / "pid").read_text()), signal.SIGKILL)
    assert job.wait(60) == 0
    status, _, errors = said(children / "0")
    assert status == "1"
    assert "does not fit this configuration" in errors
    assert "Traceback" not in errors
    for child, incomplete in enumerate(work.values(), 1):
        assert said(children / str(child))[0] == str(-signal.SIGKILL)
        assert list(tmp_path.glob(incomplete))

    # Started again, against a run that was not killed: the same bytes, the same number.
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


BAD_FLAGS = {
    "--config.checkpoint.directory=s3://x/y": "error: config.checkpoint.directory='s3://x/y': exp",
    "--config.model.depht=3": "error: config.model.depht: unknown key 'depht'",
    "--config.optimizer.learning_rate=fast": "config.optimizer.learning_rate=fast: ",
    "--config.optimizer.learning_rate=inf": "config.optimizer.learning_rate: expected a finite",
    "--config.optimizer.lr=1": "error: config.optimizer.lr: unknown key",
    "--config=absent.py": "error: --config=absent.py: found no file HERE/absent.py;",
    "--config=digit": "the name of one that is shipped: blockwise, cifar10, default, ",
    "--config=imagenet256:zz_9": "the size 'zz_9' must be one of s, b, l, xl",
    "--config.data.dir=None": "error: config.data.dir: found the word 'None'; expected a text",
    "--workdir=None": "error: --workdir: found the word 'None'; expected a path",
    "--compilation_cache_dir=~nobody0/x": "error: --compilation_cache_dir: found '~nobody0/x'",
    "--config.evaluation.cfg_intervals=(0.2,0.9)": "error: config.evaluation.cfg_intervals: expec",
    f"--config={ROOT}/configs/imagenet256.py:zz_9": "the size 'zz_9' must be one of s, b, l, xl",
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


SHIPPED = ["digits", "imagenet256:s_2,none"]
HELD = ["run", "elsewhere"]  # the workdir, and the folder of its checkpoints


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """By argument: a folder, and what the program says to the argument there."""
    folder = tmp_path_factory.mktemp("complaints")
    own = f"--config={ROOT / 'configs/digits.py'}"
    lists = {argument: [own, "--workdir=run", argument] for argument in BAD_FLAGS}
    lists |= {argument: [own, "--workdir=run", "--mode=plan", argument] for argument in BAD_PLANS}
    # The program ends at what `--workdir=None` says, after the configuration was read.
    lists |= {name: [f"--config={name}", "--workdir=None"] for name in SHIPPED}
    elsewhere = [f"--config.checkpoint.directory={folder / f'elsewhere_{held}'}" for held in HELD]
    lists |= {
        held: [own, f"--workdir={folder / f'run_{held}'}", directory]
        for held, directory in zip(HELD, elsewhere, strict=True)
    }
    with contextlib.ExitStack() as stack:
        for held in HELD:
            stack.enter_context(locks.sole(folder / f"{held}_{held}", "training", ""))
        found = forks(folder, list(lists.values()))
    return {
        argument: (folder / str(number), *parts)
        for number, (argument, parts) in enumerate(zip(lists, found, strict=True))
    }


@pytest.mark.parametrize("argument", BAD_FLAGS)
def test_bad_flags_fail_at_once_naming_the_key(complaints, argument):
    folder, status, stdout, stderr = complaints[argument]
    assert int(status) > 0
    assert BAD_FLAGS[argument] in stderr.replace(str(folder), "HERE")
    assert "Traceback" not in stderr
    assert "hunter2" not in stdout + stderr
    assert not (folder / "run" / "data").exists()


@pytest.mark.parametrize("argument", BAD_PLANS)
def test_a_plan_that_cannot_be_made_is_one_line(complaints, argument):
    _, status, _, stderr = complaints[argument]
    assert status == "1"
    assert stderr.startswith(BAD_PLANS[argument]), stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_is_found_from_any_folder(complaints, name):
    stderr = complaints[name][-1]
    assert stderr.startswith("error: --workdir: found the word 'None'")


@pytest.mark.parametrize("held", HELD)
def test_a_second_training_in_a_folder_ends_with_one_line(complaints, held):
    folder, status, _, stderr = complaints[held]
    path = folder.parent / f"{held}_{held}"
    assert status == "1"
    assert stderr.startswith(f"error: {path}: another job is training here (proc")
    assert stderr.count("\n") == 1
    other = folder.parent / ("elsewhere_run" if held == "run" else "run_elsewhere")
    written = [each for each in other.rglob("*") if each.is_file()]
    assert not [each for each in written if each.parent.name != ".locks"]


def test_a_command_without_arguments_stays_as_it_is():
    assert main._with_own_config(["main.py"]) == ["main.py"]


def test_a_run_may_keep_its_checkpoints_in_its_own_folder(tmp_path):
    c = tiny.config(checkpoint__directory=str(tmp_path))
    with contextlib.ExitStack() as held:
        main._hold(c, tmp_path, held)


def test_names_that_the_locale_cannot_write(tmp_path):
    """In a folder one image is bad, and its name is printed; in a zip the names are UTF-8."""
    for path in ("\u732b/a.png", "dog/a.png"):
        (tmp_path / "in" / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / path)
    shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path / "in")
    (tmp_path / "in" / "\u732b" / "b.png").write_text("no image")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    kinds = {"folder": "in", "archive": "in.zip"}
    lists = [
        [
            *(f"--config={ROOT / 'configs/digits.py'}", f"--workdir={tmp_path / kind}"),
            *("--mode=encode", f"--config.data.source={kind}"),
            *(f"--config.data.source_path={tmp_path / path}", "--config.data.train_split=."),
            *("--config.data.test_split=", "--config.data.on_bad_image=skip"),
        ]
        for kind, path in kinds.items()
    ]
    found = forks(tmp_path, lists, ascii_locale)
    for kind, (status, _, stderr) in zip(kinds, found, strict=True):
        assert status == "0", stderr
        (data,) = (tmp_path / kind).glob("data/train/dataset.json")
        assert json.loads(data.read_bytes())["num_images"] == 2


def test_the_configurations_are_part_of_the_package():
    setuptools = pytest.importorskip("setuptools")
    assert "repulsor_jax.configs" in setuptools.find_packages(ROOT, include=["repulsor_jax*"])
    assert (ROOT / "repulsor_jax" / "configs").resolve() == ROOT / "configs"


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
    tiny.save_run(tmp_path / "run", values, {4: tiny.random_params(config_lib.parse(values))})
    sample = ["--mode=sample", f"--workdir={tmp_path / 'run'}"]
    few = ['--config.sampling.classes=("b",)', "--config.sampling.num_samples=4"]
    done, refused = forks(tmp_path, [[*sample, *few], [*sample, "--config.model.depth=3"]])
    assert done[0] == "0", done[-1]
    (path,) = (tmp_path / "run" / "samples").glob("step_4-*.npz")
    np.testing.assert_array_equal(np.load(path)["arr_1"], [1] * 4)
    assert refused[0] == "1"
    assert refused[-1].startswith("error: --config.model.depth: without --config the run's own")
