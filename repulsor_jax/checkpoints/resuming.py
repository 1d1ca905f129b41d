"""Going on with a run in another configuration: what may change, what is noted, what is refused."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from repulsor_jax.checkpoints import older
from repulsor_jax.config import ConfigError
from repulsor_jax.files.atomic import Appender
from repulsor_jax.method.registry import TERMS, parse_terms

FREE = "free"  # changes nothing of what is learnt
NOTED = "noted"  # may change, and is written down
FORCED = "forced"  # another task or other data: only with --force
FIXED = "fixed"  # another model: never

# Section or key of the configuration -> what a change of it is. The longest name that fits counts.
CHANGES = {
    "seed": NOTED,
    "total_steps": NOTED,  # the end of a cosine schedule
    "batch_size": NOTED,
    "model": FIXED,
    "model.label_dropout": NOTED,
    "model.remat": FREE,
    "model.dtype": NOTED,
    "model.attention": NOTED,
    "model.attention_separation": NOTED,
    "model.init_from": FREE,  # read where there is no checkpoint
    "model.init_convention": FREE,
    "residual": NOTED,  # read at the first step alone
    "flow": NOTED,
    "flow.path": FORCED,
    "flow.prediction": FORCED,
    "conditioning": FREE,  # of sampling, but for
    "conditioning.kind": FORCED,
    "conditioning.masked": FORCED,
    "conditioning.classes": FIXED,
    "conditioning.channels": FIXED,
    "source": NOTED,
    "source.name": FIXED,
    "source.rank": FIXED,
    "source.learn_variance": FIXED,
    "source.null": FORCED,
    "terms": FORCED,
    **dict.fromkeys(TERMS, NOTED),
    "repulsor.block": FORCED,
    "repulsor.bank_keys": FORCED,
    "repulsor.negatives": FORCED,
    "repulsor.pooling": FORCED,
    "repulsor.positives": FORCED,
    "repulsor.predictor": FIXED,
    "repulsor.projection_dim": FIXED,
    "repulsor.pool_grid": FORCED,
    "dispersive.block": FORCED,
    "layersync.student_block": FORCED,
    "layersync.teacher_block": FORCED,
    "sra.student_block": FORCED,
    "sra.teacher_block": FORCED,
    "latent_alignment.block": FORCED,
    "feature_alignment.block": FORCED,
    "feature_alignment.dim": FIXED,
    "feature_alignment.head_size": FIXED,
    "optimizer": NOTED,
    "data": FREE,  # a data set is known by its identity, wherever it lies
    "data.normalization": FORCED,
    "data.features": NOTED,
    "mesh": FREE,
    "mesh.reduce_dtype": NOTED,
    "checkpoint": FREE,
    "divergence": FREE,
    "log": FREE,
    "sampling": FREE,
    "evaluation": FREE,
}
# What runs of versions without these keys did.
_BEFORE = {
    "data.features": "",
    "flow.group_fractions": [],
    "flow.teacher_times": "sra",
    "flow.time_groups": 1,
    "flow.time_shift": 1.0,
    "flow.whole_fraction": 0.0,
    "mesh.reduce_dtype": "model",
    "model.adaln_rank": 288,
    "model.architecture": "dit",
    "model.attention_separation": False,
    "model.residual_depth": 0,
    "model.segment_depth": 5,
    "model.segments": 6,
    "model.time_steps": 0,
    "repulsor.view_min_crop": 1.0,
    "residual.base_run": "",
    "residual.base_step": -1,
    "source.name": "gaussian",
}
JSONL_NAME = "resumes.jsonl"


def check(
    config: Mapping[str, Any],
    latents: Mapping[str, Any],
    saved_config: Mapping[str, Any],
    saved_latents: Mapping[str, Any],
    *,
    force: bool = False,
) -> list[str]:
    """Compares a run's configuration and data with the present ones.

    Args:
      config, latents: the present configuration, as plain values, and `experiment.latents_record`.
      saved_config, saved_latents: those of the checkpoint.
      force: allow what `FORCED` marks, and another data set.

    Returns:
      A line for each change that is allowed and matters.

    Raises:
      ConfigError: names every change that is not allowed, and what to do.
    """
    changes: dict[str, list[str]] = {FREE: [], NOTED: [], FORCED: [], FIXED: []}
    saved, present = (_flat(older.config_record(each)) for each in (saved_config, config))
    for values in (saved, present):
        for key, value in _BEFORE.items():
            values.setdefault(key, value)
        if "terms" in values:  # a sum has no order
            values["terms"] = "+".join(sorted(values["terms"].split("+")))
    saved.setdefault("conditioning.kind", "none")  # of versions before it
    in_use = {*parse_terms(present["terms"]), *saved.get("terms", "").split("+")}
    unused = {*TERMS} - in_use
    unused |= {t for t in TERMS if saved.get(f"{t}.weight") == present.get(f"{t}.weight") == 0}
    if saved["source.name"] == present["source.name"] == "gaussian":
        unused.add("source")
    for key in sorted(saved.keys() | present.keys()):
        pair = saved.get(key, "absent"), present.get(key, "absent")
        kind = kind_of_change(key)
        section, _, field = key.partition(".")
        if section in unused:
            kind = FREE
        elif section in TERMS and field == "weight" and 0 in pair:
            kind = FORCED  # a head and a bank are there only with a weight
        if section == "conditioning" and saved["conditioning.kind"] == "none" and field != "kind":
            kind = FREE  # a network without a condition goes on with any
        elif key == "conditioning.kind" and saved[key] != "none":
            kind = FIXED
        if kind != FREE and "absent" in pair:
            kind = NOTED  # a key of another version
        if pair[0] != pair[1]:
            changes[kind].append(f"config.{key}: {pair[0]!r} -> {pair[1]!r}")
    fixed, forced = changes[FIXED], changes[FORCED]
    forced += [
        f"data set: {key}: {saved_latents.get('dataset', {}).get(key)!r} -> {value!r}"
        for key, value in latents.get("dataset", {}).items()
        if saved_latents.get("dataset", {}).get(key) != value
    ]
    if fixed:
        raise ConfigError(
            f"the run was trained with other settings: {'; '.join(fixed)}. A checkpoint does not "
            "fit another model: use the run's own values, or another --workdir"
        )
    if forced and not force:
        raise ConfigError(
            f"the run was trained with other settings: {'; '.join(forced)}. Use the run's own, or "
            "another --workdir; --force goes on all the same"
        )
    return changes[NOTED] + [f"forced: {line}" for line in forced]


def kind_of_change(key: str) -> str:
    """FREE, NOTED, FORCED or FIXED, for a key as "optimizer.learning_rate"."""
    parts = key.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((CHANGES[p] for p in prefixes if p in CHANGES), NOTED)  # noted: another version's


def write_down(file: Appender, step: int, notes: Sequence[str]) -> None:
    """Appends to a run's `resumes.jsonl` what changed when it went on, if anything did."""
    if notes:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": now, "step": step, "notes": list(notes)})
        file.append_or_keep(f"{line}\n".encode())


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; tuples as lists, as JSON gives them back."""
    found: dict[str, Any] = traverse_util.flatten_dict(json.loads(json.dumps(values)), sep=".")
    return found
