"""The contrast of samples with negatives: repulsion (arXiv 2512.08648, our definition) and InfoNCE.

The paper fixes the idea: hidden representations are repelled from a large bank of negatives kept
across iterations. The form of the loss is ours. With logits s_ij = -dist(z_i, n_j) / temperature,
weights w_ij of the negatives and a positive p_i,

    repulsion: l_i = log( sum_j w_ij exp(s_ij) / sum_j w_ij )
    InfoNCE:   l_i = -log( exp(s_i+) / (exp(s_i+) + sum_j w_ij exp(s_ij)) ),  s_i+ of z_i and p_i

where j runs over the other samples of the global batch and every row written to the bank, whose
rows have no gradient. Rows of the sample's own image have weight 0. Needs jax alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from repulsor_jax.method.memory_bank import EMPTY, MemoryBank, Tags, unknown_tags
from repulsor_jax.method.online_logsumexp import online_logsumexp, slots_at_once

Array = jax.Array

DISTANCES = ("squared_l2", "cosine")

# Logits of the bank that one device makes at once: 8 MiB. The loss goes through a larger bank in
# chunks, which is also faster from this size on (`python -m benchmarks.bank`).
MAX_LOGITS = 2**21


class Contrast(NamedTuple):
    """How samples are compared with rows, and how much a row counts as a negative."""

    temperature: float = 0.5  # divides the distances
    distance: str = "squared_l2"  # or "cosine" for 1 - cos
    same_class_weight: float = 1.0  # weight of rows of the sample's class: 0 supervised, 1 blind
    time_window: float = 1.0  # rows whose t is further from the sample's do not count; 1: all do

    def logits(self, rows: Array, z: Array) -> Array:
        """-dist / temperature of rows `[..., d]` to samples `[B, d]`: `[..., B]` float32."""
        return -_distances(rows, z, self.distance) / self.temperature

    def paired_logits(self, rows: Array, z: Array) -> Array:
        """The same of row b to sample b: `[B]` float32."""
        return -paired_distances(z, rows, self.distance) / self.temperature

    def weights(self, rows: Tags, samples: Tags) -> Array:
        """Weights of rows `[...]` as negatives of samples `[B]`: `[..., B]`, bool or float32.

        0 for rows that were never written and for rows of the sample's own image.
        """
        rows = jax.tree.map(lambda x: x[..., None], rows)
        own = (rows.ids == samples.ids) & (samples.ids >= 0)
        counts = ~own & (rows.ids != EMPTY)
        if self.time_window < 1:
            counts &= jnp.abs(rows.times - samples.times) <= self.time_window
        if self.same_class_weight == 1:
            return counts
        same = (rows.labels == samples.labels) & (samples.labels >= 0)
        if self.same_class_weight == 0:
            return counts & ~same
        return jnp.where(same, self.same_class_weight, 1.0) * counts

    def weighted(self, logits: Array, weights: Array) -> Array:
        """Logits that weigh as much in a sum of exponentials as their rows; -inf for weight 0."""
        if weights.dtype == bool:
            return jnp.where(weights, logits, -jnp.inf)
        log_weights = jnp.log(jnp.where(weights > 0, weights, 1.0))
        return jnp.where(weights > 0, logits + log_weights, -jnp.inf)


class Keys(NamedTuple):
    """The rows of the batch itself among the negatives; row b belongs to sample b."""

    features: Array  # [B, d]
    tags: Tags  # [B]


def l2_normalize(x: Array, epsilon: float = 1e-12) -> Array:
    """Scales the last axis to unit Euclidean length; a zero vector stays zero, gradient finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon))


