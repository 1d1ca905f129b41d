"""Image sources: random access to labelled images, looked up by name."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from repulsor_jax.data.archives import (
    ImageFolder,
    check_size,
    open_image_archive,
    open_image_folder,
)
from repulsor_jax.data.listing import Item, Listing, Names, find_folder, source_signature
from repulsor_jax.files.untrusted import read_json

__all__ = ["ImageSource", "Item", "open_source"]

# <name>, <name>/<config> or <name>:<version>. Community data sets, <namespace>:<name>, are refused:
# TFDS would fetch and run their code.
_TFDS_NAME = re.compile(r"[a-z0-9_]+(/[\w+-]+(\.[\w+-]+)*)?(:[\d.*]+)?")


class ImageSource(Protocol):
    """Labelled images by index; item i is always the same.

    It can be pickled, so that worker processes get a copy each.
    """

    @property
    def class_names(self) -> Sequence[str]:
        """Label k is `class_names[k]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Returns an item; raises OSError with a filename where it cannot be read."""

    def signature(self) -> str:
        """SHA-256 in hex of all but contents and path; a restarted job compares it."""

    def files(self) -> list[str]:
        """The files whose contents the images are, none where they never change."""


def open_source(
    name: str, split: str, *, path: str = "", cache_dir: str | os.PathLike[str] | None = None
) -> ImageSource:
    """Opens an image source.

    Args:
      name: "digits" (scikit-learn's), "folder" (see `open_image_folder`), "archive" (see
        `open_image_archive`), or "tfds:<name>" for an image classification data set of TensorFlow
        Datasets, as in "tfds:cifar10".
      split: as in "train"; "." for all of a folder or archive.
      path: the folder or archive; for tfds the data_dir, its own default if empty.
      cache_dir: where a compressed archive is decompressed to.

    Raises:
      ValueError: unknown name or split, or a source without images and labels.
    """
    if name == "folder":
        return open_image_folder(path, split)
    if name == "archive":
        return open_image_archive(path, split, cache_dir=cache_dir)
    if name == "digits":
        return _digits(split, path)
    if name.startswith("tfds:"):
        return _tfds(name, split, path)
    expected = ["archive", "digits", "folder", "tfds:<name>"]
    raise ValueError(f"image source: found {name!r}, expected one of {expected}")


def leaves_files(name: str) -> bool:
    """Whether `open_source` may decompress an archive, or prepare a data set of TFDS."""
    return name == "archive" or name.startswith("tfds:")


@dataclasses.dataclass(frozen=True)
class MappedImages:
    """The images of a folder, each with its label map; an `ImageSource`."""

    source: ImageFolder
    root: str  # of the maps

    @property
    def class_names(self) -> Sequence[str]:
        """Of the images."""
        return self.source.class_names

    @property
    def doubt(self) -> str:
        """See `listing.Listing`."""
        return self.source.doubt

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        """Returns an item; raises OSError with a filename where it or its map cannot be read."""
        path = self._path(index)
        check_size(os.path.getsize(path), path)
        with open(path, "rb") as file:
            return self.source[index]._replace(label_map=file.read())

    def _path(self, index: int) -> str:
        return os.path.join(self.root, f"{os.path.splitext(self.source.names[index])[0]}.png")

    def signature(self) -> str:
        """Of the images: a map has no size of its own to compare."""
        return self.source.signature()

    def files(self) -> list[str]:
        """The files of images and maps."""
        return [*self.source.files(), *map(self._path, range(len(self)))]


def with_maps(source: ImageSource, path: str, split: str) -> MappedImages:
    """The images of a folder with the label maps of `path/split`, PNG files of the same names.

    Raises:
      ValueError: the source is no folder, or there is no such folder of maps, or no map in it.
    """
    if not isinstance(source, ImageFolder):
        raise ValueError(
            "config.conditioning.kind='semantic' needs config.data.source='folder': an image and "
            "its label map have the same name"
        )
    root = find_folder(path, split, "config.conditioning.maps_path")
    found = MappedImages(source, root)
    if not os.path.isfile(found._path(0)):
        raise ValueError(f"{found._path(0)}: not found, expected the label map of the first image")
    return found


@dataclasses.dataclass(frozen=True)
class _Digits(Listing):
    """Images held in memory, `[N, H, W, C]`."""

    images: np.ndarray

    def __getitem__(self, index: int) -> Item:
        name = f"digits {self.names[index]}"
        return Item(self.images[index], int(self.labels[index]), name)

    def signature(self) -> str:
        return source_signature("digits", self, np.full(len(self), self.images[0].nbytes))

    def files(self) -> list[str]:
        """None: the images are scikit-learn's own."""
        return []


def _digits(split: str, path: str) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, uint8 `[8, 8, 1]`.

    Values 0..16 become round(v * 255 / 16). With `order = RandomState(0).permutation(1797)`,
    "train" is order[:1300] and "test" is order[1300:], 497 digits.
    """
    from sklearn.datasets import load_digits

    splits = {"train": slice(1300), "test": slice(1300, None)}
    if path:
        raise ValueError(
            f'digits: found path {path!r}, expected none: is the source "folder" or "archive"?'
        )
    if split not in splits:
        raise ValueError(f"digits: found split {split!r}, expected one of {sorted(splits)}")
    digits = load_digits()
    # RandomState's streams are frozen for good; default_rng's may change between NumPy versions.
    rows = np.random.RandomState(0).permutation(len(digits.target))[splits[split]]
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)[..., None]
    names = Names.pack(f"{split}[{i}]" for i in range(len(rows)))
    return _Digits(tuple("0123456789"), names, digits.target[rows], images)


@dataclasses.dataclass(frozen=True)
class _Tfds:
    examples: Any  # a tfds data source of "image", not decoded, and "label"
    name: str  # as in `open_source`
    split: str
    version: str  # name, configuration and version of the data set, as tfds writes them
    class_names: tuple[str, ...]
    paths: tuple[str, ...]  # of the splits that `split` names

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Item:
        name = f"{self.name} {self.split}[{index}]"
        try:
            example = self.examples[index]
        except RuntimeError as error:  # which ArrayRecord raises where a checksum is wrong
            raise OSError(errno.EIO, f"damaged: {error}", name) from error
        return Item(example["image"], int(example["label"]), name)

    def signature(self) -> str:
        """The version stands for labels and sizes: tfds data sets of one version are the same."""
        names = Names.pack([f"{self.version} {self.split} {len(self)}"])
        none = np.zeros(0, np.int64)
        return source_signature("tfds", Listing(self.class_names, names, none), none)

    def files(self) -> list[str]:
        """See `ImageSource`."""
        return list(self.paths)


def _tfds(name: str, split: str, path: str) -> ImageSource:
    """A TensorFlow Datasets data set in array_record format, downloaded if it is not there yet."""
    import tensorflow_datasets as tfds

    data_set = name.removeprefix("tfds:")
    if not _TFDS_NAME.fullmatch(data_set):
        raise ValueError(
            f"image source: found {name!r}, expected the name of a data set of TensorFlow "
            "Datasets, such as 'tfds:imagenet_v2/matched-frequency:3.0.0'; data sets with a "
            "namespace bring code along, which is not run"
        )
    data_dir = path or str(tfds.core.constants.DATA_DIR)
    _check_tfds_features(data_dir, data_set)
    try:
        builder = tfds.builder(data_set, data_dir=path or None)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"image source: tfds does not know {data_set!r}, and {data_dir} does not hold it"
        ) from error
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise ValueError(f"{name}: found features {features}, expected an image and a class label")
    try:
        builder.download_and_prepare(file_format="array_record")
    # TensorFlow is missing, or, says tfds by AssertionError, the data must be fetched by hand.
    except (ModuleNotFoundError, AssertionError) as error:
        raise ValueError(
            f"{name}: is not prepared in {builder.data_dir}, and preparing it failed: "
            f"{' '.join(str(error).split())} Where TensorFlow is installed, run `tfds build "
            f"{data_set} --file_format=array_record` once and give the resulting data_dir here; or "
            'encode an archive of the images, by config.data.source="archive" (docs/data.md)'
        ) from error
    decoders = {"image": tfds.decode.SkipDecoding()}  # decoding is left to the worker processes
    try:
        examples = builder.as_data_source(split=split, decoders=decoders)
    except ValueError as error:
        splits = sorted(builder.info.splits)
        raise ValueError(f"{name}: found split {split!r}, expected one of {splits}") from error
    named = set(re.findall(r"\w+", split)) & set(builder.info.splits)
    paths = [str(path) for k in sorted(named) for path in builder.info.splits[k].filepaths]
    classes = tuple(features["label"].names)
    return _Tfds(examples, name, split, builder.info.full_name, classes, tuple(paths))


def _check_tfds_features(data_dir: str, data_set: str) -> None:
    """Refuses a prepared data set that has TFDS import a module of the data set's own choice.

    TFDS makes the features that features.json names by importing their modules, and a data set
    below the current folder can hold such a module.
    """
    from etils import epath

    folder = epath.Path(data_dir).expanduser() / re.split("[/:]", data_set)[0]
    for file in itertools.chain(*map(folder.glob, ("*/features.json", "*/*/features.json"))):
        try:
            _check_tfds_classes(read_json(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}: {error}; expected features of TensorFlow Datasets itself: is this data "
                "set from a source you trust?"
            ) from error


def _check_tfds_classes(value: Any) -> None:
    """Raises ValueError where a tree of JSON, or JSON in it as text, names another class."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, list):
        for each in value:
            _check_tfds_classes(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            names_class = key in ("pythonClassName", "python_class_name", "type")
            is_class = names_class and isinstance(each, str) and "." in each
            if is_class and not each.startswith("tensorflow_datasets.core.features."):
                raise ValueError(f"found the class {each!r}, whose module would be imported")
            if "/" in key or "\\" in key:
                raise ValueError(f"found the feature {key!r}, expected a name that is no path")
            _check_tfds_classes(each)
