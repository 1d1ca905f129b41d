"""Filling holes: inpainting as latent flow matching does it (arXiv 2307.08698).

    python -m repulsor_jax.main --config=inpaint --workdir=runs/inpaint

takes minutes on 2 CPU cores: `:digits`, the default, is configs/digits.py without its bank, shown
digits with random holes, which fills holes of held-out digits and draws each hole, its filling and
the truth. `:xl_2`, and the other sizes of configs/imagenet256.py, are for latents of 256 x 256
pixels, `:xl_2,image` with encoded masked images, as published, in place of masked latents.

A class-conditional run goes on as one, with the same output at the start:

    cp -r runs/digits runs/filled
    python -m repulsor_jax.main --config=digits --workdir=runs/filled --force \\
        --config.conditioning.kind=inpaint --config.total_steps=4000
"""

import ml_collections

from repulsor_jax.configs import digits, imagenet256


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    """Returns the configuration for digits, or for ImageNet's latents and a model size."""
    size, _, masked = variant.partition(",")
    if masked not in ("", "latent", "image"):
        raise ValueError(
            f"configs/inpaint.py:{variant}: after the size, 'latent' or 'image' is expected"
        )
    if size == "digits":
        c = digits.get_config("none")
        c.sampling.grid_samples = 60
        c.sampling.grid_columns = 12
        c.evaluation.num_samples = 1_988  # each of the 497 held-out digits with four holes
    else:
        c = imagenet256.get_config(f"{size},none")
        c.data.autoencoder = "sd-vae-ft-mse"
        c.data.dir = "data/imagenet256_sd-vae-mse"
        c.optimizer.learning_rate = 5e-5  # LFM's of both tasks
        c.sampling.solver, c.sampling.cfg_channels = "heun", 0
        c.sampling.num_steps = 50
    c.conditioning.kind = "inpaint"
    c.conditioning.masked = masked or "latent"
    if masked == "image":
        c.data.dir += "_masked"
    return c
