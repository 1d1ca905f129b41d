"""Writing what people look at: image grids, sample archives and loss curves, each atomically."""

import contextlib
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

PathLike = str | os.PathLike[str]


def to_uint8(images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Maps images in [-1, 1] to uint8 by clip(127.5 x + 128, 0, 255), truncated, as DiT does.

    Takes NumPy and JAX arrays of any shape, under jit too, and inverts v / 127.5 - 1 exactly.
    """
    return (images.astype("float32") * 127.5 + 128.0).clip(0, 255).astype("uint8")


def save_grid(
    images: np.ndarray,
    path: PathLike,
    *,
    columns: int,
    upscale: int = 1,
    smooth: bool = False,
    column_labels: Sequence[str] | None = None,
) -> None:
    """Writes a PNG of the images, row by row, with a thin white border around each.

    Args:
      images: uint8 `[N, H, W, C]` with C = 1 (grey) or 3 (RGB).
      path: the PNG; it appears complete or not at all.
      columns: images per row; the last row may be short.
      upscale: each pixel becomes `upscale x upscale` pixels.
      smooth: interpolate (bicubic) when upscaling: a person reads small images far better so.
      column_labels: text above each column.

    Raises:
      ValueError: the images are not uint8 `[N, H, W, 1 or 3]`, or there is not one label a column.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"found images {images.dtype} {images.shape}, expected uint8 [N, H, W, 1 or 3]"
        )
    if columns < 1 or upscale < 1 or not len(images):
        raise ValueError(f"found {len(images)} images, {columns=}, {upscale=}, expected 1 or more")
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"found {len(column_labels)} column labels for {columns} columns")
    if smooth:
        images = np.stack([_enlarge(image, upscale) for image in images])
    else:
        images = images.repeat(upscale, axis=1).repeat(upscale, axis=2)
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    border = max(1, min(height, width) // 32)
    # Every cell carries its border on the left and above; the sheet adds the last ones.
    cells = np.full(
        (rows * columns, height + border, width + border, channels), 255, dtype=np.uint8
    )
    cells[:count, border:, border:] = images
    sheet = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * cells.shape[1], columns * cells.shape[2], channels)
    header = 0
    if column_labels is not None:
        size = min(height // 3, 24)
        widest = max(ImageFont.load_default(size).getlength(label) for label in column_labels)
        font = ImageFont.load_default(max(9, min(size, int(size * width / max(widest, 1)))))
        header = math.ceil(max(font.getbbox(label)[3] for label in column_labels)) + 2
    sheet = np.pad(sheet, [(header, border), (0, border), (0, 0)], constant_values=255)
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    if column_labels is not None:
        draw = ImageDraw.Draw(picture)
        for k, label in enumerate(column_labels):
            middle = k * (width + border) + border + width / 2
            draw.text((middle, header - 1), label, fill="black", font=font, anchor="md")
    with _replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    height, width, channels = image.shape
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    picture = picture.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(height * factor, width * factor, channels)


def save_samples(path: PathLike, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes a compressed .npz as ADM's evaluator reads it: arr_0 images, arr_1 labels.

    Args:
      path: the archive; it appears complete or not at all.
      images: uint8 `[N, H, W, C]`.
      labels: `[N]`.

    Raises:
      ValueError: the images are not uint8 `[N, H, W, C]`, or there are not N labels.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"found images {images.dtype} {images.shape} and labels {labels.shape}, "
            "expected uint8 [N, H, W, C] and [N]"
        )
    with _replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images, labels)


def save_loss_curve(
    path: PathLike, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    """Writes a PNG with one panel per curve, one above the other, over training steps.

    Args:
      path: the PNG; it appears complete or not at all.
      curves: name -> (steps, values), of equal lengths; at least one.
    """
    figure = Figure(figsize=(7, 1 + 2 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without pyplot's global state or a display
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (name, (steps, values)) in zip(panels, curves.items(), strict=True):
        axes.plot(steps, values, linewidth=1.2, marker="." if len(steps) < 50 else "")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("training step")
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


@contextlib.contextmanager
def _replacing(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling that takes the place of `path` when the block succeeds."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
