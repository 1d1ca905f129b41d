"""Autoencoders: images to latents and back, looked up by name."""

import jax.numpy as jnp

from repulsor_jax.autoencoders.base import PIXELS, Autoencoder
from repulsor_jax.autoencoders.kl import REPOSITORIES, KLConfig, load_kl
from repulsor_jax.autoencoders.slices import decode_in_slices
from repulsor_jax.autoencoders.tiny import CONFIGS, load_tiny

__all__ = [
    "AUTOENCODERS",
    "Autoencoder",
    "decode_in_slices",
    "get_autoencoder",
    "latent_scale",
]

AUTOENCODERS = ("identity", *REPOSITORIES, *CONFIGS)

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def get_autoencoder(
    name: str, *, weights: str = "", dtype: str = "float32", abstract: bool = False
) -> Autoencoder:
    """Returns the autoencoder of that name, with its weights on the default device.

    Args:
      name: "identity", which has no weights; "sd-vae-ft-ema", "sd-vae-ft-mse" and "kl", see
        `kl.load_kl`; the tiny family, see `tiny.load_tiny`.
      weights: a local file or folder, or a Hugging Face repository "org/name"; empty is where the
        weights are published. "kl" has no default.
      dtype: "float32" or "bfloat16", of parameters and of the computation; images and latents are
        float32 in either.
      abstract: shapes in place of parameters, to compile with; of files, only the config.json of
        "kl" is read.

    Raises:
      ValueError: an unknown name or dtype, weights for "identity", none for "kl", or files whose
        content is not the named model's.
      FileNotFoundError: the weights are not where they should be, or cannot be downloaded.
    """
    if name not in AUTOENCODERS:
        raise ValueError(f"autoencoder: found {name!r}, expected one of {', '.join(AUTOENCODERS)}")
    if dtype not in _DTYPES:
        raise ValueError(f"autoencoder dtype: found {dtype!r}, expected {' or '.join(_DTYPES)}")
    if name == "identity":
        if weights:
            raise ValueError(
                f"config.data.autoencoder_weights: found {weights!r}, expected none for 'identity'"
            )
        return PIXELS
    load = load_kl if name in REPOSITORIES else load_tiny
    return load(name, weights, _DTYPES[dtype], abstract=abstract)


def latent_scale(name: str, *, weights: str = "") -> tuple[float, float]:
    """Returns scale and shift of an autoencoder's latents; only "kl" needs its files for them.

    The name "none" stands for latents that no autoencoder here decodes: scale 1, shift 0.

    Raises:
      ValueError, FileNotFoundError: see `get_autoencoder`.
    """
    if name == "kl":
        autoencoder = get_autoencoder(name, weights=weights, abstract=True)
        return autoencoder.scale, autoencoder.shift
    if name not in (*AUTOENCODERS, "none"):
        raise ValueError(
            f"autoencoder: found {name!r}, expected 'none' or one of {', '.join(AUTOENCODERS)}"
        )
    return (KLConfig().scaling_factor if name in REPOSITORIES else 1.0), 0.0
