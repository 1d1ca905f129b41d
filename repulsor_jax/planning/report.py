"""A plan in words and pictures: the text of the console, and a page with its picture in it."""

import base64
import html
import io
import pathlib
from typing import Any

import numpy as np

from repulsor_jax.files import atomic

Values = dict[str, Any]

_TITLES = {"train": "train step", "sample": "sampler", "encode": "encoder, one host"}
_GIB = 2**30
_PARTS = {
    "compute": "compute",
    "memory": "main memory",
    "links": "links",
    "network": "network between slices",
}


def plan_text(variant: Values) -> str:
    """A plan of one variant as text."""
    topology = variant["topology"]
    lines = [
        f"{topology['name']}: {topology['num_chips']} chips ({topology['chip']}), "
        f"{topology['num_hosts']} hosts"
        + (f", {topology['num_slices']} slices" if topology["num_slices"] > 1 else "")
        + f", mesh {_mesh(variant['mesh'])}, batch {variant['batch_size']:,}"
    ]
    if topology["note"]:
        lines.append(f"note: {topology['note']}")
    for name, program in variant["programs"].items():
        lines += ["", *_program_lines(name, program)]
    lines += ["", *_run_lines(variant)]
    return "\n".join(lines)


def _program_lines(name: str, program: Values) -> list[str]:
    lines = [
        f"{_TITLES[name]}: {program['images']:,} images, compiled in "
        f"{program['compile_seconds']:.1f} s"
    ]
    lines.append("  memory per chip")
    for kind, size in program["memory_bytes_per_chip"].items():
        lines.append(f"    {kind:<14}{_bytes(size):>12}")
    available = program["available_bytes_per_chip"]
    total = f"    {'sum':<14}{_bytes(program['total_bytes_per_chip']):>12}"
    if available:
        share = program["total_bytes_per_chip"] / available
        total += f" of {_bytes(available)}, {share:.0%}"
    lines.append(total)
    if not program["fits"]:
        lines.append(f"  DOES NOT FIT. The compiler: {program['refusal']}")
        if program["advice"]:
            lines.append("  Change one of these, then plan again:")
            lines += [f"    {line}" for line in program["advice"]]
        return lines
    lines.append(
        f"  FLOPs: {program['flops']:.4g} in all, {program['flops_per_image']:.4g} per image "
        f"(matrix products); {program['elementwise_flops']:.3g} elementwise"
    )
    lines.append(
        f"  main memory: {program['bytes_accessed_per_chip']:.4g} bytes read and written per chip"
    )
    lines.append(
        f"  collectives: {program['collective_bytes_per_device']:.4g} bytes on each device"
    )
    for row in program["collectives"]:
        lines.append(
            f"    {row['count']:>6} x {row['kind']:<18} over {row['axis']:<12} "
            f"{row['bytes']:>14,} bytes, largest {row['largest_bytes']:,}"
            + (", between slices" if row["over"] == "network" else "")
        )
    if name == "train" and "bank" in program["memory_bytes_per_chip"]:
        lines.append(
            "  A COLLECTIVE CARRIES THE BANK: please report this"
            if program["carries_the_bank"]
            else "  the bank stays where it is: no collective carries it"
        )
    if program["unknown_loops"]:
        lines.append(
            f"  {program['unknown_loops']} loops whose rounds are not known before they run are "
            "counted once: FLOPs, bytes and times are too low"
        )
    if program["unknown_kernels"]:
        kernels = ", ".join(f"{k} ({n})" for k, n in program["unknown_kernels"].items())
        lines.append(f"  FLOPs of these kernels are not known, and not counted: {kernels}")
    return lines + _estimate_lines(program)


def _estimate_lines(program: Values) -> list[str]:
    time = program["estimate"]
    if not time:
        return ["  no estimate of time: no peak rates are published of these devices"]
    parts = ", ".join(f"{_PARTS[k]} {_seconds(v)}" for k, v in time["seconds_by_part"].items() if v)
    lines = [
        f"  estimate from published rates, not a measurement: {parts}",
        f"    {_seconds(time['seconds'])} if all overlap (bound by {_PARTS[time['bound']]}), "
        f"{_seconds(time['serial_seconds'])} if nothing does; at most "
        f"{time['images_per_second']:,.0f} images/s",
    ]
    if "mfu" in time:
        lines.append(f"    MFU {time['mfu']:.0%} to {time['serial_mfu']:.0%} (model FLOPs / peak)")
    return lines


def _run_lines(variant: Values) -> list[str]:
    lines = []
    run, largest = variant["run"], variant.get("largest_batch")
    if largest:
        lines.append(
            f"largest batch that fits: {largest['batch_size']:,} "
            f"({_bytes(largest['total_bytes_per_chip'])} per chip), found by "
            f"{largest['compilations']} compilations in {largest['seconds']:.0f} s"
        )
    if run:
        lines.append(
            f"the run, {run['total_steps']:,} steps (estimate): {run['hours']:,.1f} to "
            f"{run['serial_hours']:,.1f} hours, {run['chip_hours']:,.0f} to "
            f"{run['serial_chip_hours']:,.0f} chip-hours"
        )
        if "cost" in run:
            lines.append(
                f"  at {run['price_per_chip_hour']:g} per chip-hour: {run['cost']:,.0f} to "
                f"{run['serial_cost']:,.0f}"
            )
    return lines


