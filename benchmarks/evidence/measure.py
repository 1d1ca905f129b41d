"""Measures the checkpoints of runs: held-out flow loss, distances, copies, what the tokens know."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evidence.classifier import Trained, classify
from benchmarks.evidence.pictures import Pictures, to_floats
from repulsor_jax.config import Config
from repulsor_jax.evaluation.frechet import GaussianStatistics, fit_gaussian, frechet_distance
from repulsor_jax.experiment import Experiment
from repulsor_jax.files import atomic
from repulsor_jax.flows.paths import get_path, interpolate, target_velocity
from repulsor_jax.flows.source import Source, sample
from repulsor_jax.inference import run
from repulsor_jax.inference.generator import Generator, generate_images, make_generator
from repulsor_jax.method import diagnostics
from repulsor_jax.models.blockwise import segment_of
from repulsor_jax.models.build import build_source
from repulsor_jax.models.dit import tokens_after

Array = jax.Array
BATCH = 500  # rows of one call
BINS = 10  # of t, each 0.1 wide
HELD_OUT = 2_000  # pictures of the flow loss, and of the test of the probe
PROBED = 5_000  # training pictures that the probe is fitted to
PROBE_TIME = 0.75  # little noise, where the tokens know most


@dataclasses.dataclass
class Yardstick:
    """What every run of a bench is measured by, and what is compiled for it, kept between runs."""

    pictures: Pictures
    trained_on: int  # of the training pictures, the first
    classifier: Trained
    num_samples: int

    def __post_init__(self) -> None:
        self.pixels = _fit(self.pictures.test)
        self.features = fit_gaussian([classify(self.classifier, self.pictures.test)[1]])
        shown = self.pictures.train[: self.trained_on]
        self.copies_floor = nearest(self.pictures.test[: self.num_samples], shown)
        self.tools: dict[str, _Tools] = {}  # by what of a configuration they are made for

    def floor(self) -> dict[str, float]:
        """What real pictures get: as many as are sampled, the last ones of the training split."""
        return self.compare(self.pictures.train[-self.num_samples :])

    def compare(self, images: np.ndarray) -> dict[str, float]:
        """Distances of images, uint8, to all held-out pictures; how near the trained ones are."""
        shown = self.pictures.train[: self.trained_on]
        near = nearest(images, shown)
        return {
            "pixels": frechet_distance(_fit(images), self.pixels),
            "features": frechet_distance(
                fit_gaussian([classify(self.classifier, images)[1]]), self.features
            ),
            # 1 is the distance of a held-out picture; copies of training pictures have 0.
            "nearest": float(np.median(near) / np.median(self.copies_floor)),
            # 0.01 of held-out pictures are as near; copies have 1.
            "near_copies": float(np.mean(near < np.quantile(self.copies_floor, 0.01))),
        }


class _Held(NamedTuple):
    """Held-out pictures, each with its noise and time: the same for every run."""

    data: Array
    noise: Array
    t: Array
    labels: Array


def measure_run(
    config: Config,
    workdir: pathlib.Path,
    yardstick: Yardstick,
    scales: Sequence[float],
    last: int,
) -> dict[int, dict[str, Any]]:
    """Measures all checkpoints of a run; keeps the numbers in `<workdir>/measure_<step>.json`.

    Args:
      config: of the run, its protocol of sampling included.
      workdir: of the run.
      yardstick: of the bench.
      scales: of the velocity, beside 1, at the step `last` alone.

    Returns:
      step -> numbers by name; "features@1.05" is the distance with a velocity scaled by 1.05.
    """
    found = {}
    with run.open_checkpoints(config, workdir) as checkpointer:
        for step in checkpointer.steps():
            path = workdir / f"measure_{step}.json"
            known = json.loads(path.read_text()) if path.is_file() else {}
            wanted = [1.0, *(scales if step == last else ())]
            todo = [s for s in wanted if f"features@{s:g}" not in known]
            if todo:
                parts = (config.model, config.flow, config.source, config.sampling)
                if (kind := repr(parts)) not in yardstick.tools:
                    experiment = run.open_experiment(config, workdir, checkpointer, step)
                    yardstick.tools[kind] = _Tools(yardstick, experiment)
                tools = yardstick.tools[kind]
                params = run.restore_params(tools.experiment, checkpointer, step)
                known = known or tools.network(params)
                for scale in todo:
                    generator, count = tools.generator(scale), yardstick.num_samples
                    values = yardstick.compare(generate_images(generator, params, count, None)[0])
                    known |= {f"{name}@{scale:g}": value for name, value in values.items()}
                atomic.write_text(path, json.dumps(known, indent=1) + "\n")
            found[step] = known
    return found


def nearest(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Root mean square distance, pixels in [-1, 1], of each image to the nearest of others: [N]."""
    x, y = (to_floats(a).reshape(len(a), -1).astype(np.float64) for a in (images, among))
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squares.min(1), 0.0) / x.shape[1])


