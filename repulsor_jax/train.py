"""The training loop, and only the loop: read it from top to bottom."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from clu import parameter_overview
from tqdm import tqdm

from repulsor_jax import images, regularizers, sharding
from repulsor_jax.checkpoint import Checkpointer
from repulsor_jax.data.latent_dataset import LatentDataset
from repulsor_jax.data.pipeline import training_iterator
from repulsor_jax.experiment import Experiment, latents_record
from repulsor_jax.metrics import (
    JSONL_NAME,
    MetricWriter,
    NonFiniteLossError,
    StepRecorder,
    read_jsonl,
)
from repulsor_jax.monitor import Monitor
from repulsor_jax.profiling import Profiler, step_annotation
from repulsor_jax.throughput import training_throughput
from repulsor_jax.train_state import (
    TrainState,
    abstract_train_state,
    build_optimizer,
    create_train_state,
)
from repulsor_jax.train_step import compile_train_step, make_train_step

_CURVES = ("flow_loss", "regularizer_loss", "fid_", "frechet_")  # what their names start with


def train(
    experiment: Experiment,
    dataset: LatentDataset,
    monitor: Monitor | None,
    config_record: Mapping[str, Any],
) -> TrainState:
    """Trains to `config.total_steps`, going on from the newest checkpoint where there is one.

    Args:
      experiment: from `experiment.prepare`.
      dataset: likewise; what is trained on.
      monitor: draws grids and evaluates on the way; None draws nothing.
      config_record: the configuration as plain values, kept with every checkpoint.

    Returns:
      The final state.

    Raises:
      NonFiniteLossError: after saving the last good state.
    """
    config, mesh, workdir = experiment.config, experiment.mesh, experiment.workdir
    is_main = jax.process_index() == 0
    say = tqdm.write if is_main else lambda message: None

    # Model, regulariser, optimizer, data.
    parts = (config, experiment.model, regularizers.build(config), build_optimizer(config))
    abstract_state, _ = abstract_train_state(*parts, mesh)
    data = training_iterator(
        dataset,
        global_batch_size=config.batch_size,
        seed=config.seed,
        rows=sharding.local_rows(mesh, config.batch_size),
        num_threads=config.data.read_threads,
        prefetch=config.data.prefetch_batches,
    )
    latents = latents_record(experiment)
    say(parameter_overview.get_parameter_overview(abstract_state.params, include_stats=False))

    # Compile before the loop, so that what cannot run fails here.
    started = time.perf_counter()
    step_fn = compile_train_step(
        make_train_step(*parts, experiment.latent_format),
        abstract_state,
        dataset.shape,
        dataset.dtype,
        config.batch_size,
        mesh,
    )
    say(f"compiled the step for mesh {dict(mesh.shape)} in {time.perf_counter() - started:.1f} s")

    with Checkpointer(
        workdir / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    ) as checkpointer:
        # State: the newest checkpoint, or fresh.
        if checkpointer.latest_step() is None:
            state = create_train_state(*parts, mesh)
        else:
            state, data_state, notes = checkpointer.restore(abstract_state, config.batch_size)
            data.set_state(data_state)
            for note in notes:
                say(note)
        first_step = int(jax.device_get(state.step))
        done = ": nothing to do" if first_step >= config.total_steps else ""
        say(f"step {first_step} of {config.total_steps}, in {workdir}{done}")

        with (
            MetricWriter(workdir, first_step, enabled=is_main) as writer,
            StepRecorder(
                writer,
                first_step=first_step,
                total_steps=config.total_steps,
                throughput=training_throughput(
                    config.model, config.batch_size, mesh.devices.flat[0], mesh.size
                ),
                every_steps=config.log.every_steps,
                enabled=is_main,
            ) as recorder,
            Profiler(workdir, config.log.profile_steps) as profiler,
        ):
            try:
                for step in range(first_step + 1, config.total_steps + 1):
                    batch = sharding.to_global(next(data), mesh)
                    profiler.before(step, state)
                    with jax.transfer_guard("disallow"), step_annotation(step):
                        state, step_metrics = step_fn(state, batch)
                    profiler.after(step, state)
                    recorder.push(step, step_metrics)  # reads the metrics of the step before

                    if monitor and _due(config.sampling.grid_every_steps, step, config.total_steps):
                        with recorder.pause():
                            monitor.write_grid(step, state.ema_params, writer)
                    if monitor and _due(config.evaluation.every_steps, step, config.total_steps):
                        with recorder.pause():
                            monitor.evaluate(step, state.ema_params, writer)
                    if _due(config.checkpoint.every_steps, step, config.total_steps):
                        recorder.flush()
                        with recorder.pause():
                            checkpointer.save(step, state, data.get_state(), config_record, latents)
            except NonFiniteLossError as error:
                # The step refused the update, so the state is still good; the data has moved on.
                step = int(jax.device_get(state.step))
                checkpointer.save(
                    step, state, data.get_state(), config_record, latents, overwrite=True
                )
                raise NonFiniteLossError(
                    f"{error}. The last good state is saved as step {step} in "
                    f"{checkpointer.directory}; the same command goes on from it with the next "
                    "batches. If it happens again, try a lower optimizer.learning_rate, "
                    "optimizer.clip_norm=1.0, model.qk_norm=True, a lower regularizer.weight, or "
                    "model.dtype='float32'."
                ) from error

    if is_main:
        _write_loss_curve(workdir)
    return state


def _due(every_steps: int, step: int, total_steps: int) -> bool:
    """Whether something done every so many steps, and after the last one, is due; 0 is never."""
    return every_steps > 0 and (step % every_steps == 0 or step == total_steps)


def _write_loss_curve(workdir: pathlib.Path) -> None:
    """Draws `<workdir>/loss_curve.png` from the metrics file."""
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in read_jsonl(workdir / JSONL_NAME):
        for name in line:
            if name.startswith(_CURVES):
                steps, values = curves.setdefault(name, {}).setdefault("", ([], []))
                steps.append(line["step"])
                values.append(line[name])
    if curves:
        images.save_curves(workdir / "loss_curve.png", curves, "training step")
