"""The data set of latents: ArrayRecord shards beside a dataset.json that describes them.

A record is an int32 little-endian label followed by the latent in C order, in the data set's
dtype. The shards hold the records in source order: shard 0 the first ones, and so on.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

FORMAT_VERSION = 1
DTYPES = {"float16": "<f2", "float32": "<f4"}
_METADATA = "dataset.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the directory, its record count and its SHA-256."""

    name: str
    records: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """What dataset.json says, and where it stands.

    Attributes:
      directory: the folder of dataset.json and the shards.
      shape: shape of one record's latent, `[h, w, c]`, or `[h, w, 2c]` if stochastic.
      dtype: "float16" or "float32", as stored.
      stochastic: the records hold the posterior's concatenated mean and log-variance.
      autoencoder: name of the autoencoder that made, and can decode, the latents.
      scale: the autoencoder's fixed factor to about unit variance.
      num_records: over all shards.
      source: name of the image source, as `open_source` takes it.
      split: split of the image source.
      class_names: label k is `class_names[k]`.
      mean: per channel `[c]`, of the latents (of the posterior mean if stochastic).
      std: per channel `[c]`, likewise; the population's, over records and positions.
      shards: the files, in record order.
    """

    directory: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    stochastic: bool
    autoencoder: str
    scale: float
    num_records: int
    source: str
    split: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[Shard, ...]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent as the model sees it, `[h, w, c]`, stochastic or not."""
        return (*self.shape[:-1], len(self.mean))

    def open(self) -> grain.sources.ArrayRecordDataSource:
        """Returns a random access source of the raw records, with `__getitems__`."""
        return grain.sources.ArrayRecordDataSource([str(p) for p in _shard_paths(self)])


def write_latent_dataset(
    directory: str | os.PathLike[str],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    num_records: int,
    stochastic: bool,
    autoencoder: str,
    scale: float,
    source: str,
    split: str,
    class_names: Sequence[str],
    dtype: str = "float16",
    num_shards: int = 1,
) -> LatentDataset:
    """Writes a data set; `directory` appears only when it is complete.

    The files are written into a sibling folder `.<name>.incomplete-*`, which is renamed at the
    end and removed on any error.

    Args:
      directory: must not exist yet, or be empty.
      batches: pairs of latents `[B, ...]` and labels `[B]`; B may vary.
      num_records: how many records the batches hold in all.
      stochastic: the latents are concatenated means and log-variances, `[B, h, w, 2c]`.
      autoencoder: name of the autoencoder, see `autoencoders.get_autoencoder`.
      scale: the autoencoder's scale; recorded, not applied.
      source: name of the image source; recorded.
      split: split of the image source; recorded.
      class_names: labels are indices into it.
      dtype: "float16" or "float32".
      num_shards: files to spread the records over, in order and evenly.

    Returns:
      The data set.

    Raises:
      FileExistsError: `directory` already holds files; nothing is changed.
      ValueError: a latent is not finite or overflows float16, a label is out of range, the
        batches do not hold `num_records` records of one shape, or an argument is wrong.
    """
    directory = pathlib.Path(directory).absolute()
    if dtype not in DTYPES:
        raise ValueError(f"latent dtype: found {dtype!r}, expected one of {list(DTYPES)}")
    if not 1 <= num_shards <= num_records:
        raise ValueError(
            f"found num_shards={num_shards} for {num_records} records, expected at least one "
            "shard and at least one record in each"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} already holds files; a data set is never overwritten: "
            "choose another directory, or delete this one first"
        )
    names = [f"data-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)]
    # Shard i ends where i + 1 of num_shards equal parts do.
    ends = [(i + 1) * num_records // num_shards for i in range(num_shards)]
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.incomplete-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        shape, mean, std = _write_shards(
            [temporary / name for name in names],
            ends,
            _checked(batches, dtype, stochastic, len(class_names)),
            stochastic,
        )
        shards = tuple(
            Shard(name, end - start, _sha256(temporary / name))
            for name, start, end in zip(names, [0, *ends], ends, strict=False)
        )
        dataset = LatentDataset(
            directory=directory,
            shape=shape,
            dtype=dtype,
            stochastic=stochastic,
            autoencoder=autoencoder,
            scale=float(scale),
            num_records=num_records,
            source=source,
            split=split,
            class_names=tuple(class_names),
            mean=mean,
            std=std,
            shards=shards,
        )
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, **dataclasses.asdict(dataset)}
        del content["directory"]
        (temporary / _METADATA).write_text(json.dumps(content, indent=2) + "\n")
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return dataset


def open_latent_dataset(directory: str | os.PathLike[str]) -> LatentDataset:
    """Reads dataset.json and checks the shards: present, and of the recorded length.

    Raises:
      FileNotFoundError: dataset.json or a shard is missing.
      ValueError: dataset.json is not one this version reads, or a shard is damaged.
    """
    directory = pathlib.Path(directory).absolute()
    path = directory / _METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: encode the images first, with --mode=encode and the same config"
        )
    try:
        content = json.loads(path.read_text())
        version = content.pop("format_version")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a latent data set's metadata ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: found format_version {version}, this version of the library reads "
            f"{FORMAT_VERSION}: encode again with --mode=encode into a new directory"
        )
    expected = {field.name for field in dataclasses.fields(LatentDataset)} - {"directory"}
    if content.keys() != expected:
        raise ValueError(
            f"{path}: missing keys {sorted(expected - content.keys())}, unknown keys "
            f"{sorted(content.keys() - expected)}: encode again with --mode=encode"
        )
    content["shards"] = [Shard(**shard) for shard in content["shards"]]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    dataset = LatentDataset(directory=directory, **fields)
    total = sum(shard.records for shard in dataset.shards)
    if dataset.dtype not in DTYPES or total != dataset.num_records:
        raise ValueError(
            f"{path}: found dtype {dataset.dtype!r} and shards of {total} records, expected one of "
            f"{list(DTYPES)} and {dataset.num_records} records in all: "
            "encode again with --mode=encode"
        )
    for shard, shard_path in zip(dataset.shards, _shard_paths(dataset), strict=True):
        _check_shard(shard_path, shard, _record_dtype(dataset.shape, dataset.dtype).itemsize)
    return dataset


def verify(dataset: LatentDataset) -> None:
    """Reads every shard and compares its SHA-256; raises ValueError naming the first bad file."""
    for shard, path in zip(dataset.shards, _shard_paths(dataset), strict=True):
        found = _sha256(path)
        if found != shard.sha256:
            raise ValueError(
                f"{path}: damaged, found SHA-256 {found}, expected {shard.sha256}: "
                "restore the file, or encode again with --mode=encode"
            )


def decode_records(
    records: Sequence[bytes], shape: tuple[int, ...], dtype: str
) -> dict[str, np.ndarray]:
    """Decodes B raw records into {"latents": `[B, *shape]` of `dtype`, "labels": int32 `[B]`}.

    Raises:
      ValueError: the records are not of the size that `shape` and `dtype` ask for.
    """
    record_dtype = _record_dtype(shape, dtype)
    data = b"".join(records)
    if len(data) != len(records) * record_dtype.itemsize:
        raise ValueError(
            f"found {len(records)} records of {len(data)} bytes in all, expected "
            f"{record_dtype.itemsize} bytes each for shape {shape} and {dtype}"
        )
    batch = np.frombuffer(data, record_dtype)
    # The fields are strided views; the copies are contiguous, aligned and writable.
    return {"latents": batch["latents"].copy(), "labels": batch["labels"].astype(np.int32)}


def normalization(dataset: LatentDataset, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns shift and factor, float32 `[c]`: model latents = (latents - shift) * factor.

    Args:
      dataset: the data set.
      mode: "scale" for the autoencoder's fixed factor and no shift, "statistics" for the data
        set's own mean and 1 / std per channel.

    Raises:
      ValueError: unknown mode, or "statistics" with a constant channel.
    """
    if mode == "scale":
        shift, factor = np.zeros(len(dataset.mean)), np.full(len(dataset.mean), dataset.scale)
    elif mode == "statistics":
        shift, std = np.array(dataset.mean), np.array(dataset.std)
        constant = std <= 1e-6 * np.maximum(np.abs(shift), 1e-6)
        if constant.any():
            raise ValueError(
                f'{dataset.directory}: normalization "statistics" divides by the standard '
                f"deviation, but channels {np.flatnonzero(constant).tolist()} are constant: "
                'use normalization "scale"'
            )
        factor = 1 / std
    else:
        raise ValueError(f'normalization: found {mode!r}, expected "scale" or "statistics"')
    return shift.astype(np.float32), factor.astype(np.float32)


