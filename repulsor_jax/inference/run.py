"""A trained run as sampling and evaluation need it: its checkpoints, EMA parameters and protocol.

Everything comes from the run's directory; its data set need not be there.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from repulsor_jax import __version__, sharding
from repulsor_jax import config as config_lib
from repulsor_jax.checkpoints.checkpointer import (
    Checkpointer,
    CheckpointError,
    checkpoint_directory,
)
from repulsor_jax.checkpoints.integrity import named_leaves
from repulsor_jax.checkpoints.places import is_bucket
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.experiment import Experiment, latents_record, prepare_sampling
from repulsor_jax.files.tensors import tensors_sha256
from repulsor_jax.files.untrusted import has_controls
from repulsor_jax.flows import solvers
from repulsor_jax.inference.generator import Guidance, Guide
from repulsor_jax.models.dit import DiT
from repulsor_jax.train_state import build_model, init_model_params

_SHOWN_DIGITS = 16  # of a SHA-256, in reports
# What a model's output depends on beside its parameters: the same as in training.
_SAME = {
    "model": (
        "latent_size",
        "in_channels",
        "patch_size",
        "hidden_size",
        "depth",
        "num_heads",
        "num_classes",
        "learn_sigma",
        "qk_norm",
    ),
    "flow": ("path", "prediction"),
}


@dataclasses.dataclass(frozen=True)
class LoadedGuide:
    """The weak model of autoguidance, and what to say of it in a report."""

    guide: Guide
    description: dict[str, Any]


def open_checkpoints(config: Config, workdir: pathlib.Path) -> Checkpointer:
    """Opens a run's checkpoints to read, also while it is training; see `Checkpointer`."""
    return Checkpointer(checkpoint_directory(config.checkpoint, workdir), read_only=True)


def open_experiment(
    config: Config, workdir: pathlib.Path, checkpointer: Checkpointer, step: int | None
) -> Experiment:
    """Builds what sampling needs from a checkpoint's records.

    Raises:
      ConfigError: the configuration is not one for this run, or this machine.
      CheckpointError: no such checkpoint.
    """
    saved, record, step = _records(checkpointer, step)
    # The average is the run's, whatever the configuration says.
    ema_decay = saved["optimizer"]["ema_decay"]
    optimizer = dataclasses.replace(config.optimizer, ema_decay=ema_decay)
    experiment = prepare_sampling(dataclasses.replace(config, optimizer=optimizer), workdir, record)
    for section, keys in _SAME.items():
        for key in keys:
            found, expected = getattr(getattr(config, section), key), saved[section][key]
            if found != expected:
                raise CheckpointError(
                    f"{checkpointer.directory}/{step} does not fit this configuration: "
                    f"config.{section}.{key} is {found!r}, but the run has {expected!r}; use the "
                    "run's own config"
                )
    return experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LatentsRecord:
    """What `experiment.latents_record` gives, as read from a checkpoint."""

    autoencoder: str
    weights_sha256: str
    shift: tuple[float, ...]
    factor: tuple[float, ...]
    class_names: tuple[str, ...]


def _records(
    checkpointer: Checkpointer, step: int | None
) -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
    """As `Checkpointer.records`, with all that is needed here, of the right types."""
    saved, record, step = checkpointer.records(step)
    where = f"{checkpointer.directory}/{step}"
    for section, keys in {**_SAME, "optimizer": ("ema_decay",)}.items():
        found = saved.get(section) if isinstance(saved, dict) else None
        for key in keys:
            if not isinstance(found, dict) or not isinstance(found.get(key), int | float | str):
                raise CheckpointError(
                    f"{where}: its record of the configuration has no value of {section}.{key}: "
                    "it was saved by another version, or is damaged"
                )
    known = [field.name for field in dataclasses.fields(_LatentsRecord)]
    if isinstance(record, dict):
        record = {key: value for key, value in record.items() if key in known}
    checked = config_lib.parse_section(_LatentsRecord, record, f"{where}: latents")
    if not checked.class_names or any(map(has_controls, checked.class_names)):
        raise CheckpointError(
            f"{where}: found the class names {list(checked.class_names)[:5]}, expected one or "
            "more, without control characters"
        )
    return saved, record, step


def restore_params(experiment: Experiment, checkpointer: Checkpointer, step: int) -> Any:
    """EMA parameters of a checkpoint, on the experiment's mesh.

    Raises:
      CheckpointError: no such checkpoint, or it holds another model.
    """
    return _restore(experiment.model, experiment, checkpointer, step)[0]


