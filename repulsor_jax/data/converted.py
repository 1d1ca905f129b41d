"""Reads latents that other programs wrote, so that they need not be encoded again.

Each function's docstring names the transformation that it undoes. All give float32, channels last.
"""

import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from repulsor_jax.data import listing
from repulsor_jax.files.tensors import open_safetensors
from repulsor_jax.files.untrusted import read_json, refuse_pointer


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Labelled latents by index; item i is always the same.

    `read` returns an item, float32 `[views, h, w, c]`, or `[views, h, w, 2c]` of means, then
    log-variances; view 1 is the image flipped left to right. It raises ValueError, naming the file,
    for an item that is damaged, of another shape than the first, or not finite.
    """

    class_names: Sequence[str]  # "0" to "K-1" where the files only have numbers
    labels: np.ndarray  # int32 [N], indices into the class names
    read: Callable[[int], np.ndarray]
    signature: Callable[[], str]  # see `sources.ImageSource`
    stochastic: bool = False  # items hold the posterior's means and log-variances
    views: int = 1
    scaled: bool = False  # latents were multiplied by the autoencoder's scale
    name: Callable[[int], str] = str  # of an item, for messages
    doubt: str = ""  # see `listing.Listing`

    def __len__(self) -> int:
        return len(self.labels)


def open_latent_source(name: str, split: str, *, path: str) -> LatentSource:
    """Opens latents of one of `KINDS` that another program wrote, in a folder, or in its `split`.

    Raises ValueError, naming the file, where latents or labels are missing or wrong.
    """
    if name not in KINDS:
        raise ValueError(f"latent source: found {name!r}, expected one of {list(KINDS)}")
    return _OPENERS[name](split, path)


def _array_files(
    kind: str,
    root: str,
    items: listing.Listing,
    *,
    scaled: bool = False,
    stochastic: bool = False,
    has_std: bool = False,
) -> LatentSource:
    """One .npy file per item, each `[c, h, w]` or `[1, c, h, w]`.

    A stochastic file holds means, then log-variances or standard deviations (converted to
    log-variances).
    """
    first = os.path.join(root, items.names[0])
    shape = _load_latents(first).shape
    if stochastic and shape[0] % 2:
        raise ValueError(f"{first}: found {shape[0]} channels, expected an even number")

    def read(index: int) -> np.ndarray:
        path = os.path.join(root, items.names[index])
        stored = _load_latents(path)
        if stored.shape != shape:
            found, expected = list(stored.shape), list(shape)
            raise ValueError(
                f"{path}: found latents of shape {found}, expected {expected} as in {first}"
            )
        if has_std:
            mean, std = np.split(stored, 2)
            if std.min() < 0:
                raise ValueError(
                    f"{path}: found {std.min()} among the standard deviations, the latter half of "
                    'the channels, expected 0 or more: are these log-variances ("npy:moments")?'
                )
            # The SD-VAE clips log-variances to [-30, 20].
            stored = np.concatenate([mean, 2 * np.log(np.maximum(std, float(np.exp(-15))))])
        return np.ascontiguousarray(stored.transpose(1, 2, 0)[None])

    def signature() -> str:
        return listing.source_signature(kind, items, listing.file_sizes(root, items.names))

    return LatentSource(
        items.class_names,
        items.labels,
        read,
        signature,
        stochastic,
        scaled=scaled,
        name=lambda index: os.path.join(root, items.names[index]),
        doubt=items.doubt,
    )


def check_layout(source: LatentSource, size: int, channels: int) -> None:
    """Raises ValueError where the first item, of a model of size x size x channels, is otherwise.

    Two layouts are told from the shape alone: channels last, and moments where latents are to be
    (or latents for moments).
    """
    height, width, depth = source.read(0).shape[1:]
    expected = 2 * channels if source.stochastic else channels
    if (height, width, depth) == (size, size, expected):
        return
    where = f"{source.name(0)}: found [{depth}, {height}, {width}], expected "
    where += f"[{expected}, {size}, {size}], channels first"
    if (height, width) == (size, size) and {depth, expected} == {channels, 2 * channels}:
        kind = "latents: npy" if source.stochastic else "means, then log-variances: npy:moments"
        raise ValueError(f"{where}; if these are {kind} is the config.data.source to name")
    if (depth, height) == (size, size) and width in (channels, 2 * channels):
        raise ValueError(f"{where}: write the arrays anew, x.transpose(2, 0, 1)")


def _fast_dit(split: str, path: str) -> LatentSource:
    """Files of fast-DiT's `extract_features.py`: `<x>_features/<i>.npy`, `<x>_labels/<i>.npy`.

    A feature is float32 `[1, c, h, w]`, a draw from the posterior times 0.18215 (so `scaled`), of
    an image flipped by chance; its label `[1]` has the same file name. The two folders stand in
    `path/split`; where there are several pairs, the split is the `<x>` of one.
    """
    features = os.path.join(path, f"{split}_features")
    if not path or not os.path.isdir(features):
        root = listing.find_folder(path, split, "fast-dit")
        folders = listing.subfolders(root)
        found = [folder for folder in folders if folder.endswith("features")]
        if len(found) != 1:
            raise ValueError(
                f"fast-dit: found the folders {listing.shorten(folders)} in {root}, expected one "
                "named <x>_features beside <x>_labels; if there are several, give <x> as split"
            )
        features = os.path.join(root, found[0])
    labels = features.removesuffix("features") + "labels"
    if not os.path.isdir(labels):
        raise ValueError(f"fast-dit: {labels} not found, expected the labels of {features}")
    arrays = _arrays(features)
    listing.check_labelled(features, arrays, listing.scan(labels, ("npy",)).names, labels)
    names = sorted(arrays, key=lambda name: (len(name), name))  # "10.npy" after "9.npy"
    values = []
    for name in tqdm(names, desc="read labels", delay=2):
        file = os.path.join(labels, name)
        label = _load_array(file)
        if label.size != 1 or label.dtype.kind not in "iu":
            kind = f"{label.dtype} {list(label.shape)}"
            raise ValueError(f"{file}: found {kind}, expected one whole number, the label")
        values.append(label.item())
    return _array_files("fast-dit", features, listing.numbered(labels, names, values), scaled=True)


def _repa(split: str, path: str) -> LatentSource:
    """The folder `vae-sd` of REPA's `dataset_tools.py encode` (after EDM2), with a dataset.json.

    A file `<5 digits>/img-mean-std-<8 digits>.npy` is float32 `[2c, h, w]`, means, then standard
    deviations of the posterior, neither scaled; dataset.json holds {"labels": [[file, label],
    ...]}. The standard deviations become log-variances, 2 log(std). `path/split` is the folder
    with the dataset.json, or holds it as `vae-sd`.
    """
    root = listing.find_folder(path, split, "repa")
    if not os.path.isfile(os.path.join(root, "dataset.json")):
        root = os.path.join(root, "vae-sd")
    file = os.path.join(root, "dataset.json")
    try:
        content = read_json(file)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}; expected labels") from error
    items = listing.labelled(root, _arrays(root), content)
    if items is None:
        raise ValueError(f"{file}: found no labels, expected [[file, number], ...] under 'labels'")
    return _array_files("repa", root, items, stochastic=True, has_std=True)


def _npy(split: str, path: str, kind: str = "npy", **facts: bool) -> LatentSource:
    """A folder of .npy files `[c, h, w]`, as `class/**/file`, or flat and without labels.

    Nothing is undone: "npy" are latents, "npy:moments" means, then log-variances (both as the
    autoencoder gives them), "npy:scaled" latents times the autoencoder's scale.
    """
    root = listing.find_folder(path, split, "npy")
    items = listing.arrange(root, listing.scan(root, ("npy",)), ".npy file")
    return _array_files(kind, root, items, **facts)


def _lightning_dit(split: str, path: str) -> LatentSource:
    """Files of LightningDiT's `extract_features.py`: safetensors of some 10,000 items each.

    "latents" `[n, c, h, w]` are draws from the posterior, as the autoencoder gives them
    (LightningDiT normalises by its latents_stats.pt as it trains, which is not read here),
    "latents_flip" those of the flipped images; with "labels" `[n]`. Files are taken in order of
    their names.
    """
    root = listing.find_folder(path, split, "lightning-dit")
    names = sorted(name for name in listing.scan(root, ("safetensors",)).names if "/" not in name)
    if not names:
        raise ValueError(f"lightning-dit: found no .safetensors file in {root}")
    views = ("latents", "latents_flip")
    paths = [os.path.join(root, name) for name in names]
    labels: list[np.ndarray] = []
    shape: list[int] = []
    for path in paths:
        file = open_safetensors(path)
        if missing := {*views, "labels"} - set(file.keys()):
            keys = sorted(file.keys())
            raise ValueError(f"{path}: found the keys {keys}, but not {sorted(missing)}")
        values = file.get_tensor("labels")
        sizes = [file.get_slice(key).get_shape() for key in views]
        types = [file.get_slice(key).get_dtype() for key in views]
        shape = shape or sizes[0][1:]
        expected = [*values.shape, *shape]
        is_shaped = len(shape) == 3 and sizes == [expected, expected] and values.ndim == 1
        is_typed = set(types) <= {"F64", "F32", "F16", "BF16"} and values.dtype.kind in "iu"
        if not (is_shaped and is_typed):
            raise ValueError(
                f"{path}: found latents {types[0]} {sizes[0]}, latents_flip {types[1]} {sizes[1]} "
                f"and labels {values.dtype} {list(values.shape)}, expected floating point "
                f"[n, c, h, w] twice, with {shape} as in {names[0]}, and whole numbers [n]"
            )
        labels.append(values)
    items = listing.numbered(root, names, np.concatenate(labels))
    ends = np.cumsum([len(values) for values in labels], dtype=np.int64)
    opened = functools.cache(open_safetensors)

    def read(index: int) -> np.ndarray:
        shard = int(np.searchsorted(ends, index, side="right"))
        row = index - (int(ends[shard - 1]) if shard else 0)
        file = opened(paths[shard])
        found = [file.get_slice(key)[row : row + 1] for key in views]
        latents = _finite(np.concatenate(found).astype(np.float32), f"{paths[shard]}[{row}]")
        return np.ascontiguousarray(latents.transpose(0, 2, 3, 1))

    def name(index: int) -> str:
        shard = int(np.searchsorted(ends, index, side="right"))
        return f"{paths[shard]}[{index - (int(ends[shard - 1]) if shard else 0)}]"

    def signature() -> str:
        sizes = np.array([os.path.getsize(path) for path in paths])
        counted = dataclasses.replace(items, labels=np.concatenate([ends, items.labels]))
        return listing.source_signature("lightning-dit", counted, sizes)

    return LatentSource(items.class_names, items.labels, read, signature, views=2, name=name)


_OPENERS: dict[str, Callable[[str, str], LatentSource]] = {
    "fast-dit": _fast_dit,
    "lightning-dit": _lightning_dit,
    "npy": _npy,
    "npy:moments": functools.partial(_npy, kind="npy:moments", stochastic=True),
    "npy:scaled": functools.partial(_npy, kind="npy:scaled", scaled=True),
    "repa": _repa,
}
KINDS = tuple(_OPENERS)


def _arrays(root: str) -> set[str]:
    """The .npy files below a folder; ValueError without any."""
    found = set(listing.scan(root, ("npy",)).names)
    if not found:
        raise ValueError(f"{root}: found no .npy file, expected the latents")
    return found


def _load_array(path: str) -> np.ndarray:
    try:
        content = pathlib.Path(path).read_bytes()  # a label is one small read, not several
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    refuse_pointer(content[:64], path)
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds on a damaged header
        raise ValueError(f"{path}: damaged or no .npy file of numbers ({error})") from error


def _load_latents(path: str) -> np.ndarray:
    """Returns latents `[c, h, w]`, float32, stored with or without a leading axis of one."""
    array = _load_array(path)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.size == 0 or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{path}: found {found}, expected latents, floating point [c, h, w]")
    return _finite(array.astype(np.float32), path)


def _finite(latents: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(latents).all():
        raise ValueError(f"{name}: found values that are not finite: encode this image again")
    return latents
