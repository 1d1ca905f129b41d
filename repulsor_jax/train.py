"""The training loop, and only the loop: read it from top to bottom."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
from clu import parameter_overview
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.checkpoints import resuming
from repulsor_jax.checkpoints.checkpointer import CheckpointError, open_for_training
from repulsor_jax.checkpoints.manifest import not_finite
from repulsor_jax.config import stored_features
from repulsor_jax.data.latents import LatentDataset
from repulsor_jax.data.pipeline import batch_records, training_iterator
from repulsor_jax.evaluation.inspector import make_inspector
from repulsor_jax.evaluation.monitor import Monitor, is_due
from repulsor_jax.evaluation.page import Page, describe
from repulsor_jax.experiment import Experiment, describe_data, latents_record, make_trainer
from repulsor_jax.files.atomic import Appender
from repulsor_jax.inference import pretrained
from repulsor_jax.inference.run import open_checkpoints, with_base_params
from repulsor_jax.runtime.guard import (
    ADVICE,
    EVENTS,
    DivergedError,
    Guard,
    Verdict,
    bad_batches,
    batch_after_going_back,
)
from repulsor_jax.runtime.metrics import MetricWriter, StepRecorder
from repulsor_jax.runtime.preemption import Preempted, Preemption
from repulsor_jax.runtime.profiling import Profiler
from repulsor_jax.runtime.throughput import training_throughput
from repulsor_jax.runtime.wandb_tracker import WandB
from repulsor_jax.runtime.watchdog import Watchdog
from repulsor_jax.train_state import TrainState
from repulsor_jax.train_step import TrainingProgram, compile_training


def train(
    experiment: Experiment,
    dataset: LatentDataset,
    monitor: Monitor | None,
    config_record: Mapping[str, Any],
    *,
    program: TrainingProgram | None = None,
    feed: grain.DatasetIterator | None = None,
    force: bool = False,
) -> TrainState:
    """Trains to `config.total_steps`, going on from the newest checkpoint where there is one.

    Args:
      experiment: from `experiment.prepare`.
      dataset: what is trained on, likewise.
      monitor: draws grids and evaluates on the way; None draws nothing.
      config_record: the configuration as plain values, kept with every checkpoint.
      program: the compiled step and its first state; None compiles them.
      feed: this process's rows of batch after batch; None reads the data set.
      force: go on with other data or another task than the run's, see `resuming.check`.

    Returns:
      The final state.

    Raises:
      ConfigError: the run in the working directory was trained with other settings.
      CheckpointError: the run's checkpoints do not fit or are damaged, or saving keeps failing.
      DivergedError: after saving the last good state.
      Preempted: after saving, when the process was told to stop.
    """
    config, mesh, workdir = experiment.config, experiment.mesh, experiment.workdir
    total_steps = config.total_steps
    is_main = jax.process_index() == 0
    say = tqdm.write if is_main else lambda message: None

    latents = latents_record(experiment)
    check = functools.partial(resuming.check, config_record, latents, force=force)
    # Another run is refused before the minutes that compiling takes, and a step that cannot run
    # fails before the loop.
    _check_run(experiment, check)
    weights = _weights_to_start_from(experiment)
    if weights:
        say(f"starts from {weights.description}")
    for line in describe_data(config, dataset):
        say(line)
    program = program or compile_step(experiment, dataset)
    feed = feed or open_feed(experiment, dataset)
    inspector = make_inspector(experiment, dataset) if config.log.diagnostics_every_steps else None
    with (
        Watchdog(workdir, config.log.watchdog_minutes) as watchdog,
        Preemption() as preemption,
        open_for_training(workdir, config.checkpoint) as checkpointer,  # on leaving, it waits
        Appender(workdir / EVENTS) as events,
        Appender(workdir / resuming.JSONL_NAME) as resumes,
        Page(workdir, enabled=is_main and config.log.page) as page,
    ):
        records_of = functools.partial(batch_records, dataset, config.batch_size, config.seed)
        newest = checkpointer.latest_step
        guard = Guard(config.divergence, events, records_of, not_finite, newest)

        def newest_state() -> tuple[TrainState, Mapping[str, Any] | None]:
            """The state of the newest checkpoint and its position in the data, or a fresh state."""
            if checkpointer.latest_step() is None:
                state = program.create_state()
                if config.model.residual_depth:
                    state = state.replace(ema_params=with_base_params(experiment, state.ema_params))
                return (pretrained.start_from(state, weights) if weights else state), None
            state, position, notes = checkpointer.restore(
                program.abstract_state, config.batch_size, check=check, create=program.create_state
            )
            for note in notes:
                say(note)
            if is_main:
                resuming.write_down(resumes, int(jax.device_get(state.step)), notes)
            return state, position

        def next_batch() -> tuple[int, Any]:
            """Number and content of the next batch; starts its transfer to the devices."""
            while (number := feed.get_state()["next_index"]) in left_out:
                next(feed)
            return number, sharding.to_global(next(feed), mesh)

        def save(step: int, state: TrainState, patience: float | None = None) -> None:
            watchdog.beat("save", step)
            checkpointer.save(
                step, state, feed.get_state(), config_record, latents, patience=patience
            )

        def diverged(step: int, state: TrainState) -> DivergedError:
            """The error to end with, after the last good state is saved."""
            if not guard.spoiled:
                save(step, state, config.checkpoint.patience_seconds)
            newest = checkpointer.latest_step()
            good = "No good state is saved; the same command starts anew"
            if newest is not None:
                good = (
                    f"The last good state is saved as step {newest} in "
                    f"{checkpointer.directory}; the same command goes on from it"
                )
            return DivergedError(f"{guard.problem}. {good}. {ADVICE}")

        watchdog.beat("restore", 0)
        state, position = newest_state()
        left_out: frozenset[int] = frozenset()
        first_step = int(jax.device_get(state.step))
        if position is not None:
            given_up = batch_after_going_back(workdir / EVENTS, first_step, records_of)
            position = {**position, "next_index": max(position["next_index"], given_up)}
            feed.set_state(position)
            left_out = bad_batches(workdir / EVENTS, records_of)
            left_out = frozenset(b for b in left_out if b >= position["next_index"])
        if left_out:
            say(f"leaves out {len(left_out)} batches that were refused, see {workdir / EVENTS}")
        done = ": nothing to do" if first_step >= total_steps else ""
        say(f"step {first_step} of {total_steps}, in {workdir}{done}")
        page.start(describe(experiment, dataset, state.params["model"], config_record), first_step)

        others = []
        if is_main and config.log.wandb:
            others.append(WandB(workdir, config.log.wandb, config_record))
        with (
            MetricWriter(workdir, first_step, is_main, others) as writer,
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
            if monitor and first_step:  # the run may have stopped after it saved
                with recorder.pause():
                    monitor.look(first_step, state.ema_params, writer, watchdog.beat, missing=True)

            step, turn, told = first_step, 0, False
            while step < total_steps:
                watchdog.beat("data", step + 1)
                number, batch = next_batch()

                watchdog.beat("step", step + 1)
                profiler.before(step + 1, state)
                annotation = jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
                with jax.transfer_guard("disallow"), annotation:
                    state, step_metrics = program.step(state, batch)
                step, turn = step + 1, turn + 1
                profiler.after(step, state)
                refused = recorder.push(number, step_metrics)  # reads the step before

                told = told or preemption.reached(turn)
                saves = told or is_due(config.checkpoint.every_steps, step, total_steps)
                saves = saves or checkpointer.retry_due(step)
                looks = monitor is not None and monitor.is_due(step)
                inspects = is_due(config.log.diagnostics_every_steps, step, total_steps)
                if refused or saves or looks or inspects:
                    refused += recorder.settle()
                step -= len(refused)

                with recorder.pause():
                    verdict = guard.look(step, state, refused, saves, number + 1)
                if verdict is Verdict.STOP:
                    raise diverged(step, state)
                if verdict is Verdict.BACK:
                    del state, step_metrics  # frees memory for the state that is read
                    state, _ = newest_state()  # the position in the data stays past the batch
                    step = int(jax.device_get(state.step))
                    recorder.rewind(step)
                    writer.rewind(step)
                if verdict is not Verdict.GO:
                    continue

                if saves:
                    recorder.flush()
                    ends = told or step == total_steps
                    with recorder.pause():
                        save(step, state, config.checkpoint.patience_seconds if ends else None)
                if told and step < total_steps:
                    raise Preempted(f"told to stop: saved step {step} of {total_steps}")
                if monitor and looks:  # after saving: a look may take longer than is left
                    with recorder.pause():
                        monitor.look(step, state.ema_params, writer, watchdog.beat)
                if inspector and inspects:
                    watchdog.beat("diagnostics", step)
                    with recorder.pause():
                        inspector.look(step, state, batch, writer)
                if saves or looks or inspects:
                    with recorder.pause():
                        page.refresh()
        watchdog.beat("save", step)
    return state


def _check_run(experiment: Experiment, check: Callable[..., list[str]]) -> None:
    """Raises ConfigError where the run in the working directory must not go on; see `resuming`."""
    with open_checkpoints(experiment.config, experiment.workdir) as checkpointer:
        try:
            saved_config, saved_latents, _ = checkpointer.records()
        except (
            CheckpointError
        ):  # there is none, or a damaged one, for which restoring finds another
            return
    check(saved_config, saved_latents)


def _weights_to_start_from(experiment: Experiment) -> pretrained.Pretrained | None:
    """The file of `config.model.init_from`, where the run has no checkpoint yet."""
    with open_checkpoints(experiment.config, experiment.workdir) as checkpointer:
        reads = pretrained.reads_file(experiment.config, checkpointer)
    return pretrained.load(experiment.config) if reads else None


def compile_step(experiment: Experiment, dataset: LatentDataset) -> TrainingProgram:
    """Compiles a run's step; the first process prints the parameters and how long it took."""
    started = time.perf_counter()
    trainer = make_trainer(experiment.config, experiment.mesh)
    program = compile_training(
        trainer, experiment.latent_format, dataset.shape, dataset.dtype, experiment.mesh
    )
    if jax.process_index() == 0:
        params = program.abstract_state.params
        tqdm.write(parameter_overview.get_parameter_overview(params, include_stats=False))
        seconds = time.perf_counter() - started
        tqdm.write(
            f"compiled the step for mesh {sharding.sizes(experiment.mesh)} in {seconds:.1f} s"
        )
    return program


def open_feed(experiment: Experiment, dataset: LatentDataset) -> grain.DatasetIterator:
    """This process's rows of the batches of a data set, read ahead; see `pipeline`."""
    config = experiment.config
    return training_iterator(
        dataset,
        global_batch_size=config.batch_size,
        seed=config.seed,
        rows=sharding.local_row_numbers(experiment.mesh, config.batch_size),
        num_threads=config.data.read_threads,
        prefetch=config.data.prefetch_batches,
        features=stored_features(config),
    )
