"""The plan mode: what a run would need and how fast it could be, on devices that need not be here.

The programs of the run are compiled for a TPU slice and read: memory, FLOPs, collectives.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from repulsor_jax import __version__
from repulsor_jax import config as config_lib
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.experiment import Experiment
from repulsor_jax.files import atomic
from repulsor_jax.planning import programs as programs_lib
from repulsor_jax.planning import report
from repulsor_jax.planning import search as search_lib
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
    search: bool = False  # compile train steps with other meshes and rematerialisation
    search_batches: tuple[int, ...] = ()  # to search among, beside the configured one
    search_limit: int = 16  # compilations of a search
    # The user's own, which found settings are added to.
    command: tuple[str, ...] = ("python", "-m", "repulsor_jax.main")


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

    With variants to compare, or a search, only train steps are compiled. The files of a comparison
    are called `compare`.

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
    if options.search:
        _check_search(options)
    variants = _variants(config_lib.plain_values(config_dict), options)
    is_whole = len(variants) == 1 and not options.search
    autoencoder = variants[0].config.data.autoencoder if is_whole else "none"
    names = {"none": programs_lib.PROGRAMS[:1], "identity": programs_lib.PROGRAMS[:2]}.get(
        autoencoder, programs_lib.PROGRAMS
    )
    names = names if is_whole else ("train",)
    experiments = [  # errors come before the first compilation
        programs_lib.abstract_experiment(variant.config, workdir, variant.topology)
        for variant in variants
    ]
    if options.search:
        found = [_search(variants[0], experiments[0], config_dict, options)]
    else:
        found = _plan_all(variants, experiments, names, options.price_per_chip_hour)
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


def _plan_all(
    variants: list[Variant], experiments: list[Experiment], names: tuple[str, ...], price: float
) -> list[dict[str, Any]]:
    """Compiles the programs of all variants side by side, and describes each variant."""
    described: list[dict[str, Any]] = [{} for _ in variants]
    jobs = [(k, name) for k in range(len(variants)) for name in names]

    def compiled(k: int, name: str) -> programs_lib.Program:
        topology = variants[k].topology
        # The train step is what a run pays for: its memory is told to the last byte.
        emits = name == "train"
        return programs_lib.compile_program(name, experiments[k], topology, emits=emits)

    workers = min(len(jobs), *(_side_by_side(variant.topology) for variant in variants))
    print(f"compiling {len(jobs)} programs, {workers} side by side", flush=True)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(compiled, *job): job for job in jobs}
        for future in concurrent.futures.as_completed(running):
            k, name = running[future]
            variant, program = variants[k], future.result()
            described[k][name] = describe_program(program, variant.config, variant.topology)
            batch = f", batch {variant.config.batch_size:,}" if name == "train" else ""
            label = f" ({variant.label})" if variant.label else ""
            outcome = "it does not fit" if program.refusal else "done"
            print(
                f"  for {variant.topology.name}: {_TITLES[name]}{batch}{label}: {outcome} in "
                f"{program.seconds:.1f} s",
                flush=True,
            )
    return [
        _described(variant, {name: programs[name] for name in names}, price)
        for variant, programs in zip(variants, described, strict=True)
    ]


def _described(variant: Variant, programs: dict[str, Any], price: float) -> dict[str, Any]:
    """A variant as `plan.json` holds it."""
    config, topology = variant.config, variant.topology
    return {
        "label": variant.label or "as configured",
        "topology": describe_topology(topology),
        "mesh": programs["train"]["mesh"],
        "batch_size": config.batch_size,
        "programs": programs,
        "run": describe_run(programs["train"], config, topology, price),
    }


def _side_by_side(topology: Topology) -> int:
    """How many programs to compile at once: each has a process, but for the devices here."""
    return 1 if topology.name == "local" else min(len(os.sched_getaffinity(0)), 8)


def _check_search(options: Options) -> None:
    if options.compare:
        raise ConfigError("--search and --compare: found both; plan them one after the other")
    if options.search_limit < 1:
        raise ConfigError(f"--search_limit={options.search_limit} must be at least 1")


def _search(
    variant: Variant,
    experiment: Experiment,
    config_dict: ml_collections.ConfigDict,
    options: Options,
) -> dict[str, Any]:
    """Compiles train steps of other settings, and describes the configured one and the best."""
    topology = variant.topology
    if topology.chip is None:
        raise ConfigError(
            f"--search ranks by estimated time, and no peak rates are published of the devices of "
            f"--topology={topology.name}: name a kind of TPU or GPU, as --topology=v5e:16x16"
        )
    values = config_lib.plain_values(config_dict)
    all_of = search_lib.candidates(values, experiment, topology, options.search_batches)
    workers = min(_side_by_side(topology), options.search_limit)
    print(
        f"searching {len(all_of.settings)} settings for {topology.name} by at most "
        f"{min(options.search_limit, len(all_of.settings))} compilations (--search_limit), "
        f"{workers} side by side; {len(all_of.too_large)} more do not fit by their state alone",
        flush=True,
    )

    def compile_step(setting: search_lib.Setting) -> dict[str, Any]:
        changed = programs_lib.reconfigured(experiment, setting.config, topology)
        program = programs_lib.compile_program("train", changed, topology, makes_sure=False)
        return describe_program(program, setting.config, topology)

    tried, useless, untried = search_lib.explore(
        all_of.settings,
        options.search_limit,
        compile_step,
        devices_per_chip=topology.devices_per_chip,
        workers=workers,
        describe=lambda each: report.setting_text(each.setting.flags, each.step),
    )
    rows = [
        {
            "flags": each.setting.flags,
            "command": shlex.join([*_without(options.command, each.setting.changes), *flags]),
            "batch_size": each.setting.config.batch_size,
            "remat": each.setting.config.model.remat,
            "on_frontier": each in best,
            "step": each.step,
        }
        for best in [search_lib.frontier(tried)]
        for each in [*best, *(t for t in tried if t not in best)]
        for flags in [each.setting.flags]
    ]
    available = topology.device_bytes or 0.0
    own = next(each.step for each in tried if not each.setting.changes)
    described = _described(variant, {"train": own}, options.price_per_chip_hour)
    described["search"] = {
        "compiled": rows,
        "too_large": [
            {"flags": setting.flags, "missing_bytes_per_chip": topology.devices_per_chip * missing}
            for setting, missing in all_of.too_large
        ],
        "cannot_be_better": [setting.flags for setting in useless],
        "not_tried": [setting.flags for setting in untried],
        "available_bytes_per_chip": topology.devices_per_chip * available,
    }
    return described


def _without(command: tuple[str, ...], keys: Mapping[str, Any]) -> list[str]:
    """A command without the flags of these keys of the configuration."""
    kept, skips = [], False
    for argument in command:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_of = argument.startswith("-") and name in {f"config.{key}" for key in keys}
        if not (skips or is_of):
            kept.append(argument)
        skips = is_of and not equals
    return kept


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
            config = config_lib.parse(config_lib.with_changes(values, changes))
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
