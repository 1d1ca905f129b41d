"""Reference statistics and images from the ADM suite's .npz files.

The files of openai/guided-diffusion hold `arr_0`, uint8 images `[N, H, W, 3]`, and the reference
ones also `mu`, `sigma` of Inception's pooled features and `mu_s`, `sigma_s` of its spatial ones
(`inception.features`), over the whole data set, of which the images are 10,000. Nothing here ever
unpickles.
"""

import contextlib
import dataclasses
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from repulsor_jax.evaluation.frechet import GaussianStatistics
from repulsor_jax.files.untrusted import array_header, refuse_pointer

PathLike = str | os.PathLike[str]

SUFFIXES = (".npz", ".npy")  # of files that hold arrays, not pictures
_IMAGES = "arr_0"
_SKIP = 2**24  # bytes read at a time on the way to an image
_MAX_PIXELS = 2**24  # of one image, 4096 x 4096


@dataclasses.dataclass(frozen=True)
class ImageArray:
    """The images of an .npz or .npy, which are read in batches and never all at once."""

    path: pathlib.Path
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, parts: Sequence[range]) -> Iterator[np.ndarray]:
        """Yields uint8 `[len(part), H, W, C]` for each of some ascending ranges of images.

        Raises:
          ValueError: the file is damaged; names it.
        """
        count, *image_shape = self.shape
        image_bytes = int(np.prod(image_shape))
        with _image_stream(self.path) as stream:
            array_header(stream, _IMAGES)
            at = 0
            for part in parts:
                to_skip = (part.start - at) * image_bytes if part else 0
                while to_skip and (data := stream.read(min(to_skip, _SKIP))):
                    to_skip -= len(data)
                at = part.stop if part else at
                data = stream.read(len(part) * image_bytes)
                if len(data) != len(part) * image_bytes:
                    image = part.start + len(data) // image_bytes
                    where = f"{_IMAGES} ends in image {image} of {count}"
                    raise ValueError(f"{where}: the file is truncated, fetch it anew")
                yield np.frombuffer(data, np.uint8).reshape(len(part), *image_shape)


def open_images(path: PathLike, *, size: tuple[int, int] | None = None) -> ImageArray:
    """Opens the images `arr_0` of an ADM reference or sample .npz, ours included, or an .npy.

    A `size` is the height and width to expect.

    Raises:
      FileNotFoundError: there is none.
      ValueError: not an .npz or .npy, no `arr_0`, not uint8 RGB or grey images, images of another
        size, or of more than 4096 x 4096 pixels; names the file.
    """
    path = pathlib.Path(path)
    with _image_stream(path) as stream:
        shape, fortran, dtype = array_header(stream, _IMAGES)
        is_images = dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3) and shape[0] > 0
        if not is_images or fortran:
            found = f"{dtype} {shape}{', Fortran order' if fortran else ''}"
            raise ValueError(f"found {_IMAGES} {found}, expected uint8 [N, H, W, 3 or 1]")
        found = f"found images of {shape[1]} x {shape[2]}"
        if min(shape) < 1 or shape[1] * shape[2] > _MAX_PIXELS:
            raise ValueError(f"{found}, expected 1 to {_MAX_PIXELS:,} pixels")
        if size is not None and shape[1:3] != tuple(size):
            raise ValueError(
                f"{found}, expected {size[0]} x {size[1]}: take the reference of the resolution "
                "that is sampled, as every metric depends on it"
            )
    return ImageArray(path, shape)


def holds_images(path: PathLike) -> bool:
    """Whether an .npz holds images `arr_0`; an .npy holds nothing else."""
    if pathlib.Path(path).suffix == ".npy":
        return True
    with _reading(pathlib.Path(path)) as archive:
        return _IMAGES in _names(archive)


def read_statistics(
    path: PathLike,
) -> tuple[GaussianStatistics, GaussianStatistics | None] | None:
    """Reads Gaussians of Inception's pooled features, for FID, and of its spatial ones, for sFID.

    A file without spatial features, as pytorch-fid's, gives None for the second; a file of images
    alone gives None. A `count` of samples is read if the file has it; ADM's files do not.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not an .npz, neither statistics nor images, one without its other half, of other
        features than Inception's, or not finite and symmetric; names the file and the key.
    """
    with _reading(pathlib.Path(path)) as archive:
        names = _names(archive)
        if not {"mu", "sigma", "mu_s", "sigma_s"} & set(names):
            if _IMAGES in names:
                return None
            raise ValueError(
                f"found {', '.join(names) or 'nothing'}, expected mu and sigma (and mu_s and "
                f"sigma_s for sFID), or images under {_IMAGES}"
            )
        has_count, has_spatial = "count" in names, {"mu_s", "sigma_s"} & set(names)
        count = int(_array(archive, "count", (), "iu", "a whole number")) if has_count else None
        pool = _gaussian(archive, "", 2048, count)
        return pool, _gaussian(archive, "_s", 17 * 17 * 7, count) if has_spatial else None


def _gaussian(
    archive: zipfile.ZipFile, suffix: str, dim: int, count: int | None
) -> GaussianStatistics:
    found = []
    for key, shape in ((f"mu{suffix}", (dim,)), (f"sigma{suffix}", (dim, dim))):
        expected = f"floats {list(shape)}: statistics of Inception's features"
        array = _array(archive, key, shape, "f", expected)
        if not np.isfinite(array).all():
            raise ValueError(f"{key}: found values that are not finite numbers")
        found.append(array.astype(np.float64))
    mean, covariance = found
    skew = float(np.abs(covariance - covariance.T).max())
    if skew > 1e-5 * np.abs(covariance).max():
        raise ValueError(
            f"sigma{suffix}: found a matrix that differs from its transpose by up to {skew:.2g}, "
            "expected a covariance"
        )
    return GaussianStatistics(mean, covariance, count)


@contextlib.contextmanager
def _image_stream(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """The .npy of images, alone or in an .npz."""
    if path.suffix == ".npy":
        with _naming_faults(path), path.open("rb") as stream:
            yield stream
        return
    with _reading(path) as archive:
        names = _names(archive)
        if _IMAGES not in names:
            raise ValueError(
                f"found {', '.join(names)}, expected images under {_IMAGES}; this file serves FID "
                "and sFID at most, not precision, recall or KID"
            )
        with archive.open(f"{_IMAGES}.npy") as stream:
            yield stream


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    with _naming_faults(path), zipfile.ZipFile(path) as archive:
        yield archive


@contextlib.contextmanager
def _naming_faults(path: pathlib.Path) -> Iterator[None]:
    """Any fault found in the file becomes a ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: found no such file, expected an .npz of images or statistics; those of the "
            "ADM suite are listed in the evaluations folder of openai/guided-diffusion"
        )
    with path.open("rb") as file:
        refuse_pointer(file.read(64), path)
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, MemoryError),
        *(NotImplementedError, RuntimeError),  # of methods and flags that zipfile does not know
    ) as error:
        raise ValueError(
            f"{path}: found a file that is not a whole {path.suffix or '.npz'} ({error}); fetch it "
            "anew"
        ) from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist()]


def _array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], kinds: str, expected: str
) -> np.ndarray:
    """Reads one array; another shape or kind (of NumPy's dtypes) than expected is never read."""
    if name not in _names(archive):
        raise ValueError(f"found {', '.join(_names(archive))}, but no {name}, expected {expected}")
    with archive.open(f"{name}.npy") as stream:
        found, _, dtype = array_header(stream, name)
    if found != shape or dtype.kind not in kinds:
        raise ValueError(f"{name}: found {dtype} {list(found)}, expected {expected}")
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
