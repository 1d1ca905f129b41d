"""A plan in words and pictures: the text of the console, and a page with its pictures in it."""

import pathlib
from typing import Any

from repulsor_jax.files import atomic
from repulsor_jax.files.webpage import document, escaped, table
from repulsor_jax.runtime.chips import GIB

Values = dict[str, Any]

_TITLES = {"train": "train step", "sample": "sampler", "encode": "encoder, one host"}
_PARTS = {
    "compute": "compute",
    "memory": "main memory",
    "links": "links",
    "network": "network",
}
_COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)


def plan_text(variant: Values) -> str:
    """A plan of one variant as text."""
    topology = variant["topology"]
    slices = topology["num_slices"]
    slices = f", {slices} slices" if slices not in (1, topology["num_hosts"]) else ""
    lines = [
        f"{topology['name']}: {topology['num_chips']} chips ({topology['chip']}), "
        f"{topology['num_hosts']} hosts{slices}, mesh {_mesh(variant['mesh'])}, batch "
        f"{variant['batch_size']:,}"
    ]
    lines += [f"note: {topology['note']}"] if topology["note"] else []
    for name, program in variant["programs"].items():
        lines += ["", *_program_lines(name, program)]
    lines += ["", *_run_lines(variant)]
    if search := variant.get("search"):
        lines += ["", *_search_lines(search)]
    return "\n".join(lines)


def _search_lines(search: Values) -> list[str]:
    best = [row for row in search["compiled"] if row["on_frontier"]]
    compiled = len(search["compiled"])
    lines = [
        f"search: {compiled} settings compiled, {len(best)} of them such that no other is both "
        "quicker, by the image, and smaller (by the middle of the estimate); the quickest first",
        "",
        table_text(search_rows(search)),
        "",
        *(f"{k}: {row['command']}" for k, row in enumerate(best, 1)),
    ]
    available = search["available_bytes_per_chip"]
    missing = [
        (row["flags"], row["step"]["total_bytes_per_chip"] - available)
        for row in search["compiled"]
        if not row["step"]["fits"]
    ]
    missing += [(row["flags"], row["missing_bytes_per_chip"]) for row in search["too_large"]]
    if missing:
        lines += ["", "these do not fit, by so much a chip (those not compiled: by their state):"]
        lines += [f"  {_bytes(size):>12}  {_flags(flags)}" for flags, size in missing]
    for key, why in (
        ("cannot_be_better", "not compiled, for they cannot fit or be better than others"),
        ("not_tried", "not compiled, because of --search_limit"),
    ):
        if search[key]:
            lines += ["", f"{why}:", *(f"  {_flags(flags)}" for flags in search[key])]
    return lines


def search_rows(search: Values) -> list[list[str]]:
    """The frontier of a search: a row of headings, then the settings, the quickest first."""
    rows = [["", "images/s", "step, estimate", "bound by", "MFU", "GiB/chip", "batch", "mesh"]]
    rows[0].append("remat")
    best = [row for row in search["compiled"] if row["on_frontier"]]
    for k, row in enumerate(best, 1):
        step, time = row["step"], row["step"]["estimate"]
        rates = [step["images"] / time[key] for key in ("serial_seconds", "seconds")]
        rows.append(
            [
                f"{k}" if row["flags"] else f"{k}, as configured",
                f"{rates[0]:,.0f} to {rates[1]:,.0f}",
                f"{_seconds(time['seconds'])} to {_seconds(time['serial_seconds'])}",
                _PARTS[time["bound"]],
                f"{time['mfu']:.0%} to {time['serial_mfu']:.0%}",
                f"{step['total_bytes_per_chip'] / GIB:.2f}"
                + (", may not fit: plan it" if step["may_not_fit"] else ""),
                f"{row['batch_size']:,}",
                _mesh(step["mesh"]),
                row["remat"],
            ]
        )
    return rows


