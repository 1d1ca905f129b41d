"""How fast training steps are against the chips: images per second and chip, and MFU.

MFU is model FLOPs utilisation (arXiv 2204.02311, appendix B): the FLOPs of the model in closed
form, without recomputed ones and without the regulariser, over the peak of the chips in the same
time.
"""

import dataclasses

import jax

from repulsor_jax.config import ModelConfig
from repulsor_jax.models.dit import NUM_FREQUENCIES
from repulsor_jax.runtime import chips


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The images and FLOPs of a step, and the chips that do it, with FLOP/s of all of them."""

    batch_size: int
    flops: float
    num_chips: float
    peak_flops: float | None  # None if unknown

    def rates(self, seconds_per_step: float) -> dict[str, float]:
        """Rates by name, for the metrics; without `mfu` if the peak is unknown."""
        images_per_second = self.batch_size / seconds_per_step
        rates = {
            "images_per_second": images_per_second,
            "images_per_second_per_chip": images_per_second / self.num_chips,
            "teraflops_per_chip": self.flops / seconds_per_step / self.num_chips / 1e12,
        }
        if self.peak_flops is not None:
            rates["mfu"] = self.flops / seconds_per_step / self.peak_flops
        return rates


def training_throughput(
    model: ModelConfig, batch_size: int, device: jax.Device, num_devices: int
) -> Throughput:
    """Throughput of training steps. The peak is the bfloat16 peak, whatever the model's dtype."""
    step_flops = batch_size * training_flops(model)
    chip = chips.find(device.device_kind)
    if chip is None:
        return Throughput(batch_size, step_flops, num_devices, None)
    num_chips = num_devices / chip.devices_per_chip
    return Throughput(batch_size, step_flops, num_chips, num_chips * chip.peak_flops)


def training_flops(config: ModelConfig) -> float:
    """FLOPs of a training step for one image: the backward pass costs twice the forward pass.

    With a residual network that is of it alone; the frozen trunk is run forward, twice.
    """
    if config.residual_depth:
        trunk = _trunk_flops(config)
        own = config.residual_depth * (_block_flops(config) + 12.0 * config.hidden_size**2)
        return 2.0 * trunk + _ends_flops(config) + 3.0 * own
    return 3.0 * forward_flops(config)


def forward_flops(config: ModelConfig) -> float:
    """FLOPs of the transformer's matrix products for one image, 2 per multiply-add."""
    if config.architecture == "blockwise":
        return _blockwise_flops(config)
    width, patch = config.hidden_size, config.in_channels * config.patch_size**2
    blocks = config.depth * (_block_flops(config) + 12.0 * width**2)  # their modulation
    outputs = patch * (2 if config.learn_sigma else 1)
    last = 2.0 * (_num_tokens(config) * width * outputs + 2 * width**2)
    return blocks + _ends_flops(config) + last


def _blockwise_flops(config: ModelConfig) -> float:
    """`forward_flops` of the trunk and one stack, with the modulation of every token."""
    width, tokens = config.hidden_size, _num_tokens(config)
    own = _block_flops(config) + tokens * _modulation_flops(config, 2 * width)
    shared = 4.0 * tokens * width * (6 + 2) * width  # of a stack's blocks, and of the final layer
    patches = 4.0 * tokens * config.in_channels * config.patch_size**2 * width  # in and out
    return _trunk_flops(config) + config.segment_depth * own + shared + patches


def _trunk_flops(config: ModelConfig) -> float:
    own = _block_flops(config) + _modulation_flops(config, config.hidden_size)
    return config.depth * own + 12.0 * config.hidden_size**2 + _ends_flops(config)


def _ends_flops(config: ModelConfig) -> float:
    """Of the patches, and of the time."""
    width, patch = config.hidden_size, config.in_channels * config.patch_size**2
    return 2.0 * (_num_tokens(config) * patch * width + NUM_FREQUENCIES * width + width**2)


def _block_flops(config: ModelConfig) -> float:
    """Of one block without its modulation: q, k, v, out; scores and values; MLP."""
    width, tokens = config.hidden_size, _num_tokens(config)
    hidden = int(width * config.mlp_ratio)
    return 2.0 * (tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width)


def _modulation_flops(config: ModelConfig, inputs: int) -> float:
    """Of one block's own modulation, for one condition."""
    width, rank = config.hidden_size, config.adaln_rank
    return 2.0 * (rank * (inputs + 6 * width) if rank else inputs * 6 * width)


def _num_tokens(config: ModelConfig) -> int:
    return (config.latent_size // config.patch_size) ** 2