def normalize(latents: jax.Array, shift: np.ndarray, factor: np.ndarray) -> jax.Array:
    """Returns (latents - shift) * factor in float32, for latents `[..., c]`."""
    return (latents.astype(jnp.float32) - shift) * factor


def denormalize(latents: jax.Array, shift: np.ndarray, factor: np.ndarray) -> jax.Array:
    """Inverse of `normalize`: what the autoencoder's decoder takes."""
    return latents.astype(jnp.float32) / factor + shift


def sample_posterior(key: jax.Array, moments: jax.Array) -> jax.Array:
    """Draws latents `[..., c]`, float32, from N(mean, exp(logvar)).

    Args:
      key: random key.
      moments: mean and log-variance concatenated, `[..., 2c]`; the log-variance is clipped to
        [-30, 20] as the SD-VAE does.
    """
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise


def _record_dtype(shape: tuple[int, ...], dtype: str) -> np.dtype:
    """The layout of one record, packed and little-endian."""
    return np.dtype([("labels", "<i4"), ("latents", DTYPES[dtype], tuple(shape))])


def _shard_paths(dataset: LatentDataset) -> list[pathlib.Path]:
    return [dataset.directory / shard.name for shard in dataset.shards]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shard(path: pathlib.Path, shard: Shard, record_bytes: int) -> None:
    """Raises if the shard is missing, or has another number or size of records."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found, though dataset.json lists it: "
            "restore the file, or encode again with --mode=encode"
        )
    found = size = 0
    with contextlib.suppress(RuntimeError):  # what the reader raises on a damaged file
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        size = len(reader.read([0])[0])
        reader.close()
    if (found, size) != (shard.records, record_bytes):
        raise ValueError(
            f"{path}: found {found} records of {size} bytes, expected {shard.records} of "
            f"{record_bytes}: restore the file, or encode again with --mode=encode"
        )


def _checked(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    dtype: str,
    stochastic: bool,
    num_classes: int,
) -> Iterator[np.ndarray]:
    """Yields each batch as an array of records, or raises naming the first bad record."""
    shape, start = None, 0
    for latents, labels in batches:
        latents, labels = np.asarray(latents), np.asarray(labels)
        if shape is None:
            shape = latents.shape[1:]
            if not shape or (stochastic and shape[-1] % 2):
                raise ValueError(
                    f"found latents of shape {latents.shape}, expected [B, ..., c]"
                    + (" with an even c: means, then log-variances" if stochastic else "")
                )
        if latents.shape != (len(labels), *shape) or labels.ndim != 1:
            raise ValueError(
                f"batch from record {start}: found latents {latents.shape} with labels "
                f"{labels.shape}, expected {('B', *shape)} with ('B',)"
            )
        records = np.empty(len(labels), _record_dtype(shape, dtype))
        records["labels"] = labels
        with np.errstate(over="ignore"):  # reported below, with the record
            records["latents"] = latents
        bad = ~np.isfinite(records["latents"]).reshape(len(records), -1).all(axis=1)
        if bad.any():
            i = int(np.argmax(bad))
            if np.isfinite(latents[i]).all():
                raise ValueError(
                    f"record {start + i}: a latent of {np.abs(latents[i]).max():g} overflows "
                    f'{dtype}: write with dtype "float32"'
                )
            raise ValueError(
                f"record {start + i}: the latents are not finite: check the image and the "
                "autoencoder's weights"
            )
        bad = (labels < 0) | (labels >= num_classes)
        if bad.any():
            i = int(np.argmax(bad))
            raise ValueError(
                f"record {start + i}: found label {labels[i]}, expected 0 to {num_classes - 1}"
            )
        start += len(records)
        yield records


def _write_shards(
    paths: Sequence[pathlib.Path],
    ends: Sequence[int],
    batches: Iterable[np.ndarray],
    stochastic: bool,
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Writes the records, shard k up to `ends[k]`; returns the latents' shape, mean and std."""
    shape: tuple[int, ...] = ()
    count, shard = 0, 0
    total = square = np.zeros(())
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_writer(paths[0]))
        for records in batches:
            latents = records["latents"].astype(np.float64)
            shape = latents.shape[1:]
            if stochastic:
                latents = latents[..., : shape[-1] // 2]
            axes = tuple(range(latents.ndim - 1))
            total = total + latents.sum(axes)
            square = square + np.square(latents).sum(axes)
            if count + len(records) > ends[-1]:
                raise ValueError(f"found more records than the {ends[-1]} announced")
            for record in records:
                if count == ends[shard]:
                    stack.close()
                    shard += 1
                    writer = stack.enter_context(_writer(paths[shard]))
                writer.write(record.tobytes())
                count += 1
    if count != ends[-1]:
        raise ValueError(f"found {count} records, expected the {ends[-1]} announced")
    positions = count * int(np.prod(shape[:-1]))
    mean = total / positions
    std = np.sqrt(np.maximum(square / positions - np.square(mean), 0))
    return shape, tuple(mean.tolist()), tuple(std.tolist())


@contextlib.contextmanager
def _writer(path: pathlib.Path) -> Iterator[Any]:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        yield writer
    finally:
        writer.close()
