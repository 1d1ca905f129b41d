"""Builds, from a checked configuration, the parts that the modes share; refuses bad input early."""

import dataclasses
import pathlib

import jax
from jax.sharding import Mesh

from repulsor_jax import config as config_lib
from repulsor_jax import regularizers, sampling, sharding
from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data import latent_dataset
from repulsor_jax.data.latent_dataset import LatentDataset
from repulsor_jax.encode import data_directory, encode, load_autoencoder
from repulsor_jax.models.dit import DiT
from repulsor_jax.train_state import build_model
from repulsor_jax.train_step import LatentFormat


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training and sampling have in common.

    The autoencoder is absent where the configuration asks for no pictures.
    """

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    model: DiT
    autoencoder: Autoencoder | None
    dataset: LatentDataset
    held_out: LatentDataset | None
    latent_format: LatentFormat


def prepare(config: Config, workdir: pathlib.Path, *, draws_pictures: bool) -> Experiment:
    """Checks the configuration against the devices and the data, and builds the shared parts.

    Args:
      config: the configuration.
      workdir: of the run.
      draws_pictures: whether latents will be decoded: whether the autoencoder must be there.

    Raises:
      ConfigError, ValueError, FileNotFoundError: one message that names the key or the file.
    """
    config_lib.check_choice("sampling.solver", config.sampling.solver, sampling.SOLVERS)
    regularizers.check(config)
    try:
        mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error
    batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    config_lib.check_devices(config, batch_shards, jax.process_count())
    data_dir = data_directory(config, workdir)
    if config.data.encode_if_missing:
        encode(config, workdir)
    dataset = latent_dataset.open_latent_dataset(data_dir / "train")
    check_dataset(config, dataset)
    has_held_out = (data_dir / "test").exists()
    held_out = latent_dataset.open_latent_dataset(data_dir / "test") if has_held_out else None
    if held_out is None and config.evaluation.every_steps:
        raise ConfigError(
            f"config.evaluation needs held-out data, and {data_dir / 'test'} is absent: encode a "
            "test split, or set config.evaluation.every_steps=0"
        )
    if held_out is not None:
        check_dataset(config, held_out)
        _check_same_origin(dataset, held_out)
    autoencoder = load_autoencoder(config) if draws_pictures else None
    if autoencoder is not None:
        _check_weights(autoencoder, dataset)
    if config.data.verify:
        for each in (dataset, held_out):
            if each is not None:
                latent_dataset.verify(
                    each,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    progress=jax.process_index() == 0,
                )
    shift, factor = latent_dataset.normalization(dataset, config.data.normalization)
    return Experiment(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=build_model(config.model),
        autoencoder=autoencoder,
        dataset=dataset,
        held_out=held_out,
        latent_format=LatentFormat(dataset.stochastic, shift, factor),
    )


def draws_pictures(config: Config) -> bool:
    """Whether training draws grids or evaluates, and so needs the autoencoder."""
    return config.sampling.grid_every_steps > 0 or config.evaluation.every_steps > 0


def check_dataset(config: Config, dataset: LatentDataset) -> None:
    """Raises ConfigError unless the model is one for these latents and classes."""
    m = config.model
    expected = (m.latent_size, m.latent_size, m.in_channels)
    if dataset.latent_shape != expected:
        raise ConfigError(
            f"{dataset.directory} holds latents of shape {dataset.latent_shape}, but "
            f"config.model.latent_size and config.model.in_channels ask for {expected}"
        )
    if dataset.autoencoder != config.data.autoencoder:
        raise ConfigError(
            f"{dataset.directory} was encoded with {dataset.autoencoder!r}, but "
            f"config.data.autoencoder={config.data.autoencoder!r}"
        )
    if len(dataset.class_names) > m.num_classes:
        raise ConfigError(
            f"{dataset.directory} has {len(dataset.class_names)} classes, but "
            f"config.model.num_classes={m.num_classes}"
        )


def _check_same_origin(dataset: LatentDataset, held_out: LatentDataset) -> None:
    """Raises ConfigError unless both were made by one autoencoder, with one meaning of labels."""
    for field in ("autoencoder", "weights_sha256", "image_size", "stochastic"):
        one, other = getattr(dataset, field), getattr(held_out, field)
        if one != other:
            raise ConfigError(
                f"{dataset.directory} and {held_out.directory} are of different origin: {field} "
                f"{one!r} and {other!r}; encode one of them again"
            )
    classes = dataset.class_names, held_out.class_names
    if classes[0] != classes[1] and min(map(len, classes)) > 1:
        raise ConfigError(
            f"{dataset.directory} and {held_out.directory} have different classes, "
            f"{len(classes[0])} and {len(classes[1])} of them: their labels do not mean the same"
        )


def _check_weights(autoencoder: Autoencoder, dataset: LatentDataset) -> None:
    found, expected = autoencoder.weights_sha256, dataset.weights_sha256
    if expected and found != expected:
        raise ConfigError(
            f"{dataset.directory} was encoded with weights of {autoencoder.name!r} whose SHA-256 "
            f"is {expected[:12]}..., but those of config.data.autoencoder_weights have "
            f"{found[:12]}...: give the same weights, or encode again"
        )
