"""Pictures from a trained model: noise and labels by index, the solver, the decoder, uint8.

Inference knows nothing of training: it takes EMA parameters, and neither head nor bank.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from repulsor_jax import flow, sampling, sde, sharding, solvers
from repulsor_jax.autoencoders import Autoencoder, decode_in_slices, decode_in_tiles
from repulsor_jax.data.latent_dataset import denormalize
from repulsor_jax.experiment import Experiment
from repulsor_jax.images import save_grid, to_uint8

_MIN_PICTURE_SIZE = 48  # small images are enlarged to about this many dots

Generator = Callable[[Any, int], tuple[np.ndarray, np.ndarray]]


def make_generator(experiment: Experiment) -> Generator:
    """Returns `generate(ema_params, count) -> (images uint8 [count, H, W, C], labels [count])`.

    Image i depends on `(config.sampling.seed, i)` and the parameters alone. One program of
    `config.sampling.batch_size` rows is compiled at the first call and serves every count.
    """
    config, mesh, model = experiment.config, experiment.mesh, experiment.model
    c, latent_format = config.sampling, experiment.latent_format
    if experiment.autoencoder is None:
        raise ValueError("the experiment was prepared without an autoencoder to decode with")
    decode = _decoder(experiment.autoencoder, c.decode_slice, c.decode_tile)
    decoder_params = jax.device_put(experiment.autoencoder.params, sharding.replicated(mesh))

    def predict(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> Any:
        return model.apply({"params": params}, x, t, labels)

    solve = sampling.make_sampler(
        predict,
        flow.get_path(config.flow.path),
        prediction=config.flow.prediction,
        solver=c.solver,
        num_steps=c.num_steps,
        null_label=config.model.num_classes,
        channels=c.cfg_channels or None,
        time_shift=c.time_shift,
        tolerance=solvers.Tolerance(c.rtol, c.atol, c.max_steps),
        diffusion=sde.Diffusion(c.diffusion_form, c.diffusion_norm, c.last_step, c.last_step_size),
    )
    guided = c.cfg_scale != 1.0
    interval = np.array([c.cfg_interval_low, c.cfg_interval_high], np.float32)
    has_interval = guided and interval.tolist() != [0.0, 1.0]
    shape = (config.model.latent_size, config.model.latent_size, config.model.in_channels)

    def generate_batch(
        params: Any,
        decoder_params: Any,
        indices: jax.Array,
        scale: jax.Array | None,
        interval: jax.Array | None,
    ) -> tuple:
        labels = sampling.sample_labels(c.seed, indices, config.model.num_classes, c.labels)
        noise = sampling.initial_noise(c.seed, indices, shape)
        keys = sampling.brownian_keys(c.seed, indices) if c.solver in sde.STEPS else None
        latents = solve(params, noise, labels, scale, interval, keys=keys)
        latents = denormalize(latents, latent_format.shift, latent_format.factor)
        images = decode(decoder_params, latents)
        return to_uint8(images), labels

    compiled = jax.jit(generate_batch, out_shardings=sharding.replicated(mesh))

    def generate(params: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
        everywhere = sharding.replicated(mesh)
        scale = jax.device_put(np.float32(c.cfg_scale), everywhere) if guided else None
        between = jax.device_put(interval, everywhere) if has_interval else None
        batches = []
        for start in range(0, count, c.batch_size):
            indices = np.arange(start, start + c.batch_size, dtype=np.int32)
            with sharding.use_mesh(mesh):
                indices = jax.device_put(indices, sharding.batch_sharding(mesh))
                batch = compiled(params, decoder_params, indices, scale, between)
                batches.append(jax.device_get(batch))
        images, labels = zip(*batches, strict=True)
        return np.concatenate(images)[:count], np.concatenate(labels)[:count]

    return generate


def _decoder(
    autoencoder: Autoencoder, slice_size: int, tile: int
) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the decoder, made to take less memory where a slice or tile size is not 0."""
    decode = autoencoder.decode
    if tile:
        decode = functools.partial(decode_in_tiles, decode, tile=tile, overlap=tile // 4)
    if slice_size:
        decode = functools.partial(decode_in_slices, decode, slice_size=slice_size)
    return decode


def write_grid(
    experiment: Experiment, path: pathlib.Path, images: np.ndarray, labels: np.ndarray
) -> None:
    """Writes a PNG of the images; with balanced labels and a column per class, headed by them."""
    columns = experiment.config.sampling.grid_columns
    names = experiment.dataset.class_names
    by_class = columns == len(names) and experiment.config.sampling.labels == "balanced"
    save_grid(
        images,
        path,
        columns=columns,
        upscale=max(1, _MIN_PICTURE_SIZE // images.shape[1]),
        smooth=True,
        column_labels=[names[k] for k in labels[:columns]] if by_class else None,
    )
