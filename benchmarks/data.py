"""The data side: how fast latents are read, and how fast images are encoded, against their limits.

python -m benchmarks.data --part=read
python -m benchmarks.data --part=encode --source_path=pictures --split=. --autoencoder=taef2

Each part prints one table. All variants of a table run in turns, round after round, in one process;
files are in the page cache, as they have just been written or read.

read: `training_iterator` against what the reader alone gives for shuffled indices
(`ArrayRecordDataSource.__getitems__`, raw bytes), and against one .npy file for each image.

encode: decoding and cropping alone; the compiled autoencoder alone, with images on the device; and
the whole job into files. The job's time is from its first finished file to its last, which leaves
out start and compilation, as an ImageNet-sized job would.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import app, flags

from repulsor_jax.autoencoders import get_autoencoder
from repulsor_jax.data.encoder import compiled_encoder, encode_images
from repulsor_jax.data.latents import Description, LatentDataset
from repulsor_jax.data.pipeline import training_iterator
from repulsor_jax.data.sources import ImageSource, Item, open_source
from repulsor_jax.data.workers import read_in_order
from repulsor_jax.data.writer import Batch, open_writer
from repulsor_jax.files.shards import fill, in_batches

_PART = flags.DEFINE_enum("part", "read", ["read", "encode"], "Which table.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; the table has the medians.", lower_bound=1)
_RECORDS = flags.DEFINE_integer("records", 20_000, "read: records of 32x32x8 float16.")
_SOURCE = flags.DEFINE_string("source", "folder", "encode: folder or archive.")
_SOURCE_PATH = flags.DEFINE_string("source_path", "", "encode: the folder or archive.")
_SPLIT = flags.DEFINE_string("split", ".", "encode: which part of it.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "encode: side of the images.")
_AUTOENCODER = flags.DEFINE_string("autoencoder", "taef2", "encode: as config.data.autoencoder.")
_WEIGHTS = flags.DEFINE_string("weights", "", "encode: as config.data.autoencoder_weights.")
_BATCH = flags.DEFINE_integer("batch", 10, "encode: images in one call of the encoder.")
_COUNT = flags.DEFINE_integer("count", 100, "encode: images of the source to take.")

_SHAPE = (32, 32, 8)
_READ_BATCH = 256


def main(argv: list[str]) -> None:
    """Prints the table of one part."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        part = read_rates if _PART.value == "read" else encode_rates
        unit, limit, variants = part(pathlib.Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(_ROUNDS.value):
            for name, variant in variants.items():
                rates[name].append(variant())
    print(f"| | {unit}/s (min to max) | of {limit} |\n|---|---|---|")
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    for name, found in rates.items():
        spread = f"{min(found):,.1f} to {max(found):,.1f}"
        print(
            f"| {name} | {medians[name]:,.1f} ({spread}) | {medians[name] / medians[limit]:.2f} |"
        )


def read_rates(folder: pathlib.Path) -> tuple[str, str, dict[str, Callable[[], float]]]:
    """Returns the unit, the variant that is the limit, and the variants."""
    count = _RECORDS.value
    rng = np.random.default_rng(0)
    about = Description(
        stochastic=True,
        autoencoder="none",
        scale=1.0,
        source="random",
        split="train",
        class_names=tuple(map(str, range(1000))),
    )
    (folder / "npy").mkdir()

    def random_latents(todo: Sequence[range]) -> Iterator[Batch]:
        for rows in in_batches(todo, 1000):
            latents = rng.standard_normal((len(rows), 1, *_SHAPE), np.float32).astype(np.float16)
            for i, latent in zip(rows, latents[:, 0], strict=True):
                np.save(folder / "npy" / f"{i}.npy", latent)
            yield Batch(latents, rng.integers(1000, size=len(latents)))

    writer = open_writer(folder / "records", about, num_images=count, images_per_shard=8192)
    fill(writer, random_latents, title="write")
    dataset = writer.finish()
    order = rng.permutation(count)
    steps = count // _READ_BATCH
    parts = [order[i * _READ_BATCH : (i + 1) * _READ_BATCH].tolist() for i in range(steps)]
    source = dataset.open()

    def ceiling() -> float:
        run = lambda: [source.__getitems__(part) for part in parts]
        return rate(steps * _READ_BATCH, run)

    def files(pool: concurrent.futures.Executor | None) -> float:
        def load(i: int) -> np.ndarray:
            return np.load(folder / "npy" / f"{i}.npy")

        return rate(
            steps * _READ_BATCH,
            lambda: [np.stack(list((pool.map if pool else map)(load, p))) for p in parts],
        )

    threads = concurrent.futures.ThreadPoolExecutor(4)
    return (
        "records",
        "the reader alone",
        {
            "the reader alone": ceiling,
            "training_iterator, 4 threads": pipeline(dataset, steps, 4),
            "training_iterator, in the caller": pipeline(dataset, steps, 0),
            "one .npy a record": lambda: files(None),
            "one .npy a record, 4 threads": lambda: files(threads),
        },
    )


def pipeline(dataset: LatentDataset, steps: int, threads: int) -> Callable[[], float]:
    """Returns a variant that measures one training iterator, from round to round."""
    prefetch = 8 if threads else 0
    iterator = training_iterator(
        dataset, global_batch_size=_READ_BATCH, seed=0, num_threads=threads, prefetch=prefetch
    )

    def run() -> float:
        for _ in range(prefetch + 1):  # batches that were read while the other variants ran
            next(iterator)
        return rate(steps * _READ_BATCH, lambda: [next(iterator) for _ in range(steps)])

    return run


def encode_rates(folder: pathlib.Path) -> tuple[str, str, dict[str, Callable[[], float]]]:
    """Returns the unit, the variant that is the limit, and the variants."""
    whole = open_source(_SOURCE.value, _SPLIT.value, path=_SOURCE_PATH.value, cache_dir=folder)
    # A whole number of files of two batches each.
    source = First(whole, min(_COUNT.value, len(whole)) // (2 * _BATCH.value) * 2 * _BATCH.value)
    autoencoder = get_autoencoder(_AUTOENCODER.value, weights=_WEIGHTS.value)
    about = Description(
        stochastic=autoencoder.stochastic,
        autoencoder=autoencoder.name,
        scale=autoencoder.scale,
        source=_SOURCE.value,
        split=_SPLIT.value,
        image_size=_IMAGE_SIZE.value,
        class_names=tuple(source.class_names),
    )
    workers = os.cpu_count() or 1
    batches = len(source) // _BATCH.value
    numbers = itertools.count()

    def read() -> float:
        chunks = [range(i, min(i + 16, len(source))) for i in range(0, len(source), 16)]
        ready = read_in_order(
            source, chunks, _IMAGE_SIZE.value, num_workers=workers, ahead=2 * workers
        )
        next(ready)  # the processes have started
        return rate(len(source) - 16, lambda: list(ready))

    encode = compiled_encoder(autoencoder, about)
    shape = (_BATCH.value, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)
    images = jax.device_put(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    jax.block_until_ready(encode(autoencoder.params, images))

    def bare() -> float:
        run = lambda: [
            encode(autoencoder.params, images).block_until_ready() for _ in range(batches)
        ]
        return rate(batches * _BATCH.value, run)

    def job() -> float:
        writer = open_writer(
            folder / f"job-{next(numbers)}",
            about,
            num_images=len(source),
            images_per_shard=2 * _BATCH.value,
        )
        fill(
            writer,
            functools.partial(
                encode_images,
                source=source,
                autoencoder=autoencoder,
                description=about,
                batch_per_device=_BATCH.value,
                num_workers=workers,
            ),
            title="encode",
            share=slice(None),
        )
        times = sorted(p.stat().st_mtime for p in writer.folder.glob("*.array_record"))
        return (len(times) - 1) * 2 * _BATCH.value / (times[-1] - times[0])

    return (
        "images",
        "the autoencoder alone",
        {
            "decoding and cropping alone": read,
            "the autoencoder alone": bare,
            "the whole job": job,
        },
    )


@dataclasses.dataclass(frozen=True)
class First:
    """The first images of a source."""

    source: ImageSource
    count: int

    @property
    def class_names(self) -> Sequence[str]:
        """Those of the source."""
        return self.source.class_names

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        return self.source[index]

    def signature(self) -> str:
        """That of the source."""
        return self.source.signature()

    def files(self) -> list[str]:
        """Those of the source."""
        return self.source.files()


def rate(count: int, run: Callable[[], object]) -> float:
    """Returns count per second of a run."""
    started = time.perf_counter()
    run()
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    app.run(main)
