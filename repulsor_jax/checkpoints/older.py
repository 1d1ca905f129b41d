"""Checkpoints of the first layout: one regulariser, and bank rows without tags.

There the parameters were `{"model": ..., "regularizer": head}`, where now they are `{"model": ...,
"terms": {"repulsor": {"head": ...}}}`; the configuration had a section `regularizer`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax.checkpoints.manifest import CheckpointError
from repulsor_jax.method.memory_bank import EMPTY, UNKNOWN, MemoryBank, Tags, unknown_tags
from repulsor_jax.train_state import TrainState

_BANK = ("features", "cursor", "filled")


def is_older(saved_config: Mapping[str, Any]) -> bool:
    """Whether the run of this configuration saved its checkpoints in the first layout."""
    return "regularizer" in saved_config and "terms" not in saved_config


def to_older(state: TrainState) -> dict[str, Any]:
    """The same arrays (or shapes) by the names of the first layout.

    Raises:
      CheckpointError: the first layout has no place for all of them.
    """
    kept = {name: {*params} for name, params in state.params["terms"].items()}
    if kept not in ({}, {"repulsor": {"head"}}) or state.ema_terms:
        raise CheckpointError(
            "an older version saved this run, with a head for config.terms='repulsor' alone, "
            "without positives, a predictor or keys of a teacher: use the run's own config"
        )

    def rename(params: dict[str, Any]) -> dict[str, Any]:
        head = params["terms"].get("repulsor", {}).get("head", {})
        return {"model": params["model"], "regularizer": head}

    fields = dict(vars(_rename(state, "terms", rename)))
    del fields["ema_terms"]
    if state.bank is not None:
        fields["bank"] = {name: getattr(state.bank, name) for name in _BANK}
    return fields


def from_older(fields: dict[str, Any]) -> TrainState:
    """The inverse of `to_older`; of the bank's rows neither image nor class is known."""

    def rename(params: dict[str, Any]) -> dict[str, Any]:
        head = params["regularizer"]
        return {"model": params["model"], "terms": {"repulsor": {"head": head}} if head else {}}

    bank = fields["bank"] and MemoryBank(tags=_tags(fields["bank"]), **fields["bank"])
    state = TrainState(**fields | {"bank": bank, "ema_terms": {}})
    return _rename(state, "regularizer", rename)


def config_record(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the sections of this version."""
    found = dict(saved)
    section = found.pop("regularizer", None)
    if not isinstance(section, Mapping) or "terms" in saved:
        return found
    values = dict(section)
    name = values.pop("name", "none")
    # What the first layout did, in the words of this version.
    values |= {"positives": "none", "bank_keys": "online", "negatives": "all", "predictor": False}
    values |= {"same_class_weight": 1.0, "time_window": 1.0, "bank_start_step": 0}
    values |= {"decay_from": 1.0, "stop_step": 0}
    only_dispersive = {key: values.pop(key) for key in ("variant", "margin") if key in values}
    if name == "dispersive":
        kept = ("weight", "warmup_steps", "block", "temperature", "decay_from", "stop_step")
        values = {key: values[key] for key in kept if key in values} | only_dispersive
    return found | {"terms": name} | ({} if name == "none" else {name: values})


def _rename(state: TrainState, mark: str, rename: Any) -> TrainState:
    def is_params(node: Any) -> bool:
        return isinstance(node, dict) and mark in node

    def each(node: Any) -> Any:
        return rename(node) if is_params(node) else node

    params, opt_state = jax.tree.map(each, (state.params, state.opt_state), is_leaf=is_params)
    return state.replace(params=params, opt_state=opt_state)


def _tags(bank: dict[str, Any]) -> Tags:
    """Tags of unknown rows in the slots that were written, laid out as the features are."""
    features = bank["features"]
    shape = features.shape[:2]

    def make(filled: jax.Array) -> Tags:
        written = jnp.arange(shape[0])[:, None] < filled
        ids = jnp.where(written, UNKNOWN, EMPTY) + jnp.zeros(shape, jnp.int32)
        return unknown_tags(shape)._replace(ids=ids)

    spec = PartitionSpec(*[*features.sharding.spec, None, None][:2])
    found: Tags = jax.jit(make, out_shardings=NamedSharding(features.sharding.mesh, spec))(
        bank["filled"]
    )
    return found
