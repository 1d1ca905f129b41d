"""From parameters, or images in files, to a record: metrics with their protocol."""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data.sources import leaves_files, open_source
from repulsor_jax.evaluation import report
from repulsor_jax.evaluation.image_sets import ImageSet, native_shape, npz_images, source_images
from repulsor_jax.evaluation.measure import image_features, metrics, sample_features
from repulsor_jax.evaluation.reference import SUFFIXES
from repulsor_jax.evaluation.yardstick import Yardstick, check_count, contents_note, open_yardstick
from repulsor_jax.experiment import Experiment, checked_mesh
from repulsor_jax.files import locks
from repulsor_jax.files.shards import Shards, job_name
from repulsor_jax.inference import run
from repulsor_jax.inference.generator import Generator, Guidance, generate_images, write_grid


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A run, the generator of its samples, and the yardstick that measures them."""

    experiment: Experiment
    generator: Generator
    yardstick: Yardstick


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

    Samples become features batch by batch on the devices; only features reach the disk, where a
    job that was stopped finds them again. An evaluation that has a record is not done again.

    Args:
      evaluator, params: of the run; EMA parameters.
      guidance: None draws samples without guidance.
      step, weights_sha256: of the parameters; `inference.run.params_sha256`.
      num_samples: how many to draw.
      grid: draw a grid of the first samples too.

    Returns:
      The record: `{"metrics", "warnings", "protocol", "reference", "features", "seconds"}`; empty
      on processes but the first.

    Raises:
      SamplingError: a sample is not a finite number.
    """
    experiment, generator = evaluator.experiment, evaluator.generator
    yardstick = evaluator.yardstick
    protocol = run.protocol(
        experiment,
        guidance,
        step=step,
        weights_sha256=weights_sha256,
        num_samples=num_samples,
        guide=generator.guide,
    )

    def features(folder: pathlib.Path, title: str) -> Shards:
        return sample_features(
            generator, params, guidance, num_samples, yardstick.extract, folder, title
        )

    title = f"evaluate step {step}" + (f", cfg {guidance.scale:g}" if guidance else "")
    record, name = _measured(yardstick, protocol, f"step_{step}", title, features)
    picture = yardstick.folder / f"{name}.png"
    if grid and not sharding.agree(int(picture.is_file())):
        shown = min(num_samples, experiment.config.sampling.grid_samples)
        samples = generate_images(generator, params, shown, guidance)
        beside = generator.pictures(shown) if generator.pictures else ()
        if jax.process_index() == 0:
            write_grid(experiment, picture, *samples, beside)
    return record


def evaluate_images(config: Config, workdir: pathlib.Path) -> report.Record:
    """Evaluates the images of `config.evaluation.samples` as `evaluate_params`; needs no run.

    Raises:
      ConfigError, ValueError, OSError: one message that names the key or file.
    """
    # Processes connect at their first barrier, with a timeout of seconds.
    multihost_utils.sync_global_devices("connected")
    path, cache = pathlib.Path(config.evaluation.samples), workdir / "evaluations" / ".samples"
    owns_cache = jax.process_index() == 0 and path.is_file() and path.suffix not in SUFFIXES
    with locks.locked(cache, enabled=owns_cache):
        images = _open_samples(config, workdir, cache)
        check_count(images, f"config.evaluation.samples={config.evaluation.samples!r}")
        mesh = checked_mesh(config, trains=False)
        yardstick = open_yardstick(config, workdir, mesh, None, (*images.shape,))
        protocol = {"samples": images.name, "images": images.digest, "num_samples": images.count}

        def features(folder: pathlib.Path, title: str) -> Shards:
            batch_size = config.evaluation.batch_size
            return image_features(images, batch_size, yardstick.extract, mesh, folder)

        stem = pathlib.Path(images.name).stem
        record, _ = _measured(yardstick, protocol, stem, f"evaluate {images.name}", features)
        if owns_cache:
            shutil.rmtree(cache, ignore_errors=True)
    return record


def _open_samples(config: Config, workdir: pathlib.Path, cache: pathlib.Path) -> ImageSet:
    """Opens an .npz or .npy, or a folder or archive of image files of one size."""
    path = pathlib.Path(config.evaluation.samples)
    key = f"config.evaluation.samples={config.evaluation.samples!r}"
    if not path.exists():
        raise ConfigError(
            f"{key}: found no such file or folder, expected an .npz or .npy of images, or a folder "
            "or archive of image files"
        )
    try:
        if path.suffix in SUFFIXES:
            return npz_images(path)
        kind = "folder" if path.is_dir() else "archive"
        source = sharding.first_process_first(
            lambda: open_source(kind, ".", path=str(path), cache_dir=cache),
            enabled=leaves_files(kind),
        )
        note = contents_note(workdir, str(path))
        return source_images(source, path.name, native_shape(source), note, crop=False)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}: {error}") from error


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
    with locks.locked(yardstick.folder / name, enabled=is_main):
        with sharding.raised_on_all():
            known = report.read(yardstick.folder, name) if is_main else None
        if sharding.agree(int(known is not None)):
            return known or {}, name
        started = time.perf_counter()
        shards = features(yardstick.folder / f".{name}.incomplete", title)
        with sharding.raised_on_all():
            if not is_main:
                return {}, name
            assert yardstick.reference is not None
            values, warnings = metrics(shards, yardstick.reference, yardstick.space)
            record = {"metrics": values, "warnings": warnings, **identity}
            record["seconds"] = round(time.perf_counter() - started, 3)
            report.write(yardstick.folder, name, record)
        shards.remove()
    shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
    tqdm.write(f"{title}, {protocol['num_samples']:,} samples: {shown}")
    for warning in warnings:
        tqdm.write(f"warning: {warning}")
    return record, name
