"""Makes a small set of images and label maps: handwritten digits, coloured by class.

    python examples/coloured_digits.py data/coloured_digits

writes <folder>/images/{train,test}/*.png, 16 x 16 RGB, and <folder>/maps of the same names: class 0
is the ground, 1 to 3 are the upper, middle and lower part of the strokes. A picture is not given by
its map: its ground has one of many colours, and its strokes are shaded as the digit is.
"""

import pathlib
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

STROKES = np.array([[0, 0, 0], [230, 70, 60], [70, 200, 90], [80, 120, 240]], np.float64)


def coloured(digit: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [16, 16, 3], and its map, uint8 [16, 16], of a digit [8, 8] in 0 to 16."""
    small = Image.fromarray(np.round(digit * 255 / 16).astype(np.uint8))
    ink = np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 255
    rows = np.flatnonzero((ink > 0.4).any(axis=1))
    thirds = np.arange(16) - rows[0]
    part = 1 + np.clip(3 * thirds // (rows[-1] - rows[0] + 1), 0, 2)
    label_map = np.where(ink > 0.4, part[:, None], 0).astype(np.uint8)
    ground = rng.uniform(0, 110, 3) * np.linspace(0.6, 1, 16)[:, None, None]
    strokes = STROKES[label_map] * (0.35 + 0.65 * ink[..., None])
    pixels = np.where(label_map[..., None] > 0, strokes, np.broadcast_to(ground, (16, 16, 3)))
    return np.round(pixels).astype(np.uint8), label_map


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/coloured_digits.py FOLDER")
    root, digits = pathlib.Path(sys.argv[1]), load_digits().images
    rng = np.random.default_rng(0)
    for k, number in enumerate(np.random.RandomState(0).permutation(len(digits))):
        split = "train" if k < 1300 else "test"
        for kind, pixels in zip(("images", "maps"), coloured(digits[number], rng), strict=True):
            path = root / kind / split / f"{k:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    print(f"{len(digits)} images and maps in {root}")


if __name__ == "__main__":
    main()
