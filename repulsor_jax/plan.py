"""The plan mode: what a run would need and how fast it could be, on devices that need not be here.

The programs of the run are compiled for a TPU slice, and read: memory, FLOPs, collectives.
"""

import ast
import contextlib
import copy
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections

from repulsor_jax import __version__
from repulsor_jax import config as config_lib
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.files import atomic
from repulsor_jax.planning import report
from repulsor_jax.planning.largest_batch import largest_batch
from repulsor_jax.planning.programs import PROGRAMS, Program, abstract_experiment, compile_program
from repulsor_jax.planning.summary import describe_program, describe_run, describe_topology
from repulsor_jax.planning.topology import Topology, open_topology

_TITLES = {"train": "train step", "sample": "sampler", "encode": "encoder"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan for beside the configuration.

    Attributes:
      topology: as "v5e:16x16", or "local".
      num_slices: slices of it.
      compare: variants, separated by ";", each `key=value` pairs separated by ","; keys are those
        of the configuration, `topology` and `num_slices`.
      price_per_chip_hour: in any currency; 0 prints no cost.
      largest_batch: whether to look for it, by a few more compilations.
    """

    topology: str
    num_slices: int = 1
    compare: str = ""
    price_per_chip_hour: float = 0.0
    largest_batch: bool = False


@dataclasses.dataclass(frozen=True)
class Variant:
    """One column of a plan: a configuration and its devices."""

    label: str
    config: Config
    topology: Topology


def plan(
    config_dict: ml_collections.ConfigDict, workdir: pathlib.Path, options: Options
) -> pathlib.Path:
    """Plans, prints, and writes `plan.json`, `plan.html` and `plan.png`.

    With variants to compare, train steps alone are compiled, and `compare` is the files' name.

    Args:
      config_dict: the configuration.
      workdir: files go to `<workdir>/plan/<topology>`.
      options: see `Options`.

    Returns:
      The page.

    Raises:
      ConfigError: the configuration does not fit the devices, libtpu is missing, or an option is
        not what it should be; one message that names the key or the flag.
    """
    if options.price_per_chip_hour < 0:
        raise ConfigError(
            f"--price_per_chip_hour={options.price_per_chip_hour:g} must be at least 0"
        )
    variants = _variants(config_dict, options)
    programs = {"none": ("train",), "identity": ("train", "sample")}.get(
        variants[0].config.data.autoencoder, PROGRAMS
    )
    programs = programs if len(variants) == 1 else ("train",)
    for variant in variants:  # what can be refused is refused before the first compilation
        abstract_experiment(variant.config, workdir, variant.topology)
    found = [_plan_one(variant, workdir, programs, options) for variant in variants]
    folder = workdir / "plan" / re.sub(r"\W+", "-", variants[0].topology.name)
    name = "plan" if len(variants) == 1 else "compare"
    for values in found if len(found) == 1 else []:
        print(f"\n{report.plan_text(values)}")
    if len(found) > 1:
        print(f"\n{report.table_text(report.comparison_rows(found))}")
        for values in found:
            for line in values["programs"]["train"].get("advice", []):
                print(f"{values['label']} does not fit; {line}")
    made_by = {"repulsor_jax": __version__, "jax": jax.__version__}
    record = {"made_by": made_by, "times_are": "estimates from published rates", "variants": found}
    atomic.write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    page = folder / f"{name}.html"
    report.write_page(page, f"Plan for {variants[0].topology.name}", found)
    print(f"\nplan: {page}")
    return page


def plan_values(
    config: Config, workdir: pathlib.Path, topology: Topology, programs: tuple[str, ...]
) -> dict[str, Any]:
    """Compiles programs for a topology and describes them: what `plan.json` holds of a variant."""
    options = Options(topology.name)
    return _plan_one(Variant("", config, topology), workdir, programs, options, quiet=True)


def _plan_one(
    variant: Variant,
    workdir: pathlib.Path,
    programs: tuple[str, ...],
    options: Options,
    quiet: bool = False,
) -> dict[str, Any]:
    config, topology = variant.config, variant.topology

    def compiled(name: str, config: Config) -> Program:
        experiment = abstract_experiment(config, workdir, topology)
        what = f"{_TITLES[name]}, batch {config.batch_size:,}" if name == "train" else _TITLES[name]
        what = f"{what} ({variant.label})" if variant.label else what
        with _said(f"compiling for {topology.name}: {what}", quiet) as say:
            program = compile_program(name, experiment, topology)
            say("it does not fit" if program.refusal else "done")
        return program

    made = {name: compiled(name, config) for name in programs}
    values: dict[str, Any] = {
        "label": variant.label or "as configured",
        "topology": describe_topology(topology),
        "batch_size": config.batch_size,
        "programs": {name: describe_program(p, config, topology) for name, p in made.items()},
    }
    values["mesh"] = values["programs"][programs[0]]["mesh"]
    train = values["programs"].get("train", {})
    values["run"] = describe_run(train, config, topology, options.price_per_chip_hour)
    if options.largest_batch and "train" in made:
        values["largest_batch"] = largest_batch(
            config, topology, made["train"], lambda config: compiled("train", config)
        )
    return values


@contextlib.contextmanager
def _said(what: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    if not quiet:
        print(f"{what} ...", end=" ", flush=True)
    started = time.perf_counter()

    def say(outcome: str) -> None:
        if not quiet:
            print(f"{outcome} in {time.perf_counter() - started:.1f} s", flush=True)

    yield say


def _variants(config_dict: ml_collections.ConfigDict, options: Options) -> list[Variant]:
    """The configuration as it is, then each of `options.compare`."""
    opened: dict[tuple[str, int], Topology] = {}

    def make(label: str, changes: dict[str, str]) -> Variant:
        changes = dict(changes)
        name = changes.pop("topology", options.topology)
        slices = changes.pop("num_slices", str(options.num_slices))
        if not slices.isdecimal():
            raise ConfigError(f"--compare: num_slices={slices!r} must be a number")
        key = name, int(slices)
        if key not in opened:
            opened[key] = open_topology(*key)
        try:
            config = config_lib.parse(_changed(config_dict, changes))
        except ConfigError as error:
            raise ConfigError(f"--compare={label!r}: {error}" if label else str(error)) from error
        return Variant(label, config, opened[key])

    texts = [text.strip() for text in options.compare.split(";") if text.strip()]
    return [make("", {}), *(make(text, _pairs(text)) for text in texts)]


def _pairs(text: str) -> dict[str, str]:
    pairs = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals):
            raise ConfigError(
                f"--compare: found {pair.strip()!r}, expected key=value pairs, as "
                "'mesh.fsdp=16; mesh.data=16,mesh.fsdp=16,model.remat=full'"
            )
        pairs[key.removeprefix("config.")] = value
    return pairs


def _changed(
    config_dict: ml_collections.ConfigDict, changes: dict[str, str]
) -> ml_collections.ConfigDict:
    """A copy with some values changed, given as text."""
    changed = copy.deepcopy(config_dict)
    for key, text in changes.items():
        section, _, last = key.rpartition(".")
        try:
            parent = changed
            for part in section.split(".") if section else []:
                parent = parent[part]
            current = parent[last]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"config.{key}: unknown key") from error
        value: Any = text
        if not isinstance(current, str):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError) as error:
                kind = type(current).__name__
                raise ConfigError(f"config.{key}: expected {kind}, found {text!r}") from error
        with parent.unlocked(), parent.ignore_type():
            parent[last] = value
    return changed
