"""The plan mode: what a run would need and how fast it could be, on devices that need not be here.

The programs of the run are compiled for a TPU slice and read: memory, FLOPs, collectives.
"""

import ast
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from flax import traverse_util

from repulsor_jax import __version__
from repulsor_jax import config as config_lib
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.files import atomic
from repulsor_jax.planning import programs as programs_lib
from repulsor_jax.planning import report
from repulsor_jax.planning.summary import describe_program, describe_run, describe_topology
from repulsor_jax.planning.topology import Topology, open_topology

_TITLES = {"train": "train step", "sample": "sampler", "encode": "encoder"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The devices to plan for, and what to print beside the plan."""

    topology: str  # as "v5e:16x16", or "local"
    num_slices: int = 1
    # Variants separated by ";", each `key=value` pairs separated by ",", where a key is one of the
    # configuration, `topology` or `num_slices`.
    compare: str = ""
    price_per_chip_hour: float = 0.0  # in any currency; 0 prints no cost
    largest_batch: bool = False  # look for it, by a few more compilations


@dataclasses.dataclass(frozen=True)
class Variant:
    """One column of a plan: a configuration and its devices."""

    label: str
    config: Config
    topology: Topology


def plan(
    config_dict: ml_collections.ConfigDict, workdir: pathlib.Path, options: Options
) -> pathlib.Path:
    """Plans, prints, and writes plan.json and plan.html to `<workdir>/plan/<topology>`.

    With variants to compare, only train steps are compiled, and the files are called `compare`.

    Returns:
      The page.

    Raises:
      ConfigError: the configuration does not fit the devices, libtpu is missing, or an option is
        wrong; one message that names the key or the flag.
    """
    if options.price_per_chip_hour < 0:
        raise ConfigError(
            f"--price_per_chip_hour={options.price_per_chip_hour:g} must be at least 0"
        )
    variants = _variants(config_lib.plain_values(config_dict), options)
    autoencoder = variants[0].config.data.autoencoder if len(variants) == 1 else "none"
    names = {"none": programs_lib.PROGRAMS[:1], "identity": programs_lib.PROGRAMS[:2]}.get(
        autoencoder, programs_lib.PROGRAMS
    )
    for variant in variants:  # errors come before the first compilation
        programs_lib.abstract_experiment(variant.config, workdir, variant.topology)
    found = [_plan_one(variant, workdir, names, options) for variant in variants]
    if len(found) == 1:
        print(f"\n{report.plan_text(found[0])}")
    else:
        print(f"\n{report.table_text(report.comparison_rows(found))}")
        for values in found:
            for line in values["programs"]["train"].get("advice", []):
                print(f"{values['label']} does not fit; {line}")
    topology = variants[0].topology.name
    folder = workdir / "plan" / re.sub(r"\W+", "-", topology)
    page = folder / ("plan.html" if len(found) == 1 else "compare.html")
    made_by = {"repulsor_jax": __version__, "jax": jax.__version__}
    record = {"made_by": made_by, "times_are": "estimates from published rates", "variants": found}
    atomic.write_text(page.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    report.write_page(page, f"Plan for {topology}", found)
    print(f"\nplan: {page}")
    return page


def _plan_one(
    variant: Variant, workdir: pathlib.Path, names: tuple[str, ...], options: Options
) -> dict[str, Any]:
    """Compiles the programs of a variant and describes them, as `plan.json` holds them."""
    config, topology = variant.config, variant.topology

    def compiled(name: str, config: Config) -> programs_lib.Program:
        batch = f", batch {config.batch_size:,}" if name == "train" else ""
        label = f" ({variant.label})" if variant.label else ""
        title = f"{_TITLES[name]}{batch}{label}"
        print(f"compiling for {topology.name}: {title}", end=" ... ", flush=True)
        program = programs_lib.compile_program(
            name, programs_lib.abstract_experiment(config, workdir, topology), topology
        )
        outcome = "it does not fit" if program.refusal else "done"
        print(f"{outcome} in {program.seconds:.1f} s", flush=True)
        return program

    programs = {name: compiled(name, config) for name in names}
    described = {name: describe_program(p, config, topology) for name, p in programs.items()}
    values: dict[str, Any] = {
        "label": variant.label or "as configured",
        "topology": describe_topology(topology),
        "mesh": described["train"]["mesh"],
        "batch_size": config.batch_size,
        "programs": described,
        "run": describe_run(described["train"], config, topology, options.price_per_chip_hour),
    }
    if options.largest_batch and (available := topology.device_bytes) is not None:
        compile_train = functools.partial(compiled, "train")
        if best := programs_lib.largest_batch(config, programs["train"], available, compile_train):
            values["largest_batch"] = {
                "batch_size": best.images,
                "total_bytes_per_chip": topology.devices_per_chip * best.total_bytes,
            }
    return values


def _variants(values: dict[str, Any], options: Options) -> list[Variant]:
    """The configuration as it is, then each variant of `options.compare`."""
    opened = functools.cache(open_topology)

    def make(label: str, changes: dict[str, str]) -> Variant:
        name = changes.pop("topology", options.topology)
        slices = changes.pop("num_slices", str(options.num_slices))
        if not slices.isdecimal():
            raise ConfigError(f"--compare: num_slices={slices!r} must be a number")
        topology = opened(name, int(slices))
        try:
            config = config_lib.parse(_changed(values, changes))
        except ConfigError as error:
            raise ConfigError(f"--compare={label!r}: {error}" if label else str(error)) from error
        return Variant(label, config, topology)

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


def _changed(values: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """The configuration's values with some replaced by values given as text."""
    flat: dict[str, Any] = traverse_util.flatten_dict(values, sep=".")
    for key, text in changes.items():
        if key not in flat:
            raise ConfigError(f"config.{key}: unknown key")
        try:
            flat[key] = text if isinstance(flat[key], str) else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            flat[key] = text  # `config.parse` says what is wrong with it
    changed: dict[str, Any] = traverse_util.unflatten_dict(flat, sep=".")
    return changed
