"""A learned source: the normal distribution of x at t = 0, in place of N(0, I).

After CSFM, "Better Source, Better Flow" (arXiv 2602.05951), whose source is a network of the text;
CAR-Flow (arXiv 2509.19300) learns a shift by class. The source learns by the gradient of the flow
loss through x_t and through the target. Needs jax alone; what the network is says
`models.source`.

What the flow loss asks of a source, in one dimension, for data N(m, s^2) and a source N(mu, q^2):
its least value at time t is s^2 q^2 / (t^2 s^2 + (1 - t)^2 q^2), and over all t it is pi s q / 2.
It falls with q, so that a variance that is free collapses without `variance_penalty`; and mu is not
in it: a shift gains only where the network cannot tell the classes, or within a class.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

AXES = ("channels", "width")
_MOST_LOG_VARIANCE = 10.0
_LEAST_NORM = 0.1


class Source(NamedTuple):
    """x at t = 0 is mean + scale noise, with noise N(0, I)."""

    mean: Array  # [B, H, W, C]
    log_variance: Array | None = None  # [B, H, W, C]; None: the variance is 1

    @property
    def scale(self) -> Array | float:
        """The standard deviation, [B, H, W, C] or 1."""
        return 1.0 if self.log_variance is None else jnp.exp(0.5 * self.log_variance)


def sample(source: Source, noise: Array) -> Array:
    """The points at t = 0 that standard normal noise [B, H, W, C] becomes."""
    return source.mean + source.scale * noise


def variance_penalty(log_variance: Array, target_std: float = 1.0) -> Array:
    """-1/2 mean(1 + l - e^l): the part of KL(N(m, e^l) || N(m, 1)) that the variance has.

    Args:
      log_variance: l, any shape; clipped to [-10, 10], as published.
      target_std: s of a KL to N(m, s^2): l - 2 ln s in place of l.

    Returns:
      A float32 scalar, 0 where the variance is s^2 and above it elsewhere.
    """
    clipped = jnp.clip(log_variance.astype(jnp.float32), -_MOST_LOG_VARIANCE, _MOST_LOG_VARIANCE)
    relative = clipped - 2.0 * np.log(target_std)
    return -0.5 * jnp.mean(1.0 + relative - jnp.exp(relative))


def direction_penalty(mean: Array, data: Array, axis: str = "channels") -> Array:
    """Mean squared difference of the directions of a source's means and of the data.

    For vectors of n numbers 2 (1 - cosine) / n, averaged. "channels" compares the C numbers of each
    position, as the paper describes; "width" the W numbers of each row and channel, which is what
    the released code does (it normalises the last axis of [B, C, H, W]).

    A mean shorter than 0.1 is divided by 0.1 and not by its length. The published division has a
    gradient of 1 / length, which is endless for the zero mean that a source starts from.

    Args:
      mean: [B, H, W, C].
      data: [B, H, W, C], no gradient.
      axis: "channels" or "width"; else ValueError.

    Returns:
      A float32 scalar in [0, 4 / n].
    """
    if axis not in AXES:
        raise ValueError(f"axis must be one of {AXES}, got {axis!r}")
    over = -1 if axis == "channels" else -2
    data = jax.lax.stop_gradient(data)
    return jnp.mean(jnp.square(_unit(mean, over, _LEAST_NORM) - _unit(data, over, 1e-12)))


def _unit(x: Array, axis: int, least: float) -> Array:
    x = x.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, least**2))


def normalized_path_energy(
    velocity_fn: Callable[[Array, Array], Array], start: Array, times: np.ndarray
) -> tuple[Array, Array]:
    """How far from straight the Euler paths of a field are: CSFM's NPE, 0 for a straight one.

    | sum_i |v_i|^2 |dt_i| - |x_end - x_0|^2 | / |x_end - x_0|^2.

    Args:
      velocity_fn: (x [B, ...], t []) -> [B, ...].
      start: [B, ...] x at times[0].
      times: [n], the Euler steps go from each to the next.

    Returns:
      The ends [B, ...], and the NPE [B].
    """

    def squared(x: Array) -> Array:
        return jnp.sum(jnp.square(x).reshape(x.shape[0], -1), axis=1)

    def step(
        carry: tuple[Array, Array], at: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        (x, energy), (t, dt) = carry, at
        velocity = velocity_fn(x, t)
        return (x + dt * velocity, energy + jnp.abs(dt) * squared(velocity)), None

    steps = jnp.asarray(times[:-1], jnp.float32), jnp.asarray(np.diff(times), jnp.float32)
    (end, energy), _ = jax.lax.scan(step, (start, jnp.zeros(start.shape[:1])), steps)
    distance = squared(end - start)
    return end, jnp.abs(energy - distance) / distance
