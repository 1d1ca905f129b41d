"""A trained run as sampling and evaluation need it: its checkpoints, EMA parameters and protocol.

Everything comes from the run's directory; its data set need not be there.
"""

import contextlib
import dataclasses
import operator
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, get_type_hints

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from pydantic import Field

from repulsor_jax import __version__, sharding
from repulsor_jax import config as config_lib
from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.checkpoints.checkpointer import Checkpointer, checkpoint_directory
from repulsor_jax.checkpoints.manifest import CheckpointError, named_leaves
from repulsor_jax.checkpoints.places import is_bucket
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data.latents import ClassName, LatentFormat
from repulsor_jax.experiment import (
    Experiment,
    check_weights,
    checked_mesh,
    load_autoencoder,
    model_of,
)
from repulsor_jax.files.tensors import tensors_sha256
from repulsor_jax.files.untrusted import checked, parse
from repulsor_jax.flows import solvers
from repulsor_jax.inference.generator import Guidance, Guide, present_classes
from repulsor_jax.inference.tasks import open_task
from repulsor_jax.models.build import build_model, build_source
from repulsor_jax.models.dit import DiT
from repulsor_jax.models.source import ClassSource
from repulsor_jax.train_state import abstract_model_params


@checked
class _Model:
    latent_size: int
    in_channels: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    label_dropout: float
    learn_sigma: bool
    qk_norm: bool
    time_steps: int = 0
    # Older versions have the plain transformer alone.
    architecture: str = "dit"
    segments: int = 6
    segment_depth: int = 5
    adaln_rank: int = 288
    residual_depth: int = 0


@checked
class _Flow:
    path: str
    prediction: str


@checked
class _Conditioning:
    kind: str = "none"
    masked: str = "latent"
    classes: int = 0
    channels: int = 4


@checked
class _Source:
    name: str = "gaussian"
    rank: int = 0
    learn_variance: bool = False


@checked
class _Optimizer:
    ema_decay: float


@checked
class Latents:
    """What `experiment.latents_record` says, but for the data set."""

    autoencoder: str
    weights_sha256: str
    shift: tuple[float, ...]
    factor: tuple[float, ...]
    class_names: Annotated[tuple[ClassName, ...], Field(min_length=1)]
    absent_classes: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()  # of the model's latents; older versions do not say


@checked
class RunRecords:
    """Everything that a model's output depends on beside its parameters, from a checkpoint.

    The latents are those of `experiment.latents_record`, the rest is of the configuration.
    """

    model: _Model
    flow: _Flow
    conditioning: _Conditioning = _Conditioning()  # older versions have none
    optimizer: _Optimizer
    latents: Latents
    source: _Source = _Source()  # older versions had no other


def open_checkpoints(config: Config, workdir: pathlib.Path) -> Checkpointer:
    """Opens a run's checkpoints to read, also while it is training; see `Checkpointer`."""
    return Checkpointer(checkpoint_directory(config.checkpoint, workdir), read_only=True)


def read_records(checkpointer: Checkpointer, step: int) -> RunRecords:
    """Reads and checks the records of a checkpoint, of this version or another.

    Raises:
      CheckpointError: no such checkpoint, or its records are not those of a run.
    """
    config, latents, step = checkpointer.records(step)
    values = _known(RunRecords, config | {"latents": latents})
    try:
        return parse(RunRecords, values, f"{checkpointer.directory}/{step}")
    except ValueError as error:
        raise CheckpointError(f"{error}; another version saved it, or it is damaged") from error


def parse_latents(values: Any, where: str) -> Latents:
    """Checks a record of `experiment.latents_record`; ValueError names what is wrong in `where`."""
    return parse(Latents, _known(Latents, values), where)


def _known(schema: Any, values: Any) -> Any:
    """Leaves out keys that a schema does not have: other versions may save more."""
    if not (dataclasses.is_dataclass(schema) and isinstance(values, dict)):
        return values
    types = get_type_hints(schema)
    return {key: _known(types[key], value) for key, value in values.items() if key in types}


def open_experiment(
    config: Config, workdir: pathlib.Path, checkpointer: Checkpointer, step: int
) -> Experiment:
    """Builds what sampling needs from a checkpoint's records.

    Raises:
      ConfigError: the configuration does not fit this run, or this machine.
      CheckpointError: no such checkpoint, or its model is another.
    """
    saved = read_records(checkpointer, step)
    model = dataclasses.asdict(saved.model)
    if model.pop("label_dropout") == 0 and config_lib.guides_by_no_class(config):
        raise ConfigError(
            f"config.sampling.cfg_scale={config.sampling.cfg_scale}, config.evaluation.cfg_scales="
            f"{config.evaluation.cfg_scales}: the run in {workdir} was trained with "
            "config.model.label_dropout=0, so that guidance has no trained null class: sample at "
            "scale 1, or name a config.sampling.guiding_run"
        )
    source = {"name": saved.source.name}
    if saved.source.name != "gaussian":
        source = dataclasses.asdict(saved.source)
    parts = {"model": model, "flow": dataclasses.asdict(saved.flow), "source": source}
    shown = dataclasses.asdict(saved.conditioning)
    parts["conditioning"] = shown if shown["kind"] != "none" else {"kind": "none"}
    parts["data"] = {"autoencoder": saved.latents.autoencoder}
    for key, value in traverse_util.flatten_dict(parts, sep=".").items():
        found = operator.attrgetter(key)(config)
        if found != value:
            raise CheckpointError(
                f"{checkpointer.directory}/{step} does not fit this configuration: config.{key} is "
                f"{found!r}, but the run has {value!r}; use the run's own config"
            )
    # A checkpoint holds the average of its own run, so the protocol must state the run's decay.
    optimizer = dataclasses.replace(config.optimizer, ema_decay=saved.optimizer.ema_decay)
    config = dataclasses.replace(config, optimizer=optimizer)
    mesh = checked_mesh(config, trains=False)
    autoencoder, digest = load_autoencoder(config), saved.latents.weights_sha256
    check_weights(autoencoder, digest, f"{workdir} was trained on latents made")
    return experiment_of(config, workdir, mesh, autoencoder, saved.latents)


