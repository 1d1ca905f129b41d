"""CIFAR-10, class-conditional, in pixels: an S-sized model.

    python -m repulsor_jax.main --config=configs/cifar10.py --workdir=runs/cifar --mode=encode \\
        --config.data.source=archive --config.data.source_path=cifar10.tar.xz
    python -m repulsor_jax.main --config=configs/cifar10.py --workdir=runs/cifar

Encoding takes 20 seconds on 2 CPU cores (3,836 images/s). It was not trained to the end: no
accelerator was available, and no number is claimed.

`--config.data.source_path=` is the folder, or with `--config.data.source=archive` the .tar or .zip,
of `train/<class>/*` and `test/<class>/*` images. With an autoencoder (`configs/cifar10.py:taef2`)
latents are 4x4x32: quick to train on a CPU, and no more than a check of the whole chain, as 32x32
pixels are far from what the autoencoder was made for.
"""

import ml_collections

from repulsor_jax.configs import default
from repulsor_jax.models.dit import DIT_SIZES


def get_config(autoencoder: str = "identity") -> ml_collections.ConfigDict:
    """Returns the configuration in pixels ("identity") or in latents of "taef2"."""
    if autoencoder not in ("identity", "taef2"):
        raise ValueError(f"configs/cifar10.py:{autoencoder}: expected identity or taef2")
    c = default.get_config()
    for field, value in DIT_SIZES["S"].items():
        c.model[field] = value
    pixels = autoencoder == "identity"
    c.model.latent_size = 32 if pixels else 4
    c.model.in_channels = 3 if pixels else 32
    c.model.patch_size = 2 if pixels else 1
    c.model.num_classes = 10

    c.data.source = "folder"
    c.data.image_size = 32
    c.data.flips = True
    c.data.autoencoder = autoencoder
    c.data.normalization = "scale" if pixels else "statistics"
    c.data.encode_batch_per_device = 256

    c.sampling.grid_samples = 100
    c.sampling.grid_columns = 10
    c.sampling.num_samples = 100
    c.sampling.batch_size = 200
    return c
