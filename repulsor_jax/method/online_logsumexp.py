"""Log-sum-exp over rows too many for their logits: value and gradient in one pass over chunks.

The running maximum and sum are those of arXiv 1805.02867. The gradient runs along with them: the
value of a sample depends on its own row of z alone, so its gradient is a weighted sum over the
same rows, and is rescaled as the sum is. Rows are read once, in the forward pass; the backward
pass multiplies the gradient that the forward pass left, an array of the shape of z.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Sums = tuple[Array, Array, Array]  # largest logit, sum of weights, their gradient


def online_logsumexp(
    logits: Callable[[Array, Array], Array],
    z: Array,
    rows: Array,
    num_valid: Array,
    chunk_slots: int,
) -> Array:
    """Log-sum-exp of logits over the rows of the first `num_valid` slots.

    No array of more than `chunk_slots * B * b` elements is made, nor a copy of `rows` in any dtype.
    On a mesh `rows` may be split on B: in the loop every device works on its own rows and nothing
    is communicated; `[b]` maxima and sums and the `[b, d]` gradient are reduced once, after it.

    Args:
      logits: `(rows [..., d], z [b, d]) -> [..., b]` float32, the last axis not mixing samples.
      z: `[b, d]` float32; differentiable once, in reverse mode.
      rows: `[S, B, d]` in any dtype; no gradient.
      num_valid: int32 scalar, at most S.
      chunk_slots: slots in a chunk, from 1 to S; it need not divide S.

    Returns:
      `[b]` float32; -inf, with zero gradient, where `num_valid` is 0.
    """
    num_slots, batch_size, dim = rows.shape
    groups = _groups(batch_size)

    def value_and_gradient(z: Array) -> tuple[Array, Array]:
        queries = jnp.broadcast_to(z, (groups, *z.shape))  # gathered once, before the loop

        def add_chunk(sums: Sums, first: Array) -> tuple[Sums, None]:
            largest, total, gradient = sums
            # The last chunk begins early enough to be whole; slots that it repeats do not count.
            start = jnp.minimum(first, num_slots - chunk_slots)
            slots = start + jnp.arange(chunk_slots)
            counts = (slots >= first) & (slots < num_valid)
            # The barrier ties the rows to this turn of the loop: without it XLA on CPUs converts
            # the whole of a bfloat16 bank before the loop.
            all_rows, start = jax.lax.optimization_barrier((rows, start))
            chunk = jax.lax.dynamic_slice_in_dim(all_rows, start, chunk_slots)
            chunk = chunk.reshape(chunk_slots, groups, -1, dim)

            by_group = functools.partial(jax.vmap(logits, in_axes=(1, 0)), chunk)
            values, pull_back = jax.vjp(by_group, queries)  # [groups, slots, rows, b]
            values = jnp.where(counts[:, None, None], values, -jnp.inf)
            new_largest = jnp.maximum(largest, values.max(axis=(1, 2)))
            rescale = jnp.exp(largest - new_largest)
            weights = jnp.exp(values - new_largest[:, None, None])
            total = rescale * total + weights.sum(axis=(1, 2))
            gradient = rescale[..., None] * gradient + pull_back(weights)[0]
            return (new_largest, total, gradient), None

        nothing = (
            jnp.full(queries.shape[:2], jnp.finfo(jnp.float32).min),  # finite: no inf - inf
            jnp.zeros(queries.shape[:2]),
            jnp.zeros(queries.shape),
        )
        firsts = jnp.arange(0, num_slots, chunk_slots)
        (largest, total, gradient), _ = jax.lax.scan(add_chunk, nothing, firsts)

        overall = largest.max(axis=0)
        rescale = jnp.exp(largest - overall)
        total = (rescale * total).sum(axis=0)
        gradient = (rescale[..., None] * gradient).sum(axis=0)
        total = jnp.where(num_valid > 0, total, 1.0)
        value = jnp.where(num_valid > 0, overall + jnp.log(total), -jnp.inf)
        return value, gradient / total[:, None]

    @jax.custom_vjp
    def value(z: Array) -> Array:
        return value_and_gradient(z)[0]

    value.defvjp(value_and_gradient, lambda gradient, g: (g[:, None] * gradient,))
    return value(z)


def slots_at_once(rows: Array, num_samples: int, max_logits: int) -> int:
    """Slots of `rows` `[S, B, d]` whose logits are `max_logits` a device: at least 1, at most S."""
    num_slots, batch_size, _ = rows.shape
    logits_per_slot = batch_size // _groups(batch_size) * num_samples
    return min(max(max_logits // logits_per_slot, 1), num_slots)


def _groups(batch_size: int) -> int:
    """Groups of rows whose sums are kept apart: a multiple of the pieces a mesh cuts a batch into.

    The rows of a group then lie on one device, and summing them communicates nothing. The axes of
    the mesh that split the batch are not known here, but the number of pieces divides both B and
    the number of devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.gcd(batch_size, jax.device_count() if mesh.empty else mesh.size)
