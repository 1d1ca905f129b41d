"""Log-sum-exp over rows too many for their logits: value and gradient in one pass over chunks.

The running maximum and sum are those of arXiv 1805.02867. The gradient runs along with them: the
value of a sample depends on its own row of z alone, so its gradient is a weighted sum over the
same rows, and is rescaled as the sum is. Rows are read once, in the forward pass; the backward
pass multiplies the gradient that the forward pass left, an array of the shape of z.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Sums = tuple[Array, Array, Array, Array]  # largest logit, sum of weights, their gradient, count


def online_logsumexp(
    logits: Callable[[Any, Array, Any], tuple[Array, Array]],
    z: Array,
    about: Any,
    rows: Any,
    chunk_slots: int,
) -> tuple[Array, Array]:
    """Log-sum-exp of logits over rows, and how many there are.

    No array of more than `chunk_slots * B * b` elements is made, nor a copy of `rows` in any dtype.
    On a mesh `rows` may be split on B: in the loop every device works on its own rows and nothing
    is communicated; `[b]` sums and the `[b, d]` gradient are reduced once, after it.

    Args:
      logits: `(rows, z [b, d], about) -> (logits, weights)`, both `[..., b]`, the last axis not
        mixing samples. A row of weight 0 has the logit -inf; other weights are only counted.
      z: `[b, d]` float32; differentiable once, in reverse mode.
      about: a tree of arrays `[b, ...]`, what else is known of the samples; no gradient.
      rows: a tree of arrays `[S, B, ...]` in any dtype; no gradient.
      chunk_slots: slots in a chunk, from 1 to S; it need not divide S.

    Returns:
      `[b]` float32, -inf with zero gradient where all weights are 0; and the sum of the weights.
    """
    num_slots, batch_size = jax.tree.leaves(rows)[0].shape[:2]
    groups = _groups(batch_size)

    def value_and_gradient(z: Array, about: Any, rows: Any) -> tuple[tuple[Array, Array], Array]:
        # The queries are gathered once, before the loop.
        queries, tags = jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, *x.shape)), (z, about))

        def add_chunk(sums: Sums, first: Array) -> tuple[Sums, None]:
            largest, total, gradient, count = sums
            # The last chunk begins early enough to be whole; slots that it repeats do not count.
            start = jnp.minimum(first, num_slots - chunk_slots)
            slots = start + jnp.arange(chunk_slots)
            counts = (slots >= first)[:, None, None]
            # The barrier ties the rows to this turn of the loop: without it XLA on CPUs converts
            # the whole of a bfloat16 bank before the loop.
            all_rows, start = jax.lax.optimization_barrier((rows, start))
            chunk = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk_slots).reshape(
                    chunk_slots, groups, -1, *x.shape[2:]
                ),
                all_rows,
            )

            def by_group(z: Array) -> tuple[Array, Array]:  # [groups, slots, rows, b]
                return jax.vmap(logits, in_axes=(1, 0, 0))(chunk, z, tags)

            values, pull_back, rows_weigh = jax.vjp(by_group, queries, has_aux=True)
            values = jnp.where(counts, values, -jnp.inf)
            new_largest = jnp.maximum(largest, values.max(axis=(1, 2)))
            rescale = jnp.exp(largest - new_largest)
            weights = jnp.exp(values - new_largest[:, None, None])
            total = rescale * total + weights.sum(axis=(1, 2))
            gradient = rescale[..., None] * gradient + pull_back(weights)[0]
            count += (counts * rows_weigh).sum(axis=(1, 2), dtype=jnp.float32)
            return (new_largest, total, gradient, count), None

        nothing = (
            jnp.full(queries.shape[:2], jnp.finfo(jnp.float32).min),  # finite: no inf - inf
            jnp.zeros(queries.shape[:2]),
            jnp.zeros(queries.shape),
            jnp.zeros(queries.shape[:2]),
        )
        firsts = jnp.arange(0, num_slots, chunk_slots)
        (largest, total, gradient, count), _ = jax.lax.scan(add_chunk, nothing, firsts)

        overall = largest.max(axis=0)
        rescale = jnp.exp(largest - overall)
        total = (rescale * total).sum(axis=0)
        gradient = (rescale[..., None] * gradient).sum(axis=0)
        found = total > 0
        total = jnp.where(found, total, 1.0)
        value = jnp.where(found, overall + jnp.log(total), -jnp.inf)
        return (value, count.sum(axis=0)), gradient / total[:, None]

    # Everything that is traced is an argument: a closure would fail in the gradient of a jit.
    @jax.custom_vjp
    def value(z: Array, about: Any, rows: Any) -> tuple[Array, Array]:
        return value_and_gradient(z, about, rows)[0]

    value.defvjp(value_and_gradient, lambda gradient, g: (g[0][:, None] * gradient, None, None))
    return value(z, about, rows)


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
