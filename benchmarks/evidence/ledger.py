"""What runs were measured to give, in one file of lines: it outlives the runs, which are large.

The first line says what the numbers are measured by, each other line is a run.
"""

import json
import pathlib
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.evidence.report import SECONDS_NAME, read_run, run_folder
from repulsor_jax.files import atomic
from repulsor_jax.runtime.metrics import JSONL_NAME

# Two kinds of processors trained classifiers that gave real pictures the same distance and accuracy
# to 5 digits, and differed in their bits.
TOLERANCE = 0.001


def pack(root: pathlib.Path, ledger: pathlib.Path) -> None:
    """Adds all measured runs below `<root>/runs` to a ledger; what it has stays."""
    runs: dict[tuple[str, float, int], dict[str, Any]] = {}
    if ledger.is_file():
        about, *lines_there = map(json.loads, ledger.read_text().splitlines())
        runs = {(line["arm"], line["rate"], line["seed"]): line for line in lines_there}
    else:
        floor = json.loads((root / "floor.json").read_text())
        about = {"floor": floor, "jax": metadata.version("jax")}
    if (path := root / SECONDS_NAME).is_file():
        about["seconds_per_step"] = json.loads(path.read_text())
    for folder in (root / "runs").glob("*/lr_*/seed_*"):
        found = read_run(folder)
        if not found.measures:
            continue
        arm, lr, number = folder.relative_to(root / "runs").parts
        rate, seed = float(lr.removeprefix("lr_")), int(number.removeprefix("seed_"))
        line = {"arm": arm, "rate": rate, "seed": seed, "seconds_per_step": found.seconds_per_step}
        known: dict[str, Any] = runs.get((arm, rate, seed), {"measures": {}})
        measures = {str(step): numbers for step, numbers in found.measures.items()}
        for step, numbers in known["measures"].items():
            measures[step] = measures.get(step, {}) | numbers
        runs[arm, rate, seed] = {**line, **known, "measures": measures}
    ordered = [runs[key] for key in sorted(runs)]
    lines = [json.dumps(_rounded(line), separators=(",", ":")) for line in (about, *ordered)]
    ledger.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(ledger, "\n".join(lines) + "\n")


def unpack(ledger: pathlib.Path, root: pathlib.Path) -> None:
    """Puts the numbers of a ledger where those of runs lie that were not measured here.

    Raises:
      ValueError: real pictures are measured otherwise by this bench than by that of the ledger, so
        that its distances are not comparable.
    """
    about, *runs = map(json.loads, ledger.read_text().splitlines())
    path = root / "floor.json"
    here = json.loads(path.read_text()) if path.is_file() else about["floor"]
    for name in ("samples", "pixels", "features", "accuracy"):
        if not np.isclose(here[name], about["floor"][name], rtol=TOLERANCE):
            raise ValueError(
                f"{ledger}: real pictures have {name}={about['floor'][name]:.5g} there and "
                f"{here[name]:.5g} in {root}: pictures, samples or classifier are others, and "
                "distances cannot be compared; name another --ledger"
            )
    for line in runs:
        folder = run_folder(root, line["arm"], line["rate"], line["seed"])
        if list(folder.glob("measure_*.json")):
            continue  # two machines' numbers of a run are not mixed
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / JSONL_NAME).exists():
            seconds = {"step": 1, "seconds_per_step": line["seconds_per_step"]}
            atomic.write_text(folder / JSONL_NAME, json.dumps(seconds) + "\n")
        for step, numbers in line["measures"].items():
            atomic.write_text(folder / f"measure_{step}.json", json.dumps(numbers) + "\n")
    for name, key in (("floor.json", "floor"), (SECONDS_NAME, "seconds_per_step")):
        if key in about and not (root / name).is_file():
            atomic.write_text(root / name, json.dumps(about[key]) + "\n")


def _rounded(value: Any) -> Any:
    """Floats with 5 digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
