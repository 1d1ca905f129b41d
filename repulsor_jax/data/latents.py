"""The data set of latents: ArrayRecord shards beside a dataset.json that describes them.

A record is an int32 little-endian label followed by the latent in C order, in the data set's
dtype. The shards hold the records in source order. A data set with flips holds two records an
image, its latent and that of the mirrored image. A data set with conditions holds further channels
after the latent's: the encoded masked image and its mask, of several masks in as many records, or
the shares of classes.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import AfterValidator, Field, FiniteFloat
from tqdm import tqdm

from repulsor_jax.data.listing import describe_classes
from repulsor_jax.files.checksums import file_sha256, values_sha256
from repulsor_jax.files.untrusted import (
    checked,
    has_controls,
    is_plain_name,
    parse,
    read_json,
    refuse_pointer,
)

if TYPE_CHECKING:
    import grain  # imported where files are read: a compiled step needs no reader

FORMAT_VERSION = 2
DTYPES = {"float16": "<f2", "float32": "<f4"}
METADATA = "dataset.json"
_LABEL_BYTES = 4
_REMEDY = "restore it from a copy, or delete the data set and encode again"


def _where(holds: Callable[[Any], bool], expected: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


_without_controls = _where(lambda name: not has_controls(name), "a name without controls")
ClassName = Annotated[str, _without_controls]
_Count = Annotated[int, Field(ge=1)]
_PerChannel = Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]


@checked
class Shard:
    """One ArrayRecord file: its name in the directory, its record count and its SHA-256."""

    name: Annotated[str, _where(is_plain_name, "the name of a file in this folder")]
    records: _Count
    sha256: str


@checked
class Skipped:
    """An image that could not be read: its index and name in the source, and the reason."""

    index: int
    name: str
    reason: str


@checked
class Description:
    """The part of dataset.json that is known before the first record.

    Model latents are (latents - shift) * scale. `source` and `split` are those of `open_source`.
    """

    dtype: Annotated[str, Field(pattern="^(float16|float32)$")] = "float16"
    stochastic: bool  # records hold the posterior's mean and log-variance, concatenated
    flipped: bool = False  # each image has two records, its own and its mirror image's
    autoencoder: str  # its name
    weights_sha256: str = ""  # of the autoencoder; "" where it has no weights, or unknown ones
    scale: FiniteFloat  # the autoencoder's fixed factor to about unit variance
    shift: FiniteFloat = 0.0  # of the autoencoder, fixed
    source: str
    split: str
    image_size: int = 0  # side of the encoded images; 0 where they were taken as they are
    class_names: tuple[ClassName, ...]  # label k is class_names[k]
    # What is stored beside each latent, "inpaint" or "semantic" (`data.conditioning`); "": nothing.
    condition: Annotated[str, Field(pattern="^(|inpaint|semantic)$")] = ""
    condition_channels: Annotated[int, Field(ge=0)] = 0  # of a record, after those of the latent
    masks: _Count = 1  # records of each image and of its mirror image, with a mask each

    @property
    def views(self) -> int:
        """Records of one image: 2 with its mirror image, else 1, times the masks of each."""
        return (2 if self.flipped else 1) * self.masks


@checked
class LatentDataset(Description):
    """A data set: the content of its dataset.json, and its folder.

    Mean and standard deviation `[c]` are over records and positions, of the posterior mean if
    stochastic. Image i is the records from `i * views` on.
    """

    directory: pathlib.Path
    # Of one record's latent, [h, w, c], or [h, w, 2c] if stochastic.
    shape: Annotated[tuple[_Count, ...], Field(min_length=1)]
    num_images: _Count
    mean: _PerChannel
    std: _PerChannel
    # Images of each class; () where an earlier version wrote the data set, and did not count.
    class_counts: tuple[Annotated[int, Field(ge=0)], ...] = ()
    shards: tuple[Shard, ...]  # in record order
    skipped: tuple[Skipped, ...] = ()  # images that could not be read and are not here

    @property
    def num_records(self) -> int:
        """Records over all shards."""
        return self.num_images * self.views

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Shape of one record's array: the latent's, with the channels of the condition."""
        return (*self.shape[:-1], self.shape[-1] + self.condition_channels)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent as the model sees it, `[h, w, c]`, stochastic or not."""
        return (*self.shape[:-1], len(self.mean))

    @property
    def absent_classes(self) -> tuple[int, ...]:
        """Labels of which there is no image, as where none of a class could be read."""
        return tuple(k for k, count in enumerate(self.class_counts) if not count)

    def open(self) -> "grain.sources.ArrayRecordDataSource":
        """Returns a random access source of the raw records, with `__getitems__`."""
        import grain

        paths = [str(self.directory / shard.name) for shard in self.shards]
        return grain.sources.ArrayRecordDataSource(paths)


def open_latent_dataset(directory: str | os.PathLike[str]) -> LatentDataset:
    """Reads dataset.json and checks the shards: present, and of the recorded length.

    Raises:
      FileNotFoundError: dataset.json or a shard is missing.
      ValueError: dataset.json is damaged or of another version, or a shard is damaged.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    directory = pathlib.Path(directory).absolute()
    path = directory / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: encode the images first, with --mode=encode and the same config"
        )
    content = read_json(path)
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: found format_version {version}, this version of the library reads "
            f"{FORMAT_VERSION}: encode again with --mode=encode into a new directory"
        )
    try:
        dataset = _parse(path, content)
    except ValueError as error:
        raise ValueError(f"{error}: {_REMEDY}") from error
    size = record_dtype(dataset.record_shape, dataset.dtype).itemsize
    for shard in dataset.shards:
        path = directory / shard.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found, though dataset.json lists it: {_REMEDY}")
        records = found = 0
        with contextlib.suppress(RuntimeError):  # which the reader raises on a damaged file
            reader = ArrayRecordReader(str(path))
            records, found = reader.num_records(), len(reader.read([0])[0])
            reader.close()
        if (records, found) != (shard.records, size):
            with path.open("rb") as file:
                refuse_pointer(file.read(64), path)
            raise ValueError(
                f"{path}: found {records} records of {found} bytes, expected {shard.records} of "
                f"{size}: {_REMEDY}"
            )
    return dataset


