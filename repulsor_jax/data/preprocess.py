"""From a file's bytes to a uint8 image of one size, with the errors that name the file.

NumPy and PIL only: worker processes import this module and should start at once.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from repulsor_jax.files.untrusted import refuse_pointer

MAX_PIXELS = 2**28 // 3  # 256 MiB as RGB, and where PIL itself begins to warn
MAX_FILE_BYTES = 2**29  # of an encoded image: as many pixels with 6 bytes each, not compressed

_ORIENTATION = 0x0112  # the number of that EXIF tag
_PNG = b"\x89PNG\r\n\x1a\n"  # how one begins
# PIL also reads formats that run other programs (EPS) or read other files.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class BadImageError(ValueError):
    """An image that cannot be used; the message is "<name>: <problem>"."""


def prepare_image(image: bytes | np.ndarray, size: int, name: str) -> np.ndarray:
    """Decodes an image if need be, and crops it to a square.

    An encoded image becomes RGB as PIL converts it, turned upright by its EXIF orientation and
    with transparent parts over white; of an animation, the first frame. 16-bit greyscale values v
    become round(v / 257); 16-bit colours lose their low byte. Colour profiles are ignored, as the
    published ImageNet pipelines do.

    The crop is that of ADM (arXiv 2105.05233, its code's `center_crop_arr`) and DiT, bit for bit:
    halve with PIL's BOX filter while the shorter side is at least twice `size`, resize with
    BICUBIC so that the shorter side is `size`, cut the centre.

    Returns:
      uint8 `[size, size, C]` (`[H, W, C]` if `size` is 0), with C = 3 if the image was encoded.

    Raises:
      BadImageError: the bytes are not a whole image of a known format, the image, or what it is
        resized to, has more than `MAX_PIXELS` pixels, or the array is not uint8 `[H, W, C]`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
            raise BadImageError(
                f"{name}: found an array of {image.dtype} {image.shape}, expected uint8 [H, W, C]"
            )
        if not size:
            return image
        # PIL filters each band by itself: one band at a time gives the result of any mode.
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(image, 2, 0)]
        return np.stack([_center_crop(band, size, name) for band in bands], axis=-1)
    decoded = _decode(image, name)
    return _center_crop(decoded, size, name) if size else np.array(decoded)


def read_images(
    source: Any, indices: Sequence[int], size: int
) -> tuple[list[np.ndarray | BadImageError], np.ndarray]:
    """Reads and prepares some items of an `ImageSource`, in a worker process.

    Returns:
      For each index the image, uint8 `[H, W, C]`, with its label map, where it has one, as a last
      channel, or the error of a damaged or unreadable one; and the labels, int32 `[B]`, -1 where
      the item was unreadable.
    """
    images: list[np.ndarray | BadImageError] = []
    labels = np.full(len(indices), -1, np.int32)
    for i, index in enumerate(indices):
        try:
            item = source[index]
            labels[i] = item.label
            image = prepare_image(item.image, size, item.name)
            if item.label_map is not None:
                _check_same_frame(item.image, item.label_map, item.name)
                label_map = prepare_map(item.label_map, size, f"map of {item.name}")
                image = np.concatenate([image, label_map[..., None]], axis=-1)
            images.append(image)
        except BadImageError as error:
            images.append(error)
        except OSError as error:
            where = error.filename or f"item {index}"
            images.append(BadImageError(f"{where}: cannot be read: {error.strerror or error}"))
    return images, labels


def _check_same_frame(image: bytes | np.ndarray, label_map: bytes, name: str) -> None:
    """Raises BadImageError unless a label map is as large as its image, which nothing turns."""
    try:
        with Image.open(io.BytesIO(label_map), formats=_FORMATS) as opened:
            found = opened.size
        if isinstance(image, np.ndarray):
            expected, turn = (image.shape[1], image.shape[0]), 1
        else:
            with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
                expected, turn = opened.size, opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # `prepare_image` and `prepare_map` say what is wrong
        return
    if turn != 1:
        raise BadImageError(
            f"{name}: found an EXIF orientation of {turn}, by which the image but not its label "
            "map would be turned: save it upright"
        )
    if found != expected:
        raise BadImageError(
            f"map of {name}: found {found[0]} x {found[1]} pixels, expected the image's "
            f"{expected[0]} x {expected[1]}"
        )


