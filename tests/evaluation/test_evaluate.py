"""The evaluate mode, from a model to a number with its protocol."""

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from repulsor_jax import config as config_lib
from repulsor_jax import evaluate as evaluate_lib
from repulsor_jax import sharding
from repulsor_jax.autoencoders import get_autoencoder
from repulsor_jax.checkpoints.checkpointer import CheckpointError
from repulsor_jax.data.latents import LatentFormat
from repulsor_jax.evaluate import evaluate
from repulsor_jax.evaluation import evaluator as evaluator_lib
from repulsor_jax.evaluation.evaluator import Evaluator, evaluate_params
from repulsor_jax.evaluation.features import FeatureSpace, pixel_space
from repulsor_jax.evaluation.frechet import GaussianStatistics
from repulsor_jax.evaluation.image_sets import npz_images
from repulsor_jax.evaluation.measure import Reference, image_reference, make_extractor
from repulsor_jax.evaluation.yardstick import Yardstick
from repulsor_jax.experiment import Experiment
from repulsor_jax.files.pictures import save_samples
from repulsor_jax.flows import paths
from repulsor_jax.inference import generator as generator_lib
from tests.data.test_sources import TinyImages
from tests.oracles import latent_sets, tiny
from tests.oracles.closed_form import Mixture, exact

# ---- A model that is exact: class k has the mean MEANS[k] in every value, and the deviation STD.

MEANS, STD, DIM = np.array([-0.3, 0.0, 0.45]), 0.12, 4 * 4 * 3


@dataclasses.dataclass(frozen=True)
class ExactModel:
    """The velocity of the flow to each class's Gaussian; without a class, to their mixture."""

    def apply(self, variables, x, t, labels):
        path = paths.get_path("linear")
        of_class = [
            exact(path, x, t, Mixture((1.0,), (mean,), (STD,)))["velocity"] for mean in MEANS
        ]
        # With its class given, every value is Gaussian on its own.
        one_hot = jax.nn.one_hot(labels, len(MEANS))
        return jnp.einsum("bk,kbhwc->bhwc", one_hot, jnp.stack(of_class))


def exact_evaluator(folder, reference, mesh, **overrides):
    options = {"sampling__solver": "rk4", "sampling__num_steps": 20, "sampling__batch_size": 400}
    c = tiny.config(model__in_channels=3, **options | overrides)
    experiment = Experiment(
        config=c,
        workdir=folder,
        mesh=mesh,
        model=ExactModel(),
        autoencoder=get_autoencoder("identity"),
        latent_format=LatentFormat(False, np.zeros(3, np.float32), np.ones(3, np.float32)),
        latents_sha256="",
        class_names=("a", "b", "c"),
    )
    space = pixel_space(DIM)
    yardstick = Yardstick(folder, space, make_extractor(space, mesh), reference)
    return Evaluator(experiment, generator_lib.make_generator(experiment), yardstick)


def known_distribution(shift=0.0, scale=1.0):
    """Moments of the mixture, all classes alike, moved and stretched."""
    mean = np.full(DIM, MEANS.mean())
    covariance = STD**2 * np.eye(DIM) + MEANS.var() * np.ones((DIM, DIM))
    gaussian = GaussianStatistics(mean + shift, scale**2 * covariance, None)
    return Reference({"name": "known", "digest": f"{shift} {scale}", "images": None}, gaussian)


def measure(evaluator, count, **changes):
    arguments = {"step": 1, "weights_sha256": "exact", "num_samples": count} | changes
    return evaluate_params(evaluator, {}, None, **arguments)["metrics"]["frechet_pixels"]


def test_an_exact_model_has_the_distance_of_the_known_distribution(tmp_path):
    """The whole chain against closed forms: labels, noise, solver, rounding, features, distance.

    Of N samples of a Gaussian, the mean is off by tr(C) / N, and the Fréchet distance of the
    covariances by sum_ij E_ij^2 / (2 (l_i + l_j)) in its eigenbasis, with E_ij^2 of l_i l_j / N,
    twice that on the diagonal.
    """
    count = 6000
    eigenvalues = np.full(DIM, STD**2)
    eigenvalues[0] += DIM * MEANS.var()
    pairs = np.outer(eigenvalues, eigenvalues) * (1 + np.eye(DIM))
    error = eigenvalues.sum() + (pairs / (2 * np.add.outer(eigenvalues, eigenvalues))).sum()
    error /= count
    mesh = tiny.mesh(8)
    found = measure(exact_evaluator(tmp_path, known_distribution(), mesh), count)
    # Balanced classes make the largest eigenvalue's share of the error smaller than by chance.
    assert 0.5 * error < found < 1.3 * error

    total = eigenvalues.sum()
    for shift, scale, expected in [
        (0.2, 1.0, DIM * 0.2**2),
        (0.0, 2.0, total * (2 - 1) ** 2),
        (0.1, 0.5, DIM * 0.1**2 + total * (1 - 0.5) ** 2),
    ]:
        evaluator = exact_evaluator(tmp_path, known_distribution(shift, scale), mesh)
        assert abs(measure(evaluator, count) / expected - 1) < 0.05, (shift, scale)


