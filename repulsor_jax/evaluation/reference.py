"""Reference statistics and images from the ADM suite's .npz files, and a cache of computed ones.

The files of openai/guided-diffusion hold `arr_0`, uint8 images `[N, H, W, 3]`, and the reference
ones also `mu`, `sigma` of Inception's pooled features and `mu_s`, `sigma_s` of its spatial ones
(`inception.features`), over the whole data set, of which the images are 10,000. Nothing here ever
unpickles.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import numpy as np
from absl import logging

from repulsor_jax.evaluation.frechet import GaussianStatistics
from repulsor_jax.files import atomic

PathLike = str | os.PathLike[str]

POOL_FEATURES, SPATIAL_FEATURES = 2048, 17 * 17 * 7
_KEYS = {"mu": POOL_FEATURES, "mu_s": SPATIAL_FEATURES}
_IMAGES = "arr_0"
_SKIP = 2**24  # bytes read at a time on the way to an image
_MAX_PIXELS = 2**24  # of one image, 4096 x 4096


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Gaussians of Inception's pooled features, for FID, and of its spatial ones, for sFID.

    The spatial ones are None where the file holds only the others, as pytorch-fid's do.
    """

    pool: GaussianStatistics
    spatial: GaussianStatistics | None


@dataclasses.dataclass(frozen=True)
class ImageArray:
    """The images of an .npz, which are read in batches and never all at once."""

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
        with _reading(self.path) as archive, archive.open(f"{_IMAGES}.npy") as stream:
            _header(self.path, _IMAGES, stream)
            at = 0
            for part in parts:
                if part:
                    self._skip(stream, (part.start - at) * image_bytes)
                    at = part.stop
                data = stream.read(len(part) * image_bytes)
                if len(data) != len(part) * image_bytes:
                    raise ValueError(
                        f"{self.path}: {_IMAGES} ends in image "
                        f"{part.start + len(data) // image_bytes} "
                        f"of {count}: the file is truncated, fetch it anew"
                    )
                yield np.frombuffer(data, np.uint8).reshape(len(part), *image_shape)

    @staticmethod
    def _skip(stream: IO[bytes], size: int) -> None:
        while size and (data := stream.read(min(size, _SKIP))):
            size -= len(data)