def prepare_map(data: bytes, size: int, name: str) -> np.ndarray:
    """Decodes a label map and crops it to the part that `prepare_image` keeps of its image.

    Of each pixel the nearest value is taken, so that no class appears that was not there.

    Returns:
      uint8 `[size, size]`, or `[H, W]` if `size` is 0.

    Raises:
      BadImageError: the bytes are not a whole image of 8-bit grey values or palette indices.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
        image.load()
    except Exception as error:  # PIL raises many kinds on a damaged header
        raise BadImageError(f"{name}: no label map can be read ({_reason(error)})") from error
    if image.mode not in ("L", "P", "1"):
        raise BadImageError(
            f"{name}: found colour mode {image.mode} (PIL's name), expected one number a pixel, "
            "8-bit grey values or the indices of a palette"
        )
    if not size:
        return np.array(image).astype(np.uint8)
    width, height = image.size
    while min(width, height) >= 2 * size:  # as `_center_crop` rounds
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.NEAREST)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size))).astype(np.uint8)


def _decode(data: bytes, name: str) -> Image.Image:
    """The RGB image in these bytes, upright."""
    try:
        return _decode_whole(data, name)
    except BadImageError:
        # PIL refuses a PNG whose colour profile or texts are large, whatever its pixels are.
        pixels = _without_notes(data)
        if len(pixels) == len(data):
            raise
        return _decode_whole(pixels, name)


def _without_notes(data: bytes) -> bytes:
    """A PNG without the chunks of its colour profile and its texts; other bytes as they are."""
    if not data.startswith(_PNG):
        return data
    kept, place = [_PNG], len(_PNG)
    while place < len(data):
        size, kind = data[place : place + 4], data[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(size, "big")  # the size, the kind, and a CRC at the end
        if kind not in (b"iCCP", b"zTXt", b"iTXt", b"tEXt"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _decode_whole(data: bytes, name: str) -> Image.Image:
    if not data:
        raise BadImageError(f"{name}: the file is empty")
    try:
        refuse_pointer(data[:64], name)
    except ValueError as error:
        raise BadImageError(str(error)) from error
    large = f"refused before decoding, as it has more than {MAX_PIXELS:,} pixels: resize it first"
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{name}: {large} ({error})") from error
    except Exception as error:  # PIL raises many kinds on a damaged header
        raise BadImageError(
            f"{name}: not an image in one of the formats {', '.join(_FORMATS)}, or its header is "
            f"damaged ({_reason(error)}); it begins with {data[:16]!r}"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{name}: {large}, found {image.width} x {image.height}")
    try:
        image.load()
        # After load(), as some formats turn the image themselves then, and drop the tag. In place,
        # so that the image is upright even where its other metadata is damaged.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, name)
    except BadImageError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError and others
        raise BadImageError(
            f"{name}: damaged or cut short, {image.format} decoding failed: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I"):  # 16-bit greyscale, which PIL reads into 32 bits for some files
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            found = f"grey values from {values.min()} to {values.max()}"
            raise BadImageError(f"{name}: found {found}, expected 16 bits: convert it to 8")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode in ("F", "LAB"):
        raise BadImageError(
            f"{name}: found colour mode {mode} (PIL's name): convert it to RGB first"
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return rgb
    return image.convert("RGB")


def _center_crop(image: Image.Image, size: int, name: str) -> np.ndarray:
    """ADM's centre crop of a PIL image, uint8 `[size, size]` or `[size, size, 3]`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise BadImageError(
            f"{name}: {image.width} x {image.height} is too long and narrow, and would become "
            f"{width} x {height}: crop it first"
        )
    if (width, height) != image.size:  # at the same size a resize changes nothing
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))
