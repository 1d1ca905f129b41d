"""Reads latents that other programs wrote, so that they need not be encoded again.

Each function's docstring names the transformation that it undoes. All give float32, channels last.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from tqdm import tqdm

from repulsor_jax.data.listing import (
    Listing,
    Names,
    arrange,
    file_sizes,
    find_folder,
    scan,
    shorten,
    source_signature,
    subfolders,
)
from repulsor_jax.files.tensors import open_safetensors
from repulsor_jax.files.untrusted import checked, parse, read_json

KINDS = ("fast-dit", "lightning-dit", "npy", "npy:moments", "npy:scaled", "repa")

# The least standard deviation of the SD-VAE's posterior, which clips log-variances to [-30, 20].
_MIN_STD = float(np.exp(-15.0))


class LatentItem(NamedTuple):
    """The stored latents of one image.

    Attributes:
      latents: float32 `[views, h, w, c]`, or `[views, h, w, 2c]` of means, then log-variances, if
        the source is stochastic. View 0 is the image, view 1 the image flipped left to right.
      label: index into the source's class names.
      name: for messages: the file, and the place in it.
    """

    latents: np.ndarray
    label: int
    name: str


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Labelled latents by index; item i is always the same.

    Attributes:
      class_names: label k is `class_names[k]`; "0" to "K-1" where the files only have numbers.
      labels: int32 `[N]`.
      read: returns an item's latents and name; ValueError, naming the file, for one that is
        damaged, of another shape than the first, or not finite.
      signature: like that of `sources.ImageSource`.
      stochastic: items hold the posterior's means and log-variances.
      views: in each item, 1 or 2.
      scaled: the latents were multiplied by the autoencoder's scale as they were written.
    """

    class_names: Sequence[str]
    labels: np.ndarray
    read: Callable[[int], tuple[np.ndarray, str]]
    signature: Callable[[], str]
    stochastic: bool = False
    views: int = 1
    scaled: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LatentItem:
        """Returns an item."""
        latents, name = self.read(index)
        return LatentItem(latents, int(self.labels[index]), name)


def open_latent_source(name: str, split: str, *, path: str) -> LatentSource:
    """Opens latents that another program wrote.

    Args:
      name: "fast-dit", "repa", "lightning-dit"; "npy" for a folder of arrays, "npy:moments" if
        they are means and log-variances, "npy:scaled" if they are multiplied by the autoencoder's
        scale.
      split: a folder in `path`, "." for `path` itself.
      path: the folder.

    Raises:
      ValueError: unknown name, no such folder, no latents, or labels that are missing or wrong;
        the message names the file.
    """
    if name not in KINDS:
        raise ValueError(f"latent source: found {name!r}, expected one of {list(KINDS)}")
    kinds = {"fast-dit": _fast_dit, "repa": _repa, "lightning-dit": _lightning_dit}
    return kinds[name](split, path) if name in kinds else _npy(split, path, name)


def _array_files(
    kind: str,
    root: str,
    listing: Listing,
    *,
    scaled: bool = False,
    stochastic: bool = False,
    has_std: bool = False,
) -> LatentSource:
    """One .npy file per item, each `[c, h, w]` or `[1, c, h, w]`.

    Stochastic are means, then log-variances, or standard deviations, which become log-variances.
    """
    first = os.path.join(root, listing.names[0])
    shape = _load_latents(first).shape
    if stochastic and shape[0] % 2:
        raise ValueError(
            f"{first}: found {shape[0]} channels, expected an even number: means, then spreads"
        )

    def read(index: int) -> tuple[np.ndarray, str]:
        path = os.path.join(root, listing.names[index])
        stored = _load_latents(path)
        if stored.shape != shape:
            raise ValueError(
                f"{path}: found latents of shape {list(stored.shape)}, expected {list(shape)} as "
                f"in {first}"
            )
        if has_std:
            stored = _log_variances(stored, path)
        return np.ascontiguousarray(stored.transpose(1, 2, 0)[None]), path

    def signature() -> str:
        return source_signature(kind, listing, file_sizes(root, listing.names))

    classes, labels = listing.class_names, listing.labels
    return LatentSource(classes, labels, read, signature, stochastic, 1, scaled)