def _restore(
    model: DiT, experiment: Experiment, checkpointer: Checkpointer, step: int | None
) -> tuple[Any, int]:
    boxed = jax.eval_shape(lambda key: init_model_params(model, key), jax.random.key(0))
    shardings = sharding.tree_shardings(boxed, experiment.mesh)
    return checkpointer.restore_ema(sharding.abstract_arrays(boxed, shardings), step)


def params_sha256(params: Any) -> str:
    """Digest of parameters, the same on every mesh: of names, shapes and float32 values.

    16 hexadecimal digits of `weights.tensors_sha256`.
    """
    named = {name: sharding.to_host(leaf) for name, leaf in named_leaves(params).items()}
    return tensors_sha256(named)[:_SHOWN_DIGITS]


def load_guide(experiment: Experiment) -> LoadedGuide | None:
    """The weak model of autoguidance that `config.sampling.guiding_run` names; None without one.

    Its size is that of its own configuration, which its checkpoint holds.

    Raises:
      ConfigError: its latents, classes, path or prediction are not those of the model it guides.
      CheckpointError: no such checkpoint.
    """
    config = experiment.config
    if not config.sampling.guiding_run:
        return None
    run = checkpoints = config.sampling.guiding_run
    if not is_bucket(run):
        run = str(pathlib.Path(run).expanduser().absolute())
        holds_steps = any(path.name.isdecimal() for path in pathlib.Path(run).glob("*"))
        checkpoints = run if holds_steps else f"{run}/checkpoints"
    step = None if config.sampling.guiding_step == -1 else config.sampling.guiding_step
    with Checkpointer(checkpoints, read_only=True) as checkpointer:
        saved, record, step = _records(checkpointer, step)
        model_config = config_lib.parse_section(
            config_lib.ModelConfig, saved["model"], f"{run}: config.model"
        )
        own = latents_record(experiment)
        comparisons: dict[str, tuple[Any, Any]] = {
            f"config.flow.{key}": (saved["flow"][key], getattr(config.flow, key))
            for key in ("path", "prediction")
        }
        for key in ("latent_size", "in_channels", "num_classes"):
            comparisons[f"config.model.{key}"] = (
                getattr(model_config, key),
                getattr(config.model, key),
            )
        for key in ("shift", "factor"):
            comparisons[f"the latents' {key}"] = (record[key], own[key])
        for what, (found, expected) in comparisons.items():
            if found != expected:
                raise ConfigError(
                    f"config.sampling.guiding_run={run!r}: {what} is {found!r}, and "
                    f"{expected!r} in the model that it would guide: they must be the same"
                )
        model = build_model(model_config, experiment.mesh.devices.flat[0])
        params, step = _restore(model, experiment, checkpointer, step)
    description = {"run": run, "step": step, "weights_sha256": params_sha256(params)}
    return LoadedGuide(Guide(model, params), description)


def protocol(
    experiment: Experiment,
    guidance: Guidance | None,
    *,
    step: int,
    weights_sha256: str,
    num_samples: int,
    guide: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that the samples follow from, as plain values: no number travels without it."""
    config = experiment.config
    c = config.sampling
    found: dict[str, Any] = {
        "step": step,
        "weights_sha256": weights_sha256,
        "ema_decay": config.optimizer.ema_decay,
        "num_samples": num_samples,
        "labels": c.labels,
        "classes": len(experiment.class_names),
        "seed": c.seed,
        "solver": c.solver,
    }
    if c.solver in solvers.ADAPTIVE:
        found |= {"rtol": c.rtol, "atol": c.atol, "max_steps": c.max_steps}
    else:
        found |= {"num_steps": c.num_steps, "time_shift": c.time_shift}
    if c.solver in solvers.SDE_STEPS:
        found |= {
            key: getattr(c, key)
            for key in ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
        }
    found["cfg_scale"] = guidance.scale if guidance else 1.0
    if guidance and guidance.scale != 1.0:
        found |= {
            "cfg_interval": [guidance.low, guidance.high],
            "cfg_channels": c.cfg_channels,
            "guide": dict(guide) if guide else "no class",
        }
    autoencoder = experiment.autoencoder
    assert autoencoder is not None
    found |= {
        "path": config.flow.path,
        "prediction": config.flow.prediction,
        "dtype": config.model.dtype,
        "autoencoder": autoencoder.name,
        "autoencoder_sha256": autoencoder.weights_sha256[:_SHOWN_DIGITS],
        "autoencoder_dtype": config.data.autoencoder_dtype,
        "decode_tile": c.decode_tile,
        "rounding": c.rounding,
        "latent_shift": np.asarray(experiment.latent_format.shift).tolist(),
        "latent_factor": np.asarray(experiment.latent_format.factor).tolist(),
        "batch_size": c.batch_size,
        "version": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    return found