def experiment_of(
    config: Config, workdir: pathlib.Path, mesh: Mesh, autoencoder: Autoencoder, latents: Latents
) -> Experiment:
    """What sampling needs of a configuration and the record of the latents trained on."""
    shift, factor = np.array(latents.shift, np.float32), np.array(latents.factor, np.float32)
    return Experiment(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=model_of(config, mesh),
        autoencoder=autoencoder,
        latent_format=LatentFormat(False, shift, factor),
        latents_sha256=latents.weights_sha256,
        class_names=latents.class_names,
        absent_classes=latents.absent_classes,
        latent_mean=latents.mean,
    )


def restore_params(
    experiment: Experiment,
    checkpointer: Checkpointer,
    step: int,
    parts: tuple[DiT, ClassSource | None] | None = None,
) -> Any:
    """EMA parameters of a checkpoint, on the experiment's mesh.

    They are those of other `parts`, a model and its source, or of the experiment's.

    Raises:
      CheckpointError: no such checkpoint, or it holds another model.
    """
    config = experiment.config
    model, source = parts or (experiment.model, build_source(config.source, config.model))
    shapes = abstract_model_params(model, source, experiment.mesh)
    return checkpointer.restore_ema(shapes, step)[0]


def params_sha256(params: Any) -> str:
    """First digits of `tensors_sha256` of parameters; the same on every mesh."""
    named = {name: sharding.to_host(leaf) for name, leaf in named_leaves(params).items()}
    return tensors_sha256(named)[:16]


def load_guide(experiment: Experiment) -> Guide | None:
    """The weak model of autoguidance that `config.sampling.guiding_run` names; None without one.

    Its size is that of its own configuration, which its checkpoint holds.

    Raises:
      ConfigError: no such checkpoint; its latents, path, prediction or number of classes are not
        those of the model it guides.
    """
    config = experiment.config
    if not config.sampling.guiding_run:
        return None
    run, checkpoints = _locate(config.sampling.guiding_run)
    key = f"config.sampling.guiding_run={run!r}"
    with _naming(key), Checkpointer(checkpoints, read_only=True) as checkpointer:
        step = config.sampling.guiding_step
        step = checkpointer.resolve(None if step == -1 else step)
        saved = read_records(checkpointer, step)
        own = experiment.latent_format
        comparisons: dict[str, tuple[Any, Any]] = {
            "config.flow.path": (saved.flow.path, config.flow.path),
            "config.flow.prediction": (saved.flow.prediction, config.flow.prediction),
            "config.conditioning.kind": (saved.conditioning.kind, config.conditioning.kind),
            "config.conditioning.masked": (saved.conditioning.masked, config.conditioning.masked),
            "config.conditioning.classes": (
                saved.conditioning.classes,
                config.conditioning.classes,
            ),
            "config.model.latent_size": (saved.model.latent_size, config.model.latent_size),
            "config.model.in_channels": (saved.model.in_channels, config.model.in_channels),
            "config.model.num_classes": (saved.model.num_classes, config.model.num_classes),
            "config.source.name": (saved.source.name, config.source.name),
            "the latents' shift": (list(saved.latents.shift), own.shift.tolist()),
            "the latents' factor": (list(saved.latents.factor), own.factor.tolist()),
            "the autoencoder's SHA-256": _digests(saved, experiment),
        }
        for what, (found, expected) in comparisons.items():
            if found != expected:
                raise ConfigError(
                    f"{key}: {what} is {found!r}, and "
                    f"{expected!r} in the model that it would guide: they must be the same"
                )
        values = checkpointer.records(step)[0]["model"]
        model_config = parse(config_lib.ModelConfig, values, f"{run}: config.model")
        device = experiment.mesh.devices.flat[0]
        model = build_model(model_config, device, conditioning=saved.conditioning)
        parts = model, build_source(saved.source, model_config)
        if model.segments not in (1, experiment.model.segments):
            raise ConfigError(
                f"{key}: config.model.segments is {model.segments}, "
                f"and {experiment.model.segments} in the model that it would guide: they must be "
                "the same, or the guide a plain transformer"
            )
        params = restore_params(experiment, checkpointer, step, parts)
    return Guide(model, params, {"run": run, "step": step, "weights_sha256": params_sha256(params)})


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Names the key by which another run was looked for."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error


