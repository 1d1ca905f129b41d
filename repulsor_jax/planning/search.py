"""Which mesh, rematerialisation and batch to train with: train steps compiled and ranked.

A setting is a value of every knob. Nothing is compiled of settings whose state alone does not fit;
the rest are compiled in the order of a rough guess of their speed, and left out as soon as a
compiled one shows that they cannot fit or cannot be better.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.experiment import Experiment
from repulsor_jax.planning import programs
from repulsor_jax.planning.cost import Cost
from repulsor_jax.planning.estimate import estimate
from repulsor_jax.planning.hlo import Array, Collective
from repulsor_jax.planning.programs import Built
from repulsor_jax.planning.topology import Topology
from repulsor_jax.runtime import throughput

Values = dict[str, Any]

# Of `model.remat`, from the least recomputation to the least memory.
REMATS = ("none", "dots_attention", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One candidate, and what is known of it before it is compiled."""

    changes: Mapping[str, Any]  # keys of the configuration whose values differ from it
    config: Config
    state_bytes: float  # on one device: its arguments, to which temporaries are added
    whole_bytes: float  # of the parameters and their gradients, were both whole
    least_seconds: float  # for an image; no compiled step is quicker
    guess: float  # of the seconds for an image, to order settings

    @property
    def flags(self) -> list[str]:
        """Its changes as flags."""
        return [f"--config.{key}={value}" for key, value in self.changes.items()]

    @property
    def place(self) -> tuple[int, int]:
        """Batch, and how little is recomputed: no less memory where both are no less."""
        return self.config.batch_size, -REMATS.index(self.config.model.remat)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The settings of a topology."""

    settings: list[Setting]  # the configured one first
    too_large: list[tuple[Setting, float]]  # with the bytes on one device that their state misses


def candidates(
    values: Mapping[str, Any],
    experiment: Experiment,
    topology: Topology,
    batches: Sequence[int] = (),
) -> Candidates:
    """All settings of the knobs.

    Args:
      values: the configuration as plain values.
      experiment: of that configuration.
      topology: the devices.
      batches: to try beside the configured one.

    Raises:
      ConfigError: a batch fits no setting.
    """
    config, shape = experiment.config, experiment.mesh.shape
    flat: Values = traverse_util.flatten_dict(values, sep=".")
    count = experiment.mesh.size // shape["tensor"]
    knobs: dict[str, Sequence[Any]] = {
        "batch_size": tuple(dict.fromkeys((config.batch_size, *batches))),
        "mesh.fsdp": [n for n in range(1, count + 1) if count % n == 0],
        "mesh.split_update": (False, True),
        "model.remat": REMATS,
    }
    if getattr(experiment.model, "attention", None) != "cudnn":  # without it these two are one
        same = "dots" if flat["model.remat"] == "dots_attention" else "dots_attention"
        knobs["model.remat"] = [name for name in REMATS if name != same]
    knobs = {key: choices for key, choices in knobs.items() if key in flat}
    now = {key: flat[key] for key in knobs} | {"mesh.fsdp": shape["fsdp"]}
    *outer, remat = knobs
    found: list[Setting] = []
    too_large: list[tuple[Setting, float]] = []
    usable = set()
    seen = set()  # a mesh that divides no dimension splits as little as another
    for choice in itertools.product(*(knobs[key] for key in outer)):
        try:
            changes = {k: v for k, v in zip(outer, choice, strict=True) if v != now[k]}
            if "mesh.fsdp" in changes:
                filled = {"mesh.data": -1, "mesh.tensor": shape["tensor"]}
                changes = {k: v for k, v in filled.items() if v != flat[k]} | changes
            if "batch_size" in changes:
                rows = programs.with_batch(config, changes["batch_size"]).repulsor.bank_rows
                changes |= {"repulsor.bank_rows": rows} if rows != config.repulsor.bank_rows else {}
            changed = _parsed(flat | changes)
            built = _built(experiment, changed, topology)
        except ConfigError:
            continue  # neither the configuration nor the devices allow it
        usable.add(changed.batch_size)
        state = sum(map(programs.shard_bytes, built.kinds.values()))
        split = choice[1 + outer.index("mesh.fsdp") :]
        if "mesh.fsdp" in changes and (changed.batch_size, split, state) in seen:
            continue
        seen.add((changed.batch_size, split, state))
        params = jax.tree.leaves(built.kinds["parameters"])
        whole = 2.0 * sum(leaf.size * leaf.dtype.itemsize for leaf in params)
        missing = state - (topology.device_bytes or math.inf)
        for name in knobs[remat]:
            own = changes | ({remat: name} if name != now[remat] else {})
            settled = _parsed(flat | own)
            least, guess = _seconds(built, settled, topology)
            setting = Setting(own, settled, state, whole, least, guess)
            if missing > 0 and own:
                too_large.append((setting, missing))
            else:
                found.append(setting)
    if wrong := {*knobs["batch_size"]} - usable:
        raise ConfigError(
            f"--search_batches: {min(wrong)} does not divide among the {experiment.mesh.size} "
            f"devices of {topology.name}, or contradicts the configuration"
        )
    found.sort(key=lambda setting: (bool(setting.changes), setting.guess))
    return Candidates(found, too_large)


def _built(experiment: Experiment, config: Config, topology: Topology) -> Built:
    experiment = programs.reconfigured(experiment, config, topology)
    return programs.build("train", experiment, topology)


def _parsed(flat: Mapping[str, Any]) -> Config:
    return config_lib.parse(traverse_util.unflatten_dict(dict(flat), sep="."))


def _seconds(built: Built, config: Config, topology: Topology) -> tuple[float, float]:
    """Seconds for an image: the least, and a rough guess of an estimate's middle.

    The step reads and writes its state, and its copy of the parameters, in two bytes a number, six
    times. Parameters are gathered along `fsdp` forward and backward (once if `mesh.split_update`
    keeps them for want of remat), and along `data` once. Their gradients are summed over the
    devices of a batch, along these axes to shards. The modulations stay where they are; XLA does
    the same without `split_update`.
    """
    kinds = ("parameters", "optimizer", "EMA")
    state = sum(programs.shard_bytes(built.kinds[kind]) for kind in kinds)
    flops = throughput.training_flops(config.model) * config.batch_size / built.mesh.size
    shape = built.mesh.shape
    gathers = 1 if config.mesh.split_update and config.model.remat == "none" else 2
    # Of parameters, by the axes that split them, and whether they are gathered.
    sizes: dict[tuple[tuple[str, ...], bool], int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(built.kinds["parameters"]):
        dims = sharding.split_axes(leaf.sharding, leaf.ndim)
        axes = tuple(axis for dim in dims for axis in dim if axis in sharding.BATCH_AXES)
        stays = "['modulation']['kernel']" in jax.tree_util.keystr(path)
        sizes[axes, not stays] = sizes.get((axes, not stays), 0) + leaf.size
    sent: list[tuple[Collective, int]] = []
    copy = 0.0
    for (axes, is_gathered), size in sizes.items():
        first = [axis for axis in axes if axis in sharding.DATA_AXES]
        by_block = [axis for axis in axes if axis not in first]
        copied = size // math.prod(shape[a] for a in by_block)  # of what one device has
        shard = copied // math.prod(shape[a] for a in first)
        rest = [axis for axis in sharding.BATCH_AXES if axis not in axes]
        copy += 2.0 * (size if is_gathered else shard)
        for kind, count, over, runs in (
            ("all-gather", copied, first, is_gathered),
            ("all-gather", size, by_block, gathers * is_gathered),
            ("reduce-scatter", copied, by_block, is_gathered),
            ("reduce-scatter", shard, first, is_gathered),
            ("all-reduce", shard, rest, 1),
        ):
            arrays, groups = (Array("bf16", (count,)),), (_group(built.mesh, over),)
            sent.append((Collective(kind, arrays, groups), runs))
    # Between no recomputation and all of the forward pass, in the order of the names.
    recomputed = flops * REMATS.index(config.model.remat) / (3 * (len(REMATS) - 1))

    def parts(flops: float, moved: float, sent: list[tuple[Collective, int]]) -> list[float]:
        found = estimate(Cost(flops, flops, 0.0, 2.0 * state + moved, sent), built.mesh, topology)
        return [seconds / config.batch_size for seconds in (found or {}).values()]

    guess = parts(flops + recomputed, 6 * copy, sent)
    return max(parts(flops, 0.0, [])), (max(guess) + sum(guess)) / 2


def _group(mesh: Mesh, axes: Sequence[str]) -> tuple[int, ...]:
    """Places of the devices that differ from the first along these axes alone."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    return tuple(
        places[tuple(slice(None) if name in axes else 0 for name in mesh.shape)].flatten().tolist()
    )


