"""A network that goes on with inputs that its checkpoint did not have: those of a condition.

The new kernel begins at zero, so that the network's output is what it was.
"""

from collections.abc import Callable
from typing import Any

import jax

from repulsor_jax.checkpoints.manifest import Manifest
from repulsor_jax.train_state import TrainState

NEW = frozenset({"condition_embed", "condition_map"})  # of the network's parameters


def has_grown(about: Manifest, wanted: TrainState) -> bool:
    """Whether the wanted network has inputs of a condition, and the saved one has none."""
    return bool(NEW & wanted.ema_params.keys()) and not any(
        NEW & {*n.split("/")} for n in about.arrays
    )


def without_new(state: TrainState) -> TrainState:
    """The state, or its shapes, without the new parameters, their averages and moments."""
    parts = jax.tree.map(
        lambda node: {k: node[k] for k in node.keys() - NEW} if _is_model(node) else node,
        _parts(state),
        is_leaf=_is_model,
    )
    return state.replace(**dict(zip(_PARTS, parts, strict=True)))


def only_new(state: TrainState) -> TrainState:
    """What `without_new` leaves out, and None for all else."""
    alone = jax.tree.map(
        lambda node: {k: node[k] for k in NEW & node.keys()} if _is_model(node) else None,
        _parts(state),
        is_leaf=_is_model,
    )
    nothing: Any = dict.fromkeys(vars(state))
    return TrainState(**nothing | dict(zip(_PARTS, alone, strict=True)))


def with_new(
    state: TrainState, wanted: TrainState, create: Callable[..., TrainState]
) -> TrainState:
    """The state with new parameters; `create` is `TrainingProgram.create_state`."""
    joined = jax.tree.map(
        lambda node, old, new: old | new if _is_model(node) else old,
        _parts(wanted),
        _parts(state),
        _parts(create(only_new)),
        is_leaf=_is_model,
    )
    return state.replace(**dict(zip(_PARTS, joined, strict=True)))


_PARTS = ("params", "ema_params", "opt_state")


def _parts(state: TrainState) -> tuple[Any, ...]:
    return tuple(getattr(state, name) for name in _PARTS)


def _is_model(node: Any) -> bool:
    return isinstance(node, dict) and bool(NEW & node.keys())
