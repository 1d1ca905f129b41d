"""A term: what a train step needs to know of one loss that is added to the flow loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial

from repulsor_jax.method.memory_bank import MemoryBank, Tags
from repulsor_jax.method.repulsion import Contrast, Keys

Array = jax.Array


class View(NamedTuple):
    """What the EMA teacher is shown of the same images: at min(1, t + time_gap u), u in [0, 1)."""

    time_gap: float
    new_noise: bool  # noise of its own, or that of the student
    true_labels: bool = False  # labels before label dropout, or those of the student
    min_crop: float = 1.0  # below 1: random crops, see `random_crops`


def _call(fn: Callable[..., Any], params: Any, *rows: Any) -> Any:
    return fn(params, *rows)


class Seen(NamedTuple):
    """What the terms may read of one micro-batch of b rows; made once for all of them."""

    data: Array  # [b, H, W, C] clean latents, as the model sees them
    t: Array  # [b] times of the student, of groups of tokens the mean over tokens
    tags: Tags  # [b] image numbers, classes before label dropout, times of the student
    output: Array  # [b, H, W, C] of the student, with gradient
    tokens: Mapping[int, Array]  # block -> [b, N, D] of the student, with gradient
    teacher: Mapping[View, tuple[Array, Mapping[int, Array]]]  # view -> its t [b], tokens by block
    drawn: Any  # the term's own `draw`, [b, ...]
    features: Array | None = None  # [b, N, P] of an encoder, where they are stored
    # (fn, params, *rows) -> fn(params, *rows), where rows and results are [b, ...] and no row sees
    # another. Heads are applied by it, for `mesh.reduce_dtype` and `mesh.fsdp` to reach them.
    on_rows: Callable[..., Any] = Partial(_call)  # a pytree, as all that is seen


class Rows(NamedTuple):
    """What a term puts into the bank."""

    features: Array  # [b, d], or [b, G, d] with G rows an image
    times: Array  # [b]


class Compared(NamedTuple):
    """What a contrast compares, one row per projection; G rows an image, one after the other."""

    contrast: Contrast
    rows_per_image: int  # G
    z: Array  # [b G, d] projections of the student's tokens
    tags: Tags  # [b G], of z
    positives: Array | None  # [b G, d], row by row those of z
    keys: Keys | None  # [b G], the rows of the batch among the negatives; None without negatives


def _no_params(key: Array) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss beside the flow loss, with its parameters, its memory and what it has to see."""

    name: str
    weight: Callable[[Array], Array]  # optimizer step -> lambda
    # (params, their EMA, seen, bank) -> the loss, a scalar, and rows for the bank or None.
    loss: Callable[[Any, Any, Seen, MemoryBank | None], tuple[Array, Rows | None]]
    taps: tuple[int, ...] = ()  # blocks of the student whose tokens it reads
    view: View | None = None  # what the teacher is shown; None needs no teacher
    teacher_taps: tuple[int, ...] = ()  # blocks of the teacher whose tokens it reads
    init: Callable[[Array], Any] = _no_params  # key -> params, boxed with logical axis names
    has_ema: bool = False  # it needs the EMA of its own parameters
    # (target velocities [B, H, W, C], labels [B] after dropout, tags [B]) of the global batch ->
    # arrays [B, ...] for `Seen.drawn`: what pairs rows must be found before the micro-batches.
    draw: Callable[[Array, Array, Tags], Any] | None = None
    create_bank: Callable[[], MemoryBank] | None = None  # None without a memory
    bank_start_step: int = 0  # nothing is put into the bank before this step
    # (params, their EMA, seen) -> what the loss compares, for the diagnostics of a contrast.
    compare: Callable[[Any, Any, Seen], Compared] | None = None


def tapped_block(section: Any, depth: int) -> int:
    """The block that a term's section names; -1 is a quarter of the depth."""
    block: int = depth // 4 if section.block == -1 else section.block
    return block