def open_images(path: PathLike, *, size: tuple[int, int] | None = None) -> ImageArray:
    """Opens the images `arr_0` of an ADM reference or sample file, ours included.

    Args:
      path: the .npz.
      size: height and width to expect; None takes any.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not an .npz, no `arr_0`, not uint8 RGB or grey images, images of another size, or
        of more than 4096 x 4096 pixels; names the file.
    """
    path = pathlib.Path(path)
    with _reading(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if _IMAGES not in names:
            raise ValueError(
                f"{path}: found {', '.join(names)}, expected images under {_IMAGES}; this file "
                "serves FID and sFID at most, not precision, recall or KID"
            )
        with archive.open(f"{_IMAGES}.npy") as stream:
            shape, fortran, dtype = _header(path, _IMAGES, stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0] or fortran:
        order = ", Fortran order" if fortran else ""
        raise ValueError(
            f"{path}: found {_IMAGES} {dtype} {shape}{order}, expected uint8 [N, H, W, 3 or 1]"
        )
    if min(shape) < 1 or shape[1] * shape[2] > _MAX_PIXELS:
        raise ValueError(
            f"{path}: found images of {shape[1]} x {shape[2]}, expected 1 to {_MAX_PIXELS:,} pixels"
        )
    if size is not None and shape[1:3] != tuple(size):
        raise ValueError(
            f"{path}: found images of {shape[1]} x {shape[2]}, expected {size[0]} x {size[1]}: "
            "take the reference of the resolution that is sampled, as every metric depends on it"
        )
    return ImageArray(path, shape)


def holds_images(path: PathLike) -> bool:
    """Whether an .npz holds images `arr_0`."""
    with _reading(pathlib.Path(path)) as archive:
        return f"{_IMAGES}.npy" in archive.namelist()


def read_statistics(path: PathLike) -> ReferenceStatistics | None:
    """Reads precomputed statistics; None if the file holds images alone, to be computed from.

    A `count` of samples is read where it exists; ADM's files have none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not an .npz, neither statistics nor images, one without its other half, of other
        features than Inception's, or not finite and symmetric; names the file and the key.
    """
    path = pathlib.Path(path)
    with _reading(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not names & {"mu", "sigma", "mu_s", "sigma_s"}:
            if _IMAGES in names:
                return None
            raise ValueError(
                f"{path}: found {', '.join(sorted(names)) or 'nothing'}, expected mu and sigma "
                f"(and mu_s and sigma_s for sFID), or images under {_IMAGES}"
            )
        count = None
        if "count" in names:
            count = int(_array(path, archive, "count", (), "iu", "a whole number"))
        pool = _gaussian(path, archive, names, "mu", "sigma", count)
        spatial = None
        if names & {"mu_s", "sigma_s"}:
            spatial = _gaussian(path, archive, names, "mu_s", "sigma_s", count)
    return ReferenceStatistics(pool, spatial)


def write_statistics(path: PathLike, statistics: ReferenceStatistics) -> None:
    """Writes statistics as `read_statistics` and the ADM suite read them, atomically."""
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    if statistics.pool.count is not None:
        arrays["count"] = np.asarray(statistics.pool.count)
    _write(pathlib.Path(path), arrays)


def read_cache(folder: PathLike, content: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Arrays that `write_cache` kept, by name; None where there are none.

    A damaged file counts as none, with a warning.

    Args:
      folder: of the cache.
      content: all that the arrays follow from, such as the SHA-256 of the reference and of the
        weights, and the count; other content is another file.
    """
    text, path = _cache_file(folder, content)
    if not path.is_file():
        return None
    try:
        with _reading(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            arrays = {name: _array(path, archive, name) for name in names}
        if str(arrays.pop("content")) == text:
            return arrays
        raise ValueError(f"{path}: found other content than {text}")
    except (KeyError, ValueError) as error:
        logging.warning("The cache is computed anew: %s", error)
    return None


def write_cache(folder: PathLike, content: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays, of any names but "content", for `read_cache`.

    Several processes may do the same at once: a file appears complete or not at all.
    """
    text, path = _cache_file(folder, content)
    _write(path, {"content": np.asarray(text), **arrays})


def _cache_file(folder: PathLike, content: Sequence[str]) -> tuple[str, pathlib.Path]:
    text = json.dumps(list(content))
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    return text, pathlib.Path(folder) / name


def _gaussian(
    path: pathlib.Path,
    archive: zipfile.ZipFile,
    names: set[str],
    mean_key: str,
    covariance_key: str,
    count: int | None,
) -> GaussianStatistics:
    dim = _KEYS[mean_key]
    found = []
    for key, shape in ((mean_key, (dim,)), (covariance_key, (dim, dim))):
        if key not in names:
            raise ValueError(
                f"{path}: found {', '.join(sorted(names))}, but no {key}, expected both "
                f"{mean_key} and {covariance_key}"
            )
        array = _array(
            path,
            archive,
            key,
            shape,
            "f",
            f"floats {list(shape)}: statistics of Inception's features",
        )
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {key}: found values that are not finite numbers")
        found.append(array.astype(np.float64))
    mean, covariance = found
    skew = float(np.abs(covariance - covariance.T).max())
    if skew > 1e-5 * np.abs(covariance).max():
        raise ValueError(
            f"{path}: {covariance_key}: found a matrix that differs from its transpose by up to "
            f"{skew:.2g}, expected a covariance"
        )
    return GaussianStatistics(mean, covariance, count)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """The open .npz; whatever is wrong with it becomes a ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: found no such file, expected an .npz of images or statistics; those of the "
            "ADM suite are listed in the evaluations folder of openai/guided-diffusion"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, MemoryError),
        *(NotImplementedError, RuntimeError),  # of methods and flags that zipfile does not know
    ) as error:
        raise ValueError(
            f"{path}: found a file that is not a whole .npz ({error}); fetch it anew"
        ) from error


def _array(
    path: pathlib.Path,
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...] | None = None,
    kinds: str = "",
    expected: str = "",
) -> np.ndarray:
    """Reads one array; another shape or kind (of NumPy's dtypes) than expected is never read."""
    if shape is not None:
        with archive.open(f"{name}.npy") as stream:
            found, _, dtype = _header(path, name, stream)
        if found != shape or dtype.kind not in kinds:
            raise ValueError(f"{path}: {name}: found {dtype} {list(found)}, expected {expected}")
    with archive.open(f"{name}.npy") as stream:
        try:
            return np.lib.format.read_array(stream, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error


def _header(
    path: pathlib.Path, name: str, stream: IO[bytes]
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an .npy stream, which then stands at the data."""
    try:
        if np.lib.format.read_magic(stream) == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(arrays))
