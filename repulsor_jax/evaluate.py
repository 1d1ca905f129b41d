"""The evaluate mode: numbers that a paper can quote, each with its protocol.

Samples become features batch by batch on the devices; only features reach the disk, where a job
that was stopped finds them again.
"""

import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.checkpoints.checkpointer import (
    Checkpointer,
    CheckpointError,
    DamagedCheckpointError,
    checkpoint_directory,
)
from repulsor_jax.checkpoints.places import open_folder
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.evaluation import report
from repulsor_jax.evaluation.image_sets import npz_images
from repulsor_jax.evaluation.measure import image_features, metrics, sample_features
from repulsor_jax.evaluation.yardstick import Yardstick, make_yardstick, open_yardstick
from repulsor_jax.experiment import Experiment, checked_mesh
from repulsor_jax.files import atomic
from repulsor_jax.files.shards import Shards, job_name
from repulsor_jax.inference import run
from repulsor_jax.inference.generator import (
    Generator,
    Guidance,
    configured_guidance,
    generate_images,
    make_generator,
    write_grid,
)
from repulsor_jax.inference.run import LoadedGuide


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What draws a run's samples, and what they are measured by."""

    experiment: Experiment
    generator: Generator
    guide: LoadedGuide | None
    yardstick: Yardstick


def evaluate(config: Config, workdir: pathlib.Path, checkpoints: str = "") -> list[report.Record]:
    """Evaluates checkpoints, or an .npz of samples, and prints a table of all that is known.

    Writes to `<workdir>/evaluations`: for every evaluation a .json with its protocol and a grid;
    `results.md`, the table; plots over steps and guidance; and TensorBoard events. What was
    evaluated before is not evaluated again, and a job that was stopped goes on where it was.

    Args:
      config: the configuration.
      workdir: of a run.
      checkpoints: "" for the newest, steps as "10000,20000", "all", or "follow": each as it
        appears, until that of the run's `total_steps` is done.

    Returns:
      The records of this call, on the first process.

    Raises:
      ConfigError, CheckpointError, ValueError, OSError: one message that names the key or file.
      SamplingError: a sample is not a finite number.
    """
    folder = workdir / "evaluations"
    if config.evaluation.samples:
        records = [_evaluate_npz(config, workdir)]
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
    records: list[report.Record] = []
    if checkpoints == "follow":
        _wait_for(checkpoint_directory(config.checkpoint, workdir), config.evaluation.poll_seconds)
    with run.open_checkpoints(config, workdir) as checkpointer:
        wanted = _wanted_steps(checkpointer, checkpoints, config)
        first = next(wanted)
        experiment = run.open_experiment(config, workdir, checkpointer, first)
        guide = run.load_guide(experiment)
        generator = make_generator(experiment, guide.guide if guide else None)
        evaluator = Evaluator(experiment, generator, guide, make_yardstick(experiment))
        guidances, by_step = sweep(config), None
        events = SummaryWriter(str(workdir / "tensorboard" / "evaluation")) if is_main else None
        for step in itertools.chain([first], wanted):
            try:
                params = run.restore_params(experiment, checkpointer, step)
            except (CheckpointError, FileNotFoundError):
                # One of several processes cannot go its own way.
                if jax.process_count() > 1 or step in checkpointer.steps():
                    raise
                tqdm.write(f"step {step} was removed before it could be evaluated")
                continue
            digest_of_params = run.params_sha256(params)
            of_step = [
                evaluate_params(
                    evaluator,
                    params,
                    guidance,
                    step=step,
                    weights_sha256=digest_of_params,
                    num_samples=config.evaluation.num_samples,
                    grid=True,
                )
                for guidance in guidances
            ]
            if not is_main:
                continue
            records += of_step
            assert events is not None
            for record in of_step:
                _write_events(events, record, swept=len(of_step) > 1)
            report.write_table(folder)
            picture = report.plot_sweep(folder, of_step)
            if picture:
                tqdm.write(f"the metrics over the guidance: {picture}")
            if len(of_step) == 1:
                by_step = report.plot_steps(folder, of_step[0])
        if events is not None:
            events.close()
        if by_step:
            tqdm.write(f"the metrics over the steps: {by_step}")
    return records


def _wait_for(directory: str | pathlib.Path, poll_seconds: float) -> None:
    """Waits until a run that is about to start has made its directory of checkpoints."""
    folder = open_folder(directory)

    def is_there() -> bool:
        try:
            return folder.exists()
        except OSError:  # away for a while
            return False

    while sharding.any_process(not is_there()):
        if jax.process_index() == 0:
            print(f"waiting for {directory}", flush=True)
        time.sleep(poll_seconds)


def _wanted_steps(checkpointer: Checkpointer, checkpoints: str, config: Config) -> Iterator[int]:
    """Yields the steps to evaluate; every process yields the same."""
    if checkpoints in ("", "all"):
        newest = checkpointer.resolve(None)  # or says that there is none
        steps = checkpointer.steps() if checkpoints else [newest]
        count = int(sharding.agree(len(steps)))
        yield from sharding.agree(np.resize(steps, count)).tolist()
    elif checkpoints == "follow":
        done: set[int] = set()
        total_steps = config.total_steps
        while total_steps not in done:
            new = [step for step in checkpointer.steps() if step not in done]
            step = int(sharding.agree(new[0] if new else -1))
            if step >= 0:
                try:
                    total_steps = checkpointer.records(step)[0]["total_steps"]  # the run's own
                except CheckpointError as error:
                    if isinstance(error, DamagedCheckpointError) and step in checkpointer.steps():
                        raise
                    time.sleep(config.evaluation.poll_seconds)  # it was removed, or is away
                    continue
                done.add(step)
                yield step
                continue
            if jax.process_index() == 0:
                print(f"waiting for a checkpoint in {checkpointer.directory}", flush=True)
            time.sleep(config.evaluation.poll_seconds)
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