@dataclasses.dataclass(frozen=True)
class Tried:
    """A compiled setting, and its train step as `summary.describe_program` has it."""

    setting: Setting
    step: Values

    @property
    def seconds(self) -> float:
        """For an image, in the middle of the estimate; inf where it does not fit."""
        if not self.step["fits"]:
            return math.inf
        time_of = self.step["estimate"]
        return float(time_of["seconds"] + time_of["serial_seconds"]) / 2 / self.step["images"]

    @property
    def total_bytes(self) -> float:
        """Of one chip."""
        return float(self.step["total_bytes_per_chip"])


def explore(
    settings: Sequence[Setting],
    limit: int,
    compile_step: Callable[[Setting], Values],
    *,
    devices_per_chip: int = 1,
    workers: int = 1,
    describe: Callable[[Tried], str] = str,
) -> tuple[list[Tried], list[Setting], list[Setting]]:
    """Compiles settings, `workers` side by side, and prints how far it is.

    Args:
      settings: the first is compiled first.
      limit: of compilations.
      compile_step: a setting -> its described train step.
      devices_per_chip: of the topology.
      workers: compilations at once.
      describe: what to print of a compiled setting.

    Returns:
      What was compiled, what was left out because it cannot be better, and what `limit` left out.
    """
    tried: list[Tried] = []
    useless: list[Setting] = []
    left = list(settings)
    running: dict[concurrent.futures.Future[Values], Setting] = {}
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while True:
            useless += [s for s in left if _cannot_be_better(s, tried, devices_per_chip)]
            left = [s for s in left if s not in useless]
            while left and len(running) < workers and len(tried) + len(running) < limit:
                following = min(left, key=lambda s: _order(s, tried, [*running.values()]))
                left.remove(following)
                running[pool.submit(compile_step, following)] = following
            if not running:
                return tried, useless, left
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                tried.append(Tried(running.pop(future), future.result()))
                seconds = time.perf_counter() - started
                most = min(limit, len(tried) + len(running) + len(left))
                remaining = (most - len(tried)) * seconds / len(tried)
                print(
                    f"  {len(tried)} of at most {most}: {describe(tried[-1])}; {seconds:.0f} s, "
                    f"at most about {remaining:.0f} s left",
                    flush=True,
                )


