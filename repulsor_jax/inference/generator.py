"""Pictures from a trained model: noise and labels by index, the solver, the decoder, uint8.

Inference knows nothing of training: it takes EMA parameters, and neither head nor bank.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax import sharding
from repulsor_jax.autoencoders import decode_in_slices
from repulsor_jax.config import Config, ConfigError, SamplingConfig
from repulsor_jax.data import conditioning
from repulsor_jax.data.classes import find, readable
from repulsor_jax.data.latents import denormalize
from repulsor_jax.experiment import Experiment
from repulsor_jax.files.pictures import save_grid, to_uint8
from repulsor_jax.files.shards import in_batches, one_late
from repulsor_jax.flows import paths, sampler, solvers
from repulsor_jax.flows.source import Source
from repulsor_jax.inference import tasks
from repulsor_jax.models.blockwise import Blockwise
from repulsor_jax.models.build import build_source
from repulsor_jax.models.dit import DiT, tokens_after
from repulsor_jax.train_state import abstract_model_params


class SamplingError(RuntimeError):
    """A sample that is not finite; the message names the sample and says what to do."""


class Guidance(NamedTuple):
    """The scale of guidance, and its first and last time; other numbers compile nothing."""

    scale: float
    low: float = 0.0
    high: float = 1.0


class Samples(NamedTuple):
    """One batch, on the devices, sharded on its rows."""

    images: jax.Array  # uint8 [B, H, W, C]
    labels: jax.Array  # int32 [B]
    finite: jax.Array  # bool [B]; False where the latent was not finite: the image means nothing


@dataclasses.dataclass(frozen=True)
class Guide:
    """The weak model of autoguidance, its EMA parameters, and its protocol for reports."""

    model: DiT
    params: Any
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Generator:
    """Samples by number: image i depends on `(config.sampling.seed, i)` and the model alone."""

    batch_size: int  # rows of one call, of one compiled program
    # (EMA parameters, first number, guidance or None) -> `Samples` of `batch_size` numbers from the
    # first on. Returns at once. Without guidance the model is evaluated once a step.
    start: Callable[[Any, int, Guidance | None], Samples]
    guide: Guide | None = None  # None guides by the model without a class
    # Count -> pictures of what the first samples are drawn for, on every process; see `tasks`.
    pictures: Callable[[int], tuple[np.ndarray, ...]] | None = None


def configured_guidance(config: SamplingConfig) -> Guidance | None:
    """The guidance of `config.sampling`; None where it is off."""
    if config.cfg_scale == 1.0:
        return None
    return Guidance(config.cfg_scale, config.cfg_interval_low, config.cfg_interval_high)


def make_generator(
    experiment: Experiment, guide: Guide | None = None, *, gathers: bool = True
) -> Generator:
    """Builds the generator of an experiment with an autoencoder; its first call compiles.

    Where `gathers` is False, parameters stay in shards whatever `config.sampling.gather_params`
    says, as beside a training state, which takes the memory.
    """
    mesh, everywhere = experiment.mesh, sharding.replicated(experiment.mesh)
    task = tasks.open_task(experiment)
    generate = make_batch_fn(experiment, guide.model if guide else None, gathers=gathers)
    compiled = jax.jit(generate, out_shardings=sharding.batch_sharding(mesh))
    assert experiment.autoencoder is not None
    decoder_params = jax.device_put(experiment.autoencoder.params, everywhere)
    batch_size = experiment.config.sampling.batch_size

    def read(first: int) -> Any:
        if task is None:
            return None
        own = (sharding.local_row_numbers(mesh, batch_size) + first) % task.count
        with sharding.raised_on_all():  # each process reads its own
            found = task.read(own)
        return sharding.to_global(found, mesh)

    def start(params: Any, first: int, guidance: Guidance | None) -> Samples:
        row = jax.device_put(np.int32(first), everywhere)
        guiding_params = numbers = None  # without guidance, a guide would be computed for nothing
        if guidance is not None:
            guiding_params = guide and guide.params
            numbers = tuple(jax.device_put(np.float32(x), everywhere) for x in guidance)
        with sharding.use_mesh(mesh):
            return compiled(params, guiding_params, decoder_params, row, numbers, read(first))

    if task is None:
        return Generator(batch_size, start, guide)
    show = jax.jit(tasks.make_pictures(experiment, _decoder(experiment)), out_shardings=everywhere)

    def pictures(count: int) -> tuple[np.ndarray, ...]:
        found = []
        for first in range(0, count, batch_size):
            numbers = jax.device_put(
                np.arange(first, first + batch_size, dtype=np.int32), everywhere
            )
            with sharding.use_mesh(mesh):
                found.append(sharding.to_host(show(decoder_params, read(first), numbers)))
        return tuple(np.concatenate(each)[:count] for each in zip(*found, strict=True))

    return Generator(batch_size, start, guide, pictures)


def make_batch_fn(
    experiment: Experiment, guiding_model: DiT | None = None, *, gathers: bool = True
) -> Callable[..., Samples]:
    """Returns the pure function that a `Generator` compiles: noise to images, one batch.

    Its arguments are the EMA parameters, those of the guide or None, the autoencoder's, the first
    number, None or the three float32 numbers of a `Guidance`, and what `tasks.Task.read` gives of
    the items that the samples are for, or None.
    """
    config, mesh, latent_format = experiment.config, experiment.mesh, experiment.latent_format
    c = config.sampling
    decode = _decoder(experiment)
    solve = make_latent_sampler(config, experiment.model, guiding_model, experiment.latent_mean)
    shape = (config.model.latent_size, config.model.latent_size, config.model.in_channels)
    classes = present_classes(experiment)  # a model may have room for more
    rows = sharding.batch_sharding(mesh)
    unsplit = None
    if not gathers and config.mesh.split_update:  # a training state's are split over `data`
        source = build_source(config.source, config.model)
        shapes = abstract_model_params(experiment.model, source, mesh)
        unsplit = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    gathers = gathers and c.gather_params and mesh.shape["tensor"] == 1
    prepare = tasks.make_prepare(experiment, decode) if tasks.has_task(config) else None

    def generate(
        params: Any,
        guiding_params: Any,
        decoder_params: Any,
        first: jax.Array,
        guidance: Any,
        given: tasks.Given | None = None,
    ) -> Samples:
        constrain = jax.lax.with_sharding_constraint
        if gathers:  # here, not in every evaluation of the model
            params, guiding_params = constrain((params, guiding_params), sharding.replicated(mesh))
        elif unsplit is not None:
            params = constrain(params, unsplit)
        indices = constrain(jnp.arange(c.batch_size, dtype=jnp.int32) + first, rows)
        labels = sampler.sample_labels(c.seed, indices, len(classes), c.labels)
        if classes != [*range(len(classes))]:
            labels = jnp.asarray(classes, jnp.int32)[labels]
        noise = sampler.initial_noise(c.seed, indices, shape)
        keys = sampler.brownian_keys(c.seed, indices) if c.solver in solvers.SDE_STEPS else None
        scale, interval = (None, None) if guidance is None else (guidance[0], guidance[1:])
        optional: dict[str, Any] = {"keys": keys, "guiding_params": guiding_params}
        shown = None
        if prepare is not None and given is not None:
            shown = prepare(decoder_params, given, indices)
            labels = labels if shown.labels is None else shown.labels
            optional |= {"extras": shown.extras, "known": shown.known}
        latents = solve(params, noise, labels, scale, interval, **optional)
        finite = jnp.isfinite(latents).all(axis=(1, 2, 3))
        images = decode(decoder_params, denormalize(latents, latent_format))
        pictures = jnp.asarray(to_uint8(images, c.rounding))
        if shown is not None and shown.mask is not None and shown.original is not None:
            pictures = conditioning.composite(shown.mask, pictures, shown.original)
        return Samples(pictures, labels, finite)

    return generate


def _decoder(experiment: Experiment) -> Callable[[Any, jax.Array], jax.Array]:
    """The autoencoder's decoder, some latents at a time where that is configured."""
    assert experiment.autoencoder is not None
    decode, size = experiment.autoencoder.decode, experiment.config.sampling.decode_slice
    return functools.partial(decode_in_slices, decode, slice_size=size) if size else decode


