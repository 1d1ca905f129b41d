"""The registry of regularisers: what a train step needs to know of one, and which there are.

A new regulariser is one file with its loss, one builder here and one line in `REGULARIZERS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from repulsor_jax import config as config_lib
from repulsor_jax.method import memory_bank, repulsion
from repulsor_jax.method.dispersive import dispersive_loss
from repulsor_jax.method.memory_bank import MemoryBank

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Regularizer:
    """A loss on the hidden tokens of one block, with what it carries from step to step.

    Attributes:
      init: `(key, abstract tokens [B, N, D]) -> params`, boxed with logical axis names; `{}` when
        there is nothing to learn.
      create_bank: `() -> MemoryBank`, or None when there is no memory.
      loss: `(params, tokens [B, N, D], bank) -> (loss scalar, z [B, d] or None)`; z is what the
        bank is fed with.
    """

    init: Callable[[Array, jax.ShapeDtypeStruct], Any]
    create_bank: Callable[[], MemoryBank] | None
    loss: Callable[[Any, Array, MemoryBank | None], tuple[Array, Array | None]]


def build(config: config_lib.Config) -> Regularizer | None:
    """Returns the configured regulariser, or None when it is off ("none", or weight 0).

    Raises:
      ConfigError: unknown name.
    """
    check(config)
    if not config_lib.regularizer_is_on(config):
        return None
    return REGULARIZERS[config.regularizer.name](config)


def check(config: config_lib.Config) -> None:
    """Raises ConfigError unless the configured name is one of `REGULARIZERS`."""
    config_lib.check_choice("regularizer.name", config.regularizer.name, REGULARIZERS)


def weight(config: config_lib.RegularizerConfig, step: Array) -> Array:
    """Lambda at an optimizer step: linear from 0 over `warmup_steps`, then constant; float32."""
    progress = (step.astype(jnp.float32) + 1.0) / max(config.warmup_steps, 1)
    return config.weight * jnp.minimum(progress, 1.0)


def _build_repulsor(config: config_lib.Config) -> Regularizer:
    c = config.regularizer
    head = repulsion.ProjectionHead(c.projection_dim, config.model.hidden_size)

    def init(key: Array, tokens: jax.ShapeDtypeStruct) -> Any:
        pooled = jax.eval_shape(lambda x: repulsion.pool(x, c.pooling), tokens)
        return head.init(key, jnp.zeros(pooled.shape, pooled.dtype))["params"]

    def create_bank() -> MemoryBank:
        num_slots = c.bank_rows // config.batch_size
        dtype = jnp.dtype(c.bank_dtype)
        return memory_bank.create(num_slots, config.batch_size, c.projection_dim, dtype)

    def loss(params: Any, tokens: Array, bank: MemoryBank | None) -> tuple[Array, Array]:
        z: Any = head.apply({"params": params}, repulsion.pool(tokens, c.pooling))
        value = repulsion.repulsion_loss(z, bank, temperature=c.temperature, distance=c.distance)
        return value, z

    return Regularizer(init, create_bank if c.bank_rows else None, loss)


def _build_dispersive(config: config_lib.Config) -> Regularizer:
    c = config.regularizer

    def loss(params: Any, tokens: Array, bank: MemoryBank | None) -> tuple[Array, None]:
        del params, bank
        value = dispersive_loss(
            tokens, variant=c.variant, temperature=c.temperature, margin=c.margin
        )
        return value, None

    return Regularizer(lambda key, tokens: {}, None, loss)


REGULARIZERS: dict[str, Callable[[config_lib.Config], Regularizer | None]] = {
    "none": lambda config: None,
    "dispersive": _build_dispersive,
    "repulsor": _build_repulsor,
}
