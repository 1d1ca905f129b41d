"""The weight of a term over training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def weight_schedule(section: Any, total_steps: int) -> Callable[[Array], Array]:
    """Returns lambda by optimizer step, float32, from a term's section.

    It grows linearly from 0 over `warmup_steps`, then is `weight`; from the share `decay_from` of
    training on it falls linearly to 0 at the end; from `stop_step` on it is 0 (0: it never stops).
    """

    def weight(step: Array) -> Array:
        done = step.astype(jnp.float32)
        value = jnp.minimum((done + 1.0) / max(section.warmup_steps, 1), 1.0)
        if section.decay_from < 1:
            value *= jnp.clip((1.0 - done / total_steps) / (1.0 - section.decay_from), 0.0, 1.0)
        if section.stop_step:
            value = jnp.where(step < section.stop_step, value, 0.0)
        return section.weight * value

    return weight