def test_a_model_of_another_distribution_is_found_out(tmp_path):
    """Euler's few steps leave the samples too narrow: the distance says so."""
    exactly = measure(exact_evaluator(tmp_path, known_distribution(), tiny.mesh(8)), 2000)
    crude = exact_evaluator(
        tmp_path,
        known_distribution(),
        tiny.mesh(8),
        sampling__solver="euler",
        sampling__num_steps=3,
    )
    assert measure(crude, 2000) > 3 * exactly


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 400), (2, 400), (8, 400), (8, 120)])
def test_any_mesh_and_batch_size_give_the_same_number(tmp_path, devices, batch_size):
    found = [
        measure(
            exact_evaluator(
                tmp_path / str(mesh.size),
                known_distribution(0.1),
                mesh,
                sampling__batch_size=size,
                sampling__solver="euler",
                sampling__num_steps=5,
            ),
            700,
        )
        for mesh, size in ((tiny.mesh(), 700), (tiny.mesh(devices), batch_size))
    ]
    assert abs(found[0] / found[1] - 1) < 1e-4  # a value in a thousand may round the other way


@pytest.mark.parametrize("stop_at", [0, 4, 6])
def test_a_stopped_feature_pass_goes_on_and_gives_the_same_number(tmp_path, stop_at, monkeypatch):
    monkeypatch.setattr("repulsor_jax.evaluation.measure._PER_SHARD", 400)
    options = {"sampling__solver": "euler", "sampling__batch_size": 200}
    mesh = tiny.mesh(8)
    whole = measure(exact_evaluator(tmp_path / "a", known_distribution(), mesh, **options), 1500)
    evaluator = exact_evaluator(tmp_path / "b", known_distribution(), mesh, **options)
    made = []

    def extract(images):
        made.append(1)
        if len(made) == stop_at + 1:
            raise KeyboardInterrupt
        return evaluator.yardstick.extract(images)

    stopped = dataclasses.replace(
        evaluator, yardstick=dataclasses.replace(evaluator.yardstick, extract=extract)
    )
    with pytest.raises(KeyboardInterrupt):
        measure(stopped, 1500)
    assert not list((tmp_path / "b").glob("*.json"))
    made[:] = [1] * 100
    assert measure(stopped, 1500) == whole
    assert len(made) - 100 == 8 - max(stop_at - 1, 0) // 2 * 2  # of 8 batches, two to a shard
    left = {path.name for path in (tmp_path / "b").iterdir()} - {".locks"}
    assert [pathlib.PurePath(name).suffix for name in left] == [".json"]

    made.clear()
    assert measure(stopped, 1500) == whole  # read from its record
    assert not made


def test_samples_that_are_not_finite_are_an_error(tmp_path, monkeypatch):
    broken = lambda self, variables, x, t, labels: jnp.where(
        labels[:, None, None, None] == 2, jnp.nan, x
    )
    monkeypatch.setattr(ExactModel, "apply", broken)
    evaluator = exact_evaluator(tmp_path, known_distribution(), tiny.mesh(8))
    with pytest.raises(
        generator_lib.SamplingError, match="sample 2 is not finite, nor are 132 others"
    ):
        measure(evaluator, 600)


# ---- A run on disk, as the program finds it.

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


