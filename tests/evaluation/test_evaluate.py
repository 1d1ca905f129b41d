"""The evaluate mode: a run on disk, references of every kind, what is written and what is said."""

import json
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.checkpoints.checkpointer import CheckpointError
from repulsor_jax.evaluate import evaluate
from repulsor_jax.files.pictures import save_samples
from repulsor_jax.inference import run as run_lib
from repulsor_jax.inference.generator import generate_images, make_generator
from tests.oracles import latent_sets, tiny
from tests.oracles.tiny_images import TinyImages

OPTIONS = {
    "model__in_channels": 3,
    "total_steps": 5,
    "sampling__grid_samples": 6,
    "evaluation__features": "pixels",
    "evaluation__num_samples": 60,
    "evaluation__batch_size": 8,
    "evaluation__poll_seconds": 1,
    "mesh__data": 8,
}
PICTURES = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 3), np.uint8)
STEPS = [1, 3, 5]


def values(**overrides):
    return tiny.config_dict(**OPTIONS | overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three checkpoints, its held-out data, and its first 60 samples at each step."""
    workdir = tmp_path_factory.mktemp("run")
    c = config_lib.parse(values())
    params = {step: tiny.random_params(c, seed=step) for step in STEPS}
    tiny.save_run(workdir, values(), params)
    latents = (PICTURES / 127.5 - 1)[:, None].astype(np.float32)
    about = {"dtype": "float32", "scale": 1.0, "class_names": ("a", "b", "c")}
    latent_sets.write(workdir / "data" / "test", latents, np.arange(90) % 3, **about)
    with run_lib.open_checkpoints(c, workdir) as checkpointer:
        experiment = run_lib.open_experiment(c, workdir, checkpointer, 5)
    generator, everywhere = make_generator(experiment), sharding.replicated(experiment.mesh)
    samples = {
        step: generate_images(generator, jax.device_put(params[step], everywhere), 60, None)
        for step in STEPS
    }
    return workdir, samples


@pytest.fixture
def workdir(run, tmp_path):
    for name in ("checkpoints", "data"):
        (tmp_path / name).symlink_to(run[0] / name)
    return tmp_path


def call(workdir, checkpoints="", **overrides):
    return evaluate(config_lib.parse(values(**overrides)), workdir, checkpoints)


def frechet(a, b):
    """Independent: the trace of the root of the product is the sum of its eigenvalues' roots."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) / 127.5 - 1 for x in (a, b))
    ca, cb = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * roots.sum()


def assert_measured(record, run, step=5):
    expected = frechet(run[1][step][0], PICTURES)
    np.testing.assert_allclose(record["metrics"]["frechet_pixels"], expected, rtol=1e-6)


def events(workdir):
    """(step, tag) of every TensorBoard scalar."""
    found = []
    for path in (workdir / "tensorboard" / "evaluation").iterdir():
        data = path.read_bytes()
        while data:  # length, its check, the event, its check
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            scalars = [value for value in event.summary.value if value.HasField("simple_value")]
            found += [(event.step, value.tag) for value in scalars]
            data = data[16 + size :]
    return found


def test_all_checkpoints_with_their_protocol(run, workdir, capsys):
    records = call(workdir, "all")
    folder = workdir / "evaluations"
    for step, record in zip(STEPS, records, strict=True):
        assert record["protocol"]["step"] == step
        assert_measured(record, run, step)
    paths = sorted(folder.glob("step_*.json"))
    assert [json.loads(path.read_text()) for path in paths] == records
    assert len(list(folder.glob("step_*.png"))) == 3
    for what in ("ema_decay", "solver", "num_steps", "cfg_scale", "num_samples", "weights_sha256"):
        assert what in records[0]["protocol"]
    assert records[0]["reference"]["images"] == 90

    table = (folder / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 5
    for cell in ("frechet_pixels", "| 0.9 ", "| heunx3 ", "| off ", "| 60 ", "| balanced, 0 "):
        assert cell in table, cell
    for path, row in zip(paths, table.splitlines()[2:], strict=True):
        assert f"| dit      | {path.name} |" in row
    assert f"| {records[0]['protocol']['weights_sha256'][:8]} " in table
    assert events(workdir) == [(step, "evaluation/frechet_pixels") for step in STEPS]
    assert (folder / "by_step.png").is_file()


def test_the_newest_some_and_the_same_again(workdir):
    (newest,) = call(workdir)
    assert newest["protocol"]["step"] == 5
    some = call(workdir, "3,5")
    assert [record["protocol"]["step"] for record in some] == [3, 5]
    assert some[1] == newest  # with the seconds that it took: it was read
    assert call(workdir, "3,5") == some


def test_follows_a_run_that_is_training(run, tmp_path):
    """Its directory appears, then checkpoints one by one; the last is that of total_steps."""
    folder = tmp_path / "checkpoints"
    (tmp_path / "data").symlink_to(run[0] / "data")

    def train():
        time.sleep(0.2)
        folder.mkdir()
        for step in STEPS:
            time.sleep(0.5)
            (folder / str(step)).symlink_to(run[0] / "checkpoints" / str(step))

    thread = threading.Thread(target=train)
    thread.start()
    records = call(tmp_path, "follow")
    thread.join()
    assert [record["protocol"]["step"] for record in records] == STEPS


@pytest.mark.parametrize(
    ("scales", "intervals", "expected"),
    [
        (
            (1.0, 1.5),
            ((0.0, 1.0), (0.2, 0.7)),
            # Without guidance there is no interval.
            [(1.0, None), (1.5, [0.0, 1.0]), (1.5, [0.2, 0.7])],
        ),
        ((), ((0.0, 1.0), (0.3, 0.8)), [(2.0, [0.0, 1.0]), (2.0, [0.3, 0.8])]),
    ],
)
def test_a_sweep(workdir, scales, intervals, expected):
    options = {"evaluation__cfg_scales": scales, "evaluation__cfg_intervals": intervals}
    records = call(workdir, sampling__cfg_scale=2.0, **options)
    found = [(r["protocol"]["cfg_scale"], r["protocol"].get("cfg_interval")) for r in records]
    assert found == expected
    assert (workdir / "evaluations" / "sweep_step_5.png").is_file()
    tags = [
        f"evaluation/frechet_pixels/cfg_{scale:g}_t_{low:g}_{high:g}"
        for scale, (low, high) in ((scale, interval or (0, 1)) for scale, interval in expected)
    ]
    assert [tag for _, tag in events(workdir)] == tags


def test_an_npz_needs_no_run(run, tmp_path):
    """Samples of others: the same number as those drawn here."""
    images, labels = run[1][5]
    save_samples(tmp_path / "theirs.npz", [images], labels)
    save_samples(tmp_path / "real.npz", [PICTURES], np.zeros(90))
    (record,) = call(
        tmp_path,
        evaluation__samples=str(tmp_path / "theirs.npz"),
        evaluation__reference=str(tmp_path / "real.npz"),
    )
    assert_measured(record, run)
    assert record["protocol"]["num_samples"] == 60
    assert "theirs" in (tmp_path / "evaluations" / "results.md").read_text()


@pytest.mark.parametrize("kind", ["archive", "train"])
def test_references_of_other_kinds_are_the_same_images(run, workdir, tmp_path_factory, kind):
    reference = "train"
    if kind == "archive":
        here = tmp_path_factory.mktemp("reference")
        for k, picture in enumerate(PICTURES):
            (here / f"{k % 3}").mkdir(exist_ok=True)
            Image.fromarray(picture).save(here / f"{k % 3}" / f"{k:03d}.png")
        reference = shutil.make_archive(str(here / "pictures"), "xztar", here)
    else:
        (workdir / "data").unlink()
        (workdir / "data").mkdir()
        (workdir / "data" / "train").symlink_to(run[0] / "data" / "test")
    (record,) = call(workdir, evaluation__reference=reference)
    assert_measured(record, run)


def write_images(folder, images, suffix="png"):
    folder.mkdir()
    for k, image in enumerate(images):
        grey = image.shape[-1] == 1
        Image.fromarray(image[..., 0] if grey else image).save(folder / f"{k:03d}.{suffix}")
    return folder


def distance(workdir, samples, reference):
    names = {"evaluation__samples": str(samples), "evaluation__reference": str(reference)}
    (record,) = call(workdir, **names)
    return record["metrics"]["frechet_pixels"]


@pytest.mark.parametrize("kind", ["folder", "npy", "zip", "gztar"])
def test_samples_in_files_of_other_kinds(run, tmp_path, kind):
    images, _ = run[1][5]
    samples = write_images(tmp_path / "theirs", images)
    if kind == "npy":
        samples = tmp_path / "theirs.npy"
        np.save(samples, images)
    elif kind != "folder":
        samples = shutil.make_archive(str(tmp_path / "theirs"), kind, samples)
    np.save(tmp_path / "real.npy", PICTURES)
    found = distance(tmp_path, samples, tmp_path / "real.npy")
    np.testing.assert_allclose(found, frechet(images, PICTURES), rtol=1e-6)
    assert not (tmp_path / "evaluations" / ".samples").exists()


def test_grey_samples_and_a_grey_folder(tmp_path):
    one, two = PICTURES[:40, ..., :1], PICTURES[40:, ..., :1]
    write_images(tmp_path / "one", one)
    write_images(tmp_path / "two", two)
    save_samples(tmp_path / "one.npz", [one], np.zeros(40))
    for samples in ("one", "one.npz"):
        found = distance(tmp_path, tmp_path / samples, tmp_path / "two")
        np.testing.assert_allclose(found, frechet(one, two), rtol=1e-6)
    Image.fromarray(PICTURES[0]).save(tmp_path / "two" / "007.png")
    with pytest.raises(ValueError, match=r"two/007\.png: found an image in colour"):
        distance(tmp_path, tmp_path / "one", tmp_path / "two")


def test_samples_that_are_none(tmp_path):
    write_images(tmp_path / "samples", PICTURES[:5])
    Image.new("RGB", (5, 4)).save(tmp_path / "samples" / "003.png")
    write_images(tmp_path / "alone", PICTURES[:1])
    np.save(tmp_path / "real.npy", PICTURES)
    np.save(tmp_path / "floats.npy", PICTURES / 255)
    (tmp_path / "pointer.npz").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, message in {
        "samples": r"samples/003\.png: found \[4, 5\] pixels, expected \[4, 4\]",
        "floats.npy": r"floats\.npy: found arr_0 float64 .*expected uint8",
        "pointer.npz": r"samples='.*pointer\.npz': .*is a Git LFS pointer",
        "nowhere": r"config\.evaluation\.samples='.*nowhere': found no such file or folder",
        "alone": r"config\.evaluation\.samples='.*alone': found 1 image: a distance needs",
    }.items():
        with pytest.raises(ValueError, match=message):
            distance(tmp_path, tmp_path / name, tmp_path / "real.npy")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_reference_of_other_pictures_under_the_same_names_and_sizes(tmp_path, kind):
    np.save(tmp_path / "samples.npy", PICTURES[:30])

    def measure(pictures):
        here = reference = tmp_path / "reference"
        shutil.rmtree(here, ignore_errors=True)
        write_images(here, pictures, "bmp")
        if kind == "zip":
            reference = shutil.make_archive(str(here), "zip", here)
        return distance(tmp_path, tmp_path / "samples.npy", reference)

    for pictures in (PICTURES[30:60], PICTURES[60:], PICTURES[30:60]):
        np.testing.assert_allclose(measure(pictures), frechet(PICTURES[:30], pictures), rtol=1e-6)


def test_a_tfds_reference(workdir):
    (record,) = call(
        workdir,
        evaluation__reference=f"tfds:{TinyImages.name}",
        evaluation__reference_split="train",
        data__source_path=str(workdir),
    )
    assert record["reference"]["name"] == "tfds:tiny_images train"
    assert record["reference"]["images"] == 6


def test_too_few_samples_are_warned_of_with_their_count(workdir, capsys):
    (record,) = call(workdir, evaluation__num_samples=20)
    (warning,) = record["warnings"]
    assert "found 20 samples for a covariance of 48 features" in warning
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((90, 4, 4, 1), r"reference=.*real.npz.*\[4, 4, 1\], but samples are \[4, 4, 3\]"),
        ((3, 8, 8, 3), "found images of 8 x 8, expected 4 x 4"),
    ],
)
def test_a_reference_of_another_shape_is_refused(workdir, shape, message):
    path = workdir / "real.npz"
    save_samples(path, [np.zeros(shape, np.uint8)], np.zeros(shape[0]))
    with pytest.raises(ValueError, match=message):
        call(workdir, evaluation__reference=str(path))


@pytest.mark.parametrize(
    ("overrides", "checkpoints", "message"),
    [
        ({}, "2", r"holds no step 2; it holds \[1, 3, 5\]"),
        ({}, "newest", "--checkpoint_step='newest': expected steps as 10000,20000"),
        ({"evaluation__reference": "/nowhere"}, "", "reference='/nowhere': found no such file"),
        ({"evaluation__reference": "train"}, "", "data/train is absent"),
        (
            {"evaluation__features": "inception", "evaluation__inception_weights": "/no.pth"},
            "",
            "/no.pth: found no Inception weights; get pt_inception.*or do without",
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_message_before_sampling(workdir, overrides, checkpoints, message):
    with pytest.raises((ValueError, OSError, CheckpointError), match=message):
        call(workdir, checkpoints, **overrides)
    assert not list(workdir.glob("evaluations/*step*"))
