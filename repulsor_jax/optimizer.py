"""The update rule: AdamW, its learning rate and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from repulsor_jax.config import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to 0 at `total_steps`.

    Step 0 takes the first part of the warm-up, not 0: its batch is not wasted.
    """
    c = config.optimizer

    def schedule(step: Any) -> jax.Array:
        rate = c.learning_rate * jnp.minimum(1.0, (step + 1) / max(c.warmup_steps, 1))
        if c.schedule == "constant":
            return rate
        progress = (step - c.warmup_steps) / (config.total_steps - c.warmup_steps)
        return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))

    return schedule


def build_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with the schedule, after clipping by the global norm where configured.

    Its state has the same structure with and without clipping: a run may go on with the other.
    """
    c = config.optimizer
    adamw = optax.adamw(
        learning_rate(config), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay
    )
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    return optax.chain(clip, adamw)
