"""Data sets of latents, written from arrays."""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from repulsor_jax.data.latents import LatentDataset
from repulsor_jax.data.writer import Batch, DatasetWriter, open_writer
from repulsor_jax.files.shards import fill, in_batches
from tests.oracles import tiny


def random_latents(
    count: int = 23, views: int = 1, shape: tuple[int, ...] = (4, 4, 6), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[count, views, *shape]`, whose channels have different means, and labels 0 to 6."""
    rng = np.random.default_rng(seed)
    latents = 3 * rng.standard_normal((count, views, *shape)) + np.arange(shape[-1])
    return latents.astype(np.float32), rng.integers(0, 7, count)


def batches(
    latents: np.ndarray, labels: np.ndarray
) -> Callable[[Sequence[range]], Iterator[Batch]]:
    """What `fill` takes: the arrays in batches of 5."""

    def produce(todo: Sequence[range]) -> Iterator[Batch]:
        for rows in in_batches(todo, 5):
            yield Batch(latents[rows.start : rows.stop], labels[rows.start : rows.stop])

    return produce


def begin(
    directory: pathlib.Path, count: int, images_per_shard: int = 0, **description: Any
) -> DatasetWriter:
    """A writer of `count` images, in one shard unless told otherwise."""
    description = {"scale": 0.5, "class_names": tuple("abcdefg"), **description}
    return open_writer(
        directory,
        tiny.description(**description),
        num_images=count,
        images_per_shard=images_per_shard or count,
    )


def write(
    directory: pathlib.Path,
    latents: np.ndarray,
    labels: np.ndarray,
    images_per_shard: int = 0,
    **description: Any,
) -> LatentDataset:
    """Writes a whole data set."""
    writer = begin(directory, len(labels), images_per_shard, **description)
    fill(writer, batches(latents, labels), title="test", share=slice(None))
    return writer.finish()


def edit(directory: pathlib.Path, **changes: Any) -> None:
    """Changes values of a data set's dataset.json."""
    path = directory / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