def _digests(saved: RunRecords, experiment: Experiment) -> tuple[str, str]:
    """Of the weights that made the latents, there and here; alike where one is not known."""
    there, here = saved.latents.weights_sha256, experiment.latents_sha256
    return (there, here) if there and here else ("", "")


def _locate(run: str) -> tuple[str, str]:
    """A run that a configuration names, by its directory or checkpoints, and its checkpoints."""
    if is_bucket(run):
        return run, run
    run = str(pathlib.Path(run).absolute())
    holds_steps = any(path.name.isdecimal() for path in pathlib.Path(run).glob("*"))
    return run, run if holds_steps else f"{run}/checkpoints"


def with_base_params(experiment: Experiment, params: Any) -> Any:
    """The parameters of a model with a residual network, the rest being those of its base run.

    Args:
      experiment: of the residual network; `config.residual` names the base run.
      params: of its model, global arrays; those of the residual network stay.

    Raises:
      ConfigError: no such checkpoint; the base run has another model, path or latents.
    """
    config = experiment.config
    run, checkpoints = _locate(config.residual.base_run)
    key = f"config.residual.base_run={run!r}"
    with _naming(key), Checkpointer(checkpoints, read_only=True) as checkpointer:
        step = config.residual.base_step
        step = checkpointer.resolve(None if step == -1 else step)
        saved = read_records(checkpointer, step)
        own = experiment.latent_format
        model = dataclasses.asdict(config.model) | {"residual_depth": 0}
        found_model = dataclasses.asdict(saved.model)
        found_model.pop("label_dropout")
        pairs = {f"config.model.{key}": (value, model[key]) for key, value in found_model.items()}
        pairs |= {
            "config.flow.path": (saved.flow.path, config.flow.path),
            "the latents' shift": (list(saved.latents.shift), own.shift.tolist()),
            "the latents' factor": (list(saved.latents.factor), own.factor.tolist()),
            "the autoencoder's SHA-256": _digests(saved, experiment),
        }
        for what, (found, expected) in pairs.items():
            if found != expected:
                raise ConfigError(
                    f"{key}: {what} is {found!r}, expected {expected!r} "
                    "as in the model with the residual network"
                )
        # As they lie in the state: a compiled step takes no others.
        base = {name: part for name, part in params.items() if name != "residual"}
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        found, _ = checkpointer.restore_ema(jax.tree.map(shape, base), step)
    return found | {"residual": params["residual"]}


def protocol(
    experiment: Experiment,
    guidance: Guidance | None,
    *,
    step: int,
    weights_sha256: str,
    num_samples: int,
    guide: Guide | None,
) -> dict[str, Any]:
    """Everything that the samples follow from, as plain values; kept with every number.

    Its digest names samples and evaluations: another key or value makes them anew.
    """
    config, autoencoder = experiment.config, experiment.autoencoder
    assert autoencoder is not None
    c = config.sampling
    keys = ["labels", "seed", "solver", "rounding", "batch_size"]
    is_adaptive = c.solver in solvers.ADAPTIVE
    keys += ["rtol", "atol", "max_steps"] if is_adaptive else ["num_steps", "time_shift"]
    if c.solver in solvers.SDE_STEPS:
        keys += ["diffusion_form", "diffusion_norm", "last_step", "last_step_size"]
    found: dict[str, Any] = {
        "step": step,
        "weights_sha256": weights_sha256,
        "ema_decay": config.optimizer.ema_decay,
        "num_samples": num_samples,
        "classes": len(present_classes(experiment)),
        "cfg_scale": guidance.scale if guidance else 1.0,
        "path": config.flow.path,
        "prediction": config.flow.prediction,
        "dtype": config.model.dtype,
        "autoencoder": autoencoder.name,
        "autoencoder_sha256": autoencoder.weights_sha256[:16],
        "autoencoder_dtype": config.data.autoencoder_dtype,
        "latent_shift": np.asarray(experiment.latent_format.shift).tolist(),
        "latent_factor": np.asarray(experiment.latent_format.factor).tolist(),
        "version": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    if guidance and guidance.scale != 1.0:
        found |= {
            "cfg_interval": [guidance.low, guidance.high],
            "cfg_channels": c.cfg_channels,
            "guide": guide.description if guide else "no class",
        }
    if config.source.name != "gaussian":
        found["source"] = config.source.name
    if c.velocity_scale != 1.0:
        found |= {"velocity_scale": c.velocity_scale, "latent_mean": list(experiment.latent_mean)}
    if task := open_task(experiment):
        found["conditioning"] = task.description
    if c.classes:
        found["chosen_classes"] = present_classes(experiment)
    if experiment.weights_file:
        found["weights_file"] = dict(experiment.weights_file)
    if experiment.absent_classes:
        found["absent_classes"] = list(experiment.absent_classes)
    return found | {key: getattr(c, key) for key in keys}
