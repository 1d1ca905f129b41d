"""From a model to a number, against closed forms; jobs that are stopped, and references kept."""

import concurrent.futures
import functools
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.autoencoders import get_autoencoder
from repulsor_jax.data.latents import LatentFormat
from repulsor_jax.evaluation.evaluator import Evaluator, evaluate_params
from repulsor_jax.evaluation.features import FeatureSpace, pixel_space
from repulsor_jax.evaluation.frechet import GaussianStatistics
from repulsor_jax.evaluation.image_sets import npz_images
from repulsor_jax.evaluation.measure import Reference, image_reference, make_extractor
from repulsor_jax.evaluation.yardstick import Yardstick
from repulsor_jax.experiment import Experiment
from repulsor_jax.files.pictures import save_samples
from repulsor_jax.flows import paths
from repulsor_jax.inference.generator import Guidance, SamplingError, make_generator
from tests.oracles import tiny
from tests.oracles.closed_form import Mixture, exact

# Class k has the mean MEANS[k] in every value, and the deviation STD.
MEANS, STD, DIM = np.array([-0.3, 0.0, 0.45]), 0.12, 4 * 4 * 3


class ExactModel:
    """The velocity of the flow to each class's Gaussian."""

    segments = 1  # as of a `DiT`

    def apply(self, variables, x, t, labels):
        path = paths.get_path("linear")
        of_class = [
            exact(path, x, t, Mixture((1.0,), (mean,), (STD,)))["velocity"] for mean in MEANS
        ]
        # With its class given, every value is Gaussian on its own.
        one_hot = jax.nn.one_hot(labels, len(MEANS))
        return jnp.einsum("bk,kbhwc->bhwc", one_hot, jnp.stack(of_class))


class BrokenModel:
    """NaN for the last class."""

    segments = 1

    def apply(self, variables, x, t, labels):
        return jnp.where(labels[:, None, None, None] == 2, jnp.nan, x)


@functools.cache
def parts(devices=8, batch_size=400, solver="euler", num_steps=5, model=ExactModel):
    """An experiment, its generator and the pixels' space with its extractor, compiled once."""
    options = {"solver": solver, "num_steps": num_steps, "batch_size": batch_size}
    mesh = tiny.mesh(devices)
    experiment = Experiment(
        config=tiny.config(
            model__in_channels=3, **{f"sampling__{key}": value for key, value in options.items()}
        ),
        workdir=pathlib.Path(),
        mesh=mesh,
        model=model(),
        autoencoder=get_autoencoder("identity"),
        latent_format=LatentFormat(False, np.zeros(3, np.float32), np.ones(3, np.float32)),
        latents_sha256="",
        class_names=("a", "b", "c"),
    )
    space = pixel_space(DIM)
    return experiment, make_generator(experiment), space, make_extractor(space, mesh)


def evaluator(folder, reference, *options, extract=None, **more):
    experiment, generator, space, extractor = parts(*options, **more)
    yardstick = Yardstick(folder, space, extract or extractor, reference)
    return Evaluator(experiment, generator, yardstick)


def known_distribution(shift=0.0, scale=1.0):
    """Moments of the mixture, all classes alike, moved and stretched."""
    mean = np.full(DIM, MEANS.mean())
    covariance = STD**2 * np.eye(DIM) + MEANS.var() * np.ones((DIM, DIM))
    gaussian = GaussianStatistics(mean + shift, scale**2 * covariance, None)
    return Reference({"name": "known", "digest": f"{shift} {scale}", "images": None}, gaussian)


def measure(evaluator, count, guidance=None):
    found = evaluate_params(
        evaluator, {}, guidance, step=1, weights_sha256="exact", num_samples=count
    )
    return found["metrics"]["frechet_pixels"]


def test_an_exact_model_has_the_distance_of_the_known_distribution(tmp_path):
    """The whole chain against closed forms: labels, noise, solver, rounding, features, distance.

    Of N samples of a Gaussian, the mean is off by tr(C) / N, and the Fréchet distance of the
    covariances by sum_ij E_ij^2 / (2 (l_i + l_j)) in its eigenbasis, with E_ij^2 of l_i l_j / N,
    twice that on the diagonal.
    """
    count, rk4 = 6000, {"solver": "rk4", "num_steps": 20}
    eigenvalues = np.full(DIM, STD**2)
    eigenvalues[0] += DIM * MEANS.var()
    pairs = np.outer(eigenvalues, eigenvalues) * (1 + np.eye(DIM))
    error = eigenvalues.sum() + (pairs / (2 * np.add.outer(eigenvalues, eigenvalues))).sum()
    error /= count
    found = measure(evaluator(tmp_path, known_distribution(), **rk4), count)
    # Balanced classes make the largest eigenvalue's share of the error smaller than by chance.
    assert 0.5 * error < found < 1.3 * error
    # Euler's few steps leave the samples too narrow: the distance says so.
    crude = evaluator(tmp_path, known_distribution(), num_steps=3)
    assert measure(crude, count) > 3 * found

    total = eigenvalues.sum()
    for shift, scale, expected in [
        (0.2, 1.0, DIM * 0.2**2),
        (0.0, 2.0, total * (2 - 1) ** 2),
        (0.1, 0.5, DIM * 0.1**2 + total * (1 - 0.5) ** 2),
    ]:
        moved = evaluator(tmp_path, known_distribution(shift, scale), **rk4)
        assert abs(measure(moved, count) / expected - 1) < 0.05, (shift, scale)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 400), (2, 400), (8, 120)])
