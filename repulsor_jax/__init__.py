"""Latent diffusion transformers trained with a contrastive memory bank, in JAX."""
