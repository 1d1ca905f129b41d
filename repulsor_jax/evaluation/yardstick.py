"""The yardstick of a run's samples: a feature space, and a reference in it."""

import dataclasses
import math
import pathlib
import shutil

import jax
from jax.sharding import Mesh

from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data.latents import open_latent_dataset
from repulsor_jax.data.sources import leaves_files, open_source
from repulsor_jax.evaluation import features
from repulsor_jax.evaluation import reference as reference_lib
from repulsor_jax.evaluation.image_sets import ImageSet, latent_images, npz_images, source_images
from repulsor_jax.evaluation.measure import Extract, Reference, image_reference, make_extractor
from repulsor_jax.experiment import Experiment, check_weights, data_directory, load_autoencoder
from repulsor_jax.files import locks
from repulsor_jax.files.checksums import file_sha256
from repulsor_jax.files.shards import job_name

_ARCHIVE = ".archive"


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """A feature space with its reference, shared by all evaluations of a run."""

    folder: pathlib.Path  # of records, and of the features of a job at work
    space: features.FeatureSpace
    extract: Extract
    reference: Reference | None  # None on processes but the first


def make_yardstick(experiment: Experiment) -> Yardstick:
    """Opens the feature space and the reference; computes the reference's features once.

    Raises:
      ConfigError, ValueError, OSError: one message that names the key or file.
    """
    config, autoencoder = experiment.config, experiment.autoencoder
    assert autoencoder is not None
    size, channels = config.model.latent_size, config.model.in_channels
    latent = jax.ShapeDtypeStruct((1, size, size, channels), "float32")
    shape = jax.eval_shape(autoencoder.decode, autoencoder.params, latent).shape[1:]
    return open_yardstick(config, experiment.workdir, experiment.mesh, autoencoder, shape)


def open_yardstick(
    config: Config,
    workdir: pathlib.Path,
    mesh: Mesh,
    autoencoder: Autoencoder | None,
    image_shape: tuple[int, ...],
) -> Yardstick:
    """As `make_yardstick`, for samples that no run of ours drew.

    Args:
      config, workdir, mesh: records and caches are kept in `<workdir>/evaluations`.
      autoencoder: of the configuration; None loads it where the reference or the space needs it.
      image_shape: `[H, W, C]` of the samples.
    """
    folder, is_main = workdir / "evaluations", jax.process_index() == 0
    path = pathlib.Path(config.evaluation.reference)
    statistics = images = found = None
    is_npz = path.suffix in reference_lib.SUFFIXES
    is_archive = path.is_file() and not is_npz
    # No other job opens its archive while this one reads, and then removes, a decompressed copy.
    with locks.locked(folder / _ARCHIVE, enabled=is_main and is_archive):
        if not is_npz:
            images = _open_images(config, workdir, autoencoder, image_shape)
        else:
            if config.evaluation.features == "inception" and path.suffix == ".npz":
                statistics = reference_lib.read_statistics(path)
            if statistics is None or reference_lib.holds_images(path):
                images = npz_images(path, size=(image_shape[0], image_shape[1]))
        if images is not None:
            check_count(images, f"config.evaluation.reference={config.evaluation.reference!r}")
            _check_shape(config, images, image_shape)
        space = _open_space(config, autoencoder, image_shape)
        extract = make_extractor(space, mesh)
        if images is not None:
            found = image_reference(
                images,
                keep=config.evaluation.reference_features,
                batch_size=config.evaluation.batch_size,
                space=space,
                extract=extract,
                mesh=mesh,
                cache=folder / "references",
            )
        if is_main and is_archive:
            shutil.rmtree(folder / _ARCHIVE, ignore_errors=True)
    if statistics is not None and is_main:
        # Published statistics are of the whole data set, of which the images are a part.
        digest = images.digest if images else file_sha256(path)[:16]
        about = {"name": path.name, "digest": digest, "images": statistics[0].count}
        about["features"] = found.description["features"] if found else 0
        found = Reference(about, *statistics, found.features if found else None)
    return Yardstick(folder, space, extract, found)


