"""Published figures of accelerators: peak compute, memory, link rates. All figures are per chip.

Sources: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x} for TPUs, NVIDIA's data sheets for
GPUs (dense rates, without sparsity) and its DGX hosts (network). A figure without a source is None.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip."""

    name: str  # as "v5e"
    device_kinds: tuple[str, ...]  # its values of `jax.Device.device_kind`
    peak_flops: float  # dense bfloat16 FLOP/s, 2 per multiply-add
    hbm_bytes: int
    hbm_bytes_per_second: float
    # Of one link to a neighbour, in one direction; a GPU's NVLinks count as one link.
    link_bytes_per_second: float | None = None
    dcn_bytes_per_second: float | None = None  # its share of its host's network, one direction
    devices_per_chip: int = 1  # JAX devices that stand for one chip


CHIPS = (
    # TPUs. A link's rate is the page's bidirectional rate per chip / ports / 2. The page of
    # v4 has only the all-reduce rate of a pod: 1.1 PB/s / 4,096 chips / 6 links.
    Chip("v3", ("TPU v3",), 123e12, 32 * GIB, 900e9, devices_per_chip=2),
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1200e9, 45e9),
    # 2 NICs of 100 Gbit/s for 8 chips.
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 50e9, 3.125e9),
    # 50 Gbit/s of network per chip.
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 100e9, 6.25e9),
    # 25.6 Tbit/s of network for a pod of 256.
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 100e9, 12.5e9),
    # 100 Gbit/s of network per chip.
    Chip("tpu7x", ("TPU7x",), 2307e12, 192 * GIB, 7380e9, 100e9, 12.5e9, devices_per_chip=2),
    # GPUs. NVLink: the data sheet's rate in both directions / 2. Network: a port a GPU, of 200 (DGX
    # A100) and 400 Gbit/s (DGX H100, H200, B200).
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * GIB, 1555e9, 300e9, 25e9),
    Chip("a100-80gb", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * GIB, 2039e9, 300e9, 25e9),
    Chip("a100-pcie", ("NVIDIA A100-PCIE-40GB",), 312e12, 40 * GIB, 1555e9),
    Chip("a100-pcie-80gb", ("NVIDIA A100 80GB PCIe",), 312e12, 80 * GIB, 1935e9),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3350e9, 450e9, 50e9),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80 * GIB, 2000e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 141 * 10**9, 4800e9, 450e9, 50e9),
    Chip("b200", ("NVIDIA B200",), 2250e12, 180 * 10**9, 8000e9, 900e9, 50e9),
    Chip("l4", ("NVIDIA L4",), 121e12, 24 * GIB, 300e9),
)


def find(device_kind: str) -> Chip | None:
    """The chip with this `jax.Device.device_kind`; None for an unknown kind, as a CPU's."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)
