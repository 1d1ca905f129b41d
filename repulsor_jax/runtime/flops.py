"""FLOPs of the model in closed form: what model FLOPs utilisation (MFU) is measured by."""

from repulsor_jax.config import ModelConfig
from repulsor_jax.models.dit import NUM_FREQUENCIES


def forward_flops(config: ModelConfig) -> float:
    """FLOPs of the transformer for one image, 2 per multiply-add: matrix products alone."""
    width = config.hidden_size
    tokens = (config.latent_size // config.patch_size) ** 2
    patch = config.in_channels * config.patch_size**2
    hidden = int(width * config.mlp_ratio)
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width  # q, k, v, out; scores and values
    block = attention + tokens * 2 * width * hidden + 6 * width**2  # MLP; modulation
    last = tokens * patch * width * (2 if config.learn_sigma else 1) + 2 * width**2
    first = tokens * patch * width + NUM_FREQUENCIES * width + width**2  # patches; time
    return 2.0 * (config.depth * block + first + last)


def training_flops(config: ModelConfig) -> float:
    """FLOPs of a training step for one image: the backward pass costs twice the forward pass.

    Neither rematerialisation nor the regulariser counts: they are not the model's own work.
    """
    return 3.0 * forward_flops(config)
