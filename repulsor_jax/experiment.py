"""Builds, from a checked configuration, the parts that the modes share; refuses bad input early."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder, get_autoencoder
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data import conditioning, features, latents, listing
from repulsor_jax.data.latents import LatentDataset, LatentFormat
from repulsor_jax.flows import paths
from repulsor_jax.method import registry
from repulsor_jax.method.repulsor import rows_per_image
from repulsor_jax.models.blockwise import stratified_times
from repulsor_jax.models.build import build_model, build_source, num_segments
from repulsor_jax.models.dit import DiT, drop_labels
from repulsor_jax.models.token_groups import TokenGroups
from repulsor_jax.optimizer import build_optimizer, learning_rate
from repulsor_jax.train_state import Objective, Trainer


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training, sampling and evaluation have in common."""

    config: Config
    workdir: pathlib.Path
    mesh: Mesh  # of all devices
    model: DiT
    autoencoder: Autoencoder | None  # None where the configuration asks for no pictures
    latent_format: LatentFormat  # how stored latents become the model's, and back
    latents_sha256: str  # of the weights that made the latents; "" where they are not known
    class_names: tuple[str, ...]  # label k is `class_names[k]`
    absent_classes: tuple[int, ...] = ()  # labels without an image, which are never sampled
    latent_mean: tuple[float, ...] = ()  # [C] of the model's latents; () where it is not known
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # `latents.identity`
    weights_file: Mapping[str, str] = dataclasses.field(default_factory=dict)  # where no run is


def prepare(config: Config, workdir: pathlib.Path) -> tuple[Experiment, LatentDataset]:
    """Checks the configuration against the devices and the data, and builds what training needs.

    Returns:
      The experiment, with an autoencoder if it draws pictures, and the data set to train on.

    Raises:
      ConfigError, ValueError, FileNotFoundError: one message that names the key or the file.
    """
    mesh = checked_mesh(config)
    data_dir = data_directory(config, workdir)
    dataset = latents.open_latent_dataset(data_dir / "train")
    check_dataset(config, dataset)
    stored = config_lib.stored_features(config)
    if stored is not None:
        features.check_rows(stored, config.data.features, dataset)
    if problem := latents.spread_problem(dataset, config.data.normalization):
        raise ConfigError(problem)
    if config.sampling.classes and config.evaluation.every_steps:
        raise ConfigError(
            f"config.sampling.classes={config.sampling.classes} would be compared with images of "
            "all classes every config.evaluation.every_steps="
            f"{config.evaluation.every_steps}: set that to 0, or choose classes in --mode=sample"
        )
    held_out = open_held_out(config, workdir)
    if held_out is None and config.evaluation.every_steps and config.evaluation.reference == "test":
        raise ConfigError(
            f"config.evaluation needs a reference, and {data_dir / 'test'} is absent: encode a "
            "test split, name another config.evaluation.reference, or set "
            "config.evaluation.every_steps=0"
        )
    if held_out is not None:
        check_dataset(config, held_out)
        _check_same_origin(dataset, held_out)
    autoencoder = load_autoencoder(config) if draws_pictures(config) else None
    if autoencoder is not None:
        check_weights(autoencoder, dataset.weights_sha256, f"{dataset.directory} was encoded")
    if config.data.verify:
        for each in (dataset, held_out):
            if each is not None:
                latents.check_files(
                    each,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    progress=jax.process_index() == 0,
                )
    form = latents.latent_format(dataset, config.data.normalization)
    experiment = Experiment(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=model_of(config, mesh),
        autoencoder=autoencoder,
        latent_format=form,
        latents_sha256=dataset.weights_sha256,
        dataset=latents.identity(dataset),
        class_names=dataset.class_names,
        absent_classes=dataset.absent_classes,
        latent_mean=tuple(((np.array(dataset.mean) - form.shift) * form.factor).tolist()),
    )
    return experiment, dataset


def model_of(config: Config, mesh: Mesh) -> DiT:
    """The network of a configuration, for the devices of a mesh."""
    device = mesh.devices.flat[0]
    return build_model(config.model, device, conditioning=config.conditioning)


def make_trainer(config: Config, mesh: Mesh) -> Trainer:
    """Builds model, objective and optimizer, by name, for the devices of a mesh."""
    return Trainer(
        config=config,
        model=model_of(config, mesh),
        objective=_make_objective(config),
        optimizer=build_optimizer(config),
        learning_rate=learning_rate(config),
        source=build_source(config.source, config.model),
    )


