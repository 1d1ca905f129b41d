"""NVIDIA's GPUs as XLA's compiler is told of them, so that it compiles for GPUs that are not here.

The figures are those that a card states of itself; the list of the compiler's own project
(openxla.org, `xla/backends/gpu/target_config`) has the same.
"""

import dataclasses
import importlib.util

# The share of a card's memory that JAX takes at its start, and no program exceeds, unless told
# otherwise by XLA_PYTHON_CLIENT_MEM_FRACTION.
MEMORY_SHARE = 0.75
# A flag of XLA: kernels are not tried out on a card, which fails where there is none.
NO_TRIALS = "--xla_gpu_autotune_level=0"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of card."""

    device_kind: str
    capability: int  # its major number
    cores: int  # streaming multiprocessors
    float_units: int  # of one core
    core_memory: int  # shared memory of one core, bytes
    block_memory: int  # that one block of threads may use, bytes
    cache_bytes: int
    memory_bytes: int
    memory_rate: int  # bytes a second
    clock_ghz: float
    per_host: int = 8


GPUS = {
    "a100": Gpu(
        *("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167_936, 166_912, 41_943_040),
        *(85_100_068_864, 2_039_040_000_000, 1.41),
    ),
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", 9, 132, 128, 233_472, 232_448, 52_428_800),
        *(84_942_979_072, 3_352_320_000_000, 1.98),
    ),
    "h200": Gpu(
        *("NVIDIA H200", 9, 132, 128, 233_472, 232_448, 52_428_800),
        *(151_397_597_184, 4_800_000_000_000, 1.98),
    ),
    "b200": Gpu(
        *("NVIDIA B200", 10, 148, 128, 233_472, 232_448, 132_644_864),
        *(191_514_411_008, 7_672_320_000_000, 1.965),
    ),
}


def is_installed() -> bool:
    """Whether the compiler of NVIDIA's GPUs is installed; no driver and no card is needed."""
    return importlib.util.find_spec("jax_cuda12_plugin") is not None


def target_config(gpu: Gpu) -> str:
    """A card as the text of XLA's `GpuTargetConfigProto`."""
    # Of all cards from Ampere on.
    limits = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
    }
    own = {
        "shared_memory_per_core": gpu.core_memory,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.float_units,
        "memory_bandwidth": gpu.memory_rate,
        "l2_cache_size": gpu.cache_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory_bytes,
        "shared_memory_per_block_optin": gpu.block_memory,
    }
    numbers = " ".join(f"{name}: {value}" for name, value in (limits | own).items())
    name = f'"{gpu.device_kind}"'
    return (
        f"gpu_device_info {{ {numbers} cuda_compute_capability {{ major: {gpu.capability} }} "
        f'name: {name} driver_version: "13.0.0" runtime_version: "12.9.0" '
        'compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0" } '
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        f"device_description_str: {name}"
    )
