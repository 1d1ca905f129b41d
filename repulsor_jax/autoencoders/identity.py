"""The autoencoder that does nothing: pixels are the latents."""

import jax


class Identity:
    """Latents `[B, H, W, C]` are the images in [-1, 1]."""

    name = "identity"
    stochastic = False
    scale = 1.0

    def encode(self, images: jax.Array) -> jax.Array:
        """Returns the images."""
        return images

    def decode(self, latents: jax.Array) -> jax.Array:
        """Returns the latents."""
        return latents
