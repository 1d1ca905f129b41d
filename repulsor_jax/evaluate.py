"""The evaluate mode: numbers that a paper can quote, each with its protocol."""

import contextlib
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.checkpoints.checkpointer import Checkpointer
from repulsor_jax.checkpoints.manifest import CheckpointError, DamagedCheckpointError
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.evaluation import report
from repulsor_jax.evaluation.evaluator import Evaluator, evaluate_images, evaluate_params
from repulsor_jax.evaluation.yardstick import make_yardstick
from repulsor_jax.inference import pretrained, run
from repulsor_jax.inference.generator import Guidance, configured_guidance, make_generator
from repulsor_jax.runtime.metrics import Tracker


def evaluate(config: Config, workdir: pathlib.Path, checkpoints: str = "") -> list[report.Record]:
    """Evaluates checkpoints, or samples in files, and prints a table of all that is known.

    Writes to `<workdir>/evaluations`: for every evaluation a .json with its protocol and a grid;
    `results.md`, the table; plots over steps and guidance; and TensorBoard events. What was
    evaluated before is not evaluated again, and a job that was stopped goes on where it was.

    Args:
      config, workdir: of a run.
      checkpoints: "" for the newest, or, without any, for the file of `config.model.init_from`;
        steps as "10000,20000", "all", or "follow": each as it appears, until that of the run's
        `total_steps` is done.

    Returns:
      The records of this call, on the first process.

    Raises:
      ConfigError, CheckpointError, ValueError, OSError: one message that names the key or file.
      SamplingError: a sample is not a finite number.
    """
    folder = workdir / "evaluations"
    if config.evaluation.samples:
        records = [evaluate_images(config, workdir)]
    else:
        records = _evaluate_checkpoints(config, workdir, folder, checkpoints)
    if jax.process_index() == 0:
        print(report.write_table(folder))
        print(f"protocols, grids and this table: {folder}")
    return [record for record in records if record]


def _evaluate_checkpoints(
    config: Config, workdir: pathlib.Path, folder: pathlib.Path, checkpoints: str
) -> list[report.Record]:
    is_main = jax.process_index() == 0
    records, plot = list[report.Record](), None
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(run.open_checkpoints(config, workdir))
        published, wanted = None, iter(list[int]())
        if pretrained.reads_file(config, checkpointer, checkpoints):
            experiment, published = pretrained.open_published(config, workdir)
            first = 0
        else:
            wanted = _wanted_steps(checkpointer, checkpoints, config)
            first = next(wanted)
            experiment = run.open_experiment(config, workdir, checkpointer, first)
        generator = make_generator(experiment, run.load_guide(experiment))
        evaluator = Evaluator(experiment, generator, make_yardstick(experiment))
        evaluate_of_step = functools.partial(
            evaluate_params, evaluator, num_samples=config.evaluation.num_samples, grid=True
        )
        if is_main:
            from repulsor_jax.runtime.event_files import EventFiles  # slow where torch is installed

            events = EventFiles(workdir / "tensorboard" / "evaluation")
            stack.callback(events.close, failed=False)
        for step in itertools.chain([first], wanted):
            try:
                params = published or run.restore_params(experiment, checkpointer, step)
            except (CheckpointError, FileNotFoundError):
                # All processes must evaluate the same steps, and the others may have read this one.
                if jax.process_count() > 1 or step in checkpointer.steps():
                    raise
                tqdm.write(f"step {step} was removed before it could be evaluated")
                continue
            weights_sha256 = run.params_sha256(params)
            of_step = [
                evaluate_of_step(params, guidance, step=step, weights_sha256=weights_sha256)
                for guidance in _sweep(config)
            ]
            if is_main:
                records += of_step
                _write_events(events, of_step)
                report.write_table(folder)
                plot = report.plot(folder, of_step)
        if plot:
            tqdm.write(f"plot of the metrics: {plot}")
    return records


def _write_events(events: Tracker, records: Sequence[report.Record]) -> None:
    """Writes the records of one step; in a sweep the guidance is in their names."""
    for record in records:
        protocol, suffix = record["protocol"], ""
        if len(records) > 1:
            low, high = protocol.get("cfg_interval", (0, 1))
            suffix = f"/cfg_{protocol['cfg_scale']:g}_t_{low:g}_{high:g}"
        step, text = protocol["step"], json.dumps(record, indent=2)
        events.text(step, f"evaluation/protocol{suffix}", text)
        metrics = record["metrics"].items()
        events.scalars(step, {f"evaluation/{name}{suffix}": value for name, value in metrics})
    events.flush()


def _wanted_steps(checkpointer: Checkpointer, checkpoints: str, config: Config) -> Iterator[int]:
    """Yields the steps to evaluate; every process yields the same."""
    if checkpoints == "follow":
        yield from _followed_steps(checkpointer, config)
    elif checkpoints in ("", "all"):
        newest = checkpointer.resolve(None)  # raises where there is no checkpoint
        yield from checkpointer.steps() if checkpoints else [newest]
    else:
        try:
            steps = [int(part) for part in checkpoints.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"--checkpoint_step={checkpoints!r}: expected steps as 10000,20000, 'all' or "
                "'follow'"
            ) from error
        for step in steps:
            checkpointer.resolve(step)
        yield from steps


def _followed_steps(checkpointer: Checkpointer, config: Config) -> Iterator[int]:
    done: set[int] = set()
    total_steps, poll_seconds = config.total_steps, config.evaluation.poll_seconds
    while total_steps not in done:
        new = [step for step in checkpointer.steps() if step not in done]
        step = int(sharding.agree(new[0] if new else -1))
        if step < 0:
            if jax.process_index() == 0:
                print(f"waiting for a checkpoint in {checkpointer.directory}", flush=True)
            time.sleep(poll_seconds)
            continue
        try:
            total_steps = checkpointer.records(step)[0]["total_steps"]  # the run's own
        except CheckpointError as error:
            if isinstance(error, DamagedCheckpointError) and step in checkpointer.steps():
                raise
            time.sleep(poll_seconds)  # the run removed it, or the folder is away for a while
            continue
        done.add(step)
        yield step


def _sweep(config: Config) -> list[Guidance | None]:
    """The guidances to evaluate: every scale with every interval, without guidance once.

    A sweep compiles one program, which at scale 1 evaluates the model once a step.
    """
    c, s = config.evaluation, config.sampling
    if not c.cfg_scales and not c.cfg_intervals:
        return [configured_guidance(s)]
    scales = c.cfg_scales or (s.cfg_scale,)
    intervals = c.cfg_intervals or ((s.cfg_interval_low, s.cfg_interval_high),)
    pairs = itertools.product(intervals, scales)
    guidances = [Guidance(k, *between) if k != 1.0 else Guidance(k) for between, k in pairs]
    return list(dict.fromkeys(guidances))
