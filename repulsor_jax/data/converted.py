"""Reads latents that other programs wrote, so that they need not be encoded again.

What each kind undoes is in its function's docstring. All give float32, channels last, and tell by
`scaled` whether the autoencoder's scale was multiplied in.
"""

import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from repulsor_jax.data.listing import (
    Files,
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
from repulsor_jax.files.untrusted import read_json

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


class LatentSource(Protocol):
    """Labelled latents by index; item i is always the same. It can be pickled.

    `__getitem__` raises ValueError, naming the file, on one that is damaged, of another shape
    than the first, or not finite.
    """

    @property
    def class_names(self) -> Sequence[str]:
        """Label k is `class_names[k]`; "0" to "K-1" where the files only have numbers."""
        ...

    @property
    def stochastic(self) -> bool:
        """Items hold the posterior's means and log-variances."""
        ...

    @property
    def views(self) -> int:
        """Views in each item, 1 or 2."""
        ...

    @property
    def scaled(self) -> bool:
        """The latents were multiplied by the autoencoder's scale as they were written."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> LatentItem:
        """Returns an item."""
        ...

    def signature(self) -> str:
        """Like that of `sources.ImageSource`."""
        ...


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
    if name == "fast-dit":
        return _fast_dit(split, path)
    if name == "repa":
        return _repa(split, path)
    if name == "lightning-dit":
        return _lightning_dit(split, path)
    if name in KINDS:
        return _npy(split, path, name)
    raise ValueError(f"latent source: found {name!r}, expected one of {list(KINDS)}")


@dataclasses.dataclass(frozen=True)
class _ArrayFiles:
    """One .npy file per item, each `[c, h, w]` or `[1, c, h, w]`.

    Attributes:
      kind: as in `open_latent_source`.
      root: the folder that `names` are below.
      class_names: label k is `class_names[k]`.
      names: the files.
      labels: int32 `[N]`.
      shape: `[c, h, w]` of the first file.
      stochastic: c is of means, then of spreads.
      scaled: see `LatentSource`.
      std: the spreads are standard deviations, to be made log-variances.
    """

    kind: str
    root: str
    class_names: Sequence[str]
    names: Names
    labels: np.ndarray
    shape: tuple[int, ...]
    stochastic: bool = False
    scaled: bool = False
    std: bool = False
    views: int = 1

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LatentItem:
        path = os.path.join(self.root, self.names[index])
        stored = _load_latents(path)
        if stored.shape != self.shape:
            first = os.path.join(self.root, self.names[0])
            raise ValueError(
                f"{path}: found latents of shape {list(stored.shape)}, expected "
                f"{list(self.shape)} as in {first}"
            )
        if self.std:
            stored = _log_variances(stored, path)
        latents = np.ascontiguousarray(stored.transpose(1, 2, 0)[None])
        return LatentItem(latents, int(self.labels[index]), path)

    def signature(self) -> str:
        sizes = file_sizes(self.root, self.names)
        return source_signature(self.kind, self.class_names, self.names, self.labels, sizes)


def _fast_dit(split: str, path: str) -> LatentSource:
    """What fast-DiT's `extract_features.py` writes: `<x>_features/<i>.npy`, `<x>_labels/<i>.npy`.

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
    arrays = set(_scan_arrays(features).names)
    alone = sorted(arrays ^ set(scan(labels, ("npy",)).names))
    if alone:
        has, lacks = (features, labels) if alone[0] in arrays else (labels, features)
        raise ValueError(
            f"fast-dit: {len(alone)} files stand alone, such as {alone[0]}, which {has} holds and "
            f"{lacks} does not; expected the same names in both: was the copy or the run cut short?"
        )
    names = sorted(arrays, key=_by_number)
    values = []
    for name in tqdm(names, desc="read labels", unit="file", delay=2):
        file = os.path.join(labels, name)
        label = _load_array(file)
        if label.size != 1 or label.dtype.kind not in "iu" or label.item() < 0:
            raise ValueError(
                f"{file}: found {label.dtype} {list(label.shape)}, expected one whole number, "
                "0 or more: the label of the feature of this name"
            )
        values.append(label.item())
    packed = Names.pack(names)
    class_names = _numbered_classes(labels, values)
    shape = _first_shape(features, packed)
    return _ArrayFiles(
        "fast-dit", features, class_names, packed, np.array(values, np.int32), shape, scaled=True
    )


def _repa(split: str, path: str) -> LatentSource:
    """What REPA's `dataset_tools.py encode` writes (after EDM2): `vae-sd`, with a dataset.json.

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
        pairs = read_json(file)["labels"]
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read: {error.strerror}; expected the labels, as REPA's "
            "preprocessing writes them beside the latents"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: found no "labels" in it ({error!r})') from error
    if not pairs:
        raise ValueError(f"{file}: found labels {pairs!r}, expected a list of [file, label]")
    labels: dict[str, int] = {}
    for pair in pairs:
        match pair:
            case [str() as name, int() as label] if not isinstance(label, bool) and label >= 0:
                labels[name] = label
            case _:
                raise ValueError(f"{file}: found the entry {pair!r}, expected [file, label >= 0]")
    found = set(_scan_arrays(root).names)
    alone = sorted(found ^ labels.keys())
    if alone:
        what = "has no label in" if alone[0] in found else "is not there, though it has one in"
        raise ValueError(
            f"repa: {os.path.join(root, alone[0])} {what} {file}, and so for {len(alone)} files "
            "in all; expected a label for each file: was the copy or the run cut short?"
        )
    names = sorted(found)
    values = [labels[name] for name in names]
    packed = Names.pack(names)
    shape = _even(_first_shape(root, packed), os.path.join(root, names[0]))
    return _ArrayFiles(
        "repa",
        root,
        _numbered_classes(file, values),
        packed,
        np.array(values, np.int32),
        shape,
        stochastic=True,
        std=True,
    )


def _npy(split: str, path: str, name: str) -> LatentSource:
    """A folder of .npy files `[c, h, w]`, as `class/**/file`, or flat and without labels.

    Nothing is undone: "npy" are latents, "npy:moments" means, then log-variances (both as the
    autoencoder gives them), "npy:scaled" latents times the autoencoder's scale.
    """
    root = find_folder(path, split, "npy")
    listing = arrange(root, scan(root, ("npy",)), ".npy file")
    shape = _first_shape(root, listing.names)
    stochastic = name == "npy:moments"
    if stochastic:
        shape = _even(shape, os.path.join(root, listing.names[0]))
    return _ArrayFiles(
        name,
        root,
        listing.class_names,
        listing.names,
        listing.labels,
        shape,
        stochastic=stochastic,
        scaled=name == "npy:scaled",
    )


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Safetensors files with "latents" and "latents_flip" `[n, c, h, w]` and "labels" `[n]`.

    Attributes:
      paths: the files.
      ends: int64, items in the files up to and with each.
      labels: int32 `[N]`.
      class_names: label k is `class_names[k]`.
      files: those that are open.
    """

    paths: Sequence[str]
    ends: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]
    files: "_OpenFiles"
    stochastic: bool = False
    scaled: bool = False
    views: int = 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LatentItem:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} out of range for {len(self)} items")
        shard = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[shard - 1]) if shard else 0)
        name = f"{self.paths[shard]}[{row}]"
        file = self.files.get(self.paths[shard])
        views = [file.get_slice(key)[row : row + 1] for key in ("latents", "latents_flip")]
        latents = _finite(np.concatenate(views).astype(np.float32), name)
        latents = np.ascontiguousarray(latents.transpose(0, 2, 3, 1))
        return LatentItem(latents, int(self.labels[index]), name)

    def signature(self) -> str:
        names = Names.pack(os.path.basename(path) for path in self.paths)
        sizes = np.array([os.path.getsize(path) for path in self.paths])
        labels = np.concatenate([self.ends, self.labels])
        return source_signature("lightning-dit", self.class_names, names, labels, sizes)