def _fast_dit(split: str, path: str) -> LatentSource:
    """Files of fast-DiT's `extract_features.py`: `<x>_features/<i>.npy`, `<x>_labels/<i>.npy`.

    A feature is float32 `[1, c, h, w]`, a draw from the posterior times 0.18215 (so `scaled`), of
    an image flipped by chance; its label `[1]` has the same file name. The two folders stand in
    `path/split`; where there are several pairs, the split is the `<x>` of one.
    """
    features = os.path.join(path, f"{split}_features")
    if not path or not os.path.isdir(features):
        root = find_folder(path, split, "fast-dit")
        folders = subfolders(root)
        found = [folder for folder in folders if folder.endswith("features")]
        if len(found) != 1:
            raise ValueError(
                f"fast-dit: found the folders {shorten(folders)} in {root}, expected one named "
                "<x>_features beside one named <x>_labels; if there are several, give <x> as split"
            )
        features = os.path.join(root, found[0])
    labels = features.removesuffix("features") + "labels"
    if not os.path.isdir(labels):
        raise ValueError(f"fast-dit: {labels} not found, expected the labels of {features}")
    arrays = _arrays_with_labels(features, scan(labels, ("npy",)).names, labels)
    values = []
    for name in tqdm(names := sorted(arrays, key=_by_number), desc="read labels", delay=2):
        file = os.path.join(labels, name)
        label = _load_array(file)
        if label.size != 1 or label.dtype.kind not in "iu" or label.item() < 0:
            raise ValueError(
                f"{file}: found {label.dtype} {list(label.shape)}, expected one whole number, "
                "0 or more: the label of the feature of this name"
            )
        values.append(label.item())
    classes, numbers = _numbered_classes(labels, values)
    listing = Listing(classes, Names.pack(names), numbers)
    return _array_files("fast-dit", features, listing, scaled=True)


@checked
class _RepaLabels:
    """REPA's dataset.json."""

    labels: Annotated[tuple[tuple[str, Annotated[int, Field(ge=0)]], ...], Field(min_length=1)]


def _repa(split: str, path: str) -> LatentSource:
    """The folder `vae-sd` of REPA's `dataset_tools.py encode` (after EDM2), with a dataset.json.

    A file `<5 digits>/img-mean-std-<8 digits>.npy` is float32 `[2c, h, w]`, means, then standard
    deviations of the posterior, neither scaled; dataset.json holds {"labels": [[file, label],
    ...]}. The standard deviations become log-variances, 2 log(std). `path/split` is the folder
    with the dataset.json, or holds it as `vae-sd`.
    """
    root = find_folder(path, split, "repa")
    if not os.path.isfile(os.path.join(root, "dataset.json")):
        root = os.path.join(root, "vae-sd")
    file = os.path.join(root, "dataset.json")
    try:
        content = read_json(file)
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read: {error.strerror}; expected the labels, as REPA's "
            "preprocessing writes them beside the latents"
        ) from error
    values = {"labels": content.get("labels")} if isinstance(content, dict) else content
    labels = dict(parse(_RepaLabels, values, file).labels)
    names = sorted(_arrays_with_labels(root, labels, file))
    classes, numbers = _numbered_classes(file, [labels[name] for name in names])
    listing = Listing(classes, Names.pack(names), numbers)
    return _array_files("repa", root, listing, stochastic=True, has_std=True)


def _npy(split: str, path: str, name: str) -> LatentSource:
    """A folder of .npy files `[c, h, w]`, as `class/**/file`, or flat and without labels.

    Nothing is undone: "npy" are latents, "npy:moments" means, then log-variances (both as the
    autoencoder gives them), "npy:scaled" latents times the autoencoder's scale.
    """
    root = find_folder(path, split, "npy")
    listing = arrange(root, scan(root, ("npy",)), ".npy file")
    stochastic, scaled = name == "npy:moments", name == "npy:scaled"
    return _array_files(name, root, listing, stochastic=stochastic, scaled=scaled)


