"""Latent diffusion transformers trained with a contrastive memory bank, in JAX."""

__version__ = "0.1.0"
