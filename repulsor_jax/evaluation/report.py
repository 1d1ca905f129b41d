"""Records of evaluations: a JSON file each with its protocol, a table of all, plots."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from repulsor_jax.files import atomic, pictures
from repulsor_jax.files.untrusted import read_json

Record = dict[str, Any]

# Columns of metrics, in this order, with their digits.
_METRICS = {"fid": 2, "sfid": 2, "inception_score": 1, "precision": 3, "recall": 3, "kid": 5}
_METRICS |= {"frechet_pixels": 4, "frechet_autoencoder": 4}


def write(folder: pathlib.Path, name: str, record: Record) -> None:
    """Writes `<folder>/<name>.json`, atomically."""
    atomic.write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")


def read(folder: pathlib.Path, name: str) -> Record | None:
    """Reads `<folder>/<name>.json`; None if there is no such file."""
    path = folder / f"{name}.json"
    return _load(path) if path.is_file() else None


def read_all(folder: pathlib.Path) -> tuple[list[Record], list[str]]:
    """All records of a folder, by step, then by guidance, with the name of its file in each.

    Also the names of the files in which no record can be read.
    """
    found, others = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            record = _load(path) | {"file": path.name}
            rows([record])
            found.append((_order(record), record))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            others.append(path.name)
    return [record for _, record in sorted(found, key=lambda pair: pair[0])], others


def _order(record: Record) -> list[float]:
    """By step, then by guidance."""
    p = record["protocol"]
    numbers = p.get("step", -1), p.get("cfg_scale", 1.0), *p.get("cfg_interval", (0, 1))
    return [float(number) for number in numbers]


def _load(path: pathlib.Path) -> Record:
    """Reads a record; raises ValueError where the file holds none."""
    record = read_json(path)
    if not isinstance(record, dict) or not {"metrics", "protocol"} <= record.keys():
        raise ValueError(f"{path}: found no metrics with their protocol: remove the file")
    return record


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Headings, then a row for each record: metrics, protocol in short, and the file of all."""
    known = [m for m in _METRICS if any(m in record["metrics"] for record in records)]
    lines = [[*known, *_PROTOCOL]]
    for record in records:
        found = record["metrics"]
        numbers = [f"{found[m]:.{_METRICS[m]}f}" if m in found else "" for m in known]
        lines.append([*numbers, *(show(record) for show in _PROTOCOL.values())])
    return lines


def table(records: Sequence[Record]) -> str:
    """The same as a Markdown table."""
    header, *others = rows(records)
    widths = [max(map(len, column)) for column in zip(header, *others, strict=True)]
    lines = [header, ["-" * width for width in widths], *others]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _solver(record: Record) -> str:
    p = record["protocol"]
    if "solver" not in p:
        return ""
    steps = f"x{p['num_steps']}" if "num_steps" in p else f" {p['rtol']:g}, {p['atol']:g}"
    if p.get("time_shift", 1.0) != 1.0:
        steps += f" shift {p['time_shift']:g}"
    if "diffusion_form" in p:
        steps += f" {p['diffusion_form']} {p['diffusion_norm']:g}, last {p['last_step']}"
        if p["last_step"] != "none":
            steps += f" {p['last_step_size']:g}"
    return p["solver"] + steps


def _guidance(record: Record) -> str:
    p = record["protocol"]
    if p.get("cfg_scale", 1.0) == 1.0:
        return "off" if "cfg_scale" in p else ""
    low, high = p["cfg_interval"]
    parts = [f"{p['cfg_scale']:g}"]
    if (low, high) != (0, 1):
        parts.append(f"t {low:g}-{high:g}")
    if p["cfg_channels"]:
        parts.append(f"{p['cfg_channels']} channels")
    if isinstance(p["guide"], Mapping):
        parts.append(f"auto {p['guide']['weights_sha256'][:8]}@{p['guide']['step']}")
    return ", ".join(parts)


_PROTOCOL = {
    "of step": lambda r: str(r["protocol"].get("step", r["protocol"].get("samples"))),
    "EMA": lambda r: f"{r['protocol']['ema_decay']:g}" if "ema_decay" in r["protocol"] else "",
    "sampler": _solver,
    "guidance": _guidance,
    "samples": lambda r: f"{r['protocol']['num_samples']}",
    "labels, seed": lambda r: (
        f"{r['protocol']['labels']}, {r['protocol']['seed']}" if "labels" in r["protocol"] else ""
    ),
    "weights": lambda r: r["protocol"].get("weights_sha256", r["protocol"].get("images", ""))[:8],
    "reference": lambda r: f"{r['reference']['name']} {r['reference']['digest'][:8]}",
    "features": lambda r: f"{r['features']['name']} {r['features']['digest'][:8]}".strip(),
    "rounding": lambda r: r["protocol"].get("rounding", ""),
    "all of it": lambda r: r["file"],
}


def write_table(folder: pathlib.Path) -> str:
    """Writes `<folder>/results.md`, the table of all records there, and returns it."""
    records, others = read_all(folder)
    text = table(records)
    if others:
        text += f"\n\nLeft out, as no record can be read there: {', '.join(others)}"
    atomic.write_text(folder / "results.md", text + "\n")
    return text


def plot(folder: pathlib.Path, records: Sequence[Record]) -> pathlib.Path | None:
    """Draws the metrics of one step's evaluations: over the guidance, or one alone over the steps.

    Over the guidance, each interval is a line over the scale; where there is one scale, each end
    of an interval is a line over its start. Over the steps: all records of the folder that differ
    from this one only in the step. Returns None for a single point.
    """
    if len(records) == 1:
        records = [r for r in read_all(folder)[0] if _but_step(r) == _but_step(records[0])]
        path, label = folder / "by_step.png", "training step"
        points = [("", r["protocol"]["step"], r) for r in records]
    else:
        path, label = folder / f"sweep_step_{records[0]['protocol']['step']}.png", "guidance scale"
        if len({r["protocol"]["cfg_scale"] for r in records}) == 1:
            label, points = "guidance from t =", []
            for record in records:
                low, high = record["protocol"]["cfg_interval"]
                points.append((f"to t = {high:g}", low, record))
        else:
            points = _by_scale(records)
    if len(records) < 2:
        return None
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for metric in [m for m in _METRICS if m in records[0]["metrics"]]:
        for line, x, record in sorted(points, key=lambda point: point[1]):
            xs, ys = curves.setdefault(metric, {}).setdefault(line, ([], []))
            xs.append(x)
            ys.append(record["metrics"].get(metric, math.nan))
    pictures.save_curves(path, curves, label)
    return path


def _by_scale(records: Sequence[Record]) -> list[tuple[str, float, Record]]:
    """(line, scale, record); a record without guidance has no interval, and is in every line."""
    lines: dict[str, list[Record]] = {}
    for record in records:
        if "cfg_interval" in record["protocol"]:
            low, high = record["protocol"]["cfg_interval"]
            lines.setdefault(f"t in [{low:g}, {high:g}]", []).append(record)
    off = [record for record in records if "cfg_interval" not in record["protocol"]]
    pairs = [(line, record) for line, guided in lines.items() for record in (*off, *guided)]
    return [(line, record["protocol"]["cfg_scale"], record) for line, record in pairs]


def _but_step(record: Record) -> Record:
    """What a record was measured with, without the step and its weights."""
    protocol = {k: v for k, v in record["protocol"].items() if k not in ("step", "weights_sha256")}
    return {"protocol": protocol, "features": record["features"], "reference": record["reference"]}
