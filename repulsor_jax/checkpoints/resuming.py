"""Going on with a run in another configuration: what may change, what is noted, what is refused."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from repulsor_jax.config import ConfigError
from repulsor_jax.files.atomic import Appender

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
    "flow": NOTED,
    "flow.path": FORCED,
    "flow.prediction": FORCED,
    "regularizer": NOTED,
    "regularizer.name": FORCED,
    "regularizer.block": FORCED,
    "regularizer.pooling": FORCED,
    "regularizer.projection_dim": FIXED,
    "optimizer": NOTED,
    "data": FREE,  # a data set is known by its identity, wherever it lies
    "data.normalization": FORCED,
    "mesh": FREE,
    "checkpoint": FREE,
    "divergence": FREE,
    "log": FREE,
    "sampling": FREE,
    "evaluation": FREE,
}
_ABSENT = "absent"
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
      config: the present configuration, as plain values.
      latents: the present `experiment.latents_record`.
      saved_config: that of the checkpoint.
      saved_latents: likewise.
      force: allow what `FORCED` marks, and another data set.

    Returns:
      A line for each change that is allowed and matters.

    Raises:
      ConfigError: names every change that is not allowed, and what to do.
    """
    notes: list[str] = []
    forced: list[str] = []
    fixed: list[str] = []
    saved, present = _flat(saved_config), _flat(config)
    for key in sorted(saved.keys() | present.keys()):
        one, other = saved.get(key, _ABSENT), present.get(key, _ABSENT)
        verdict = kind_of_change(key)
        if key == "regularizer.weight" and 0 in (one, other):
            verdict = FORCED  # the head and the bank are there only with a weight
        if one == other or verdict == FREE:
            continue
        line = f"config.{key}: {one!r} -> {other!r}"
        if verdict == NOTED or _ABSENT in (one, other):  # a key of another version
            notes.append(line)
        else:
            (fixed if verdict == FIXED else forced).append(line)
    forced += [
        f"data set: {key}: {saved_latents['dataset'].get(key)!r} -> {value!r}"
        for key, value in latents.get("dataset", {}).items()
        if saved_latents.get("dataset", {}).get(key) != value
    ]
    if fixed:
        raise ConfigError(
            f"the run was trained otherwise: {'; '.join(fixed)}. A checkpoint does not fit another "
            "model: use the run's own values, or another --workdir"
        )
    if forced and not force:
        raise ConfigError(
            f"the run was trained otherwise: {'; '.join(forced)}. Use the run's own, or another "
            "--workdir; --force goes on all the same"
        )
    return notes + [f"forced: {line}" for line in forced]


def kind_of_change(key: str) -> str:
    """FREE, NOTED, FORCED or FIXED, for a key as "optimizer.learning_rate"."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        known = CHANGES.get(".".join(parts[:length]))
        if known:
            return known
    return NOTED  # a section of another version


def write_down(file: Appender, step: int, notes: Sequence[str]) -> None:
    """Appends to a run's `resumes.jsonl` what changed when it went on, if anything did."""
    if not notes:
        return
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": step}
    file.append_or_keep((json.dumps(line | {"notes": list(notes)}) + "\n").encode())


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; tuples as lists, as JSON gives them back."""
    found: dict[str, Any] = traverse_util.flatten_dict(json.loads(json.dumps(values)), sep=".")
    return found
