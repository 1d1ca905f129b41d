"""What samples are drawn for: images with holes to fill, or label maps to make images from.

Sample i is of item i mod n, whatever batch or device computes it.
"""

import colorsys
import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax import sharding
from repulsor_jax.config import Config, ConfigError, stored_condition_channels
from repulsor_jax.data import conditioning
from repulsor_jax.data.latents import normalize, open_latent_dataset
from repulsor_jax.data.pipeline import read_records
from repulsor_jax.experiment import Experiment, check_weights, data_directory, image_size
from repulsor_jax.files.checksums import file_sha256, values_sha256
from repulsor_jax.files.pictures import to_uint8
from repulsor_jax.files.shards import DAMAGED
from repulsor_jax.files.untrusted import array_header, most_expanded

Array = jax.Array
Given = dict[str, Any]  # [B, ...] by name: "latents" or "images" and "masks", "maps", "labels", ...

# Folded into the key of the noise: the masks'. `flows.sampler` has the numbers above.
_MASKS = 0x7FFFFFFD
_HIDDEN = 128  # grey level of a hole in pictures: black and white may be the image's own


@dataclasses.dataclass(frozen=True)
class Task:
    """The items that samples are drawn for."""

    count: int
    read: Callable[[np.ndarray], dict[str, np.ndarray]]  # numbers of items [b] -> `Given`
    description: dict[str, Any]  # for the protocol of samples


class Prepared(NamedTuple):
    """What the sampler takes of a batch of items; None is what this task has not."""

    extras: dict[str, Array]  # for the network, by its argument's name
    labels: Array | None  # int32 [B], where known
    mask: Array | None  # bool [B, H, W], True in the hole
    original: Array | None  # uint8 [B, H, W, C], whose known pixels are kept
    # For a network without a condition: latents [B, h, w, C], and where they are unknown.
    known: tuple[Array, Array] | None


def has_task(config: Config) -> bool:
    """Whether samples are drawn for given images or maps, not out of noise and a class alone."""
    return config.conditioning.kind != "none" or config.conditioning.filling == "replace"


def open_task(experiment: Experiment) -> Task | None:
    """Opens what `config.conditioning.images` names; None where samples are drawn for nothing.

    Raises:
      ConfigError: it is absent, damaged, or not of this model's images; names the key.
    """
    config = experiment.config
    if not has_task(config):
        return None
    c = config.conditioning
    with sharding.raised_on_all():  # each process reads for itself
        try:
            stored = c.images in ("train", "test")
            task = _dataset(experiment) if stored else _archive(experiment, pathlib.Path(c.images))
        except (OSError, ValueError) as error:
            raise ConfigError(f"config.conditioning.images={c.images!r}: {error}") from error
        if config.sampling.classes and "labels" in task.read(np.arange(1)):
            raise ConfigError(
                f"config.sampling.classes={config.sampling.classes}: a sample has the class of the "
                f"image that it is for (config.conditioning.images={c.images!r}); set it to ()"
            )
    about = {"kind": c.kind, "images": c.images, **task.description}
    if c.kind != "semantic":
        about |= {"filling": c.filling, "measured": "composites"}
    if c.kind == "inpaint":
        about["masked"] = c.masked
    return dataclasses.replace(task, description=about)