def values(**overrides):
    return tiny.config_dict(**OPTIONS | overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three checkpoints, and its held-out data."""
    workdir = tmp_path_factory.mktemp("run")
    c = config_lib.parse(values())
    tiny.save_run(workdir, values(), {k: tiny.random_params(c, seed=k) for k in (1, 3, 5)})
    latents = (PICTURES / 127.5 - 1)[:, None].astype(np.float32)
    about = {"dtype": "float32", "scale": 1.0, "class_names": ("a", "b", "c")}
    latent_sets.write(workdir / "data" / "test", latents, np.arange(90) % 3, **about)
    return workdir


@pytest.fixture
def workdir(run, tmp_path):
    for name in ("checkpoints", "data"):
        (tmp_path / name).symlink_to(run / name)
    return tmp_path


def call(workdir, checkpoints="", **overrides):
    return evaluate(config_lib.parse(values(**overrides)), workdir, checkpoints)


def frechet(a, b):
    """Independent: the trace of the root of the product is the sum of its eigenvalues' roots."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) / 127.5 - 1 for x in (a, b))
    ca, cb = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * roots.sum()


def samples_of(workdir, seeds, count):
    """Images and labels of parameters drawn with each seed."""
    c = config_lib.parse(values())
    with evaluate_lib.run.open_checkpoints(c, workdir) as checkpointer:
        experiment = evaluate_lib.run.open_experiment(c, workdir, checkpointer, 5)
    generator = generator_lib.make_generator(experiment)
    everywhere = sharding.replicated(experiment.mesh)
    params = [jax.device_put(tiny.random_params(c, seed), everywhere) for seed in seeds]
    return [generator_lib.generate_images(generator, each, count, None) for each in params]


def steps_drawn(monkeypatch, evaluate_some):
    """The steps in `by_step.png`, drawn anew by the call."""
    drawn = []
    monkeypatch.setattr(
        "repulsor_jax.evaluation.report.pictures.save_curves",
        lambda path, curves, xlabel: drawn.append((path.name, curves)),
    )
    evaluate_some()
    ((name, curves),) = drawn
    assert name == "by_step.png"
    return curves["frechet_pixels"][""][0]


def test_all_checkpoints_with_their_protocol(workdir, capsys, monkeypatch):
    records = call(workdir, "all")
    folder = workdir / "evaluations"
    assert [record["protocol"]["step"] for record in records] == [1, 3, 5]
    for record, (images, _) in zip(records, samples_of(workdir, [1, 3, 5], 60), strict=True):
        expected = frechet(images, PICTURES)
        np.testing.assert_allclose(record["metrics"]["frechet_pixels"], expected, rtol=1e-6)
    written = [json.loads(path.read_text()) for path in sorted(folder.glob("step_*.json"))]
    assert written == records
    assert len(list(folder.glob("step_*.png"))) == 3
    for what in ("ema_decay", "solver", "num_steps", "cfg_scale", "num_samples", "weights_sha256"):
        assert what in records[0]["protocol"]
    assert records[0]["reference"]["images"] == 90

    table = (folder / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 5
    for cell in ("frechet_pixels", "| 0.9 ", "| heunx3 ", "| off ", "| 60 ", "| balanced, 0 "):
        assert cell in table, cell
    for path, row in zip(sorted(folder.glob("step_*.json")), table.splitlines()[2:], strict=True):
        assert f"| dit      | {path.name} |" in row
    assert f"| {records[0]['protocol']['weights_sha256'][:8]} " in table
    assert [(step, tag) for step, tag, _ in events(workdir)] == [
        (step, "evaluation/frechet_pixels") for step in (1, 3, 5)
    ]
    assert (folder / "by_step.png").is_file()
    assert steps_drawn(monkeypatch, lambda: call(workdir, "5")) == [1, 3, 5]


def events(workdir):
    """(step, tag, value) of every TensorBoard event."""
    found = []
    for path in (workdir / "tensorboard" / "evaluation").iterdir():
        data = path.read_bytes()
        while data:  # length, its check, the event, its check
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [
                (event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
            data = data[16 + size :]
    return found


def test_the_newest_some_and_the_same_again(workdir, monkeypatch):
    (newest,) = call(workdir)
    assert newest["protocol"]["step"] == 5
    some = call(workdir, "3,5")
    assert [record["protocol"]["step"] for record in some] == [3, 5]
    assert some[1] == newest

    def never(*arguments):
        raise AssertionError("it is known already")

    monkeypatch.setattr(evaluator_lib, "sample_features", never)
    assert call(workdir, "3,5") == some


def test_follows_a_run_that_is_training(run, tmp_path):
    """Its directory appears, then checkpoints one by one; the last is that of total_steps."""
    folder = tmp_path / "checkpoints"
    (tmp_path / "data").symlink_to(run / "data")

    def train():
        time.sleep(0.5)
        folder.mkdir()
        for step in (1, 3, 5):
            time.sleep(1.0)
            (folder / str(step)).symlink_to(run / "checkpoints" / str(step))

    thread = threading.Thread(target=train)
    thread.start()
    records = call(tmp_path, "follow")
    thread.join()
    assert [record["protocol"]["step"] for record in records] == [1, 3, 5]


def test_a_sweep_compiles_once_and_draws_a_plot(workdir):
    compiled = []

    def listen(event, *rest, **more):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    sweep = {"cfg_scales": (1.0, 1.5, 3.0), "cfg_intervals": ((0.0, 1.0), (0.2, 0.7))}
    counts = []
    evaluated = evaluate_lib.evaluate_params

    def counting(*arguments, **options):
        before = len(compiled)
        record = evaluated(*arguments, **options)
        counts.append(len(compiled) - before)
        return record

    evaluate_lib.evaluate_params = counting
    try:
        records = call(workdir, **{f"evaluation__{key}": value for key, value in sweep.items()})
    finally:
        evaluate_lib.evaluate_params = evaluated
    assert counts[0] > 0
    assert counts[1:] == [0] * 4
    found = [(r["protocol"]["cfg_scale"], r["protocol"].get("cfg_interval")) for r in records]
    assert found == [
        (1.0, None),  # without guidance there is no interval
        (1.5, [0.0, 1.0]),
        (3.0, [0.0, 1.0]),
        (1.5, [0.2, 0.7]),
        (3.0, [0.2, 0.7]),
    ]
    distances = [record["metrics"]["frechet_pixels"] for record in records]
    assert len(set(distances)) == 5
    # Scale 1 of the guided program is the program without guidance.
    expected = frechet(samples_of(workdir, [5], 60)[0][0], PICTURES)
    np.testing.assert_allclose(distances[0], expected, rtol=1e-3)
    assert (workdir / "evaluations" / "sweep_step_5.png").is_file()
    tags = [tag for _, tag, _ in events(workdir)]
    assert tags[1] == "evaluation/frechet_pixels/cfg_1.5_t_0_1"


def test_an_npz_needs_no_run(workdir, tmp_path_factory):
    """Samples of others: the same number as those drawn here."""
    ((images, labels),) = samples_of(workdir, [5], 60)
    here = tmp_path_factory.mktemp("npz")
    save_samples(here / "theirs.npz", [images], labels)
    save_samples(here / "real.npz", [PICTURES], np.zeros(90))
    options = {
        "evaluation__samples": str(here / "theirs.npz"),
        "evaluation__reference": str(here / "real.npz"),
    }
    (record,) = call(here, **options)
    np.testing.assert_allclose(
        record["metrics"]["frechet_pixels"], frechet(images, PICTURES), rtol=1e-6
    )
    assert record["protocol"]["num_samples"] == 60
    assert "theirs" in (here / "evaluations" / "results.md").read_text()


@pytest.mark.parametrize("kind", ["archive", "npz", "train"])
def test_references_of_every_kind_are_the_same_images(workdir, tmp_path_factory, kind):
    here = tmp_path_factory.mktemp("reference")
    if kind == "archive":
        for k, picture in enumerate(PICTURES):
            (here / f"{k % 3}").mkdir(exist_ok=True)
            Image.fromarray(picture).save(here / f"{k % 3}" / f"{k:03d}.png")
        reference = shutil.make_archive(str(here / "pictures"), "xztar", here)
    elif kind == "npz":
        reference = str(here / "real.npz")
        save_samples(reference, [PICTURES], np.zeros(90))
    else:
        data = workdir / "data"
        source = data.resolve()
        data.unlink()
        data.mkdir()
        (data / "train").symlink_to(source / "test")
        reference = "train"
    (record,) = call(workdir, evaluation__reference=reference)
    expected = frechet(samples_of(workdir, [5], 60)[0][0], PICTURES)
    np.testing.assert_allclose(record["metrics"]["frechet_pixels"], expected, rtol=1e-6)


def test_a_tfds_reference(workdir, tmp_path_factory):
    (record,) = call(
        workdir,
        evaluation__reference=f"tfds:{TinyImages.name}",
        evaluation__reference_split="train",
        data__source_path=str(tmp_path_factory.mktemp("tfds")),
    )
    assert record["reference"]["name"] == "tfds:tiny_images train"
    assert record["reference"]["images"] == 6


def picture_reference(folder, mesh, space, extract, batch_size):
    """The reference that the pictures are, cached in the folder."""
    path = folder / "real.npz"
    save_samples(path, [PICTURES], np.zeros(90))
    return image_reference(
        npz_images(path),
        keep=90,
        batch_size=batch_size,
        space=space,
        extract=extract,
        mesh=mesh,
        cache=folder / "cache",
    )


def test_a_killed_reference_is_not_continued_with_other_features(tmp_path, monkeypatch):
    """Half of the features of one weight, then all of another: none of the first is used."""
    monkeypatch.setattr("repulsor_jax.evaluation.measure._PER_SHARD", 8)
    mesh = tiny.mesh(8)

    def space(weight):
        apply = lambda params, images: {"pool": params * images.reshape(len(images), -1)}
        return FeatureSpace("pixels", str(weight), jnp.float32(weight), apply)

    calls = []

    def killed(images):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return make_extractor(space(1), mesh)(images)

    with pytest.raises(KeyboardInterrupt):
        picture_reference(tmp_path, mesh, space(1), killed, 8)
    found = picture_reference(tmp_path, mesh, space(2), make_extractor(space(2), mesh), 8)
    np.testing.assert_allclose(found.features, 2.0 * PICTURES.reshape(90, -1))


def test_two_jobs_compute_a_reference_once(tmp_path):
    """As a run that evaluates and another that follows it do."""
    mesh, space = tiny.mesh(), pixel_space(DIM)
    started, go_on, calls = threading.Event(), threading.Event(), []

    def extract(images):
        calls.append(1)
        started.set()
        assert go_on.wait(60)
        return make_extractor(space, mesh)(images)

    arguments = (tmp_path, mesh, space, extract, 45)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(picture_reference, *arguments)
        assert started.wait(60)
        second = pool.submit(picture_reference, *arguments)
        time.sleep(0.2)  # it waits meanwhile
        go_on.set()
        found = first.result(60), second.result(60)
    assert len(calls) == 2  # batches of one pass
    np.testing.assert_array_equal(found[0].features, found[1].features)


def test_a_sweep_of_intervals_alone_is_drawn(workdir):
    records = call(
        workdir,
        sampling__cfg_scale=2.0,
        evaluation__cfg_intervals=((0.0, 1.0), (0.3, 1.0), (0.3, 0.8)),
    )
    assert [record["protocol"]["cfg_interval"][0] for record in records] == [0.0, 0.3, 0.3]
    assert (workdir / "evaluations" / "sweep_step_5.png").is_file()


def test_a_reference_of_other_channels_is_refused(workdir):
    path = workdir / "grey.npz"
    save_samples(path, [PICTURES[..., :1]], np.zeros(90))
    message = r"config.evaluation.reference=.*grey.npz.*\[4, 4, 1\], but samples are \[4, 4, 3\]"
    with pytest.raises(config_lib.ConfigError, match=message):
        call(workdir, evaluation__reference=str(path))


def test_too_few_samples_are_warned_of_with_their_count(workdir, capsys):
    (record,) = call(workdir, evaluation__num_samples=20)
    (warning,) = record["warnings"]
    assert "found 20 samples for a covariance of 48 features" in warning
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "checkpoints", "message"),
    [
        ({}, "2", r"holds no step 2; it holds \[1, 3, 5\]"),
        ({}, "newest", "--checkpoint_step='newest': expected steps as 10000,20000"),
        ({"model__depth": 3}, "", "does not fit this configuration"),
        (
            {"evaluation__reference": "/nowhere"},
            "",
            "config.evaluation.reference='/nowhere': found no such file",
        ),
        ({"evaluation__reference": "/nowhere.npz"}, "", "/nowhere.npz: found no such file"),
        ({"evaluation__reference": "train"}, "", "data/train is absent"),
        (
            {"evaluation__features": "inception", "evaluation__inception_weights": "/no.pth"},
            "",
            "/no.pth: found no Inception weights; get pt_inception.*or do without",
        ),
        ({"evaluation__samples": "/no.npz"}, "", "/no.npz: found no such file"),
    ],
    ids=str,
)
def test_bad_input_is_one_message_before_sampling(workdir, overrides, checkpoints, message):
    with pytest.raises((ValueError, OSError, CheckpointError), match=message):
        call(workdir, checkpoints, **overrides)
    assert not list(workdir.glob("evaluations/*step*"))


def test_a_reference_of_another_resolution_is_refused(workdir):
    path = workdir / "large.npz"
    save_samples(path, [np.zeros((3, 8, 8, 3), np.uint8)], np.zeros(3))
    with pytest.raises(ValueError, match="found images of 8 x 8, expected 4 x 4.*resolution"):
        call(workdir, evaluation__reference=str(path))