def test_any_mesh_and_batch_size_give_the_same_number(tmp_path, devices, batch_size):
    found = [
        measure(evaluator(tmp_path / f"{k}", known_distribution(0.1), *sizes), 700)
        for k, sizes in enumerate([(8, 400), (devices, batch_size)])
    ]
    assert abs(found[0] / found[1] - 1) < 1e-4  # a value in a thousand may round the other way


@pytest.mark.parametrize(("killed_in", "left"), [(4, 13), (7, 8)])
def test_a_stopped_feature_pass_goes_on_and_gives_the_same_number(tmp_path, killed_in, left):
    """2,500 samples are 13 batches of 200, kept 1,000 at a time."""
    options = {"batch_size": 200}
    whole = measure(evaluator(tmp_path / "a", known_distribution(), **options), 2500)
    made, extractor = [], parts(**options)[-1]

    def extract(images):
        made.append(1)
        if len(made) == killed_in:
            raise KeyboardInterrupt
        return extractor(images)

    stopped = evaluator(tmp_path / "b", known_distribution(), extract=extract, **options)
    with pytest.raises(KeyboardInterrupt):
        measure(stopped, 2500)
    assert not list((tmp_path / "b").glob("*.json"))
    killed_in = 0
    made.clear()
    assert measure(stopped, 2500) == whole
    assert len(made) == left
    names = {path.name for path in (tmp_path / "b").iterdir()} - {".locks"}
    assert [pathlib.PurePath(name).suffix for name in names] == [".json"]

    made.clear()
    assert measure(stopped, 2500) == whole  # read from its record
    assert not made


def test_samples_that_are_not_finite_are_an_error(tmp_path):
    broken = evaluator(tmp_path, known_distribution(), model=BrokenModel)
    with pytest.raises(SamplingError, match="sample 2 is not finite, nor are 132 others"):
        measure(broken, 600)


def test_a_sweep_compiles_once(tmp_path):
    compiled, counts, found = [], [], []

    def listen(event, *rest, **more):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    swept = evaluator(tmp_path, known_distribution(), batch_size=80)
    for guidance in (1.5, 0.0, 1.0), (3.0, 0.0, 1.0), (3.0, 0.2, 0.7), (1.0, 0.0, 1.0):
        before = len(compiled)
        found.append(measure(swept, 80, Guidance(*guidance)))
        counts.append(len(compiled) - before)
    assert counts[0] > 0
    assert counts[1:] == [0] * 3
    assert len(set(found)) == 4
    # Scale 1 of the guided program is the program without guidance.
    np.testing.assert_allclose(found[3], measure(swept, 80), rtol=1e-3)


# ---- A reference, computed once.

PICTURES = np.random.default_rng(0).integers(0, 256, (2100, 4, 4, 3), np.uint8)


def scaled_space(weight):
    """A space whose features, 4 values of a picture, are multiplied by its weight."""
    apply = lambda params, images: {"pool": params * images.reshape(len(images), -1)[:, :4]}
    return FeatureSpace("pixels", str(weight), jnp.float32(weight), apply)


def picture_reference(folder, extract=None, weight=1):
    """The reference that the pictures are, in 5 batches, kept 1,024 at a time."""
    path, space, mesh = folder / "real.npz", scaled_space(weight), tiny.mesh(8)
    if not path.exists():
        save_samples(path, [PICTURES], np.zeros(len(PICTURES)))
    return image_reference(
        npz_images(path),
        keep=2100,
        batch_size=512,
        space=space,
        extract=extract or make_extractor(space, mesh),
        mesh=mesh,
        cache=folder / "cache",
    )


def test_a_killed_reference_is_not_continued_with_other_features(tmp_path):
    """Half of the features of one weight, then all of another: none of the first is used."""
    calls, extractor = [], make_extractor(scaled_space(1), tiny.mesh(8))

    def killed(images):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return extractor(images)

    with pytest.raises(KeyboardInterrupt):
        picture_reference(tmp_path, killed)
    found = picture_reference(tmp_path, weight=2)
    np.testing.assert_allclose(found.features, 2.0 * PICTURES.reshape(2100, -1)[:, :4])


def test_two_jobs_compute_a_reference_once_and_a_damaged_one_anew(tmp_path):
    """As a run that evaluates and another that follows it do."""
    started, go_on, calls = threading.Event(), threading.Event(), []
    extractor = make_extractor(scaled_space(1), tiny.mesh(8))

    def extract(images):
        calls.append(1)
        started.set()
        assert go_on.wait(60)
        return extractor(images)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(picture_reference, tmp_path, extract)
        assert started.wait(60)
        second = pool.submit(picture_reference, tmp_path, extract)
        time.sleep(0.2)  # it waits meanwhile
        go_on.set()
        found = first.result(60), second.result(60)
    assert len(calls) == 5  # batches of one pass
    np.testing.assert_array_equal(found[0].features, found[1].features)
    wide = PICTURES.reshape(2100, -1)[:, :4].astype(np.float64)
    np.testing.assert_allclose(found[1].pool.covariance, np.cov(wide.T))

    (kept,) = (tmp_path / "cache").rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-30])
    again = picture_reference(tmp_path, extract)
    assert len(calls) == 10
    np.testing.assert_array_equal(again.pool.covariance, found[0].pool.covariance)