def comparison_rows(variants: list[Values]) -> list[list[str]]:
    """Train steps side by side: a row of headings, then one row for each variant."""
    rows = [
        [
            *("variant", "mesh", "batch", "fits", "memory/chip GiB", "of which bank"),
            *("FLOPs/step", "bytes/chip", "collectives/device", "step, estimate", "MFU"),
        ]
    ]
    base = next((v["programs"]["train"] for v in variants if v["programs"]["train"]["fits"]), None)
    for variant in variants:
        program = variant["programs"]["train"]
        memory = program["memory_bytes_per_chip"]
        row = [
            variant["label"],
            f"{variant['topology']['name']} {_mesh(variant['mesh'])}",
            f"{variant['batch_size']:,}",
            "yes" if program["fits"] else "NO",
            f"{program['total_bytes_per_chip'] / _GIB:.3f}",
            f"{memory.get('bank', 0) / _GIB:.4f}",
        ]
        if not program["fits"]:
            rows.append([*row, "", "", "", "", ""])
            continue
        for key in ("flops", "bytes_accessed_per_chip", "collective_bytes_per_device"):
            ratio = program[key] / base[key] if base and base[key] else 1.0
            row.append(f"{program[key]:.4g} (x {ratio:.4f})")
        time = program["estimate"]
        if not time:
            rows.append([*row, "", ""])
            continue
        row.append(f"{_seconds(time['seconds'])} to {_seconds(time['serial_seconds'])}")
        rows.append([*row, f"{time['mfu']:.0%} to {time['serial_mfu']:.0%}"])
    return rows


def table_text(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def write_page(path: pathlib.Path, title: str, variants: list[Values]) -> None:
    """Writes an HTML page that needs no other file, and its picture beside it as PNG."""
    picture = draw(variants)
    with atomic.replacing(path.with_suffix(".png")) as temporary:
        temporary.write_bytes(picture)
    body = [f"<h1>{html.escape(title)}</h1>"]
    body.append(
        "<p>Memory, FLOPs and bytes are read from the compiled program. Times are estimates from "
        "published peak rates: nothing was run.</p>"
    )
    encoded = base64.b64encode(picture).decode()
    body.append(f'<img alt="memory and time" src="data:image/png;base64,{encoded}">')
    if len(variants) > 1:
        head, *rows = comparison_rows(variants)
        body.append("<table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>")
        body += [
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
        ]
        body.append("</table>")
    for variant in variants:
        if len(variants) > 1:
            body.append(f"<h2>{html.escape(variant['label'])}</h2>")
        body.append(f"<pre>{html.escape(plan_text(variant))}</pre>")
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:75em}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em}"
        "pre{background:#f6f6f6;padding:1em;overflow:auto}"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><body>{''.join(body)}</body></html>\n"
    )
    atomic.write_text(path, page)


def draw(variants: list[Values]) -> bytes:
    """A PNG: memory by kind against what a chip has and, where known, the parts of the time."""
    import matplotlib.figure  # here, as in images.py

    bars = [
        (f"{variant['label']}\n{_TITLES[name]}" if len(variants) > 1 else _TITLES[name], program)
        for variant in variants
        for name, program in variant["programs"].items()
    ]
    timed = any(program.get("estimate") for _, program in bars)
    height = 1.2 + 0.55 * len(bars)
    figure = matplotlib.figure.Figure(figsize=(10, height * (2 if timed else 1)), dpi=110)
    axes: Any = figure.subplots(2 if timed else 1, 1, squeeze=False)[:, 0]
    memory = [
        {k: v / _GIB for k, v in program["memory_bytes_per_chip"].items()} for _, program in bars
    ]
    _stack(axes[0], [label for label, _ in bars], memory, "GiB per chip")
    limits = {program["available_bytes_per_chip"] for _, program in bars} - {None}
    for limit in limits:
        axes[0].axvline(limit / _GIB, color="black", linestyle="--")
        axes[0].annotate(
            f"{limit / _GIB:.2f} GiB", (limit / _GIB, 1), xycoords=("data", "axes fraction"),
            ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
    if timed:
        times = [(label, p["estimate"]) for label, p in bars if p.get("estimate")]
        parts = [
            {_PARTS[k]: 100 * v / t["serial_seconds"] for k, v in t["seconds_by_part"].items()}
            for _, t in times
        ]
        labels = [
            f"{label}\n{_seconds(t['seconds'])} to {_seconds(t['serial_seconds'])}"
            for label, t in times
        ]
        _stack(axes[1], labels, parts, "estimated time, % of the sum of its parts")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _stack(axis: Any, labels: list[str], bars: list[dict[str, float]], unit: str) -> None:
    import matplotlib

    widest = max((sum(bar.values()) for bar in bars), default=0.0)
    kinds = list(dict.fromkeys(k for bar in bars for k, size in bar.items() if size > widest / 500))
    colors = matplotlib.colormaps["tab10"]
    left = np.zeros(len(bars))
    for k, kind in enumerate(kinds):
        widths = np.array([bar.get(kind, 0.0) for bar in bars])
        axis.barh(range(len(bars)), widths, left=left, label=kind, color=colors(k % 10))
        left += widths
    axis.set_yticks(range(len(bars)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _mesh(mesh: Values) -> str:
    return " x ".join(f"{name}={size}" for name, size in mesh.items()) or "of one device"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= 0.1 * size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**10:,.2f} KiB"


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