def _order(
    setting: Setting, tried: Sequence[Tried], running: Sequence[Setting]
) -> tuple[bool, bool, float]:
    """The configured one, then one of each mesh and batch, the quickest first, and all of the best.

    A mesh and batch begin with the configured remat, and go on with the others. Last come those
    that take more memory than one that is not among the best, and a remat that was seen to take
    more memory than another without being quicker.
    """
    same = [each for each in tried if _is_same_mesh(each.setting, setting)]
    if same:
        is_late = _takes_memory_for_nothing(setting, same, tried)
    else:
        is_running = any(_is_same_mesh(each, setting) for each in running)
        is_late = is_running or "model.remat" in setting.changes
    of_same, of_all = _errors_of_guess(same), _errors_of_guess(tried)
    factor = min(of_same) if of_same else statistics.median(of_all or [1.0])
    return bool(setting.changes), is_late, setting.guess * factor


def _takes_memory_for_nothing(
    setting: Setting, same: Sequence[Tried], tried: Sequence[Tried]
) -> bool:
    """Whether less memory was seen to be as quick: on its mesh, or with its remat on another."""
    best = frontier(tried)
    beaten = [each for each in same if each.step["fits"] and each not in best]
    fitting = [each for each in tried if each.step["fits"]]
    return any(setting.place > each.setting.place for each in beaten) or any(
        a.setting.config.model.remat == setting.config.model.remat
        and _is_same_mesh(a.setting, b.setting)
        and a.setting.place > b.setting.place
        and a.seconds >= b.seconds
        for a, b in itertools.permutations(fitting, 2)
    )


def _errors_of_guess(tried: Sequence[Tried]) -> list[float]:
    """What the guesses of those that fit are wrong by, as factors."""
    return [each.seconds / each.setting.guess for each in tried if each.step["fits"]]


def _is_same_mesh(a: Setting, b: Setting) -> bool:
    """Whether two settings differ by nothing but remat."""
    return _without_remat(a) == _without_remat(b)


def _without_remat(setting: Setting) -> Values:
    return {key: value for key, value in setting.changes.items() if key != "model.remat"}


def _cannot_be_better(setting: Setting, tried: Sequence[Tried], devices_per_chip: int) -> bool:
    for each in tried:
        other = each.setting
        no_less = all(a >= b for a, b in zip(setting.place, other.place, strict=True))
        if each.step["fits"]:
            smaller = each.total_bytes <= devices_per_chip * setting.state_bytes
            if smaller and each.seconds <= setting.least_seconds:
                return True
        elif no_less:
            # Temporaries that no mesh makes smaller: activations.
            kept = each.total_bytes - devices_per_chip * (other.state_bytes + other.whole_bytes)
            too_many = kept > (each.step["available_bytes_per_chip"] or math.inf)
            if too_many or setting.state_bytes >= other.state_bytes:
                return True
    return False


def frontier(tried: Sequence[Tried]) -> list[Tried]:
    """Those than which no other is both quicker, by the image, and smaller; the quickest first."""
    best: list[Tried] = []
    fitting = [each for each in tried if each.step["fits"]]
    for each in sorted(fitting, key=lambda each: (each.seconds, each.total_bytes)):
        if not best or each.total_bytes < best[-1].total_bytes:
            best.append(each)
    return best