def _fit(images: np.ndarray) -> GaussianStatistics:
    return fit_gaussian([to_floats(images).reshape(len(images), -1)])


class _Tools:
    """What is compiled once for all runs of one model: a bench has one data set."""

    def __init__(self, yardstick: Yardstick, experiment: Experiment):
        self.experiment = experiment
        self.network = _make_network(yardstick, experiment)
        self.generator = functools.cache(self._make_generator)

    def _make_generator(self, scale: float) -> Generator:
        config = self.experiment.config
        sampling = dataclasses.replace(config.sampling, velocity_scale=scale)
        config = dataclasses.replace(config, sampling=sampling)
        return make_generator(dataclasses.replace(self.experiment, config=config))


def _make_network(yardstick: Yardstick, experiment: Experiment) -> Callable[[Any], dict[str, Any]]:
    """Returns EMA parameters -> flow loss by bins of t; probe, rank and cosine by block."""
    model, pictures = experiment.model, yardstick.pictures
    source: Any = build_source(experiment.config.source, experiment.config.model)
    path, classes = get_path(experiment.config.flow.path), experiment.config.model.num_classes
    blocks = tuple(range(experiment.config.model.depth))
    count = int(pictures.train_labels.max()) + 1
    train = _hold(pictures.train[:PROBED], pictures.train_labels[:PROBED], classes)
    test = _hold(pictures.test[:HELD_OUT], pictures.test_labels[:HELD_OUT], classes)
    answers = [
        jnp.asarray(a) for a in (pictures.train_labels[:PROBED], pictures.test_labels[:HELD_OUT])
    ]

    def predict(params: Any, x: Array, held: _Held) -> Array:
        inputs = {"params": params}, x, held.t, held.labels
        if model.segments == 1:
            found: Any = model.apply(*inputs)
            return found
        own, found = segment_of(held.t, model.segments)[:, None, None, None], jnp.zeros_like(x)
        for segment in range(model.segments):
            velocity: Any = model.apply(*inputs, segment=segment)
            found = jnp.where(own == segment, velocity, found)
        return found

    @jax.jit
    def flow_loss(params: Any, held: _Held) -> Array:
        x_0 = held.noise
        if source is not None:
            start = Source(*source.apply({"params": params["source"]}, held.labels))
            x_0 = sample(start, held.noise)
        x = interpolate(path, held.data, x_0, held.t)
        target = target_velocity(path, held.data, x_0, held.t)
        return jnp.square(predict(params, x, held) - target).mean((1, 2, 3))

    @jax.jit
    def pooled(params: Any, held: _Held) -> Array:
        t = jnp.full_like(held.t, PROBE_TIME)
        x = interpolate(path, held.data, held.noise, t)
        # The null class: a network that is told the label would pass it on to the probe.
        labels = jnp.full_like(held.labels, classes) if classes > 1 else held.labels
        tokens = tokens_after(model, params, x, t, labels, blocks)
        return jnp.stack([each.mean(1) for each in tokens], 1)

    @jax.jit
    def describe(ours: Array, theirs: Array) -> dict[str, Array]:
        return {
            "probe": diagnostics.ridge_probe(ours, answers[0], theirs, answers[1], count),
            "rank": diagnostics.effective_rank(theirs),
            "cosine": diagnostics.mean_cosine_between_samples(theirs),
        }

    def network(params: Any) -> dict[str, Any]:
        losses = _in_batches(flow_loss, params, test)
        bins = np.minimum((np.asarray(test.t) * BINS).astype(int), BINS - 1)
        ours, theirs = (_in_batches(pooled, params, held) for held in (train, test))
        found = [jax.device_get(describe(ours[:, b], theirs[:, b])) for b in blocks]
        return {
            "flow_loss": float(losses.mean()),
            "flow_loss_by_t": [float(losses[bins == b].mean()) for b in range(BINS)],
            **{f"{name}_by_block": [float(b[name]) for b in found] for name in found[0]},
        }

    return network


def _hold(images: np.ndarray, labels: np.ndarray, classes: int) -> _Held:
    """Times are spread evenly over [0, 1], in random order."""
    rng, count = np.random.default_rng(0), len(images)
    noise = rng.standard_normal(images.shape, np.float32)
    t = rng.permutation((np.arange(count, dtype=np.float32) + 0.5) / count)
    given = labels if classes > 1 else np.zeros_like(labels)
    return _Held(*map(jnp.asarray, (to_floats(images), noise, t, given)))


def _in_batches(function: Callable[[Any, _Held], Array], params: Any, held: _Held) -> np.ndarray:
    parts = [_Held(*(a[i : i + BATCH] for a in held)) for i in range(0, len(held.t), BATCH)]
    return np.concatenate([jax.device_get(function(params, part)) for part in parts])