class _OpenFiles:
    """Safetensors files, each mapped when it is first asked for; a pickled copy has none open."""

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": {}}

    def get(self, path: str) -> Any:
        if path not in self._files:
            self._files[path] = open_safetensors(path)
        return self._files[path]


def _lightning_dit(split: str, path: str) -> LatentSource:
    """What LightningDiT's `extract_features.py` writes: safetensors files of some 10,000 items.

    "latents" are draws from the posterior, as the autoencoder gives them (LightningDiT normalises
    by its latents_stats.pt as it trains, which is not read here), "latents_flip" those of the
    flipped images; with "labels". Files are taken in order of their names.
    """
    root = find_folder(path, split, "lightning-dit")
    try:
        paths = sorted(
            entry.path for entry in os.scandir(root) if entry.name.endswith(".safetensors")
        )
    except OSError as error:
        raise ValueError(f"{root}: the folder cannot be read: {error.strerror}") from error
    if not paths:
        raise ValueError(f"lightning-dit: found no .safetensors file in {root}")
    labels: list[np.ndarray] = []
    shape: list[int] = []
    for shard in paths:
        file = open_safetensors(shard)
        missing = {"latents", "latents_flip", "labels"} - set(file.keys())
        if missing:
            raise ValueError(
                f"{shard}: found the keys {sorted(file.keys())}, but not {sorted(missing)}, which "
                "LightningDiT's extract_features.py writes"
            )
        values = file.get_tensor("labels")
        sizes = [file.get_slice(key).get_shape() for key in ("latents", "latents_flip")]
        shape = shape or sizes[0][1:]
        expected = [*values.shape, *shape]
        if len(shape) != 3 or sizes != [expected, expected] or values.ndim != 1:
            raise ValueError(
                f"{shard}: found latents {sizes[0]}, latents_flip {sizes[1]} and labels "
                f"{list(values.shape)}, expected [n, c, h, w] twice, with [c, h, w] = {shape} as "
                f"in {os.path.basename(paths[0])}, and [n]"
            )
        types = [file.get_slice(key).get_dtype() for key in ("latents", "latents_flip")]
        if not set(types) <= {"F64", "F32", "F16", "BF16"} or values.dtype.kind not in "iu":
            raise ValueError(
                f"{shard}: found latents of type {types[0]} and {types[1]}, labels of "
                f"{values.dtype}; expected floating point and whole numbers"
            )
        if len(values) and values.min() < 0:
            raise ValueError(f"{shard}: found the label {values.min()}, expected 0 or more")
        labels.append(values)
    joined = np.concatenate(labels)
    class_names = _numbered_classes(root, joined)
    ends = np.cumsum([len(values) for values in labels], dtype=np.int64)
    return _Shards(tuple(paths), ends, joined.astype(np.int32), class_names, _OpenFiles())


