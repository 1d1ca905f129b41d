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
    """FLOPs of a training step for one image: the backward pass costs twice the forward pass."""
    return 3.0 * forward_flops(config)


def forward_flops(config: ModelConfig) -> float:
    """FLOPs of the transformer's matrix products for one image, 2 per multiply-add."""
    if config.architecture == "blockwise":
        return _blockwise_flops(config)
    width = config.hidden_size
    tokens = (config.latent_size // config.patch_size) ** 2
    patch = config.in_channels * config.patch_size**2
    hidden = int(width * config.mlp_ratio)
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width  # q, k, v, out; scores and values
    block = attention + tokens * 2 * width * hidden + 6 * width**2  # MLP; modulation
    last = tokens * patch * width * (2 if config.learn_sigma else 1) + 2 * width**2
    first = tokens * patch * width + NUM_FREQUENCIES * width + width**2  # patches; time
    return 2.0 * (config.depth * block + first + last)


def _blockwise_flops(config: ModelConfig) -> float:
    """`forward_flops` of the trunk and one stack, with the modulation of every token."""
    width, rank = config.hidden_size, config.adaln_rank
    tokens = (config.latent_size // config.patch_size) ** 2
    patch = config.in_channels * config.patch_size**2
    hidden = int(width * config.mlp_ratio)
    block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width

    def modulation(inputs: int) -> int:  # of one block, for one condition
        return rank * (inputs + 6 * width) if rank else inputs * 6 * width

    trunk = config.depth * (block + modulation(width)) + 6 * width**2
    stack = config.segment_depth * (block + tokens * modulation(2 * width))
    shared = tokens * 2 * width * (6 + 2) * width  # of a stack's blocks, and of the final layer
    ends = 3 * tokens * patch * width + NUM_FREQUENCIES * width + width**2
    return 2.0 * (trunk + stack + shared + ends)