def present_classes(experiment: Experiment) -> list[int]:
    """The labels that are sampled: the configured, else all of which the data set has images.

    Raises:
      ConfigError: the configuration names a class that is not there.
    """
    if wanted := experiment.config.sampling.classes:
        try:
            return list(find(experiment.class_names, wanted))
        except ValueError as error:
            raise ConfigError(f"config.sampling.classes: {error}") from error
    return sorted({*range(len(experiment.class_names))} - {*experiment.absent_classes})


def make_latent_sampler(
    config: Config,
    model: DiT,
    guiding_model: DiT | None = None,
    latent_mean: Sequence[float] = (),
    *,
    trajectory: bool = False,
) -> Callable[..., jax.Array]:
    """Returns the configured sampler of latents; see `sampler.make_sampler` for its call.

    With `trajectory` it gives the latents at all times, see `SamplerSpec`.

    Raises:
      ConfigError: the velocity is to be scaled about the mean latent, and that is not known.
    """
    c = config.sampling

    def predict_with(model: DiT, is_guide: bool = False) -> Callable[..., Any]:
        def predict(params: Any, *inputs: Any, segment: Any = None, **extras: Any) -> Any:
            if segment is not None and isinstance(model, Blockwise):
                extras["segment"] = segment
            if is_guide:  # the guide's trunk is run at every step
                extras.pop("start", None)
            return model.apply({"params": params}, *inputs, **extras)

        return predict

    start_fn = None
    if isinstance(model, Blockwise) and model.residual_depth:

        def start_fn(params: Any, x: Any, t: Any, labels: Any, **extras: Any) -> Any:
            return tokens_after(model, params, x, t, labels, (model.depth - 1,), extras)[0]

    if c.velocity_scale != 1.0 and not latent_mean:
        raise ConfigError(
            f"config.sampling.velocity_scale={c.velocity_scale}: an older version trained this "
            "run, and did not keep the mean of its latents; set it to 1"
        )
    spec = sampler.SamplerSpec(
        paths.get_path(config.flow.path),
        null_label=config.model.num_classes,
        prediction=config.flow.prediction,
        solver=c.solver,
        num_steps=c.num_steps,
        channels=c.cfg_channels or None,
        time_shift=c.time_shift,
        velocity_scale=c.velocity_scale,
        mean_velocity=tuple(latent_mean),
        tolerance=solvers.Tolerance(c.rtol, c.atol, c.max_steps),
        diffusion=solvers.Diffusion(
            c.diffusion_form, c.diffusion_norm, c.last_step, c.last_step_size
        ),
        num_segments=model.segments,
        trajectory=trajectory,
    )
    source: Any = build_source(config.source, config.model)

    def source_fn(params: Any, labels: jax.Array) -> Source:
        return Source(*source.apply({"params": params["source"]}, labels))

    guiding_fn = predict_with(guiding_model, is_guide=True) if guiding_model else None
    return sampler.make_sampler(
        predict_with(model), spec, guiding_fn, None if source is None else source_fn, start_fn
    )