def setting_text(flags: list[str], step: Values) -> str:
    """A setting of a search and its train step in a line."""
    size = f"{step['total_bytes_per_chip'] / GIB:.2f} GiB"
    if not step["fits"]:
        return f"{_flags(flags)}: does not fit, {size}"
    time = step["estimate"]
    times = f"{_seconds(time['seconds'])} to {_seconds(time['serial_seconds'])}"
    return f"{_flags(flags)}: {times}, {size}"


def _flags(flags: list[str]) -> str:
    return " ".join(flags) or "as configured"


def _program_lines(name: str, program: Values) -> list[str]:
    lines = [
        f"{_TITLES[name]}: {program['images']:,} images, compiled in "
        f"{program['compile_seconds']:.1f} s",
        "  memory per chip",
    ]
    available, total = program["available_bytes_per_chip"], program["total_bytes_per_chip"]
    for kind, size in [*program["memory_bytes_per_chip"].items(), ("sum", total)]:
        lines.append(f"    {kind:<14}{_bytes(size):>12}")
    lines[-1] += f" of {_bytes(available)}, {total / available:.0%}" if available else ""
    if not program["emitted"]:
        lines.append(
            "    read before machine code, whose bytes, and on TPUs what it adds to the "
            "temporaries, are not in the sum"
        )
    if unsplit := program.get("unsplit_bytes_per_chip"):
        lines.append(
            f"    {_bytes(unsplit)} of parameters, optimizer and EMA lie on several devices: no "
            "split over all divides them, or they are small"
        )
    if not program["fits"]:
        lines.append(f"  DOES NOT FIT: {program['refusal']}")
        lines.append("  Change one of these, then plan again:")
        return lines + [f"    {line}" for line in program["advice"]]
    lines += [
        f"  FLOPs: {program['flops']:.4g} in all, {program['flops_per_image']:.4g} per image "
        f"(matrix products); {program['elementwise_flops']:.3g} elementwise",
        f"  main memory: {program['bytes_accessed_per_chip']:.4g} bytes read and written per chip",
        f"  collectives: {program['collective_bytes_per_device']:.4g} bytes on each device",
    ]
    for row in program["collectives"]:
        lines.append(
            f"    {row['count']:>6} x {row['kind']:<18} over {row['axis']:<12} "
            f"{row['bytes']:>14,} bytes, largest {row['largest_bytes']:,}"
            + (", over the network" if row["over"] == "network" else "")
        )
    if "bank" in program["memory_bytes_per_chip"]:
        stays = "the bank stays where it is: no collective carries it"
        travels = "A COLLECTIVE CARRIES THE BANK: its bytes grow with config.repulsor.bank_rows"
        lines.append(f"  {travels if program['carries_the_bank'] else stays}")
    if program["unknown_loops"]:
        lines.append(
            f"  {program['unknown_loops']} loops are counted once, because the number of their "
            "turns depends on the data: FLOPs, bytes and times are too low"
        )
    if program["unknown_kernels"]:
        kernels = ", ".join(f"{k} ({n})" for k, n in program["unknown_kernels"].items())
        lines.append(f"  FLOPs of these kernels are not known, and not counted: {kernels}")
    return lines + _estimate_lines(program["estimate"])