def _make_objective(config: Config) -> Objective:
    f = config.flow
    path = paths.get_path(f.path)
    t0, t1 = paths.time_interval(path, f.prediction)
    sample_times = functools.partial(
        paths.sample_timesteps,
        distribution=f.time_distribution,
        t0=t0,
        t1=t1,
        location=f.logit_normal_location,
        scale=f.logit_normal_scale,
        shift=f.time_shift,
    )
    segments = num_segments(config.model)

    def stratified(key: jax.Array, batch_size: int) -> jax.Array:
        return stratified_times(sample_times(key, batch_size), segments)

    return Objective(
        path=path,
        flow_loss=functools.partial(paths.flow_loss, path, f.prediction, weighting=f.weighting),
        sample_times=sample_times if segments == 1 else stratified,
        drop_labels=functools.partial(
            drop_labels, num_classes=config.model.num_classes, rate=config.model.label_dropout
        ),
        terms=registry.build(config),
        condition=_condition_of(config),
        groups=_token_groups(config),
        last_time=t1,
    )


def _condition_of(config: Config) -> Callable[..., jax.Array] | None:
    """What makes the condition of a step; None without one."""
    c = config.conditioning
    if c.kind == "semantic":
        return conditioning.stored_histograms
    if c.kind == "inpaint" and c.masked == "image":
        return conditioning.stored_masked_latents
    if c.kind == "inpaint":
        return functools.partial(conditioning.draw_masked_latents, size=image_size(config))
    return None


def stored_condition(config: Config, stochastic: bool) -> dict[str, Any]:
    """What `latents.Description` says of the condition stored beside latents; {} without one."""
    c = config.conditioning
    channels = config.model.in_channels * (2 if stochastic else 1)
    found = config_lib.stored_condition_channels(c, channels)
    if not found:
        return {}
    masks = c.masks_per_image if c.kind == "inpaint" else 1
    return {"condition": c.kind, "condition_channels": found, "masks": masks}


def image_size(config: Config) -> int:
    """Height and width of the images that latents are of; the latents' own without a decoder."""
    m = config.model
    if config.data.autoencoder == "none":
        return m.latent_size
    autoencoder = load_autoencoder(config, abstract=True)
    latents = jax.ShapeDtypeStruct((1, m.latent_size, m.latent_size, m.in_channels), np.float32)
    return jax.eval_shape(autoencoder.decode, autoencoder.params, latents).shape[1]


def _token_groups(config: Config) -> TokenGroups | None:
    f = config.flow
    if f.time_groups == 1:
        return None
    return TokenGroups(config_lib.token_group_counts(config), f.whole_fraction, f.teacher_times)


def latents_record(experiment: Experiment) -> dict[str, Any]:
    """What sampling needs to know of the latents, as plain values: kept in checkpoints."""
    absent = list(experiment.absent_classes)
    return {
        "autoencoder": experiment.config.data.autoencoder,
        "weights_sha256": experiment.latents_sha256,
        "shift": experiment.latent_format.shift.tolist(),
        "factor": experiment.latent_format.factor.tolist(),
        "mean": list(experiment.latent_mean),
        "class_names": list(experiment.class_names),
        "dataset": dict(experiment.dataset),
    } | ({"absent_classes": absent} if absent else {})


def checked_mesh(
    config: Config, devices: Sequence[jax.Device] | None = None, *, trains: bool = True
) -> Mesh:
    """Returns the mesh of all devices; raises ConfigError where the configuration does not fit.

    Args:
      config: the configuration.
      devices: use these, not the local ones.
      trains: also check the training batch.
    """
    try:
        mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error
    config_lib.check_devices(config, sharding.batch_shards(mesh), trains=trains)
    return mesh