def sweep(config: Config) -> list[Guidance | None]:
    """The guidances to evaluate: every scale with every interval, without guidance once.

    In a sweep all are of one program, which at scale 1 evaluates the model once a step.
    """
    c, s = config.evaluation, config.sampling
    if not c.cfg_scales and not c.cfg_intervals:
        return [configured_guidance(s)]
    scales = c.cfg_scales or (s.cfg_scale,)
    intervals = c.cfg_intervals or ((s.cfg_interval_low, s.cfg_interval_high),)
    guidances = [
        Guidance(scale, *(interval if scale != 1.0 else (0.0, 1.0)))
        for interval in intervals
        for scale in scales
    ]
    return list(dict.fromkeys(guidances))


def evaluate_params(
    evaluator: Evaluator,
    params: Any,
    guidance: Guidance | None,
    *,
    step: int,
    weights_sha256: str,
    num_samples: int,
    grid: bool = False,
) -> report.Record:
    """Evaluates EMA parameters with one guidance; every process of the job takes part.

    Args:
      evaluator: of the run.
      params: EMA parameters.
      guidance: of the samples; None is none.
      step: that the parameters are of.
      weights_sha256: of the parameters, `inference.params_sha256`.
      num_samples: how many to draw.
      grid: draw a grid of the first ones too.

    Returns:
      The record: `{"metrics", "warnings", "protocol", "reference", "features", "seconds"}`; empty
      on processes but the first.

    Raises:
      SamplingError: a sample is not a finite number.
    """
    experiment, generator, guide = evaluator.experiment, evaluator.generator, evaluator.guide
    yardstick = evaluator.yardstick
    protocol = run.protocol(
        experiment,
        guidance,
        step=step,
        weights_sha256=weights_sha256,
        num_samples=num_samples,
        guide=guide.description if guide else None,
    )

    def features(folder: pathlib.Path, title: str) -> Shards:
        return sample_features(
            generator, params, guidance, num_samples, yardstick.extract, folder, title
        )

    title = f"evaluate step {step}"
    if guidance is not None:
        title += f", cfg {guidance.scale:g}"
    record, name = _measured(yardstick, protocol, f"step_{step}", title, features)
    picture = yardstick.folder / f"{name}.png"
    if grid and not sharding.agree(int(picture.is_file())):
        shown = min(num_samples, experiment.config.sampling.grid_samples)
        pictures = generate_images(generator, params, shown, guidance)
        if jax.process_index() == 0:
            write_grid(experiment, picture, *pictures)
    return record


def _evaluate_npz(config: Config, workdir: pathlib.Path) -> report.Record:
    images = npz_images(config.evaluation.samples)
    mesh = checked_mesh(config, trains=False)
    yardstick = open_yardstick(config, workdir, mesh, None, images.shape)
    protocol = {"samples": images.name, "images": images.digest, "num_samples": images.count}

    def features(folder: pathlib.Path, title: str) -> Shards:
        return image_features(images, config.evaluation.batch_size, yardstick.extract, mesh, folder)

    stem = pathlib.Path(images.name).stem
    return _measured(yardstick, protocol, stem, f"evaluate {images.name}", features)[0]


def _measured(
    yardstick: Yardstick,
    protocol: dict[str, Any],
    stem: str,
    title: str,
    features: Callable[[pathlib.Path, str], Shards],
) -> tuple[report.Record, str]:
    """Reads the record of this protocol, or measures and writes it; also returns its name."""
    is_main = jax.process_index() == 0
    identity: dict[str, Any] = {
        "protocol": protocol,
        "features": {"name": yardstick.space.name, "digest": yardstick.space.digest},
    }
    if yardstick.reference is not None:
        identity["reference"] = yardstick.reference.description
    name = f"{stem}-{job_name(identity)}"
    with atomic.locked(yardstick.folder / name, enabled=is_main):
        known = report.read(yardstick.folder, name) if is_main else None
        if sharding.agree(int(known is not None)):
            return known or {}, name
        started = time.perf_counter()
        shards = features(yardstick.folder / f".{name}.incomplete", title)
        if not is_main:
            return {}, name
        assert yardstick.reference is not None
        values, warnings = metrics(shards, yardstick.reference, yardstick.space)
        seconds = time.perf_counter() - started
        record = {"metrics": values, "warnings": warnings, **identity, "seconds": round(seconds, 3)}
        report.write(yardstick.folder, name, record)
        shards.remove()
    shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
    tqdm.write(f"{title}, {protocol['num_samples']:,} samples: {shown}")
    for warning in warnings:
        tqdm.write(f"warning: {warning}")
    return record, name


def _write_events(events: SummaryWriter, record: report.Record, *, swept: bool) -> None:
    protocol = record["protocol"]
    suffix = ""
    if swept:
        low, high = protocol.get("cfg_interval", (0, 1))
        suffix = f"/cfg_{protocol['cfg_scale']:g}_t_{low:g}_{high:g}"
    text = json.dumps(record, indent=2)
    events.add_text(f"evaluation/protocol{suffix}", f"```\n{text}\n```", protocol["step"])
    for name, value in record["metrics"].items():
        events.add_scalar(f"evaluation/{name}{suffix}", value, protocol["step"])
