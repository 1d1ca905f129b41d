"""The memory bank: a first-in first-out queue of negatives, held as sharded state.

Pure functions on a small dataclass. Nothing here knows of models, optimizers or meshes, so
the bank can be carried by anyone's train state.

The features are laid out `[S, B, d]`: S slots, each the whole global batch of one past step. A
step overwrites one slot, which is a `dynamic_update_slice` along an unsharded axis; with the batch
axis sharded as the batch itself is, every device writes its own rows in place and nothing is
communicated. A flat `[S * B, d]` queue gathers the whole bank instead.

Beside its features a row carries twelve bytes of tags: the number of its image, its class and its
noise level. They say which rows are negatives of a sample, and how much each counts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

UNKNOWN = -1  # the id of a row whose image is not known: it is no copy of any sample
EMPTY = -2  # the id of a row that is no negative: never written, or refused by `valid`


class Tags(NamedTuple):
    """What is known of rows beside their features; one shape for all three, [B] or [S, B]."""

    ids: jax.Array  # int32, the number of the image; mirror images share it
    labels: jax.Array  # int32, the class, also where training dropped it
    times: jax.Array  # float32, the noise level t: 0 is noise, 1 is data


def tag(ids: jax.Array, labels: jax.Array | None = None, times: jax.Array | None = None) -> Tags:
    """Tags of rows whose images, and perhaps classes and noise levels, are known.

    Image numbers are not negative: UNKNOWN stands for an image that is not known.
    """
    unknown = unknown_tags(ids.shape)
    return Tags(
        ids.astype(jnp.int32),
        unknown.labels if labels is None else labels.astype(jnp.int32),
        unknown.times if times is None else times.astype(jnp.float32),
    )


def unknown_tags(shape: int | tuple[int, ...], ids: int = UNKNOWN) -> Tags:
    """Tags of rows of which nothing is known."""
    numbers = jnp.full(shape, ids, jnp.int32)
    return Tags(numbers, jnp.full(shape, UNKNOWN, jnp.int32), jnp.zeros(shape, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryBank:
    """Queue of past projections: slot s holds those of one past global batch, row b by row b."""

    features: jax.Array  # [S, B, d]; slots that were never written hold zeros
    tags: Tags  # [S, B]; EMPTY ids where never written
    cursor: jax.Array  # int32 scalar, the slot that the next batch overwrites (the oldest one)
    filled: jax.Array  # int32 scalar, the number of slots written so far, at most S


def create(num_slots: int, batch_size: int, dim: int, dtype: jnp.dtype = jnp.float32) -> MemoryBank:
    """Returns an empty bank of `num_slots * batch_size` rows.

    Raises:
      ValueError: a size is not positive.
    """
    shape = (num_slots, batch_size, dim)
    if min(shape) < 1:
        raise ValueError(f"a memory bank [slots, batch, dim] needs positive sizes, got {shape}")
    return MemoryBank(
        features=jnp.zeros(shape, dtype),
        tags=unknown_tags(shape[:2], EMPTY),
        cursor=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def shardings(mesh: Mesh, batch_axes: str | tuple[str, ...]) -> MemoryBank:
    """Returns where a bank lives on a mesh whose `batch_axes` split the batch.

    The rows of every slot lie where the rows of the batch lie; cursor and count are everywhere.
    """
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    rows: Any = NamedSharding(mesh, PartitionSpec(None, batch_axes))
    return MemoryBank(rows, Tags(rows, rows, rows), everywhere, everywhere)


def enqueue(
    bank: MemoryBank,
    z: jax.Array,
    valid: jax.Array | bool = True,
    *,
    tags: Tags | None = None,
) -> MemoryBank:
    """Overwrites the oldest slot with one global batch of projections.

    Args:
      bank: the queue.
      z: `[B, d]` projections, cast to the bank's dtype; no gradient flows through them.
      valid: bool, a scalar or one for each row, `[B]`. A row that is not valid is written as EMPTY,
        which is no negative. Where no row is valid the bank comes back unchanged; the slot is
        selected here, for a select on the whole bank outside would copy it. A `valid` that depends
        on the loss makes the update wait until the loss has read the bank; without it XLA may copy
        a donated bank to do both at once.
      tags: of the rows, `[B]` each; None where nothing is known of them.

    Raises:
      ValueError: z does not have the shape of a slot.
    """
    num_slots, *slot_shape = bank.features.shape
    if list(z.shape) != slot_shape:
        raise ValueError(f"one slot of this bank is {slot_shape}, the batch is {list(z.shape)}")
    rows = z.shape[0]
    written = tags or unknown_tags(rows)
    slot = jax.lax.stop_gradient((z.astype(bank.features.dtype), written))
    advance = jnp.ones((), jnp.int32)
    if valid is not True:
        valid = jnp.asarray(valid)
        advance = valid.any().astype(jnp.int32)
        if valid.ndim:
            nothing = jnp.zeros_like(slot[0]), unknown_tags(rows, EMPTY)
            slot = jax.tree.map(lambda x, y: _select(valid, x, y), slot, nothing)
        slot = jax.tree.map(
            lambda new, all_slots: jnp.where(
                advance > 0,
                new,
                jax.lax.dynamic_index_in_dim(all_slots, bank.cursor, 0, keepdims=False),
            ),
            slot,
            (bank.features, bank.tags),
        )
    features, all_tags = jax.tree.map(
        lambda all_slots, new: jax.lax.dynamic_update_index_in_dim(all_slots, new, bank.cursor, 0),
        (bank.features, bank.tags),
        slot,
    )
    return MemoryBank(
        features,
        all_tags,
        cursor=(bank.cursor + advance) % num_slots,
        filled=jnp.minimum(bank.filled + advance, num_slots),
    )


def _select(valid: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def reslot(bank: MemoryBank, num_slots: int, batch_size: int) -> MemoryBank:
    """Lays the rows out for another batch size or number of slots, and keeps the newest.

    The rows are one sequence: the slots from the oldest on, each row by row. Of the newest rows, as
    many as make whole new slots are kept, at most `num_slots` of them, in their order; the older
    rest is dropped. So a bank that was full may come back with its last slot unwritten, and the
    next batch fills it.

    Args:
      bank: the queue, `[S, B, d]`.
      num_slots: S' of the queue `[S', B', d]` that is returned.
      batch_size: B'; a size that is not positive is a ValueError.
    """
    empty = create(num_slots, batch_size, bank.features.shape[2], bank.features.dtype)
    num_rows = bank.filled * bank.features.shape[1]
    filled = jnp.minimum(num_rows // batch_size, num_slots)
    oldest = bank.cursor - bank.filled

    def lay_out(old: jax.Array, unwritten: jax.Array) -> jax.Array:
        rows = jnp.roll(old, -oldest, axis=0).reshape(-1, *old.shape[2:])
        # Rows past the newest are those of slots that were never written.
        rows = jnp.concatenate([rows, unwritten.reshape(-1, *old.shape[2:])])
        first = num_rows - filled * batch_size
        kept = jax.lax.dynamic_slice_in_dim(rows, first, num_slots * batch_size)
        return kept.reshape(unwritten.shape)

    features = lay_out(bank.features, empty.features)
    tags = jax.tree.map(lay_out, bank.tags, empty.tags)
    return MemoryBank(features, tags, filled % num_slots, filled)


def saved_layout(saved: MemoryBank, wanted: MemoryBank) -> MemoryBank:
    """Returns what to ask a checkpoint for, so that `lay_out` can make `wanted` of it.

    Where slots, batch size or dtype differ, the saved ones are asked for, with the features split
    over their last axis: `reslot` leaves that axis alone, so no device ever holds the whole bank.
    The tags, 12 bytes a row, are asked for whole on every device.

    Args:
      saved: shapes and dtypes that the checkpoint holds.
      wanted: shapes with shardings.

    Returns:
      Shapes with shardings: `wanted` itself where nothing differs, or where the rows have another
      length, which nothing can translate.
    """
    old: Any = saved.features
    new: Any = wanted.features
    if (old.shape, old.dtype) == (new.shape, new.dtype) or old.shape[2:] != new.shape[2:]:
        return wanted
    num_shards = new.shape[1] // new.sharding.shard_shape(new.shape)[1]
    axes = new.sharding.spec[1] if old.shape[2] % num_shards == 0 else None
    by_feature = NamedSharding(new.sharding.mesh, PartitionSpec(None, None, axes))
    features: Any = jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=by_feature)
    whole = NamedSharding(new.sharding.mesh, PartitionSpec())
    tags: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(old.shape[:2], x.dtype, sharding=whole), wanted.tags
    )
    return dataclasses.replace(wanted, features=features, tags=tags)


def lay_out(bank: MemoryBank, wanted: MemoryBank) -> MemoryBank:
    """Returns the bank with the shape, dtype and shardings of `wanted`; see `reslot`."""
    num_slots, batch_size, _ = wanted.features.shape

    def convert(bank: MemoryBank) -> MemoryBank:
        found = reslot(bank, num_slots, batch_size)
        return dataclasses.replace(found, features=found.features.astype(wanted.features.dtype))

    return jax.jit(convert, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))(bank)


def describe(bank: MemoryBank) -> str:
    """Returns the layout in words, as "3 slots of 16 in float32"."""
    num_slots, batch_size, _ = bank.features.shape
    return f"{num_slots:,} slots of {batch_size:,} in {bank.features.dtype}"
