"""The repulsion loss (the method of arXiv 2512.08648, our definition).

The paper fixes the idea: hidden representations are repelled from a large bank of negatives kept
across iterations. The form of the loss is ours:

    l_i = log( mean_{j in Neg(i)} exp( -dist(z_i, n_j) / temperature ) ),   L_rep = mean_i l_i

where Neg(i) are the other samples of the global batch (with gradient) and every row written to the
bank (without). Needs jax alone.
"""

import functools

import jax
import jax.numpy as jnp

from repulsor_jax.method import memory_bank
from repulsor_jax.method.online_logsumexp import online_logsumexp, slots_at_once

DISTANCES = ("squared_l2", "cosine")

# Logits of the bank that one device makes at once: 8 MiB. The loss goes through a larger bank in
# chunks, which is also faster from this size on (`python -m benchmarks.bank`).
MAX_LOGITS = 2**21


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Scales the last axis to unit Euclidean length; a zero vector stays zero, gradient finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon))


def repulsion_per_sample(
    z: jax.Array,
    bank: memory_bank.MemoryBank | None = None,
    *,
    temperature: float = 0.5,
    distance: str = "squared_l2",
    chunk_slots: int | None = None,
) -> jax.Array:
    """Log of the mean repulsion of each sample from its negatives.

    The mean divides by the count of negatives that are really there (B - 1 of the batch plus the
    filled rows of the bank), so that the loss is continuous while the bank fills. No `[B, K, d]`
    array is made, and no `[B, K]` array where that is large: then the bank is gone through in
    chunks of slots, with the same result.

    Args:
      z: `[B, d]` projections of the global batch, or of a micro-batch of it.
      bank: negatives of past steps, or None for the batch alone. Its dtype is that of storage; all
        is computed in float32.
      temperature: divides the distances.
      distance: "squared_l2", or "cosine" for 1 - cos.
      chunk_slots: slots of the bank to go through at a time. All of them is the direct form, which
        keeps every logit for the backward pass; fewer is the online form, which keeps none and
        can be differentiated once. None takes as many as make `MAX_LOGITS` logits on a device.

    Returns:
      `[B]` float32; zero, with zero gradient, where there are no negatives (B = 1, empty bank).

    Raises:
      ValueError: unknown distance, or `chunk_slots` below 1.
    """
    batch_size = z.shape[0]
    z = z.astype(jnp.float32)

    def logits(negatives: jax.Array, z: jax.Array) -> jax.Array:
        return -_distances(negatives, z, distance) / temperature

    others = ~jnp.eye(batch_size, dtype=bool)
    parts = [jnp.where(others, logits(z, z), -jnp.inf)]
    count = jnp.asarray(batch_size - 1, jnp.float32)
    if bank is not None:
        features, filled = memory_bank.negatives(bank)
        count += bank.filled.astype(jnp.float32) * features.shape[1]
        if chunk_slots is None:
            chunk_slots = slots_at_once(features, batch_size, MAX_LOGITS)
        if chunk_slots < 1:
            raise ValueError(f"chunk_slots must be at least 1, got {chunk_slots}")
        if chunk_slots >= features.shape[0]:
            parts.append(jnp.where(filled[:, None, None], logits(features, z), -jnp.inf))
        else:  # one logit that weighs as much as all of the bank's
            parts.append(online_logsumexp(logits, z, features, bank.filled, chunk_slots)[None])

    # The maximum is taken over both parts, so that a part without negatives adds an exact zero
    # and no nan to the gradient.
    axes = [tuple(range(part.ndim - 1)) for part in parts]
    maxima = [part.max(over) for part, over in zip(parts, axes, strict=True)]
    largest = functools.reduce(jnp.maximum, maxima)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    sums = [jnp.exp(part - largest).sum(over) for part, over in zip(parts, axes, strict=True)]
    has_negatives = count > 0
    mean = jnp.where(has_negatives, sum(sums), 1.0) / jnp.maximum(count, 1.0)
    return jnp.where(has_negatives, largest + jnp.log(mean), 0.0)


def repulsion_loss(
    z: jax.Array,
    bank: memory_bank.MemoryBank | None = None,
    *,
    temperature: float = 0.5,
    distance: str = "squared_l2",
    chunk_slots: int | None = None,
) -> jax.Array:
    """The repulsion loss: mean over samples of `repulsion_per_sample`; a float32 scalar."""
    return repulsion_per_sample(
        z, bank, temperature=temperature, distance=distance, chunk_slots=chunk_slots
    ).mean()


def _distances(negatives: jax.Array, z: jax.Array, distance: str) -> jax.Array:
    """Distances of negatives `[..., d]` to samples z `[B, d]`: `[..., B]` float32.

    By inner products alone, so that no `[..., B, d]` array is made. The samples come last: that is
    the order in which the large operand is read as it lies in memory.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {DISTANCES}, got {distance!r}")
    negatives = negatives.astype(jnp.float32)
    if distance == "cosine":
        negatives, z = l2_normalize(negatives), l2_normalize(z)
    dots = jnp.einsum("...d,bd->...b", negatives, z, precision=jax.lax.Precision.HIGHEST)
    if distance == "cosine":
        return 1.0 - dots
    lengths = jnp.sum(negatives * negatives, axis=-1, keepdims=True)
    return jnp.maximum(lengths + jnp.sum(z * z, axis=-1) - 2.0 * dots, 0.0)