def data_directory(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Folder of the latent data sets `train` and `test`."""
    return pathlib.Path(config.data.dir) if config.data.dir else workdir / "data"


def open_held_out(config: Config, workdir: pathlib.Path) -> LatentDataset | None:
    """The data set of images that are not trained on, or None where there is none."""
    directory = data_directory(config, workdir) / "test"
    return latents.open_latent_dataset(directory) if directory.exists() else None


def load_autoencoder(config: Config, *, abstract: bool = False) -> Autoencoder:
    """Returns the configured autoencoder with its weights, or `abstract`, with their shapes alone.

    Raises:
      ConfigError: the name is unknown, or the weights are absent or damaged.
    """
    data = config.data
    if data.autoencoder == "none":
        raise ConfigError(
            "config.data.autoencoder='none' can neither encode nor decode: name one, or train "
            "without pictures by config.sampling.grid_every_steps=0 and "
            "config.evaluation.every_steps=0"
        )
    try:
        return get_autoencoder(
            data.autoencoder,
            weights=data.autoencoder_weights,
            dtype=data.autoencoder_dtype,
            abstract=abstract,
        )
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data.autoencoder={data.autoencoder!r}: {error}") from error


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
    stored = stored_condition(config, dataset.stochastic)
    asked = stored.get("condition", ""), stored.get("condition_channels", 0)
    if (dataset.condition, dataset.condition_channels) != asked:
        found = f"{dataset.condition or 'no'} conditions of {dataset.condition_channels} channels"
        raise ConfigError(
            f"{dataset.directory} holds {found}, but config.conditioning asks for "
            f"{asked[0] or 'no'} conditions of {asked[1]}: encode with this configuration into "
            "another config.data.dir"
        )
    if len(dataset.class_names) > m.num_classes:
        raise ConfigError(
            f"{dataset.directory} has {len(dataset.class_names)} classes, but "
            f"config.model.num_classes={m.num_classes}"
        )
    terms = registry.active_terms(config)
    leaves_none = config.repulsor.same_class_weight == 0 and config.repulsor.negatives == "all"
    if "repulsor" in terms and leaves_none and len(dataset.class_names) == 1:
        raise ConfigError(
            f"config.repulsor.same_class_weight=0 leaves no negatives: {dataset.directory} has one "
            "class; raise it, up to 1"
        )


def describe_data(config: Config, dataset: LatentDataset) -> list[str]:
    """Lines for the start of training: what it is trained on, and warnings."""
    classes = listing.describe_classes(dataset.class_names)
    lines = [f"{dataset.directory}: {dataset.num_images:,} images of {classes}"]
    room = config.model.num_classes
    if len(dataset.class_names) < room:
        lines.append(
            f"warning: the data have {len(dataset.class_names):,} of config.model.num_classes="
            f"{room:,} classes: is {dataset.directory} the data set that is meant?"
        )
    r = config.repulsor
    terms, images = registry.active_terms(config), r.bank_rows // rows_per_image(r)
    if "repulsor" in terms and r.negatives == "all" and images > dataset.num_images:
        lines.append(
            f"warning: config.repulsor.bank_rows={r.bank_rows:,} hold rows of {images:,} images, "
            f"and the data set has {dataset.num_images:,}: each image is in the bank about "
            f"{images / dataset.num_images:.1f} times, and the older copies are stale"
        )
    if config.source.name != "gaussian" and len(dataset.class_names) == 1:
        lines.append(
            f"warning: config.source.name={config.source.name!r} learns a start for each class, "
            f"and {dataset.directory} has one: a shift of them all gains little (docs/systems.md)"
        )
    _, block = registry.layersync_blocks(config)
    if "layersync" in terms and block + 1 > 0.8 * config.model.depth:
        lines.append(
            f"warning: config.layersync.teacher_block={block} is in the last fifth of the "
            f"{config.model.depth} blocks: these turn towards the output, and make poor references"
        )
    if absent := latents.absent_classes(dataset):
        lines.append(f"warning: {absent}")
    return lines


def _check_same_origin(dataset: LatentDataset, held_out: LatentDataset) -> None:
    """Raises ConfigError unless both were made by one autoencoder, with one meaning of labels."""
    for field in ("autoencoder", "weights_sha256", "image_size", "stochastic"):
        one, other = getattr(dataset, field), getattr(held_out, field)
        if one != other:
            raise ConfigError(
                f"{dataset.directory} and {held_out.directory} are of different origin: {field} "
                f"{one!r} and {other!r}; encode one of them again"
            )
    if how := listing.class_difference(dataset.class_names, held_out.class_names):
        raise ConfigError(
            f"{dataset.directory} and {held_out.directory} have different classes, {how}: their "
            "labels do not mean the same"
        )


def check_weights(autoencoder: Autoencoder, expected: str, where: str) -> None:
    """Raises ConfigError unless the autoencoder is the one of that digest, "" being unknown."""
    found = autoencoder.weights_sha256
    if expected and found != expected:
        raise ConfigError(
            f"{where} with weights of {autoencoder.name!r} whose SHA-256 "
            f"is {expected[:12]}..., but those of config.data.autoencoder_weights have "
            f"{found[:12]}...: give the same weights, or encode again"
        )