def absent_classes(dataset: LatentDataset) -> str:
    """Says which classes have no image; "" where each has one, or none were counted."""
    absent = [dataset.class_names[k] for k in dataset.absent_classes]
    if not absent:
        return ""
    return f"{dataset.directory} has no image of {describe_classes(absent)}: they are not sampled"


def check_files(
    dataset: LatentDataset,
    *,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = False,
) -> None:
    """Compares the SHA-256 of every `process_count`-th shard with dataset.json's; or ValueError.

    Intact files are noted in `.verified-*.json` beside the shards, where that can be written, and
    are not read again while size and time of change stay the same.
    """
    directory = dataset.directory
    note = directory / f".verified-{process_index}-of-{process_count}.json"
    stamps: dict[str, list[Any]] = {}
    for shard in dataset.shards[process_index::process_count]:
        stat = (directory / shard.name).stat()
        stamps[shard.name] = [stat.st_size, stat.st_mtime_ns, shard.sha256]
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(read_json(note))
    unknown = [name for name, stamp in stamps.items() if known.get(name) != stamp]
    if not unknown:
        return
    title = f"verify {directory.name}"
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        found = pool.map(file_sha256, [directory / name for name in unknown])
        bar = tqdm(found, title, len(unknown), unit="file", delay=1, disable=not progress)
        digests = zip(unknown, bar, strict=True)
        damaged = [name for name, digest in digests if digest != stamps[name][2]]
    if damaged:
        raise ValueError(
            f"{directory / damaged[0]}: damaged, its SHA-256 is not the one in dataset.json, and "
            f"so for {len(damaged)} files in all: {_REMEDY}"
        )
    with contextlib.suppress(OSError):  # a read-only data set is checked at every start
        note.write_text(json.dumps(stamps))


def identity(dataset: LatentDataset) -> dict[str, Any]:
    """Plain values that are the same where data sets hold the same records in the same order."""
    return {
        "images": dataset.num_images,
        "flipped": dataset.flipped,
        "shape": list(dataset.shape),
        "dtype": dataset.dtype,
        "autoencoder": dataset.autoencoder,
        "weights_sha256": dataset.weights_sha256,
        "class_names_sha256": values_sha256(dataset.class_names),
        **({"condition": dataset.condition} if dataset.condition else {}),
        "shards_sha256": values_sha256([[shard.records, shard.sha256] for shard in dataset.shards]),
    }


