"""The encode mode: images, or latents that others made, into the project's latent data sets."""

import contextlib
import functools
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import loky
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder, latent_scale
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data import converted, listing, preprocess
from repulsor_jax.data.encoder import convert_latents, encode_images
from repulsor_jax.data.latents import (
    METADATA,
    Description,
    LatentDataset,
    absent_classes,
    decode_records,
    open_latent_dataset,
    spread_problem,
)
from repulsor_jax.data.sources import ImageSource, leaves_files, open_source, with_maps
from repulsor_jax.data.writer import open_writer
from repulsor_jax.experiment import data_directory, load_autoencoder, stored_condition
from repulsor_jax.files import locks, pictures
from repulsor_jax.files.shards import fill
from repulsor_jax.files.untrusted import printable


def encode(config: Config, workdir: pathlib.Path) -> None:
    """Encodes the configured source, split by split; what is complete is left alone.

    Every process encodes its share of the shards on its own devices; they share the directory. A
    job that was stopped goes on with the shards that are missing.

    Raises:
      ConfigError: no source is configured, autoencoder and source do not go together, or a data
        set that is complete differs from the configured one.
      ValueError, OSError: the source or an item of it cannot be used; names it.
      BusyError: another job encodes into the same folder.
    """
    data = config.data
    if not data.source:
        raise ConfigError("config.data.source is empty: name what to encode (docs/data.md)")
    # Processes connect at their first barrier, with a timeout of seconds. At later barriers they
    # may wait for hours: one process may have more to encode than another.
    multihost_utils.sync_global_devices("connected")
    directory = data_directory(config, workdir)
    todo = _to_make(config, directory)
    for folder, split in _splits(config).items():
        if split and folder not in todo and jax.process_index() == 0:
            tqdm.write(f"{directory / folder}: is there already, and is left as it is")
    if not todo:
        return
    with locks.sole(directory, "encoding", "give this one another config.data.dir"):
        todo = _to_make(config, directory)  # another job may have made it just now
        cache = directory / ".archive"
        # Sources, classes and autoencoder are checked before the first image is encoded.
        sources = _open_sources(config, todo, cache)
        _show_classes(directory, sources)
        _check_classes(directory, {folder: s.class_names for folder, s in sources.items()})
        is_latent = data.source in converted.KINDS
        if is_latent and stored_condition(config, False):
            raise ConfigError(
                f"config.data.source={data.source!r} holds latents alone, but config.conditioning "
                "stores conditions of images: encode images, or set conditioning.masked='latent'"
            )
        autoencoder = None if is_latent or not todo else load_autoencoder(config)
        for folder, source in sources.items():
            _make(config, directory / folder, source, todo[folder], autoencoder)
            multihost_utils.sync_global_devices("finished")
        if jax.process_index() == 0:
            shutil.rmtree(cache, ignore_errors=True)


def _splits(config: Config) -> dict[str, str]:
    return {"train": config.data.train_split, "test": config.data.test_split}


def _to_make(config: Config, directory: pathlib.Path) -> dict[str, str]:
    """The split of each folder, train and test, that is not complete yet."""
    todo = {}
    with sharding.raised_on_all():
        for folder, split in _splits(config).items():
            if split and (directory / folder / METADATA).exists():
                _check_is_the_configured(config, directory / folder, folder)
            elif split:
                todo[folder] = split
    mask = np.array([folder in todo for folder in _splits(config)])
    is_other = bool((sharding.agree(mask) != mask).any())
    with sharding.raised_on_all():
        if is_other:
            raise ConfigError(
                f"{directory}: the first process sees other data sets there: config.data.dir must "
                "be one folder that all processes see"
            )
    return todo


def _show_classes(directory: pathlib.Path, sources: Mapping[str, Any]) -> None:
    """Prints what the sources hold, and what looks wrong in it, before hours are spent on it."""
    if jax.process_index() > 0:
        return
    for folder, source in sources.items():
        classes = listing.describe_classes(source.class_names)
        tqdm.write(f"{directory / folder}: {len(source):,} images of {classes}")
        if doubt := getattr(source, "doubt", ""):
            tqdm.write(printable(f"warning: {doubt}"))


