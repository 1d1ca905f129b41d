"""The training loop, and only the loop: read it from top to bottom."""

import collections
import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from clu import parameter_overview
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.checkpoints import integrity, resuming
from repulsor_jax.checkpoints.checkpointer import open_for_training
from repulsor_jax.data.latents import LatentDataset
from repulsor_jax.data.pipeline import batch_records, training_iterator
from repulsor_jax.evaluation.monitor import Monitor, is_due
from repulsor_jax.experiment import Experiment, latents_record
from repulsor_jax.files import atomic, pictures
from repulsor_jax.method import registry
from repulsor_jax.runtime.guard import EVENTS, DivergedError, DivergencePolicy
from repulsor_jax.runtime.metrics import JSONL_NAME, MetricWriter, StepRecorder, read_jsonl
from repulsor_jax.runtime.preemption import Preempted, Preemption
from repulsor_jax.runtime.profiling import Profiler, step_annotation
from repulsor_jax.runtime.throughput import training_throughput
from repulsor_jax.runtime.watchdog import Watchdog
from repulsor_jax.train_state import (
    TrainState,
    abstract_train_state,
    build_optimizer,
    create_train_state,
)
from repulsor_jax.train_step import compile_train_step, make_train_step

_CURVES = ("flow_loss", "regularizer_loss", "fid_", "frechet_")  # what their names start with

_ADVICE = (
    "If it happens again, try a lower optimizer.learning_rate, optimizer.clip_norm=1.0, "
    "model.qk_norm=True, a lower regularizer.weight, model.dtype='float32', or "
    "divergence.policy='skip' or 'rollback'."
)


