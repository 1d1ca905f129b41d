"""Images for the encoder job; imports no jax, so that worker processes start at once."""

import dataclasses
import io
import os
import pathlib

import numpy as np
from PIL import Image

from repulsor_jax.data.listing import Item


@dataclasses.dataclass
class Images:
    """Image i has the label i % 3; reading image `fatal` ends the process."""

    images: list[np.ndarray | bytes]
    fatal: int | None = None
    class_names = ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        if index == self.fatal:
            os._exit(9)
        return Item(self.images[index], index % 3, f"image-{index}")

    def signature(self) -> str:
        return "s"


def png(rng: np.random.Generator) -> bytes:
    """A PNG of 13 x 10 random pixels."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (13, 10, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_pictures(root: pathlib.Path) -> pathlib.Path:
    """A folder of train/ with 2 x 11 and test/ with 2 x 5 images, in the classes cat and dog."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 5)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:03d}.png").write_bytes(png(rng))
    return root
