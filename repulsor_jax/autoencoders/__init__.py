"""Autoencoders: images to latents and back, looked up by name."""

from collections.abc import Callable
from typing import Protocol

import jax

from repulsor_jax.autoencoders.identity import Identity


class Autoencoder(Protocol):
    """What encoding, sampling and evaluation need of an autoencoder.

    `encode` and `decode` are pure and can be jitted.

    Attributes:
      name: the name `get_autoencoder` knows it by.
      stochastic: `encode` returns the posterior's mean and log-variance, concatenated on the last
        axis, `[B, h, w, 2c]`, rather than latents `[B, h, w, c]`.
      scale: fixed factor that brings latents to about unit variance (0.18215 for the SD-VAE).
    """

    name: str
    stochastic: bool
    scale: float

    def encode(self, images: jax.Array) -> jax.Array:
        """Maps float32 images `[B, H, W, C]` in [-1, 1] to latents or moments."""
        ...

    def decode(self, latents: jax.Array) -> jax.Array:
        """Maps latents `[B, h, w, c]`, not scaled, to images `[B, H, W, C]` in [-1, 1]."""
        ...


_AUTOENCODERS: dict[str, Callable[[], Autoencoder]] = {"identity": Identity}


def get_autoencoder(name: str) -> Autoencoder:
    """Returns the autoencoder of that name, or raises ValueError listing the known ones."""
    if name not in _AUTOENCODERS:
        raise ValueError(f"autoencoder: found {name!r}, expected one of {sorted(_AUTOENCODERS)}")
    return _AUTOENCODERS[name]()