def _scan_arrays(root: str) -> Files:
    files = scan(root, ("npy",))
    if not files.names:
        raise ValueError(f"{root}: found no .npy file, expected the latents")
    return files


def _by_number(name: str) -> tuple[int, int, str]:
    """Sorts "10.npy" after "9.npy", and names that are no numbers after those that are."""
    stem = name.removesuffix(".npy")
    return (0, int(stem), name) if stem.isdecimal() else (1, 0, name)


def _numbered_classes(where: str, labels: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """Names "0" to "K-1" for labels of which each of these must occur."""
    found = np.unique(np.asarray(labels))
    if not len(found):
        raise ValueError(f"{where}: found no labels, expected one for each latent")
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if len(gaps):
        raise ValueError(
            f"{where}: found {len(found)} different labels up to {found[-1]}, but not {gaps[0]}; "
            "expected each of 0 to K-1: renumber the labels, or complete the data set"
        )
    return tuple(str(k) for k in range(len(found)))


def _load_array(path: str) -> np.ndarray:
    try:
        with open(path, "rb", buffering=0) as file:
            # From memory: a label is one small read, not several.
            array = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of a damaged header NumPy raises many kinds
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


def _first_shape(root: str, names: Names) -> tuple[int, ...]:
    return _load_latents(os.path.join(root, names[0])).shape


def _even(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    if shape[0] % 2:
        raise ValueError(
            f"{path}: found {shape[0]} channels, expected an even number: means, then spreads"
        )
    return shape


def _log_variances(moments: np.ndarray, path: str) -> np.ndarray:
    """Turns `[2c, h, w]` of means and standard deviations into means and log-variances."""
    mean, std = np.split(moments, 2)
    if std.min() < 0:
        raise ValueError(
            f"{path}: found {std.min()} among the standard deviations, the latter half of the "
            'channels, expected 0 or more: are these log-variances (kind "npy:moments")?'
        )
    return np.concatenate([mean, 2 * np.log(np.maximum(std, _MIN_STD))])
