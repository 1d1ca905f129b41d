"""How fast steps are: images per second and chip, and the share of the chips' peak (MFU).

MFU is model FLOPs utilisation (arXiv 2204.02311, appendix B): the FLOPs that the model needs,
whatever is computed beside them or again, over what the chips could do in the same time.
"""

import dataclasses

import jax

from repulsor_jax.config import ModelConfig
from repulsor_jax.runtime import chips, flops


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What a step does, on what.

    Attributes:
      batch_size: images in a step.
      flops: the model's FLOPs in a step.
      num_chips: chips at work.
      peak_flops: FLOP/s of all of them; None where it is not known.
    """

    batch_size: int
    flops: float
    num_chips: float
    peak_flops: float | None

    def rates(self, seconds_per_step: float) -> dict[str, float]:
        """Rates by name, for the metrics; without `mfu` where no peak is known."""
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
    """Of training steps. The peak is that of bfloat16, whatever the model computes in."""
    step_flops = batch_size * flops.training_flops(model)
    chip = chips.find(device.device_kind)
    if chip is None:
        return Throughput(batch_size, step_flops, num_devices, None)
    num_chips = num_devices / chip.devices_per_chip
    return Throughput(batch_size, step_flops, num_chips, num_chips * chip.peak_flops)
