"""The replay mode: a batch that was refused goes through the step once more, for study."""

import pathlib
import zipfile

import jax
import numpy as np

from repulsor_jax import sharding
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data.latents import LatentFormat
from repulsor_jax.experiment import checked_mesh
from repulsor_jax.inference import run
from repulsor_jax.method import registry
from repulsor_jax.train_state import abstract_train_state, build_model, build_optimizer
from repulsor_jax.train_step import compile_train_step, make_train_step


def replay(config: Config, workdir: pathlib.Path, event: pathlib.Path) -> dict[str, float]:
    """Runs the step on a kept batch with the state of a checkpoint, and says what is not finite.

    The state is that of the newest checkpoint before the refused step; where that is the step right
    before it, the numbers are the very same. The training run and its checkpoints are left alone.

    Args:
      config: of the run.
      workdir: of the run.
      event: a file of `<workdir>/divergence`.

    Returns:
      The metrics of the step.

    Raises:
      ConfigError, CheckpointError: one message that names the file or key.
    """
    try:
        with np.load(event, allow_pickle=False) as archive:
            kept = {name: archive[name] for name in archive.files}
        step, records = int(kept.pop("step")), kept.pop("records")
        number = int(kept.pop("batch"))
        latents, labels = kept["latents"], kept["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"--event={event}: found no kept batch ({error}); they are in {workdir / 'divergence'}"
        ) from error
    if len(latents) != config.batch_size:
        raise ConfigError(
            f"--event={event}: found a batch of {len(latents)}, but "
            f"config.batch_size={config.batch_size}; use the run's own config"
        )
    mesh = checked_mesh(config)
    model = build_model(config.model, mesh.devices.flat[0])
    parts = (config, model, registry.build(config), build_optimizer(config))
    abstract_state, _ = abstract_train_state(*parts, mesh)
    with run.open_checkpoints(config, workdir) as checkpointer:
        before = [saved for saved in checkpointer.steps() if saved < step]
        if not before:
            raise ConfigError(f"--event={event}: {checkpointer.directory} holds no step before it")
        state, _, _ = checkpointer.restore(abstract_state, config.batch_size, before[-1])
        _, record, _ = checkpointer.records(before[-1])
    stochastic = latents.shape[-1] == 2 * config.model.in_channels
    shift, factor = (np.asarray(record[key], np.float32) for key in ("shift", "factor"))
    step_fn = compile_train_step(
        make_train_step(*parts, LatentFormat(stochastic, shift, factor)),
        abstract_state,
        latents.shape[1:],
        str(latents.dtype),
        config.batch_size,
        mesh,
    )
    own = sharding.local_row_numbers(mesh, config.batch_size)
    batch = sharding.to_global({name: array[own] for name, array in kept.items()}, mesh)
    lines = [f"batch {number}, kept of step {step}, on the state of step {before[-1]}"]
    bad_rows = np.flatnonzero(~np.isfinite(latents).reshape(len(latents), -1).all(axis=1))
    for row in bad_rows[:8]:
        lines.append(
            f"latents of row {row} are not finite: record {records[row]}, label {labels[row]}"
        )
    largest = np.nanmax(np.abs(latents.astype(np.float32)).reshape(len(latents), -1), axis=1)
    row = int(np.nanargmax(largest)) if np.isfinite(largest).any() else 0
    lines.append(f"the largest latent is {largest[row]:.4g}, of row {row}, record {records[row]}")
    _, metrics = step_fn(state, batch)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    lines += [f"{name} {value:.6g}" for name, value in values.items()]
    if jax.process_index() == 0:
        print("\n".join(lines))
    return values
