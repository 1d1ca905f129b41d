"""The memory bank and its losses, for anyone's trainer; each name is imported when first used.

import repulsor_jax as rj

bank = rj.create_bank(num_slots=256, batch_size=32, dim=128)
tags = rj.tag(image_numbers)  # rows of the sample's own image are no negatives
loss = rj.info_nce_loss(z, positives, bank, tags, temperature=0.5)
bank = rj.enqueue(bank, z, tags=tags)
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> its module under `method`, and its name there. A worker process that imports a module of
# the package imports this file too, and must start without jax. Only the head needs flax.
_LAZY = {
    "MemoryBank": ("memory_bank", "MemoryBank"),
    "ProjectionHead": ("head", "ProjectionHead"),
    "bank_shardings": ("memory_bank", "shardings"),
    "create_bank": ("memory_bank", "create"),
    "dispersive_loss": ("dispersive", "dispersive_loss"),
    "enqueue": ("memory_bank", "enqueue"),
    "info_nce_loss": ("repulsion", "info_nce_loss"),
    "l2_normalize": ("repulsion", "l2_normalize"),
    "repulsion_loss": ("repulsion", "repulsion_loss"),
    "tag": ("memory_bank", "tag"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(f"{__name__}.method.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