def _open_sources(config: Config, splits: Mapping[str, str], cache: pathlib.Path) -> dict[str, Any]:
    """Opens an image or latent source for each folder to be made."""
    name, path = config.data.source, config.data.source_path
    if name in converted.KINDS:
        opened = {
            k: converted.open_latent_source(name, split, path=path) for k, split in splits.items()
        }
        for source in opened.values():
            converted.check_layout(source, config.model.latent_size, config.model.in_channels)
        return opened

    def open_all() -> dict[str, Any]:
        open_split = functools.partial(open_source, name, path=path, cache_dir=cache)
        sources = {folder: open_split(split) for folder, split in splits.items()}
        if config.conditioning.kind == "semantic":
            maps = config.conditioning.maps_path
            sources = {k: with_maps(source, maps, splits[k]) for k, source in sources.items()}
        return sources

    return sharding.first_process_first(open_all, enabled=leaves_files(name))


def _check_is_the_configured(config: Config, directory: pathlib.Path, folder: str) -> None:
    """Raises ConfigError where a complete data set, train or test, is not the configured one."""
    found = open_latent_dataset(directory)
    made = {key: getattr(found, key) for key in ("source", "autoencoder", "dtype")}
    made[f"{folder}_split"] = found.split
    if config.data.source not in converted.KINDS:  # whose files fix size and mirroring
        made |= {"image_size": found.image_size, "flips": found.flipped}
    _check_condition(config, found)
    differences = [
        f"config.data.{key}={getattr(config.data, key)!r}, and there it is {value!r}"
        for key, value in made.items()
        if getattr(config.data, key) != value
    ]
    if differences:
        raise ConfigError(
            f"{directory} holds another data set than the configured one: {'; '.join(differences)}."
            " A data set is never overwritten: choose another config.data.dir, or delete this one"
        )


def _check_condition(config: Config, found: LatentDataset) -> None:
    """Raises ConfigError where a data set lacks the condition that the configuration shows."""
    for key, expected in stored_condition(config, found.stochastic).items():
        if getattr(found, key) != expected:
            raise ConfigError(
                f"{found.directory}: its {key} is {getattr(found, key)!r}, but "
                f"config.conditioning asks for {expected!r}: choose another config.data.dir, or "
                "delete this one"
            )


def _make(
    config: Config,
    directory: pathlib.Path,
    source: Any,
    split: str,
    autoencoder: Autoencoder | None,
) -> None:
    """Writes what is missing of a data set: encodes an image source, converts a latent source."""
    data = config.data
    common: dict[str, Any] = {"dtype": data.dtype, "source": data.source, "split": split}
    common["class_names"] = tuple(source.class_names)
    settings = {"source_signature": source.signature()}
    if autoencoder is None:
        scale, shift = latent_scale(data.autoencoder, weights=data.autoencoder_weights)
        description = Description(
            stochastic=source.stochastic,
            flipped=source.views == 2,
            autoencoder=data.autoencoder,
            scale=scale,
            shift=shift,
            **common,
        )
        produce = functools.partial(convert_latents, source=source, description=description)
    else:
        description = Description(
            stochastic=autoencoder.stochastic,
            flipped=data.flips,
            autoencoder=autoencoder.name,
            weights_sha256=autoencoder.weights_sha256,
            scale=autoencoder.scale,
            shift=autoencoder.shift,
            image_size=data.image_size,
            **stored_condition(config, autoencoder.stochastic),
            **common,
        )
        for key in ("autoencoder_dtype", "encode_batch_per_device"):
            settings[key] = getattr(data, key)
        produce = functools.partial(
            encode_images,
            source=source,
            autoencoder=autoencoder,
            description=description,
            batch_per_device=data.encode_batch_per_device,
            # The cores of this process, which on a shared machine are not all of the machine.
            num_workers=loky.cpu_count() if data.encode_workers == -1 else data.encode_workers,
            skip_bad_images=data.on_bad_image == "skip",
        )
    writer = open_writer(
        directory,
        description,
        num_images=len(source),
        images_per_shard=data.images_per_shard,
        settings=settings,
        name_of=lambda i: source.name(i) if autoencoder is None else source[i].name,
    )
    started = time.perf_counter()
    images_done = sum(len(writer.rows(k)) for k in writer.missing())
    title = f"{'encode' if autoencoder else 'convert'} {data.source} {split}"
    fill(writer, produce, title=title, share=slice(jax.process_index(), None, jax.process_count()))
    multihost_utils.sync_global_devices("encoded")
    if jax.process_index() > 0:
        return
    dataset, seconds = writer.finish(), time.perf_counter() - started
    directory = dataset.directory
    size = sum((directory / shard.name).stat().st_size for shard in dataset.shards)
    mirrored = " and their mirror images" if dataset.flipped else ""
    classes = listing.describe_classes(dataset.class_names)
    tqdm.write(
        f"{directory}: {dataset.num_images:,} images{mirrored} of {classes}; latents "
        f"{list(dataset.shape)} {dataset.dtype}, {size / 1e6:,.1f} MB; {images_done:,} of them "
        f"now, {images_done / seconds:,.1f} images/s"
    )
    problems = [absent_classes(dataset), spread_problem(dataset, data.normalization)]
    # The doubt was said at the start, hours ago perhaps.
    for problem in filter(None, [*problems, getattr(source, "doubt", "")]):
        tqdm.write(printable(f"warning: {problem}"))
    if dataset.skipped:
        where = directory / METADATA
        tqdm.write(f"{len(dataset.skipped):,} images could not be read, and are listed in {where}")
    if autoencoder is not None and data.preview_images:
        _write_preview(dataset, source, autoencoder, data.preview_images)


