"""The pictures of a bench: read once, kept as one .npz, and those trained on as latents."""

import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from repulsor_jax.data.preprocess import prepare_image
from repulsor_jax.data.sources import open_source
from repulsor_jax.files.atomic import replacing


class Pictures(NamedTuple):
    """Training and held-out pictures, uint8 `[N, H, W, C]`, and their classes, int32 `[N]`."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def load_pictures(path: pathlib.Path, source: str, size: int) -> Pictures:
    """Reads `path`, or makes it of an image source with the splits "train" and "test".

    Args:
      path: the .npz.
      source: "digits", "tfds:<name>", a folder or an archive.
      size: side of the pictures, cropped and resized as for ImageNet.

    Raises:
      ValueError, OSError: of the source; one message that names the file.
    """
    if not path.is_file():
        kind = source if source == "digits" or source.startswith("tfds:") else "archive"
        if pathlib.Path(source).is_dir():
            kind = "folder"
        where = source if kind in ("archive", "folder") else ""
        cache = path.parent / ".archive"
        found: dict[str, Any] = {}
        for split in ("train", "test"):
            items = open_source(kind, split, path=where, cache_dir=cache)
            order = np.random.RandomState(0).permutation(len(items))
            read = (items[i] for i in tqdm(order.tolist(), desc=f"read {split}", unit="image"))
            rows = [(prepare_image(i.image, size, i.name), i.label) for i in read]
            found[split] = np.stack([image for image, _ in rows])
            found[f"{split}_labels"] = np.array([label for _, label in rows], np.int32)
        shutil.rmtree(cache, ignore_errors=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **found)
    with np.load(path) as stored:
        return Pictures(*(stored[name] for name in Pictures._fields))


def write_latents(folder: pathlib.Path, pictures: Pictures, count: int, labelled: bool) -> None:
    """Writes the first `count` training pictures as `train/<class>/<number>.npy`, [C, H, W].

    That is what `--mode=encode` reads from the source "npy"; pixels in [-1, 1].
    """
    shutil.rmtree(folder, ignore_errors=True)
    for i, (picture, label) in enumerate(
        zip(pictures.train[:count], pictures.train_labels[:count], strict=True)
    ):
        file = folder / "train" / (str(label) if labelled else "all") / f"{i:06d}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, to_floats(picture).transpose(2, 0, 1))


def to_floats(pictures: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0
