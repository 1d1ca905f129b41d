"""Features that a user has stored for the training images: one .npy, read row by row.

Row i is of image i of the data set's train/, as an encoder's tokens: [num_images, N, P] of float16
or float32, N the tokens of the network in rows. The file is mapped into memory, never read whole.
"""

import numpy as np

from repulsor_jax.data.latents import LatentDataset


def open_features(path: str, num_tokens: int, width: int) -> np.ndarray:
    """Maps the features of `path` into memory: [num_images, num_tokens, width].

    Raises:
      FileNotFoundError, ValueError: one line that names the file, what was found and expected.
    """
    expected = f"[images, {num_tokens}, {width}] of float16 or float32"
    key = f"config.data.features={path!r}"
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: no such file; expected an .npy of {expected}") from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{key}: expected an .npy of {expected} ({error})") from error
    is_array = isinstance(found, np.ndarray)
    if not is_array or found.dtype not in (np.float16, np.float32) or not found.flags.c_contiguous:
        what = f"{found.dtype}" if is_array else "several arrays"
        raise ValueError(f"{key}: found {what}, expected an .npy of {expected}, in C order")
    if found.shape[1:] != (num_tokens, width):
        raise ValueError(
            f"{key}: found the shape {list(found.shape)}, expected {expected}: the tokens of "
            "config.model, and config.feature_alignment.dim"
        )
    return found


def check_rows(features: np.ndarray, path: str, dataset: LatentDataset) -> None:
    """Raises ValueError unless the features have a row for each image of the data set."""
    if dataset.flipped:
        raise ValueError(
            f"config.data.features={path!r}: {dataset.directory} holds mirror images too, of which "
            "the file has no rows: encode without config.data.flips"
        )
    if len(features) != dataset.num_images:
        raise ValueError(
            f"config.data.features={path!r}: found {len(features):,} rows, expected one for each "
            f"of the {dataset.num_images:,} images of {dataset.directory}, in its order"
        )
