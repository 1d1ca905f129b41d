"""Writing what people look at: image grids, sample archives and loss curves, each atomically."""

import concurrent.futures
import itertools
import math
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from repulsor_jax.files import atomic
from repulsor_jax.files.untrusted import printable

PathLike = str | os.PathLike[str]


def to_uint8(images: np.ndarray | jax.Array, rounding: str = "dit") -> np.ndarray | jax.Array:
    """Maps NumPy or JAX images in [-1, 1], of any shape, to uint8.

    Rounding "dit" is clip(127.5 x + 128, 0, 255), truncated, as in DiT and SiT; it inverts
    v / 127.5 - 1 exactly. "adm" adds 127.5 instead, as ADM's sampler does: half a level darker on
    average.
    """
    offset = {"dit": 128.0, "adm": 127.5}[rounding]
    return (images.astype("float32") * 127.5 + offset).clip(0, 255).astype("uint8")


def save_grid(
    images: np.ndarray,
    path: PathLike,
    *,
    columns: int,
    upscale: int = 1,
    smooth: bool = False,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Writes a PNG of the images, row by row, with a thin white border around each.

    Args:
      images: uint8 `[N, H, W, C]` with C = 1 (grey) or 3 (RGB).
      path: the PNG.
      columns: images per row; the last row may be short.
      upscale: each pixel becomes `upscale x upscale` pixels.
      smooth: upscale by bicubic interpolation, which lets a person read small images far better.
      column_labels: text above each column.
      captions: text above each image, in place of `column_labels`.

    Raises:
      ValueError: the images are not uint8 `[N, H, W, 1 or 3]`, or there is not one label a column,
        or one caption an image.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"found images {images.dtype} {images.shape}, expected uint8 [N, H, W, 1 or 3]"
        )
    if not len(images):
        raise ValueError("found 0 images, expected 1 or more")
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"found {len(column_labels)} column labels for {columns} columns")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"found {len(captions)} captions for {len(images)} images")
    height, width = (size * upscale for size in images.shape[1:3])
    border = max(1, min(height, width) // 32)
    # PIL measures no text of several lines.
    labels = [printable(x).replace("\n", " ")[:100] for x in captions or column_labels or ()]
    header = 0
    if labels:
        size = min(height // 3, 24)
        widest = max(ImageFont.load_default(size).getlength(label) for label in labels)
        font = ImageFont.load_default(max(9, min(size, int(size * width / max(widest, 1)))))
        header = math.ceil(max(font.getbbox(label)[3] for label in labels)) + 2
    top = 0 if captions else header  # of the sheet; captions have theirs in each row
    across, down = width + border, height + border + header - top
    rows = math.ceil(len(images) / columns)
    mode = "L" if images.shape[-1] == 1 else "RGB"
    sheet = Image.new(mode, (columns * across + border, top + rows * down + border), "white")
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    for k, image in enumerate(images):
        place = (k % columns * across + border, header + k // columns * down + border)
        sheet.paste(_picture(image).resize((width, height), method), place)
    for k, label in enumerate(labels):
        middle = (k % columns * across + border + width / 2, header + k // columns * down - 1)
        ImageDraw.Draw(sheet).text(middle, label, fill="black", font=font, anchor="md")
    with atomic.replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_samples(path: PathLike, images: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Writes a compressed .npz as ADM's evaluator reads it: arr_0 images, arr_1 labels `[N]`.

    The images come in pieces uint8 `[n, H, W, C]`, of which one is in memory at a time.

    Raises ValueError unless all images are uint8 and of one size, and there are N.
    """
    pieces = iter(images)
    first = next(pieces)
    shape = (len(labels), *first.shape[1:])
    count = 0
    with (
        atomic.replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for piece in itertools.chain([first], pieces):
                if piece.dtype != np.uint8 or piece.ndim != 4 or piece.shape[1:] != shape[1:]:
                    found, expected = f"{piece.dtype} {piece.shape}", ["n", *shape[1:]]
                    raise ValueError(f"found images {found}, expected uint8 {expected}")
                file.write(np.ascontiguousarray(piece).data)
                count += len(piece)
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels, allow_pickle=False)
        if labels.shape != (count,):
            raise ValueError(f"found {count} images, labels {labels.shape}, expected equal numbers")


def save_animation(frames: Sequence[np.ndarray], path: PathLike, *, milliseconds: int) -> None:
    """Writes an animated WebP, without loss, of frames uint8 `[H, W, 1 or 3]`; the last stays."""
    pictures = [_picture(frame).convert("RGB") for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [1_500]
    options = {"save_all": True, "duration": durations, "loop": 0, "lossless": True}
    with atomic.replacing(path) as temporary:
        pictures[0].save(temporary, format="WEBP", append_images=pictures[1:], **options)


def save_pngs(folder: PathLike, first: int, images: np.ndarray) -> None:
    """Writes uint8 `[N, H, W, 1 or 3]` as `<folder>/000000.png` and so on, from number `first`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def write(k: int) -> None:
        _picture(images[k]).save(folder / f"{first + k:06d}.png", format="PNG")

    with concurrent.futures.ThreadPoolExecutor() as pool:  # compressing lets go of the interpreter
        list(pool.map(write, range(len(images))))


Curve = tuple[Sequence[float], Sequence[float]]


def save_curves(path: PathLike, panels: Mapping[str, Mapping[str, Curve]], x_label: str) -> None:
    """Writes a PNG with one panel for each quantity, one above the other, over a common axis.

    The panels are quantity -> name of a line -> (x, y); lines named "" have no legend. Panels with
    the same lines share one, above them.
    """
    # Imported here: only some runs draw, and every program would start later.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without pyplot's global state or a display
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    first, *others = panels.values()
    is_shared = any(first) and any(others) and all([*lines] == [*first] for lines in others)
    for panel, (quantity, lines) in zip(axes, panels.items(), strict=True):
        for name, (x, y) in lines.items():
            panel.plot(x, y, linewidth=1.2, marker="." if len(x) < 50 else "", label=name or None)
        panel.set_ylabel(quantity)
        panel.grid(alpha=0.3)
        if any(lines) and not is_shared:
            panel.legend(fontsize="small")
    if is_shared:
        found = axes[0].get_legend_handles_labels()
        figure.legend(*found, loc="outside upper center", ncols=3, fontsize="small")
    axes[-1].set_xlabel(x_label)
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
