"""The sample mode: as many images as a paper needs, from a checkpoint's EMA parameters."""

import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from repulsor_jax import sharding
from repulsor_jax.config import Config
from repulsor_jax.evaluation.reference import open_images
from repulsor_jax.files import atomic, locks, pictures
from repulsor_jax.files.shards import Shards, fill, job_name, whole_batches
from repulsor_jax.inference import pretrained, run
from repulsor_jax.inference.generator import (
    configured_guidance,
    draw_batches,
    make_generator,
    trajectory,
    write_grid,
)


def sample(config: Config, workdir: pathlib.Path, step: int | None = None) -> pathlib.Path:
    """Writes `<workdir>/samples/step_<step>-<digest>.npz`, as ADM's evaluator reads it.

    Beside it: a grid (.png), the protocol (.json), from which the digest is made, and, where
    configured, a folder of PNG files. A job that was stopped goes on with the images that are
    missing, and ends with the same bytes.

    Args:
      config: the configuration.
      workdir: of a trained run.
      step: which checkpoint; the newest by default, or `config.model.init_from` without any.

    Returns:
      The .npz.

    Raises:
      ConfigError, CheckpointError: one message that names the key or file.
      SamplingError: a sample is not a finite number.
    """
    step, experiment, params, _ = pretrained.open_model(config, workdir, step)
    guide = run.load_guide(experiment)
    guidance = configured_guidance(config.sampling)
    count, batch_size = config.sampling.num_samples, config.sampling.batch_size
    protocol = run.protocol(
        experiment,
        guidance,
        step=step,
        weights_sha256=run.params_sha256(params),
        num_samples=count,
        guide=guide,
    )
    path = workdir / "samples" / f"step_{step}-{job_name(protocol)}.npz"
    record = path.with_suffix(".json")
    is_main = jax.process_index() == 0
    shards = Shards(
        path.with_name(f".{path.stem}.incomplete"),
        count,
        whole_batches(config.sampling.images_per_shard, batch_size),
    )
    with locks.locked(path, enabled=is_main):
        if sharding.agree(int(path.is_file() and record.is_file())):
            if is_main:
                shards.remove()  # a job killed at its very end leaves its shards
                if config.sampling.save_png:
                    rows = [shards.rows(shard) for shard in range(len(shards))]
                    finished = open_images(path).read(rows)
                    _save_pngs(path, zip(rows, finished, strict=True))
                print(f"{path}: these {count:,} samples are there already")
            return path

        generator = make_generator(experiment, guide)
        produce = lambda parts: draw_batches(generator, params, parts, guidance)
        fill(shards, produce, title="sample")
        shown = min(count, config.sampling.grid_samples)
        beside = generator.pictures(shown) if generator.pictures else ()
        if is_main:
            labels = np.concatenate(list(shards.read("labels")))
            if config.sampling.save_png:
                _save_pngs(path, ((shards.rows(k), x) for k, x in enumerate(shards.read("images"))))
            atomic.remove_stale(path)
            pictures.save_samples(path, shards.read("images"), labels)
            first = _first(shards.read("images"), shown)
            write_grid(experiment, path.with_suffix(".png"), first, labels[:shown], beside)
            atomic.write_text(record, json.dumps(protocol, indent=2) + "\n")
            shards.remove()
            print(
                f"{count:,} samples of step {step}: {path}\n"
                f"the first {shown}: {path.with_suffix('.png')}; their protocol: {record}"
            )
        return path


def draw_trajectory(config: Config, workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Writes, beside samples, the way of the first of them from noise: a strip, and an animation.

    `<path>_trajectory.png` has a row for each of `sampling.grid_columns` samples, and a column for
    each of nine times; `.webp` shows them at up to 50 times. A picture is the decoded latent, in
    which noise is left.

    Args:
      config, workdir: as of `sample`.
      path: what `sample` returned.
    """
    # The step of the samples: by now a run that trains may have saved another.
    step = 0
    with sharding.raised_on_all():  # the others wait here: the first process writes the samples
        if jax.process_index() == 0:
            step = json.loads(path.with_suffix(".json").read_text())["step"]
    step = int(sharding.agree(step))
    _, experiment, params, _ = pretrained.open_model(config, workdir, step or None)
    frames, times = trajectory(experiment, params, run.load_guide(experiment))
    if jax.process_index() == 0:
        strip = path.with_name(f"{path.stem}_trajectory.png")
        shown = np.linspace(0, len(times) - 1, 9).round().astype(int)
        shown = np.unique(shown)
        rows = frames[shown].swapaxes(0, 1)
        pictures.save_grid(
            rows.reshape(-1, *rows.shape[2:]),
            strip,
            columns=len(shown),
            upscale=max(1, 48 // rows.shape[2]),
            smooth=True,
            column_labels=[f"{times[k]:.2f}" for k in shown],
        )
        size = max(1, 96 // frames.shape[2])
        moving = [np.concatenate(list(frame), axis=1) for frame in frames]
        moving = [np.kron(frame, np.ones((size, size, 1), np.uint8)) for frame in moving]
        pictures.save_animation(moving, strip.with_suffix(".webp"), milliseconds=80)
        print(f"from noise to image: {strip}, and as an animation {strip.with_suffix('.webp')}")


def _save_pngs(path: pathlib.Path, pieces: Iterable[tuple[range, np.ndarray]]) -> None:
    """Writes the folder of PNG files beside the .npz, unless it is there; it appears whole."""
    folder, made = path.with_suffix(""), path.with_name(f".{path.stem}.png.incomplete")
    if folder.is_dir():
        return
    shutil.rmtree(made, ignore_errors=True)  # of a job that was killed
    for rows, piece in pieces:
        pictures.save_pngs(made, rows.start, piece)
    made.rename(folder)


def _first(pieces: Iterator[np.ndarray], count: int) -> np.ndarray:
    """The first `count` items of arrays in a row."""
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        found.append(next(pieces))
    return np.concatenate(found)[:count]