def contents_note(workdir: pathlib.Path, *names: str) -> pathlib.Path:
    """Where the digest of image files is kept, so that they are read for it once."""
    return workdir / "evaluations" / "references" / f".contents-{job_name(names)}.json"


def check_count(images: ImageSet, key: str) -> None:
    """Raises ConfigError for one image alone."""
    if images.count < 2:
        raise ConfigError(f"{key}: found 1 image: a distance needs the covariance of 2 or more")


def _check_shape(config: Config, images: ImageSet, image_shape: tuple[int, ...]) -> None:
    items = jax.ShapeDtypeStruct((1, *images.shape), images.dtype)
    found = jax.eval_shape(images.decode, images.params, items).shape[1:]
    axes = 2 if config.evaluation.features == "inception" else 3  # grey images are taken as RGB
    if tuple(found)[:axes] != tuple(image_shape)[:axes]:
        raise ConfigError(
            f"config.evaluation.reference={config.evaluation.reference!r}: found images of "
            f"{list(found)}, but samples are {list(image_shape)}, and "
            f"config.evaluation.features={config.evaluation.features!r} compares like with like"
        )


def _open_space(
    config: Config, autoencoder: Autoencoder | None, image_shape: tuple[int, ...]
) -> features.FeatureSpace:
    name = config.evaluation.features
    try:
        if name == "inception":
            return features.inception_space(config.evaluation.inception_weights)
        if name == "pixels":
            return features.pixel_space(math.prod(image_shape))
    except ValueError as error:
        raise ConfigError(f"config.evaluation.features={name!r}: {error}") from error
    return features.autoencoder_space(autoencoder or load_autoencoder(config))


def _open_images(
    config: Config,
    workdir: pathlib.Path,
    autoencoder: Autoencoder | None,
    image_shape: tuple[int, ...],
) -> ImageSet:
    """Opens the reference where it is not an .npz."""
    c = config.evaluation
    key = f"config.evaluation.reference={c.reference!r}"
    if c.reference in ("train", "test"):
        directory = data_directory(config, workdir) / c.reference
        if not directory.exists():
            raise ConfigError(
                f"{key}: {directory} is absent. Name an .npz or a folder of images, or encode that "
                "split, or in training set config.evaluation.every_steps=0"
            )
        dataset = open_latent_dataset(directory)
        autoencoder = autoencoder or load_autoencoder(config)
        if dataset.autoencoder != autoencoder.name:
            raise ConfigError(
                f"{key}: {directory} was encoded with {dataset.autoencoder!r}, but "
                f"config.data.autoencoder={autoencoder.name!r}"
            )
        check_weights(autoencoder, dataset.weights_sha256, f"{key}: {directory} was encoded")
        return latent_images(dataset, autoencoder)
    height, width = image_shape[:2]
    if height != width:
        raise ConfigError(
            f"{key}: its images are cropped to squares, but samples are {height} x {width}: give "
            "an .npz"
        )
    kind, path = c.reference, config.data.source_path
    if not kind.startswith("tfds:"):
        located = pathlib.Path(c.reference)
        if not located.exists():
            raise ConfigError(
                f"{key}: found no such file or folder, expected an .npz or .npy, a folder or "
                "archive of images, 'tfds:<name>', 'train' or 'test'"
            )
        kind, path = "folder" if located.is_dir() else "archive", str(located)
    cache = workdir / "evaluations" / _ARCHIVE
    name = f"{c.reference} {c.reference_split}".removesuffix(" .")
    note = contents_note(workdir, path, name)
    # Inception takes grey images as RGB.
    shape = (height, width, 3 if c.features == "inception" else image_shape[2])
    try:
        source = sharding.first_process_first(
            lambda: open_source(kind, c.reference_split, path=path, cache_dir=cache),
            enabled=leaves_files(kind),
        )
        return source_images(source, name, shape, note, crop=True)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}: {error}") from error
