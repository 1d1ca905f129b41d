"""The memory bank and its losses, for anyone's trainer; each name is imported when first used.

    import repulsor_jax as rj

    bank = rj.create_bank(num_slots=256, batch_size=32, dim=128)
    loss = rj.repulsion_loss(z, bank, temperature=0.5)
    bank = rj.enqueue(bank, z)

Only `ProjectionHead` needs flax. Everything else of the package is reached by its module.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repulsor_jax.method.dispersive import dispersive_loss
    from repulsor_jax.method.head import ProjectionHead
    from repulsor_jax.method.memory_bank import MemoryBank, enqueue
    from repulsor_jax.method.memory_bank import create as create_bank
    from repulsor_jax.method.memory_bank import shardings as bank_shardings
    from repulsor_jax.method.repulsion import repulsion_loss

__version__ = "0.1.0"
__all__ = [
    "MemoryBank",
    "ProjectionHead",
    "bank_shardings",
    "create_bank",
    "dispersive_loss",
    "enqueue",
    "repulsion_loss",
]

# Name -> its module under `method`, and its name there. A worker process that imports a module of
# the package imports this file too: it must start without jax.
_LAZY = {
    "MemoryBank": ("memory_bank", "MemoryBank"),
    "ProjectionHead": ("head", "ProjectionHead"),
    "bank_shardings": ("memory_bank", "shardings"),
    "create_bank": ("memory_bank", "create"),
    "dispersive_loss": ("dispersive", "dispersive_loss"),
    "enqueue": ("memory_bank", "enqueue"),
    "repulsion_loss": ("repulsion", "repulsion_loss"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(f"{__name__}.method.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