def described(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a description to write: without a condition's, which older versions lack."""
    new = () if values["condition"] else ("condition", "condition_channels", "masks")
    return {key: value for key, value in values.items() if key not in new}


def decode_records(
    records: Sequence[bytes], shape: tuple[int, ...], dtype: str
) -> dict[str, np.ndarray]:
    """Decodes B raw records into {"latents": `[B, *shape]` of `dtype`, "labels": int32 `[B]`}.

    Raises ValueError unless all are of the size that `shape` and `dtype` ask for.
    """
    size = record_dtype(shape, dtype).itemsize
    sizes = {len(record) for record in records}
    if sizes - {size}:
        raise ValueError(f"found records of {sorted(sizes)} bytes, expected {size} bytes each")
    labels = np.frombuffer(b"".join(record[:_LABEL_BYTES] for record in records), "<i4")
    latents = np.empty((len(records), *shape), DTYPES[dtype])
    # Bytes into bytes: five times as fast as through an array of records.
    target, step = latents.reshape(-1).view(np.uint8).data, size - _LABEL_BYTES
    for i, record in enumerate(records):
        target[i * step : (i + 1) * step] = memoryview(record)[_LABEL_BYTES:]
    return {"latents": latents, "labels": labels.astype(np.int32)}


class LatentFormat(NamedTuple):
    """How stored latents become the model's: `(latents - shift) * factor`, float32 `[c]` each."""

    stochastic: bool  # records hold mean and log-variance; a latent is drawn at each use
    shift: np.ndarray
    factor: np.ndarray


def latent_format(dataset: LatentDataset, normalization: str) -> LatentFormat:
    """Returns the format of a data set's latents.

    The normalization is "scale" for the autoencoder's fixed shift and factor, or "statistics" for
    the data set's own mean and 1 / std per channel, which must not be constant: ValueError.
    """
    if normalization == "scale":
        shift, factor = np.full((2, len(dataset.mean)), [[dataset.shift], [dataset.scale]])
    else:
        shift, std = np.array(dataset.mean), np.array(dataset.std)
        constant = std <= 1e-6 * np.maximum(np.abs(shift), 1e-6)
        if constant.any():
            raise ValueError(
                f'{dataset.directory}: normalization "statistics" divides by the standard '
                f"deviation, but channels {np.flatnonzero(constant).tolist()} are constant: "
                'use normalization "scale"'
            )
        factor = 1 / std
    return LatentFormat(dataset.stochastic, shift.astype(np.float32), factor.astype(np.float32))


def spread_problem(dataset: LatentDataset, normalization: str) -> str:
    """What is wrong with the standard deviation that the model sees; "" where it is about 1.

    Noise has 1, and the latents' must be of its size: between 1/4 and 4, over all channels.
    """
    if normalization == "statistics":
        return ""
    stored = math.sqrt(sum(std**2 for std in dataset.std) / len(dataset.std))
    found = stored * abs(dataset.scale)
    if 1 / 4 <= found <= 4:
        return ""
    message = (
        f"{dataset.directory}: normalised by the scale {dataset.scale:g}, the latents have the "
        f"standard deviation {found:.2g}, and about 1 is expected, as the noise has"
    )
    remedy = "set config.data.normalization='statistics'"
    if dataset.scale == 1 or not 1 / 4 <= stored <= 4:
        return f"{message}: {remedy}"
    return (
        f"{message}. Stored is {stored:.2g}: if they were scaled before, encode them again with "
        f"config.data.source='npy:scaled'; else {remedy}"
    )


def normalize(latents: jax.Array, latent_format: LatentFormat) -> jax.Array:
    """Returns `(latents - shift) * factor` in float32: model latents `[..., c]` of stored ones."""
    return (latents.astype(jnp.float32) - latent_format.shift) * latent_format.factor


def denormalize(latents: jax.Array, latent_format: LatentFormat) -> jax.Array:
    """Inverse of `normalize`: the input of the autoencoder's decoder."""
    return latents.astype(jnp.float32) / latent_format.factor + latent_format.shift


def sample_posterior(key: jax.Array, moments: jax.Array) -> jax.Array:
    """Draws latents `[..., c]`, float32, from N(mean, exp(logvar)).

    The moments are mean and log-variance, `[..., 2c]`; the latter is clipped to [-30, 20] as the
    SD-VAE does.
    """
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise


def record_dtype(shape: tuple[int, ...], dtype: str) -> np.dtype:
    """The layout of one record, packed and little-endian."""
    return np.dtype([("labels", "<i4"), ("latents", DTYPES[dtype], tuple(shape))])


def _parse(path: pathlib.Path, content: dict[str, Any]) -> LatentDataset:
    """Checks dataset.json, which may be downloaded: types, file names, and sizes to allocate."""
    # The parser takes UTF-8 alone, but the name of a class or a skipped image may be any bytes:
    # "?" stands for these bytes while the rest is parsed.
    values = {**content, "directory": str(path.parent)}
    text = json.dumps(values, ensure_ascii=False).encode(errors="replace")
    dataset = parse(LatentDataset, json.loads(text), str(path))
    dataset = dataclasses.replace(
        dataset,
        class_names=tuple(content["class_names"]),
        skipped=tuple(Skipped(**skipped) for skipped in content.get("skipped", ())),
    )
    if math.prod(dataset.record_shape) > 2**28:
        raise ValueError(
            f"{path}: found shape {dataset.record_shape}, expected 2^28 values at most"
        )
    if len(dataset.mean) != len(dataset.std):
        raise ValueError(f"{path}: found {len(dataset.std)} in std, {len(dataset.mean)} in mean")
    total = sum(shard.records for shard in dataset.shards)
    if total != dataset.num_records:
        expected = dataset.num_records
        raise ValueError(f"{path}: found shards of {total} records, expected {expected} in all")
    counts = dataset.class_counts
    if counts and (len(counts), sum(counts)) != (len(dataset.class_names), dataset.num_images):
        counted = f"{sum(counts)} images in {len(counts)} classes"
        stated = f"{dataset.num_images} in {len(dataset.class_names)}"
        raise ValueError(f"{path}: found class_counts of {counted}, expected {stated}")
    return dataset
