"""Writes a latent data set shard by shard, so that it can be stopped anywhere and gone on with.

Until it is complete, the data set `<name>` is a sibling folder `.<name>.incomplete`, which holds

- `job.json`: the settings of the job; a job that goes on must have the same;
- for every finished shard, the ArrayRecord file, and then a `.json` with its counts, sums and
  SHA-256: a shard without that `.json` is written again, whole.

When all shards are there, dataset.json is made from those, and the folder is renamed. Everything
is a function of the records, so that an interrupted job ends with the same bytes as another.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from repulsor_jax.data.latents import (
    FORMAT_VERSION,
    METADATA,
    Description,
    LatentDataset,
    Shard,
    Skipped,
    described,
    open_latent_dataset,
    record_dtype,
)
from repulsor_jax.files import atomic
from repulsor_jax.files.checksums import file_sha256
from repulsor_jax.files.shards import Restartable
from repulsor_jax.files.untrusted import read_json


class Batch(NamedTuple):
    """A piece of a shard: images in source order, and those that could not be read."""

    latents: np.ndarray  # [B, views, h, w, c], with the channels of a condition
    labels: np.ndarray  # [B]
    skipped: Sequence[Skipped] = ()


@dataclasses.dataclass(frozen=True)
class DatasetWriter(Restartable):
    """A data set that is being written; make it with `open_writer`."""

    directory: pathlib.Path  # the place of the complete data set
    description: Description
    name_of: Callable[[int], str]  # an image's name, for messages

    def is_finished(self, shard: int) -> bool:
        """Whether a shard and its summary are written, or all of them and dataset.json."""
        return self._summary_path(shard).exists() or (self.folder / METADATA).exists()

    def size(self, part: Batch) -> int:
        """The number of images, also those that could not be read."""
        return len(part.labels) + len(part.skipped)

    def write(self, shard: int, parts: Iterable[Batch]) -> None:
        """See `Restartable`.

        Raises:
          ValueError: a latent is not finite or overflows float16, a label is out of range, the
            shapes disagree, or the batches do not hold the images of this shard.
          OSError: it cannot be written, as where the disk is full.
        """
        path = self.folder / self._name(shard)
        atomic.remove_stale(path)
        with atomic.replacing(path) as partial:
            summary = self._write_records(partial, shard, parts)
            summary["sha256"] = file_sha256(partial)
        atomic.write_text(self._summary_path(shard), json.dumps(summary))

    def finish(self) -> LatentDataset:
        """Completes the data set, on one process; ValueError without all shards, or any image."""
        if not (self.folder / METADATA).exists():
            if unfinished := self.missing():
                found = f"{len(unfinished)} of {len(self)} shards are not finished"
                raise ValueError(f"{self.folder}: {found}: run the same command again")
            paths = map(self._summary_path, range(len(self)))
            dataset = self._combine([read_json(path) for path in paths])
            values = described(dataclasses.asdict(dataset))
            content = {"format_version": FORMAT_VERSION, **values}
            del content["directory"]
            atomic.write_text(self.folder / METADATA, json.dumps(content, indent=2) + "\n")
        # A job that is killed from here on, and run again, begins here.
        listed = {s["name"] for s in read_json(self.folder / METADATA)["shards"]}
        for path in self.folder.iterdir():
            if path.name not in listed | {METADATA}:
                path.unlink()
        self.folder.rename(self.directory)
        return open_latent_dataset(self.directory)

    def _name(self, shard: int) -> str:
        return f"data-{shard:05d}-of-{len(self):05d}.array_record"

    def _summary_path(self, shard: int) -> pathlib.Path:
        return self.folder / f"{self._name(shard)}.json"

    def _write_records(
        self, path: pathlib.Path, shard: int, batches: Iterable[Batch]
    ) -> dict[str, Any]:
        """Writes the records of a shard and returns its summary."""
        about = self.description
        shape: tuple[int, ...] = ()
        images, counts = 0, np.zeros(len(about.class_names), np.int64)
        skipped: list[Skipped] = []
        total = square = np.zeros(())
        with _full_disk_is_oserror():
            out = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        try:
            for batch in batches:
                first = self.rows(shard).start + images + len(skipped)
                skipped += batch.skipped
                if not len(batch.labels):
                    continue
                records = self._records(batch, shape, first)
                shape = records["latents"].shape[1:]
                channels = shape[-1] - about.condition_channels
                latents = records["latents"][..., :channels].astype(np.float64)
                if about.stochastic:
                    latents = latents[..., : channels // 2]
                axes = tuple(range(latents.ndim - 1))
                total = total + latents.sum(axes)
                square = square + np.square(latents).sum(axes)
                with _full_disk_is_oserror():
                    for record in records:
                        out.write(record.tobytes())
                images += len(batch.labels)
                counts += np.bincount(batch.labels, minlength=len(counts))
        finally:
            with _full_disk_is_oserror():
                out.close()
        if images + len(skipped) != len(self.rows(shard)):
            found = f"{images} images and {len(skipped)} skipped"
            raise ValueError(f"shard {shard}: found {found}, expected {len(self.rows(shard))}")
        return {
            "images": images,
            "class_counts": counts.tolist(),
            "shape": [*shape[:-1], shape[-1] - about.condition_channels] if shape else [],
            "sum": total.tolist(),
            "square": square.tolist(),
            "skipped": [dataclasses.asdict(s) for s in skipped],
        }

    def _records(self, batch: Batch, shape: tuple[int, ...], first: int) -> np.ndarray:
        """Returns a batch as an array of records, or raises naming the first bad image."""
        about, latents, labels = self.description, batch.latents, batch.labels
        shape = shape or latents.shape[2:]
        expected = (len(labels), about.views, *shape)
        if latents.shape != expected:
            where = f"batch from {self.name_of(first)}"
            raise ValueError(f"{where}: found latents {latents.shape}, expected {expected}")
        channels = shape[-1] - about.condition_channels
        if about.stochastic and channels % 2:
            raise ValueError(f"found {channels} channels of means and spreads, not an even number")
        skipped = {s.index for s in batch.skipped}
        rows = [
            row for row in range(first, first + len(labels) + len(skipped)) if row not in skipped
        ]
        name = lambda i: self.name_of(rows[i])
        classes = len(about.class_names)
        for i in np.flatnonzero((labels < 0) | (labels >= classes)):
            raise ValueError(f"{name(i)}: found label {labels[i]}, expected 0 to {classes - 1}")
        records = np.empty((len(labels), about.views), record_dtype(shape, about.dtype))
        records["labels"] = labels[:, None]
        with np.errstate(over="ignore"):  # reported below, with the image
            records["latents"] = latents
        stored = records["latents"].reshape(len(labels), -1)
        for i in np.flatnonzero(~np.isfinite(stored).all(axis=1)):
            problem = "are not finite" if np.isnan(stored[i]).any() else f"overflow {about.dtype}"
            raise ValueError(
                f"{name(i)}: the latents {problem}: check the image and the autoencoder's "
                'weights, or write with config.data.dtype="float32"'
            )
        return records.reshape(-1)

    def _combine(self, summaries: Sequence[Mapping[str, Any]]) -> LatentDataset:
        full = [s for s in summaries if s["images"]]
        if not full:
            reason = "{name}: {reason}".format(**summaries[0]["skipped"][0])
            raise ValueError(f"{self.directory}: no image could be read; the first: {reason}")
        shapes = {tuple(s["shape"]) for s in full}
        if len(shapes) > 1:
            remedy = f"set config.data.image_size, and delete {self.folder}"
            raise ValueError(f"found latents of shapes {sorted(shapes)}, expected one: {remedy}")
        shape = shapes.pop()
        images, views = sum(s["images"] for s in full), self.description.views
        # Summed in the order of the shards: other orders change the last bit.
        positions = images * views * math.prod(shape[:-1])
        # Shards that an earlier version wrote have no counts.
        counts = [s["class_counts"] for s in full if "class_counts" in s]
        mean = np.sum([s["sum"] for s in full], axis=0) / positions
        variance = np.sum([s["square"] for s in full], axis=0) / positions - np.square(mean)
        shards = [
            Shard(name=self._name(k), records=s["images"] * views, sha256=s["sha256"])
            for k, s in enumerate(summaries)
            if s["images"]
        ]
        return LatentDataset(
            **vars(self.description),
            directory=self.directory,
            shape=shape,
            num_images=images,
            class_counts=tuple(np.sum(counts, axis=0).tolist()) if len(counts) == len(full) else (),
            mean=tuple(mean.tolist()),
            std=tuple(np.sqrt(np.maximum(variance, 0)).tolist()),
            shards=tuple(shards),
            skipped=tuple(Skipped(**skip) for s in summaries for skip in s["skipped"]),
        )


def open_writer(
    directory: str | os.PathLike[str],
    description: Description,
    *,
    num_images: int,
    images_per_shard: int,
    settings: Mapping[str, Any] | None = None,
    name_of: Callable[[int], str] = "image {}".format,
) -> DatasetWriter:
    """Begins a data set, or goes on with one that was begun.

    Args:
      directory: must not exist yet, or be empty.
      description: the part of dataset.json that is known before the first record.
      num_images: of the source.
      images_per_shard: at most as many are lost when the job is stopped.
      settings: all else that the records depend on; a job that goes on must have the same.
      name_of: the name of an image by its number, for messages.

    Raises:
      FileExistsError: `directory` already holds files; nothing is changed.
      ValueError: an argument is wrong, or the job that was begun is another one.
    """
    directory = pathlib.Path(directory).absolute()
    if not num_images:
        raise ValueError(f"{directory}: the source is empty, expected 1 image or more")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} already holds files; a data set is never overwritten: "
            "choose another directory, or delete this one first"
        )
    folder = directory.parent / f".{directory.name}.incomplete"
    about = directory, description, name_of
    writer = DatasetWriter(folder, num_images, images_per_shard, *about)
    sizes = {"num_images": num_images, "images_per_shard": images_per_shard}
    job = {"format_version": FORMAT_VERSION, **sizes, **described(vars(description))}
    job |= settings or {}
    text = json.dumps(job, indent=2) + "\n"
    path = folder / "job.json"
    if not path.exists():
        if not (folder / METADATA).exists():
            atomic.write_text(path, text)
        return writer
    begun, job = read_json(path), json.loads(text)
    differences = [
        f"{key} was {begun.get(key)!r:.60} and is {job.get(key)!r:.60}"
        for key in sorted(begun.keys() | job.keys())
        if begun.get(key) != job.get(key)
    ]
    if differences:
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(differences)}. Go on with the "
            "settings of then, or delete that folder to start over"
        )
    return writer


@contextlib.contextmanager
def _full_disk_is_oserror() -> Iterator[None]:
    """The ArrayRecord writer raises RuntimeError, with the path in its message."""
    try:
        yield
    except RuntimeError as error:
        problem = f"latents cannot be written: {error}"
        raise OSError(f"{problem}. Once there is room, the same command goes on") from error
