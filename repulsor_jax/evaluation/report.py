"""What an evaluation found, with its protocol: a JSON file each, a table of all, plots."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from repulsor_jax.files import atomic, pictures

Record = dict[str, Any]

TABLE = "results.md"

# Columns of metrics, in this order where they are known, with their digits.
_METRICS = {
    "fid": 2,
    "sfid": 2,
    "inception_score": 1,
    "precision": 3,
    "recall": 3,
    "kid": 5,
    "frechet_pixels": 4,
    "frechet_autoencoder": 4,
}
_STEP_PLOT, _SWEEP_PLOT = "by_step.png", "sweep_step_{step}.png"


def write(folder: pathlib.Path, name: str, record: Record) -> None:
    """Writes `<folder>/<name>.json`, atomically."""
    atomic.write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")


def read(folder: pathlib.Path, name: str) -> Record | None:
    """Reads what `write` wrote, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_all(folder: pathlib.Path) -> list[Record]:
    """All records of a folder, by step, then by guidance; with the name of its file in each."""
    paths = sorted(folder.glob("*.json"))
    records = [json.loads(path.read_text()) | {"file": path.name} for path in paths]
    return sorted(records, key=_order)


def _order(record: Record) -> tuple:
    p = record["protocol"]
    return p.get("step", -1), p.get("cfg_scale", 1.0), p.get("cfg_interval", [0, 1])


def table(records: Sequence[Record]) -> str:
    """A Markdown table, a row for each record: the metrics, their protocol, and where it is whole.

    Args:
      records: from `read_all`.
    """
    known = [m for m in _METRICS if any(m in record["metrics"] for record in records)]
    header = [*known, *_PROTOCOL]
    rows = []
    for record in records:
        found = record["metrics"]
        numbers = [f"{found[m]:.{_METRICS[m]}f}" if m in found else "" for m in known]
        rows.append([*numbers, *(show(record) for show in _PROTOCOL.values())])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
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
    text = table(read_all(folder))
    atomic.write_text(folder / TABLE, text + "\n")
    return text


def plot_steps(folder: pathlib.Path, newest: Record) -> pathlib.Path | None:
    """Draws every metric over the training step, of all records that differ from one in it alone.

    None where there is one step only.
    """
    records = [record for record in read_all(folder) if _but_step(record) == _but_step(newest)]
    if len(records) < 2:
        return None
    curves = _curves(records, lambda record: record["protocol"]["step"], lambda record: "")
    path = folder / _STEP_PLOT
    pictures.save_curves(path, curves, "training step")
    return path


def _but_step(record: Record) -> Record:
    """What a record says beside the step, its weights and the results."""
    protocol = {k: v for k, v in record["protocol"].items() if k not in ("step", "weights_sha256")}
    return {"protocol": protocol, "features": record["features"], "reference": record["reference"]}


def plot_sweep(folder: pathlib.Path, records: Sequence[Record]) -> pathlib.Path | None:
    """Draws the metrics of one step over the guidance, from two evaluations on.

    Over the scale, a line for each interval; of one scale, over the interval's start, a line for
    each end.
    """
    if len(records) < 2:
        return None
    path = folder / _SWEEP_PLOT.format(step=records[0]["protocol"]["step"])
    if len({record["protocol"]["cfg_scale"] for record in records}) == 1:
        panels = _curves(
            records,
            lambda record: record["protocol"]["cfg_interval"][0],
            lambda record: f"to t = {record['protocol']['cfg_interval'][1]:g}",
        )
        pictures.save_curves(path, panels, "guidance from t =")
        return path

    def interval(record: Record) -> str:
        low, high = record["protocol"]["cfg_interval"]
        return f"t in [{low:g}, {high:g}]"

    # Without guidance there is no interval: that point belongs to every line.
    off = [record for record in records if record["protocol"]["cfg_scale"] == 1.0]
    guided = [record for record in records if record["protocol"]["cfg_scale"] != 1.0]
    lines = dict.fromkeys(interval(record) for record in guided)
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in lines:
        own = [*off, *(record for record in guided if interval(record) == line)]
        for metric, found in _curves(
            own, lambda record: record["protocol"]["cfg_scale"], lambda record, line=line: line
        ).items():
            curves.setdefault(metric, {}).update(found)
    pictures.save_curves(path, curves, "guidance scale")
    return path


def _curves(records: Sequence[Record], x: Any, line: Any) -> Any:
    """metric -> line -> (x values, y values), in the order of x."""
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for record in sorted(records, key=x):
        for metric in _METRICS:
            if metric in record["metrics"]:
                xs, ys = curves.setdefault(metric, {}).setdefault(line(record), ([], []))
                xs.append(x(record))
                ys.append(record["metrics"][metric])
    return curves