def train(
    experiment: Experiment,
    dataset: LatentDataset,
    monitor: Monitor | None,
    config_record: Mapping[str, Any],
    *,
    force: bool = False,
) -> TrainState:
    """Trains to `config.total_steps`, going on from the newest checkpoint where there is one.

    Args:
      experiment: from `experiment.prepare`.
      dataset: likewise; what is trained on.
      monitor: draws grids and evaluates on the way; None draws nothing.
      config_record: the configuration as plain values, kept with every checkpoint.
      force: go on with other data or another task than the run's, see `resuming.check`.

    Returns:
      The final state.

    Raises:
      ConfigError: the run that is there was trained otherwise.
      CheckpointError: what is there does not fit or is damaged, or nothing can be saved any more.
      DivergedError: after saving the last good state.
      Preempted: after saving, when the process was told to stop.
    """
    config, mesh, workdir = experiment.config, experiment.mesh, experiment.workdir
    total_steps = config.total_steps
    is_main = jax.process_index() == 0
    say = tqdm.write if is_main else lambda message: None

    # Model, regulariser, optimizer, data.
    parts = (config, experiment.model, registry.build(config), build_optimizer(config))
    abstract_state, _ = abstract_train_state(*parts, mesh)
    data = training_iterator(
        dataset,
        global_batch_size=config.batch_size,
        seed=config.seed,
        rows=sharding.local_row_numbers(mesh, config.batch_size),
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

    check = functools.partial(resuming.check, config_record, latents, force=force)
    patience = config.checkpoint.patience_seconds
    with (
        Watchdog(workdir, config.log.watchdog_minutes) as watchdog,
        Preemption() as preemption,
        open_for_training(workdir, config.checkpoint) as checkpointer,  # on leaving, it waits
        atomic.Appender(workdir / EVENTS) as events,
        atomic.Appender(workdir / resuming.JSONL_NAME) as resumes,
    ):
        divergence = DivergencePolicy(
            config.divergence,
            workdir,
            events,
            functools.partial(batch_records, dataset, config.batch_size, config.seed),
        )

        def newest_state() -> tuple[TrainState, Mapping[str, Any] | None]:
            """That of the newest checkpoint with its position in the data, or a fresh one."""
            if checkpointer.latest_step() is None:
                return create_train_state(*parts, mesh), None
            state, position, notes = checkpointer.restore(
                abstract_state, config.batch_size, check=check
            )
            for note in notes:
                say(note)
            if is_main:
                resuming.write_down(resumes, int(jax.device_get(state.step)), notes)
            return state, position

        def save(step: int, state: TrainState, **options: Any) -> None:
            watchdog.beat("save", step)
            position = data.get_state()
            checkpointer.save(step, state, position, config_record, latents, **options)

        watchdog.beat("restore", 0)
        state, position = newest_state()
        if position is not None:
            data.set_state(position)
        first_step = int(jax.device_get(state.step))
        done = ": nothing to do" if first_step >= total_steps else ""
        say(f"step {first_step} of {total_steps}, in {workdir}{done}")

        with (
            MetricWriter(workdir, first_step, enabled=is_main) as writer,
            StepRecorder(
                writer,
                first_step=first_step,
                total_steps=total_steps,
                throughput=training_throughput(
                    config.model, config.batch_size, mesh.devices.flat[0], mesh.size
                ),
                every_steps=config.log.every_steps,
                enabled=is_main,
            ) as recorder,
            Profiler(workdir, config.log.profile_steps) as profiler,
        ):
            if monitor and first_step:  # stopped after it saved, before it had looked
                with recorder.pause():
                    monitor.look(first_step, state.ema_params, writer, watchdog.beat, missing=True)
            step, turn, told = first_step, 0, False
            recent: collections.deque[tuple[int, Any]] = collections.deque(maxlen=2)
            while step < total_steps:
                watchdog.beat("data", step + 1)
                number = data.get_state()["next_index"]
                batch = sharding.to_global(next(data), mesh)
                recent.append((number, batch))

                watchdog.beat("step", step + 1)
                profiler.before(step + 1, state)
                with jax.transfer_guard("disallow"), step_annotation(step + 1):
                    state, step_metrics = step_fn(state, batch)
                step, turn = step + 1, turn + 1
                profiler.after(step, state)
                refused = recorder.push(number, step_metrics)  # reads those of the step before

                told = told or preemption.reached(turn)
                saves = told or is_due(config.checkpoint.every_steps, step, total_steps)
                saves = saves or checkpointer.retry_due(step)
                looks = monitor is not None and monitor.is_due(step)
                if refused or saves or looks:
                    refused += recorder.settle()

                spoiled = ""
                if refused or saves:  # a step that is refused keeps what came before, good or not
                    with recorder.pause():
                        spoiled = integrity.not_finite(state)

                if refused or spoiled:
                    step -= len(refused)  # they did not count
                    try:
                        rolls_back = divergence.rolls_back(step, refused, spoiled, recent)
                    except DivergedError as error:
                        if not spoiled:  # the last good state; the data have moved on
                            save(step, state, overwrite=True, patience=patience)
                        newest = checkpointer.latest_step()
                        good = "No good state is saved; the same command starts anew"
                        if newest is not None:
                            good = (
                                f"The last good state is saved as step {newest} in "
                                f"{checkpointer.directory}; the same command goes on from it"
                            )
                        raise DivergedError(f"{error}. {good}. {_ADVICE}") from error
                    if rolls_back:
                        del state, step_metrics  # makes room for the other
                        state, _ = newest_state()  # the data go on past the batch
                        step = int(jax.device_get(state.step))
                        recorder.rewind(step)
                        writer.rewind(step)
                    continue

                if saves:
                    recorder.flush()
                    with recorder.pause():
                        ends = told or step == total_steps
                        save(step, state, patience=patience if ends else None)
                if told and step < total_steps:
                    raise Preempted(f"told to stop: saved step {step} of {total_steps}")
                if monitor and looks:  # after saving: it may take longer than there is
                    with recorder.pause():
                        monitor.look(step, state.ema_params, writer, watchdog.beat)
        watchdog.beat("save", step)

    if is_main:
        _write_loss_curve(workdir)
    return state


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
        pictures.save_curves(workdir / "loss_curve.png", curves, "training step")