def _lightning_dit(split: str, path: str) -> LatentSource:
    """Files of LightningDiT's `extract_features.py`: safetensors of some 10,000 items each.

    "latents" `[n, c, h, w]` are draws from the posterior, as the autoencoder gives them
    (LightningDiT normalises by its latents_stats.pt as it trains, which is not read here),
    "latents_flip" those of the flipped images; with "labels" `[n]`. Files are taken in order of
    their names.
    """
    root = find_folder(path, split, "lightning-dit")
    try:
        paths = sorted(e.path for e in os.scandir(root) if e.name.endswith(".safetensors"))
    except OSError as error:
        raise ValueError(f"{root}: the folder cannot be read: {error.strerror}") from error
    if not paths:
        raise ValueError(f"lightning-dit: found no .safetensors file in {root}")
    views = ("latents", "latents_flip")
    labels: list[np.ndarray] = []
    shape: list[int] = []
    for path in paths:
        file = open_safetensors(path)
        if missing := {*views, "labels"} - set(file.keys()):
            raise ValueError(
                f"{path}: found the keys {sorted(file.keys())}, but not {sorted(missing)}, which "
                "LightningDiT's extract_features.py writes"
            )
        values = file.get_tensor("labels")
        sizes = [file.get_slice(key).get_shape() for key in views]
        types = [file.get_slice(key).get_dtype() for key in views]
        shape = shape or sizes[0][1:]
        expected = [*values.shape, *shape]
        if len(shape) != 3 or sizes != [expected, expected] or values.ndim != 1:
            raise ValueError(
                f"{path}: found latents {sizes[0]}, latents_flip {sizes[1]} and labels "
                f"{list(values.shape)}, expected [n, c, h, w] twice, with [c, h, w] = {shape} as "
                f"in {os.path.basename(paths[0])}, and [n]"
            )
        if not set(types) <= {"F64", "F32", "F16", "BF16"} or values.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: found latents of type {types[0]} and {types[1]}, labels of "
                f"{values.dtype}; expected floating point and whole numbers"
            )
        labels.append(values)
    class_names, numbers = _numbered_classes(root, np.concatenate(labels))
    ends = np.cumsum([len(values) for values in labels], dtype=np.int64)
    opened = functools.cache(open_safetensors)

    def read(index: int) -> tuple[np.ndarray, str]:
        shard = int(np.searchsorted(ends, index, side="right"))
        row = index - (int(ends[shard - 1]) if shard else 0)
        name, file = f"{paths[shard]}[{row}]", opened(paths[shard])
        found = [file.get_slice(key)[row : row + 1] for key in views]
        latents = _finite(np.concatenate(found).astype(np.float32), name)
        return np.ascontiguousarray(latents.transpose(0, 2, 3, 1)), name

    def signature() -> str:
        names = Names.pack(os.path.basename(path) for path in paths)
        sizes = np.array([os.path.getsize(path) for path in paths])
        listing = Listing(class_names, names, np.concatenate([ends, numbers]))
        return source_signature("lightning-dit", listing, sizes)

    return LatentSource(class_names, numbers, read, signature, views=2)


def _arrays_with_labels(root: str, labelled: Collection[str], where: str) -> set[str]:
    """The .npy files below a folder, each of which must have a label, and each label a file."""
    found = set(scan(root, ("npy",)).names)
    if not found:
        raise ValueError(f"{root}: found no .npy file, expected the latents")
    if alone := sorted(found ^ set(labelled)):
        what = "has no label in" if alone[0] in found else "is not there, though it has one in"
        raise ValueError(
            f"{os.path.join(root, alone[0])} {what} {where}, and so for {len(alone)} files in all; "
            "expected a label for each file: was the copy or the run cut short?"
        )
    return found


def _by_number(name: str) -> tuple[int, int, str]:
    """Sorts "10.npy" after "9.npy", and names that are no numbers after those that are."""
    stem = name.removesuffix(".npy")
    return (0, int(stem), name) if stem.isdecimal() else (1, 0, name)


def _numbered_classes(
    where: str, labels: Sequence[int] | np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names "0" to "K-1", each of which must occur among the labels, and these as int32."""
    found = np.unique(np.asarray(labels))
    if not len(found):
        raise ValueError(f"{where}: found no labels, expected one for each latent")
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if len(gaps):
        raise ValueError(
            f"{where}: found {len(found)} different labels from {found[0]} to {found[-1]}, but not "
            f"{gaps[0]}; expected each of 0 to K-1: renumber the labels, or complete the data set"
        )
    return tuple(str(k) for k in range(len(found))), np.asarray(labels, np.int32)


def _load_array(path: str) -> np.ndarray:
    try:
        with open(path, "rb", buffering=0) as file:
            # From memory: a label is one small read, not several.
            array = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # NumPy raises many kinds on a damaged header
        raise ValueError(f"{path}: damaged or no .npy file of numbers ({error})") from error
    return array


def _load_latents(path: str) -> np.ndarray:
    """Returns latents `[c, h, w]`, float32, stored with or without a leading axis of one."""
    array = _load_array(path)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.size == 0 or array.dtype.kind != "f":
        raise ValueError(
            f"{path}: found {array.dtype} {list(array.shape)}, expected latents of floating point, "
            "[c, h, w] or [1, c, h, w]"
        )
    return _finite(array.astype(np.float32), path)


def _finite(latents: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(latents).all():
        raise ValueError(f"{name}: found values that are not finite: encode this image again")
    return latents


def _log_variances(moments: np.ndarray, path: str) -> np.ndarray:
    """Turns `[2c, h, w]` of means and standard deviations into means and log-variances."""
    mean, std = np.split(moments, 2)
    if std.min() < 0:
        raise ValueError(
            f"{path}: found {std.min()} among the standard deviations, the latter half of the "
            'channels, expected 0 or more: are these log-variances (kind "npy:moments")?'
        )
    return np.concatenate([mean, 2 * np.log(np.maximum(std, _MIN_STD))])
