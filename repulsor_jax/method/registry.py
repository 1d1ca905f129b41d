"""The registry of regularisers: what a train step needs to know of one, and which there are.

A new regulariser is one file with its loss, one builder here and one line in `REGULARIZERS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from repulsor_jax.method import memory_bank
from repulsor_jax.method.dispersive import dispersive_loss
from repulsor_jax.method.head import ProjectionHead, pool
from repulsor_jax.method.memory_bank import MemoryBank
from repulsor_jax.method.repulsion import repulsion_loss

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Regularizer:
    """A loss on the hidden tokens [B, N, D] of one block, with its parameters and its memory."""

    # (key, abstract tokens) -> params, boxed with logical axis names; {} with nothing to learn.
    init: Callable[[Array, jax.ShapeDtypeStruct], Any]
    create_bank: Callable[[], MemoryBank] | None  # None without a memory
    # (params, tokens, bank) -> (loss scalar, z [B, d] for the bank or None).
    loss: Callable[[Any, Array, MemoryBank | None], tuple[Array, Array | None]]


def build(config: Any, *, hidden_size: int, batch_size: int) -> Regularizer | None:
    """Returns the configured regulariser, or None when it is off ("none", or weight 0).

    Args:
      config: the section `regularizer` of a configuration; its `name` is one of `REGULARIZERS`.
      hidden_size: D, the width of the tokens.
      batch_size: B, of the global batch.
    """
    builder = REGULARIZERS[config.name]
    if builder is None or config.weight == 0:
        return None
    return builder(config, hidden_size, batch_size)


def weight(config: Any, step: Array) -> Array:
    """Lambda at an optimizer step: linear from 0 over `warmup_steps`, then constant; float32."""
    progress = (step.astype(jnp.float32) + 1.0) / max(config.warmup_steps, 1)
    return config.weight * jnp.minimum(progress, 1.0)


def _build_repulsor(config: Any, hidden_size: int, batch_size: int) -> Regularizer:
    head = ProjectionHead(config.projection_dim, hidden_size)

    def init(key: Array, tokens: jax.ShapeDtypeStruct) -> Any:
        pooled = jax.eval_shape(lambda x: pool(x, config.pooling), tokens)
        return head.init(key, jnp.zeros(pooled.shape, pooled.dtype))["params"]

    def create_bank() -> MemoryBank:
        num_slots = config.bank_rows // batch_size
        dtype = jnp.dtype(config.bank_dtype)
        return memory_bank.create(num_slots, batch_size, config.projection_dim, dtype)

    def loss(params: Any, tokens: Array, bank: MemoryBank | None) -> tuple[Array, Array]:
        z: Any = head.apply({"params": params}, pool(tokens, config.pooling))
        value = repulsion_loss(z, bank, temperature=config.temperature, distance=config.distance)
        return value, z

    return Regularizer(init, create_bank if config.bank_rows else None, loss)


def _build_dispersive(config: Any, hidden_size: int, batch_size: int) -> Regularizer:
    def loss(params: Any, tokens: Array, bank: MemoryBank | None) -> tuple[Array, None]:
        value = dispersive_loss(
            tokens,
            variant=config.variant,
            temperature=config.temperature,
            margin=config.margin,
        )
        return value, None

    return Regularizer(lambda key, tokens: {}, None, loss)


REGULARIZERS: dict[str, Callable[[Any, int, int], Regularizer] | None] = {
    "none": None,
    "dispersive": _build_dispersive,
    "repulsor": _build_repulsor,
}