def check_trajectory(config: Config) -> None:
    """Raises ConfigError where the solver has no fixed steps, or samples are for given images."""
    solver = config.sampling.solver
    if solver not in solvers.ODE_STEPS or tasks.has_task(config):
        c = config.conditioning
        raise ConfigError(
            f"--trajectory follows {', '.join(solvers.ODE_STEPS)} without given images: found "
            f"config.sampling.solver={solver!r}, config.conditioning.kind={c.kind!r} and "
            f"filling={c.filling!r}"
        )


def trajectory(
    experiment: Experiment, params: Any, guide: Guide | None = None, most: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """The first `sampling.grid_columns` samples on their way from noise; `check_trajectory`.

    Args:
      experiment, params, guide: as of `make_generator` and a `Generator`.
      most: of the times of the solver's grid.

    Returns:
      uint8 images [times, samples, H, W, C] on every process, and their times.
    """
    config, c = experiment.config, experiment.config.sampling
    weak = guide.model if guide else None
    solve = make_latent_sampler(
        config, experiment.model, weak, experiment.latent_mean, trajectory=True
    )
    classes = jnp.asarray(present_classes(experiment), jnp.int32)
    shape = (config.model.latent_size, config.model.latent_size, config.model.in_channels)
    kept = np.unique(np.linspace(0, c.num_steps, most).round().astype(int))
    guidance = configured_guidance(c)
    scale, interval = (None, None) if guidance is None else (guidance[0], guidance[1:])
    assert experiment.autoencoder is not None
    decode = experiment.autoencoder.decode

    def states(params: Any, guiding_params: Any) -> jax.Array:
        indices = jnp.arange(c.grid_columns, dtype=jnp.int32)
        labels = classes[sampler.sample_labels(c.seed, indices, len(classes), c.labels)]
        noise = sampler.initial_noise(c.seed, indices, shape)
        return solve(params, noise, labels, scale, interval, guiding_params=guiding_params)[kept]

    def pictures(decoder_params: Any, latents: jax.Array) -> jax.Array:
        images = decode(decoder_params, denormalize(latents, experiment.latent_format))
        return jnp.asarray(to_uint8(images, c.rounding))

    everywhere = sharding.replicated(experiment.mesh)
    with sharding.use_mesh(experiment.mesh):
        latents = jax.jit(states, out_shardings=everywhere)(
            params, guide.params if guide and guidance else None
        )
        decoder_params = jax.device_put(experiment.autoencoder.params, everywhere)
        shown = jax.jit(pictures, out_shardings=everywhere)
        found = [np.asarray(shown(decoder_params, frame)) for frame in latents]
    times = solvers.time_grid(
        c.num_steps,
        *paths.time_interval(
            paths.get_path(config.flow.path), config.flow.prediction, sampling=True
        ),
        c.time_shift,
    )
    return np.stack(found), times[kept]


def draw_batches(
    generator: Generator,
    params: Any,
    parts: Sequence[range],
    guidance: Guidance | None,
    extract: Callable[[jax.Array], dict[str, jax.Array]] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Draws the samples of each part, in batches that never cross from one part to the next.

    Args:
      generator, params: of the samples; EMA parameters.
      parts: numbers of samples.
      guidance: None draws them without guidance.
      extract: images on the devices -> arrays `[B, ...]` by name, yielded in place of "images" and
        "labels".

    Yields:
      The arrays of one batch, on the host of every process.

    Raises:
      SamplingError: a sample is not finite.
    """

    def started() -> Iterator[tuple[range, Any]]:
        for numbers in in_batches(parts, generator.batch_size):
            samples = generator.start(params, numbers.start, guidance)
            drawn = {"images": samples.images, "labels": samples.labels}
            yield numbers, (extract(samples.images) if extract else drawn, samples.finite)

    for numbers, device_arrays in one_late(started()):
        arrays, finite = sharding.to_host(device_arrays)
        bad = np.flatnonzero(~finite[: len(numbers)])
        if bad.size:
            raise SamplingError(
                f"sample {numbers[bad[0]]} is not finite, nor are {bad.size - 1} others of "
                f"{len(numbers)}: the model's output is NaN or infinite (evaluate an earlier "
                "checkpoint, or config.model.dtype='float32'), or config.sampling.max_steps of "
                "dopri5 were not enough"
            )
        yield {name: array[: len(numbers)] for name, array in arrays.items()}


def generate_images(
    generator: Generator, params: Any, count: int, guidance: Guidance | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the first samples, on every process: uint8 `[count, H, W, C]` and labels `[count]`.

    Raises:
      SamplingError: a sample is not finite.
    """
    found = list(draw_batches(generator, params, [range(count)], guidance))
    images, labels = (np.concatenate([part[name] for part in found]) for name in found[0])
    return images, labels


def write_grid(
    experiment: Experiment,
    path: pathlib.Path,
    images: np.ndarray,
    labels: np.ndarray,
    pictures: tuple[np.ndarray, ...] = (),
) -> None:
    """Writes a PNG of images; columns bear classes' names where each is of one class, else images.

    For chosen classes the number of columns is a multiple of theirs.

    With `pictures` of `Generator.pictures` each image stands between those of what it is for.
    """
    if pictures:
        _write_beside(experiment, path, (pictures[0], images, *pictures[1:]))
        return
    config, names = experiment.config.sampling, readable(experiment.class_names)
    columns = config.grid_columns
    count = len(present_classes(experiment))
    if config.classes and config.labels == "balanced" and count <= max(columns, 16):
        columns = max(1, columns // count) * count
    by_class = columns % count == 0 and columns <= len(labels) and config.labels == "balanced"
    save_grid(
        images,
        path,
        columns=columns,
        upscale=max(1, 48 // images.shape[1]),
        smooth=True,
        column_labels=[names[k] for k in labels[:columns]] if by_class else None,
        captions=None if by_class or len(names) == 1 else [names[k] for k in labels],
    )


def _write_beside(experiment: Experiment, path: pathlib.Path, each: tuple[np.ndarray, ...]) -> None:
    """Writes a PNG in which the images of a number follow each other in a row."""
    channels = max(x.shape[-1] for x in each)
    same = [np.repeat(x, channels // x.shape[-1], axis=-1) for x in each]
    images = np.stack(same, axis=1).reshape(-1, *same[0].shape[1:])
    columns = len(each) * max(1, experiment.config.sampling.grid_columns // len(each))
    names = ["map", "drawn", "image"] if experiment.config.conditioning.kind == "semantic" else []
    names = (names or ["hole", "filled", "image"])[: len(each)]
    upscale = max(1, 48 // images.shape[1])
    labels = names * (columns // len(each))
    save_grid(images, path, columns=columns, upscale=upscale, smooth=True, column_labels=labels)