def abstract_given(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """What `Task.read` gives of the data set for a batch of samples."""
    m, batch = config.model, config.sampling.batch_size
    shape = batch, m.latent_size, m.latent_size
    found = {
        "latents": jax.ShapeDtypeStruct((*shape, m.in_channels), np.float32),
        "labels": jax.ShapeDtypeStruct((batch,), np.int32),
    }
    if config.conditioning.kind == "semantic":
        classes = config.conditioning.classes
        found["condition"] = jax.ShapeDtypeStruct((*shape, classes), config.data.dtype)
    return found


def _dataset(experiment: Experiment) -> Task:
    """The images of a latent data set, whose masks are drawn by the number of the sample."""
    config = experiment.config
    directory = data_directory(config, experiment.workdir) / config.conditioning.images
    dataset = open_latent_dataset(directory)
    expected = (config.model.latent_size,) * 2 + (config.model.in_channels,)
    if dataset.latent_shape != expected or dataset.autoencoder != config.data.autoencoder:
        raise ValueError(
            f"{directory} holds latents {dataset.latent_shape} of {dataset.autoencoder!r}, but the "
            f"model has {expected} of {config.data.autoencoder!r}"
        )
    if experiment.autoencoder is not None:
        check_weights(experiment.autoencoder, dataset.weights_sha256, f"{directory} was encoded")
    is_semantic = config.conditioning.kind == "semantic"
    classes = stored_condition_channels(config.conditioning, 0) if is_semantic else 0
    if is_semantic and (dataset.condition, dataset.condition_channels) != ("semantic", classes):
        raise ValueError(f"{directory} holds no label maps of {classes} classes")
    source, channels = dataset.open(), config.model.in_channels

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        found = read_records(dataset, source, numbers * dataset.views)
        latents = found["latents"][..., :channels].astype(np.float32)  # the posterior's mean
        given = {"latents": latents, "labels": found["labels"]}
        return given | ({"condition": found["condition"]} if is_semantic else {})

    digest = values_sha256([shard.sha256 for shard in dataset.shards])[:16]
    return Task(dataset.num_images, read, {"digest": digest})


def _archive(experiment: Experiment, path: pathlib.Path) -> Task:
    """The arrays of an .npz: images and masks, or maps; and labels, which may be absent."""
    config = experiment.config
    assert experiment.autoencoder is not None
    size = image_size(config)
    m = config.model
    latents = jax.ShapeDtypeStruct((1, m.latent_size, m.latent_size, m.in_channels), np.float32)
    decode = experiment.autoencoder.decode
    image = jax.eval_shape(decode, experiment.autoencoder.params, latents).shape[1:]
    is_semantic = config.conditioning.kind == "semantic"
    shapes = {"maps": (size, size)} if is_semantic else {"images": image, "masks": (size, size)}
    if not path.is_file():
        raise FileNotFoundError(f"found no such file, expected an .npz with {' and '.join(shapes)}")
    arrays = _read_arrays(path, shapes)
    if "labels" in arrays:
        labels = arrays["labels"]
        if labels.min() < 0 or labels.max() > m.num_classes:
            raise ValueError(
                f"labels: found {labels.min()} to {labels.max()}, expected 0 to "
                f"{m.num_classes}, which stands for no class"
            )
        arrays["labels"] = labels.astype(np.int32)
    classes = arrays["maps"][arrays["maps"] != 255] if is_semantic else np.zeros(0)
    if (classes >= config.conditioning.classes).any():
        raise ValueError(
            f"maps: found the class {classes.max()}, expected less than "
            f"config.conditioning.classes={config.conditioning.classes}, or 255 for none"
        )
    if not is_semantic:
        arrays["masks"] = arrays["masks"] != 0
    read = lambda numbers: {name: array[numbers] for name, array in arrays.items()}
    return Task(len(arrays[next(iter(shapes))]), read, {"digest": file_sha256(path)[:16]})


def _read_arrays(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arrays [n, *shape] and labels [n], if there are any; no array that is not as expected."""
    try:
        headers = {}
        with zipfile.ZipFile(path) as archive:
            for name in {*shapes, "labels"} & {n.removesuffix(".npy") for n in archive.namelist()}:
                with archive.open(f"{name}.npy") as stream:
                    shape, _, dtype = array_header(stream, name)
                headers[name] = jax.ShapeDtypeStruct(shape, dtype)
    except (*DAMAGED, ValueError) as error:
        raise ValueError(f"damaged or no .npz ({error})") from error
    _check_headers(headers, shapes, most_expanded(path.stat().st_size))
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in headers}
    except (*DAMAGED, ValueError, MemoryError) as error:
        raise ValueError(f"damaged ({error})") from error


def _check_headers(
    headers: Mapping[str, jax.ShapeDtypeStruct], shapes: Mapping[str, tuple[int, ...]], most: int
) -> None:
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if name not in headers:
            raise ValueError(f"found no {name}, expected {' and '.join(shapes)}")
        found = headers[name]
        fits = found.dtype == np.uint8 or (name != "images" and found.dtype.kind in "bu")
        if found.shape[1:] != shape or not fits or not len(found):
            kind = f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"{name}: found {kind}, expected uint8 {['n', *shape]}")
        if len(found) != len(headers[first]):
            raise ValueError(f"{name}: found {len(found)}, but as many as images are expected")
        if (size := found.size * found.dtype.itemsize) > most:
            raise ValueError(
                f"{name}: refused, as it becomes {size:,} bytes, more than {most:,}: if you trust "
                "it, save it without compression (np.savez)"
            )
    count = len(headers[first])
    labels = headers.get("labels", jax.ShapeDtypeStruct((count,), np.int32))
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: found {labels.dtype} {list(labels.shape)}, expected integers [{count}]"
        )


def make_prepare(
    experiment: Experiment, decode: Callable[[Any, Array], Array]
) -> Callable[[Any, Given, Array], Prepared]:
    """Returns the pure function of the autoencoder's parameters, items and numbers of samples."""
    config, autoencoder = experiment.config, experiment.autoencoder
    assert autoencoder is not None
    c, latent_format = config.conditioning, experiment.latent_format
    cells, channels = config.model.latent_size, config.model.in_channels
    size = image_size(config)

    def encoded(params: Any, images: Array) -> Array:
        return normalize(autoencoder.encode(params, images)[..., :channels], latent_format)

    def prepare(params: Any, given: Given, numbers: Array) -> Prepared:
        labels = given.get("labels")
        if c.kind == "semantic":
            shares = given.get("condition")
            if shares is None:
                shares = conditioning.class_histogram(given["maps"], c.classes, cells)
            return Prepared({"condition": shares.astype(jnp.float32)}, labels, None, None, None)
        images = _originals(params, given, decode)
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        mask = given.get("masks")
        if mask is None:
            key = jax.random.fold_in(jax.random.key(config.sampling.seed), _MASKS)
            mask = conditioning.random_masks(key, numbers, size)
        if c.kind == "inpaint" and c.masked == "image":
            hidden = encoded(params, conditioning.hide(pixels, mask))
            corners = conditioning.mask_at_corners(mask, cells)
            extras = {"condition": conditioning.inpaint_channels(hidden, corners)}
            return Prepared(extras, labels, mask, images, None)
        if "latents" in given:
            latents = normalize(given["latents"], latent_format)
        else:
            latents = encoded(params, pixels)
        hole = conditioning.cells_with_hole(mask, cells)
        if c.kind == "none":
            return Prepared({}, labels, mask, images, (latents, hole[..., None]))
        shown = conditioning.inpaint_channels(jnp.where(hole[..., None], 0.0, latents), hole)
        return Prepared({"condition": shown}, labels, mask, images, None)

    return prepare


def _originals(params: Any, given: Given, decode: Callable[[Any, Array], Array]) -> Array:
    if "images" in given:
        return given["images"]
    return jnp.asarray(to_uint8(decode(params, given["latents"])))


def make_pictures(
    experiment: Experiment, decode: Callable[[Any, Array], Array]
) -> Callable[[Any, Given, Array], tuple[Array, ...]]:
    """Returns (parameters, items, numbers) -> pictures to be shown with the samples.

    These are the image with its hole and the whole image, or the label map in colours and, where it
    is known, the image that it is of: uint8 [B, H, W, C] each, the first before the sample.
    """
    prepare = make_prepare(experiment, decode)
    size, classes = image_size(experiment.config), experiment.config.conditioning.classes

    def pictures(params: Any, given: Given, numbers: Array) -> tuple[Array, ...]:
        found = prepare(params, given, numbers)
        if found.mask is not None and found.original is not None:
            hole = jnp.full_like(found.original, _HIDDEN)
            return conditioning.composite(found.mask, hole, found.original), found.original
        label_map = given.get("maps")
        if label_map is None:
            shares = found.extras["condition"]
            label_map = jnp.where(shares.sum(-1) > 0, shares.argmax(-1), classes)
        factor = size // label_map.shape[1]
        label_map = jnp.repeat(jnp.repeat(label_map, factor, axis=1), factor, axis=2)
        shown = (jnp.asarray(_colours(classes))[jnp.minimum(label_map, classes)],)
        return shown + ((_originals(params, given, decode),) if "latents" in given else ())

    return pictures


def _colours(classes: int) -> np.ndarray:
    """A colour for each class, dark for 0, and white for none: uint8 [classes + 1, 3]."""
    hues = [colorsys.hsv_to_rgb(0.61803 * k % 1, 0.75, 0.95) for k in range(classes - 1)]
    return np.round(255 * np.array([(0.1, 0.1, 0.1), *hues, (1, 1, 1)])).astype(np.uint8)