def _estimate_lines(time: Values | None) -> list[str]:
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
    lines, run = [], variant["run"]
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
    steps = [variant["programs"]["train"] for variant in variants]
    base: Values = next((step for step in steps if step["fits"]), {})
    for variant, program in zip(variants, steps, strict=True):
        row = [
            variant["label"],
            f"{variant['topology']['name']} {_mesh(variant['mesh'])}",
            f"{variant['batch_size']:,}",
            "yes" if program["fits"] else "NO",
            f"{program['total_bytes_per_chip'] / GIB:.3f}",
            f"{program['memory_bytes_per_chip'].get('bank', 0) / GIB:.4f}",
        ]
        for key in ("flops", "bytes_accessed_per_chip", "collective_bytes_per_device"):
            if program["fits"]:
                ratio = program[key] / base[key] if base[key] else 1.0
                row.append(f"{program[key]:.4g} (x {ratio:.4f})")
        if time := program.get("estimate"):
            row.append(f"{_seconds(time['seconds'])} to {_seconds(time['serial_seconds'])}")
            row.append(f"{time['mfu']:.0%} to {time['serial_mfu']:.0%}")
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def table_text(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def write_page(path: pathlib.Path, title: str, variants: list[Values]) -> None:
    """Writes an HTML page that needs no other file."""
    body = [
        f"<h1>{escaped(title)}</h1>",
        "<p>Memory, FLOPs and bytes are read from the compiled program. Times are estimates from "
        "published peak rates: nothing was run.</p>",
        *_pictures(variants),
    ]
    if len(variants) > 1:
        body.append(table(comparison_rows(variants)))
    for variant in variants:
        if search := variant.get("search"):
            body.append(table(search_rows(search)))
        body.append(f"<h2>{escaped(variant['label'])}</h2>")
        body.append(f"<pre>{escaped(plan_text(variant))}</pre>")
    atomic.write_text(path, document(title, "".join(body), style="svg{font-size:12px}"))


def _pictures(variants: list[Values]) -> list[str]:
    """Memory by kind against the memory of a chip, and the parts of the estimated times."""
    programs = {
        f"{variant['label']}, {_TITLES[name]}": program
        for variant in variants
        for name, program in variant["programs"].items()
    }
    available = max(p["available_bytes_per_chip"] or 0 for p in programs.values()) / GIB
    memory = {
        label: {kind: size / GIB for kind, size in program["memory_bytes_per_chip"].items()}
        for label, program in programs.items()
    }
    times = {
        f"{label}: {_seconds(time['seconds'])} to {_seconds(time['serial_seconds'])}": {
            _PARTS[k]: 100 * v / time["serial_seconds"] for k, v in time["seconds_by_part"].items()
        }
        for label, program in programs.items()
        if (time := program.get("estimate"))
    }
    limit = f"GiB per chip, of {available:.2f}" if available else "GiB per chip"
    charts = [(limit, memory, available), ("estimated time, % of the sum of its parts", times, 0.0)]
    return [_bars(*chart) for chart in charts if chart[1]]


def _bars(title: str, bars: dict[str, dict[str, float]], limit: float) -> str:
    """Stacked bars as SVG, one below the other, with a legend and a line at the limit."""
    widest = max(limit, *(sum(bar.values()) for bar in bars.values()))
    kinds = dict.fromkeys(k for bar in bars.values() for k, v in bar.items() if v > widest / 500)
    colors = dict(zip(kinds, _COLORS, strict=False))
    shapes, y = [f'<text x="0" y="14" font-weight="bold">{title}</text>'], 24
    for label, bar in bars.items():
        shapes.append(f'<text x="0" y="{y + 12}">{escaped(label)}</text>')
        x = 0.0
        for kind in (k for k in bar if k in colors):
            width = 700 * bar[kind] / widest
            shapes.append(
                f'<rect x="{x:.1f}" y="{y + 16}" width="{width:.1f}" height="16" '
                f'fill="{colors[kind]}"><title>{kind}: {bar[kind]:.3g}</title></rect>'
            )
            x += width
        y += 40
    if limit:
        x = 700 * limit / widest
        shapes.append(f'<path d="M{x:.1f} 24V{y}" stroke="currentColor" stroke-dasharray="4"/>')
    for k, (kind, color) in enumerate(colors.items()):
        shapes.append(f'<rect x="720" y="{24 + 18 * k}" width="12" height="12" fill="{color}"/>')
        shapes.append(f'<text x="738" y="{34 + 18 * k}">{kind}</text>')
    height = max(y, 24 + 18 * len(colors)) + 8
    svg = f'<svg width="900" height="{height}">{"".join(shapes)}</svg>'
    return f'<div class="scroll">{svg}</div>'


def _mesh(mesh: Values) -> str:
    return " x ".join(f"{name}={size}" for name, size in mesh.items()) or "of one device"


def _bytes(count: float) -> str:
    sizes = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((unit for unit, size in sizes.items() if count >= 0.1 * size), "KiB")
    return f"{count / sizes[unit]:,.2f} {unit}"


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