def log_mean_negatives(
    z: Array,
    bank: MemoryBank | None = None,
    tags: Tags | None = None,
    *,
    contrast: Contrast = Contrast(),  # noqa: B008
    keys: Keys | None = None,
    rows_per_sample: int = 1,
    chunk_slots: int | None = None,
) -> tuple[Array, Array]:
    """Log of the weighted mean of exp(logits) over the negatives of each sample, and their count.

    The mean divides by the weight of the negatives that are really there, sample by sample. No
    `[B, K, d]` array is made, and no `[B, K]` array where that is large: then the bank is gone
    through in chunks of slots, with the same result.

    Args:
      z: `[B, d]` projections of the global batch, or of a micro-batch of it.
      bank: negatives of past steps, or None for the batch alone. Its dtype is that of storage; all
        is computed in float32.
      tags: of the samples, `[B]` each; None where nothing is known of them.
      contrast: distance, temperature and weights.
      keys: the rows of the batch that are negatives; None takes z itself, with gradient.
      rows_per_sample: G where rows i G to i G + G - 1 of z are of image i, whatever the tags.
      chunk_slots: slots of the bank to go through at a time. All of them is the direct form, which
        keeps every logit for the backward pass; fewer is the online form, which keeps none and
        can be differentiated once. None takes as many as make `MAX_LOGITS` logits on a device.

    Returns:
      `[B]` float32, zero with zero gradient where there are no negatives; and the sum of weights.

    Raises:
      ValueError: unknown distance, or `chunk_slots` below 1.
    """
    batch_size = z.shape[0]
    z = z.astype(jnp.float32)
    samples = unknown_tags(batch_size) if tags is None else tags
    in_batch = Keys(z, samples) if keys is None else keys

    def logits(rows: Keys, z: Array, samples: Tags) -> tuple[Array, Array]:
        weights = contrast.weights(rows.tags, samples)
        return contrast.weighted(contrast.logits(rows.features, z), weights), weights

    image = jnp.arange(batch_size) // rows_per_sample
    others = image[:, None] != image
    weights = contrast.weights(in_batch.tags, samples) * others
    parts = [contrast.weighted(contrast.logits(in_batch.features, z), weights)]
    count = weights.sum(0, dtype=jnp.float32)
    if bank is not None:
        rows = jax.lax.stop_gradient(Keys(bank.features, bank.tags))
        num_slots = bank.features.shape[0]
        if chunk_slots is None:
            chunk_slots = slots_at_once(bank.features, batch_size, MAX_LOGITS)
        if chunk_slots < 1:
            raise ValueError(f"chunk_slots must be at least 1, got {chunk_slots}")
        if chunk_slots >= num_slots:
            values, weights = logits(rows, z, samples)
            parts.append(values)
            count += weights.sum((0, 1), dtype=jnp.float32)
        else:  # one logit that weighs as much as all of the bank's
            value, found = online_logsumexp(logits, z, samples, rows, chunk_slots)
            parts.append(value[None])
            count += found

    # The maximum is taken over both parts, so that a part without negatives adds an exact zero
    # and no nan to the gradient.
    axes = [tuple(range(part.ndim - 1)) for part in parts]
    maxima = [part.max(over) for part, over in zip(parts, axes, strict=True)]
    largest = functools.reduce(jnp.maximum, maxima)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    sums = [jnp.exp(part - largest).sum(over) for part, over in zip(parts, axes, strict=True)]
    found_any = count > 0
    mean = jnp.where(found_any, sum(sums), 1.0) / jnp.where(found_any, count, 1.0)
    return jnp.where(found_any, largest + jnp.log(mean), 0.0), count


def info_nce(positive_logits: Array, log_mean: Array, count: Array) -> Array:
    """InfoNCE (arXiv 1807.03748, equation 4), sample by sample: `[B]` float32.

    Minus the log of the share of the positive among it and all negatives; 0 where there are none.

    Args:
      positive_logits: `[B]`.
      log_mean, count: `[B]`, of the negatives, from `log_mean_negatives`.
    """
    found_any = count > 0
    log_sum = log_mean + jnp.log(jnp.where(found_any, count, 1.0))
    return jnp.where(found_any, jax.nn.softplus(log_sum - positive_logits), 0.0)


def info_nce_loss(
    z: Array,
    positives: Array,
    bank: MemoryBank | None = None,
    tags: Tags | None = None,
    *,
    temperature: float = 0.5,
    distance: str = "squared_l2",
    chunk_slots: int | None = None,
) -> Array:
    """Mean of `info_nce` with the negatives of `repulsion_loss`; a float32 scalar.

    Args:
      z: `[B, d]` projections.
      positives: `[B, d]`, row b of the image of z's row b.
      bank, tags, temperature, distance, chunk_slots: as in `repulsion_per_sample`.
    """
    contrast = Contrast(temperature, distance)
    log_mean, count = log_mean_negatives(z, bank, tags, contrast=contrast, chunk_slots=chunk_slots)
    return info_nce(contrast.paired_logits(positives, z), log_mean, count).mean()


def repulsion_per_sample(
    z: Array,
    bank: MemoryBank | None = None,
    tags: Tags | None = None,
    *,
    temperature: float = 0.5,
    distance: str = "squared_l2",
    chunk_slots: int | None = None,
) -> Array:
    """Log of the mean repulsion of each sample from its negatives; see `log_mean_negatives`.

    Continuous while the bank fills: the mean divides by the count of negatives really there.

    Returns:
      `[B]` float32; zero, with zero gradient, where there are no negatives (B = 1, empty bank).

    Raises:
      ValueError: unknown distance, or `chunk_slots` below 1.
    """
    contrast = Contrast(temperature, distance)
    return log_mean_negatives(z, bank, tags, contrast=contrast, chunk_slots=chunk_slots)[0]


def repulsion_loss(
    z: Array,
    bank: MemoryBank | None = None,
    tags: Tags | None = None,
    *,
    temperature: float = 0.5,
    distance: str = "squared_l2",
    chunk_slots: int | None = None,
) -> Array:
    """The repulsion loss: mean over samples of `repulsion_per_sample`; a float32 scalar."""
    return repulsion_per_sample(
        z, bank, tags, temperature=temperature, distance=distance, chunk_slots=chunk_slots
    ).mean()


def paired_distances(z: Array, others: Array, distance: str) -> Array:
    """Distance of each row of z `[B, d]` to its partner: `[B]` float32."""
    z, others = z.astype(jnp.float32), others.astype(jnp.float32)
    if distance == "cosine":
        return 1.0 - (l2_normalize(z) * l2_normalize(others)).sum(-1)
    return jnp.square(z - others).sum(-1)


def _distances(negatives: Array, z: Array, distance: str) -> Array:
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