def _check_classes(directory: pathlib.Path, found: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError unless labels mean the same in both splits, made now or before."""
    classes = {folder: tuple(names) for folder, names in found.items()}
    for folder in {"train", "test"} - found.keys():
        if found and (directory / folder / METADATA).exists():
            classes[folder] = open_latent_dataset(directory / folder).class_names
    if len(classes) == 2 and (how := listing.class_difference(classes["train"], classes["test"])):
        raise ConfigError(
            f"the train and test splits have different classes, {how}: their labels would not mean "
            "the same"
        )


def _write_preview(
    dataset: LatentDataset, source: ImageSource, autoencoder: Autoencoder, count: int
) -> None:
    """Writes `<data set>_preview.png`, images above their decoded latents; prints the PSNR."""
    skipped = np.array([s.index for s in dataset.skipped], int)
    present = np.setdiff1d(np.arange(len(source)), skipped)
    chosen = present[np.linspace(0, len(present) - 1, min(count, len(present))).astype(int)]
    records = ((chosen - np.searchsorted(skipped, chosen)) * dataset.views).tolist()
    stored = decode_records(
        dataset.open().__getitems__(records), dataset.record_shape, dataset.dtype
    )
    latents = stored["latents"][..., : dataset.latent_shape[-1]].astype(np.float32)
    decode = jax.jit(lambda params, z: pictures.to_uint8(autoencoder.decode(params, z)))
    decoded = np.concatenate([decode(autoencoder.params, z[None]) for z in latents])
    read, _ = preprocess.read_images(source, chosen.tolist(), dataset.image_size)
    channels = decoded.shape[-1]  # a label map is not shown
    originals = np.stack([x[..., :channels] for x in read if isinstance(x, np.ndarray)])
    error = np.square(originals.astype(np.float64) - decoded).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-12))
    path = dataset.directory.with_name(f"{dataset.directory.name}_preview.png")
    columns = min(8, len(chosen))
    blank = np.full((-len(chosen) % columns, *originals.shape[1:]), 255, np.uint8)
    pairs = [np.concatenate([images, blank]) for images in (originals, decoded)]
    pairs = [images.reshape(-1, columns, *images.shape[1:]) for images in pairs]
    rows = np.stack(pairs, axis=1).reshape(-1, *originals.shape[1:])
    with contextlib.suppress(ValueError):  # images that are neither grey nor RGB
        upscale = max(1, 64 // originals.shape[1])
        pictures.save_grid(rows, path, columns=columns, upscale=upscale)
        tqdm.write(f"{path}: {len(chosen)} images above their decoded latents")
    tqdm.write(f"PSNR of these {psnr.mean():.2f} dB (from {psnr.min():.2f} to {psnr.max():.2f})")
