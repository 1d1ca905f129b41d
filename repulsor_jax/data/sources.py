"""Image sources: random access to labelled uint8 images, looked up by name."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np


class ImageSource(Protocol):
    """Labelled images by index; item i is always the same."""

    @property
    def class_names(self) -> Sequence[str]:
        """Label k is `class_names[k]`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns an image, uint8 `[H, W, C]`, and its label."""
        ...


def open_source(name: str, split: str, *, data_dir: str | None = None) -> ImageSource:
    """Opens an image source.

    Args:
      name: "digits", or "tfds:<name>" for a TensorFlow Datasets image classification data set,
        as in "tfds:cifar10".
      split: a split of that source, as in "train".
      data_dir: where TensorFlow Datasets keeps its data sets (its own default if None).

    Raises:
      ValueError: unknown name or split, or a data set without images and labels.
    """
    kind, _, argument = name.partition(":")
    if kind not in _SOURCES:
        raise ValueError(f"image source: found {name!r}, expected one of {sorted(_SOURCES)}")
    return _SOURCES[kind](argument, split, data_dir)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Images held in memory, `[N, H, W, C]`, and labels `[N]`."""

    images: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class _Tfds:
    """A tfds data source of examples with "image" and "label"."""

    examples: Any
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        example = self.examples[index]
        return example["image"], int(example["label"])


def _digits(argument: str, split: str, data_dir: str | None) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, uint8 `[8, 8, 1]`.

    Values 0..16 become round(v * 255 / 16). With `order = RandomState(0).permutation(1797)`,
    "train" is order[:1300] and "test" is order[1300:], 497 digits.
    """
    from sklearn.datasets import load_digits

    splits = {"train": slice(0, 1300), "test": slice(1300, 1797)}
    if argument:
        raise ValueError(f"image source: found 'digits:{argument}', expected 'digits'")
    if split not in splits:
        raise ValueError(f"digits: found split {split!r}, expected one of {sorted(splits)}")
    digits = load_digits()
    # RandomState's streams are frozen for good; default_rng's may change between NumPy versions.
    rows = np.random.RandomState(0).permutation(len(digits.target))[splits[split]]
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)[..., None]
    return _Arrays(images, digits.target[rows], tuple(str(k) for k in range(10)))


def _tfds(argument: str, split: str, data_dir: str | None) -> ImageSource:
    """A TensorFlow Datasets data set in array_record format, downloaded if it is not there yet."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(argument, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"image source: found 'tfds:{argument}', but TensorFlow Datasets does not know "
            f"{argument!r} and data_dir {data_dir} does not hold it"
        ) from error
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise ValueError(
            f"tfds:{argument}: found features {features}, expected an image and a class label"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tfds:{argument}: preparing it failed: {str(error).splitlines()[-1]}. Where "
            f"TensorFlow is installed, run `tfds build {argument} --file_format=array_record` once "
            "and give the resulting data_dir here: reading it does without TensorFlow"
        ) from error
    try:
        examples = builder.as_data_source(split=split)
    except ValueError as error:
        raise ValueError(
            f"tfds:{argument}: found split {split!r}, expected one of {sorted(builder.info.splits)}"
        ) from error
    return _Tfds(examples, tuple(features["label"].names))


_SOURCES: dict[str, Callable[[str, str, str | None], ImageSource]] = {
    "digits": _digits,
    "tfds": _tfds,
}
