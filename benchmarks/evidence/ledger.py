"""What runs were measured to give, in one file of lines: it outlives the runs, which are large.

The first line says what the numbers are measured by, each other line is a run.
"""

import json
import pathlib
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.evidence.report import read_run, run_folder
from repulsor_jax.files import atomic
from repulsor_jax.files.tensors import tensors_sha256
from repulsor_jax.runtime.metrics import JSONL_NAME


def classifier_digest(path: pathlib.Path) -> str:
    """First digits of the digest of a classifier's arrays."""
    with np.load(path) as stored:
        return tensors_sha256({name: stored[name] for name in stored.files})[:16]


def pack(root: pathlib.Path, ledger: pathlib.Path) -> None:
    """Writes all measured runs below `<root>/runs` to a ledger."""
    about = {
        "classifier": classifier_digest(root / "classifier_metric.npz"),
        "floor": json.loads((root / "floor.json").read_text()),
        "jax": metadata.version("jax"),
    }
    runs = []
    for folder in sorted((root / "runs").glob("*/lr_*/seed_*")):
        found = read_run(folder)
        if found.measures:
            arm, rate, seed = folder.relative_to(root / "runs").parts
            runs.append(
                {
                    "arm": arm,
                    "rate": float(rate.removeprefix("lr_")),
                    "seed": int(seed.removeprefix("seed_")),
                    "seconds_per_step": found.seconds_per_step,
                    "measures": found.measures,
                }
            )
    lines = [json.dumps(_rounded(line), separators=(",", ":")) for line in (about, *runs)]
    ledger.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(ledger, "\n".join(lines) + "\n")


def unpack(ledger: pathlib.Path, root: pathlib.Path) -> None:
    """Puts the numbers of a ledger where those of runs lie that were not made here.

    Raises:
      ValueError: this bench's classifier is another, so that its distances are not comparable.
    """
    about, *runs = map(json.loads, ledger.read_text().splitlines())
    path = root / "classifier_metric.npz"
    if path.is_file() and (own := classifier_digest(path)) != about["classifier"]:
        raise ValueError(
            f"{ledger} has distances by the classifier {about['classifier']}, and {path} is {own}: "
            "another processor or version of jax trained it; name another --ledger"
        )
    for line in runs:
        folder = run_folder(root, line["arm"], line["rate"], line["seed"])
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        for step, numbers in line["measures"].items():
            atomic.write_text(folder / f"measure_{step}.json", json.dumps(numbers) + "\n")
        seconds = {"step": 1, "seconds_per_step": line["seconds_per_step"]}
        atomic.write_text(folder / JSONL_NAME, json.dumps(seconds) + "\n")
    if not (root / "floor.json").is_file():
        atomic.write_text(root / "floor.json", json.dumps(about["floor"]) + "\n")


def _rounded(value: Any) -> Any:
    """Floats with 5 digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
