"""Groups of tokens that have each a time of their own in training.

"Dual time scheduling" of arXiv 2607.02508: the tokens of an image are split at random into groups
of fixed sizes, and each group is at a time of its own, under one noise. In pixels that is one image
with a map of times.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

TEACHER_TIMES = ("sra", "self_flow", "same")


class TokenGroups(NamedTuple):
    """How the tokens of an image are split in training."""

    counts: tuple[int, ...]  # tokens of each group
    whole_fraction: float  # part of the images that are left whole: all tokens in group 0
    teacher_times: str  # one of `TEACHER_TIMES`


def group_counts(fractions: Sequence[float], num_tokens: int) -> tuple[int, ...]:
    """Whole numbers of tokens in these fractions of them, by the largest remainder.

    Each group has floor(fraction num_tokens) tokens, and those left over go one by one to the
    groups that the floor took most from. `fractions` sum to 1.
    """
    exact = [fraction * num_tokens for fraction in fractions]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: num_tokens - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def draw_groups(key: Array, batch_size: int, spec: TokenGroups) -> Array:
    """Draws the group of each token: [B, N] int32, a random permutation for each image."""
    order_key, whole_key = jax.random.split(key)
    places = jax.random.uniform(order_key, (batch_size, sum(spec.counts))).argsort(axis=1)
    groups, end = jnp.zeros_like(places, jnp.int32), 0
    for count in spec.counts[:-1]:
        end += count
        groups += (places >= end).astype(jnp.int32)
    if spec.whole_fraction:
        whole = jax.random.bernoulli(whole_key, spec.whole_fraction, (batch_size, 1))
        groups = jnp.where(whole, 0, groups)
    return groups


def group_times(drawn: Array, groups: Array) -> Array:
    """Times [B, G] of the groups as drawn; where an image is whole, all are that of group 0."""
    is_whole = (groups == 0).all(axis=1, keepdims=True)
    return jnp.where(is_whole, drawn[:, :1], drawn)


def teacher_group_times(moved: Array, t: Array, rule: str) -> Array:
    """What times the teacher sees the groups at, [B, G].

    Args:
      moved: [B, G], each group's time moved by a draw of its own (`alignment.teacher_time`).
      t: [B, G] times of the student.
      rule: "sra" is `moved`, "self_flow" the cleanest group's t for all, "same" is `t`.
    """
    if rule == "sra":
        return moved
    return jnp.broadcast_to(t.max(axis=1, keepdims=True), t.shape) if rule == "self_flow" else t


def of_tokens(values: Array, groups: Array) -> Array:
    """What each token takes of the values of its group.

    Args:
      values: [B, G, ...], a value for each group.
      groups: [B, N] integers in [0, G), the group of each token.

    Returns:
      [B, N, ...]. It is a choice between G broadcast arrays, which a compiler fuses into what
      reads it, and whose gradient is a sum over the tokens of a group.
    """
    shape = (*groups.shape, *(1,) * (values.ndim - 2))
    found = jnp.broadcast_to(values[:, :1], (*groups.shape, *values.shape[2:]))
    for group in range(1, values.shape[1]):
        is_member = (groups == group).reshape(shape)
        found = jnp.where(is_member, values[:, group : group + 1], found)
    return found


def pixel_times(t: Array, groups: Array | None, size: int) -> Array:
    """Times as a path takes them: t [B] as it is, and those [B, G] of groups by pixel.

    Args:
      t: [B], or [B, G] with groups.
      groups: [B, N], or None.
      size: height and width of the latents, which N tokens tile in rows.

    Returns:
      [B], or [B, size, size].
    """
    if groups is None:
        return t
    side = math.isqrt(groups.shape[1])
    square = of_tokens(t, groups).reshape(-1, side, side)
    return square.repeat(size // side, axis=1).repeat(size // side, axis=2)


def mean_times(t: Array, groups: Array | None) -> Array:
    """One time for each image, [B]: t, or with groups the mean over its tokens."""
    return t if groups is None else of_tokens(t, groups).mean(axis=1)
