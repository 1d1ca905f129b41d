"""Builds, from a checked configuration, the parts that the modes share; refuses bad input early."""

import dataclasses
import pathlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from repulsor_jax import config as config_lib
from repulsor_jax import regularizers, sampling, sharding
from repulsor_jax.autoencoders import Autoencoder, get_autoencoder
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data import latent_dataset
from repulsor_jax.data.encode import encode_dataset
from repulsor_jax.data.latent_dataset import LatentDataset
from repulsor_jax.data.sources import open_source
from repulsor_jax.models.dit import DiT
from repulsor_jax.train_state import build_model
from repulsor_jax.train_step import LatentFormat

ENCODE_BATCH_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training and sampling have in common."""

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    model: DiT
    autoencoder: Autoencoder
    dataset: LatentDataset
    held_out: LatentDataset | None
    latent_format: LatentFormat


def prepare(config: Config, workdir: pathlib.Path) -> Experiment:
    """Checks the configuration against the devices and the data, and builds the shared parts.

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
    autoencoder = _autoencoder(config)
    data_dir = data_directory(config, workdir)
    if config.data.encode_if_missing:
        encode(config, workdir)
    dataset = latent_dataset.open_latent_dataset(data_dir / "train")
    _check_dataset(config, dataset)
    has_held_out = (data_dir / "test").exists()
    held_out = latent_dataset.open_latent_dataset(data_dir / "test") if has_held_out else None
    if held_out is None and config.evaluation.every_steps:
        raise ConfigError(
            f"config.evaluation needs held-out data, and {data_dir / 'test'} is absent: encode a "
            "test split, or set config.evaluation.every_steps=0"
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


def data_directory(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Folder of the latent data set."""
    return pathlib.Path(config.data.dir) if config.data.dir else workdir / "data"


def encode(config: Config, workdir: pathlib.Path) -> None:
    """Encodes the configured source into latents, split by split; what is there is left alone.

    Raises:
      ConfigError: no source is configured.
      ValueError: unknown source or autoencoder.
    """
    if not config.data.source:
        raise ConfigError("config.data.source is empty: name the images to encode, as 'digits'")
    autoencoder = _autoencoder(config)
    directory = data_directory(config, workdir)
    splits = {"train": config.data.train_split, "test": config.data.test_split}
    for folder, split in splits.items():
        if not split:
            continue
        # Process 0 alone looks and writes; the others wait below, and look afterwards.
        if jax.process_index() == 0 and not (directory / folder / "dataset.json").exists():
            encode_dataset(
                open_source(config.data.source, split, data_dir=config.data.source_dir or None),
                autoencoder,
                directory / folder,
                source_name=config.data.source,
                split=split,
                batch_size=ENCODE_BATCH_SIZE,
                dtype=config.data.dtype,
            )
    multihost_utils.sync_global_devices("encoded")


def _autoencoder(config: Config) -> Autoencoder:
    try:
        return get_autoencoder(config.data.autoencoder)
    except ValueError as error:
        raise ConfigError(f"config.data.{error}") from error


def _check_dataset(config: Config, dataset: LatentDataset) -> None:
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
