"""The picture of a run's diagnostics: what the regularisers do to the representation."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from repulsor_jax.files import atomic

PREFIX = "diagnostics/"

# Unlike the blocks', which go from violet through green to yellow.
TERM_COLOURS = ("tab:red", "tab:orange", "tab:pink", "tab:brown", "tab:gray")

Curve = tuple[list[float], list[float]]  # steps, values


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel: its title, and the diagnostics that it shows, each with a line style of its own.

    A limit that is given is always inside the axis, so that a curve at 1 looks like a curve at 1;
    the axis grows where values lie beyond it.
    """

    title: str
    names: tuple[str, ...]
    low: float | None = None
    high: float | None = None


PANELS = (
    Panel("Collapse: cosine of samples", ("cosine_samples",), 0, 1),
    Panel("Collapse: cosine of tokens", ("cosine_tokens",), 0, 1),
    Panel("Collapse: isotropy of tokens", ("isotropy",), 0, 1),
    Panel("Collapse: effective rank", ("effective_rank",), low=1),
    Panel("Alignment and uniformity", ("alignment", "uniformity"), -4, 2),
    Panel("Probe: held-out accuracy", ("probe_accuracy",), low=0),
    Panel("Negatives: effective number", ("perplexity",), low=0),
    Panel("Negatives: share of the positive", ("positive_share",), low=0),
    Panel("Bank: own copies", ("copies_found", "copies_expected"), low=0),
    Panel("Bank: rows in use", ("filled",), low=0),
    Panel("Bank: age in steps", ("age",), low=0),
    Panel("Bank: cosine of its rows", ("cosine_bank",), 0, 1),
    Panel("Bank: cosine to today", ("drift", "drift_newest"), 0, 1),
    Panel("Gradient: share of the term", ("gradient_share",), 0, 1),
    Panel("Gradient: cosine to the flow", ("gradient_cosine",), -1, 1),
)


def draw_diagnostics(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes the diagnostics of a run as one PNG; nothing, where the rows hold none.

    Args:
      rows: those of metrics.jsonl: "step", and numbers under "diagnostics/<where>/<what>" or
        "diagnostics/<what>". `<where>` is a regulariser or a block, as "block_7". `<what>` chooses
        the panel; a name that no panel of `PANELS` has gets one of its own.
      path: of the picture.
    """
    figure = diagnostics_figure(rows)
    if figure is not None:
        with atomic.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def diagnostics_figure(rows: Iterable[Mapping[str, Any]]) -> Any:
    """The matplotlib Figure that `draw_diagnostics` writes, or None without diagnostics."""
    curves = curves_of(rows)
    if not curves:
        return None
    # Imported here: only some runs draw, and every program would start later.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = panels_of(curves)
    colours = place_colours({where for lines in curves.values() for where in lines})
    columns = min(4 if len(panels) > 9 else 3, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1 + 4 * columns, 1 + 2.4 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)  # draws without pyplot's global state or a display
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for panel, axis in zip(panels, axes, strict=False):
        draw_panel(axis, panel, curves, colours)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.supxlabel("training step", fontsize="medium")
    handles = [Line2D([], [], color=c, label=where) for where, c in colours.items() if where]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(8, len(handles)))
    return figure


def panels_of(curves: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """The panels that `curves_of` fills: those of `PANELS`, then one for each other name."""
    known = {name for panel in PANELS for name in panel.names}
    others = [Panel(name.replace("_", " "), (name,)) for name in curves if name not in known]
    return [p for p in (*PANELS, *others) if any(name in curves for name in p.names)]


def curves_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """What -> where -> its curve; numbers that are not finite are left out."""
    curves: dict[str, dict[str, Curve]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(PREFIX) and isinstance(value, float | int) and math.isfinite(value):
                where, _, what = key.removeprefix(PREFIX).rpartition("/")
                steps, values = curves.setdefault(what, {}).setdefault(where, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def place_colours(places: set[str]) -> dict[str, Any]:
    """A colour for each place, blocks from dark (the first) to light; in the legend's order."""
    from matplotlib import colormaps

    blocks = sorted((p for p in places if re.search(r"\d+$", p)), key=_number)
    terms = sorted(places.difference(blocks))
    found: dict[str, Any] = {
        term: TERM_COLOURS[i % len(TERM_COLOURS)] if term else "black"
        for i, term in enumerate(terms)
    }
    for i, block in enumerate(blocks):
        found[block] = colormaps["viridis"](0.9 * i / max(len(blocks) - 1, 1))
    return found


def _number(place: str) -> tuple[str, int]:
    name = place.rstrip("0123456789")
    return name, int(place[len(name) :])


def draw_panel(
    axis: Any, panel: Panel, curves: Mapping[str, Mapping[str, Curve]], colours: Mapping[str, Any]
) -> None:
    """Draws a panel on matplotlib axes, each place of `curves_of` in its colour."""
    shown = [name for name in panel.names if name in curves]
    for name, style in zip(shown, ("-", "--", ":"), strict=False):
        for where, (steps, values) in curves[name].items():
            marker = "." if len(steps) < 20 else ""
            axis.plot(steps, values, color=colours[where], linestyle=style, marker=marker, lw=1.3)
        if len(shown) > 1:
            axis.plot([], [], color="grey", linestyle=style, label=name.replace("_", " "))
    axis.set_title(panel.title, fontsize="medium")
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize="small")
    axis.locator_params(axis="x", nbins=5)
    for limit in (panel.low, panel.high):
        if limit is not None:
            axis.axhline(limit, color="grey", lw=0.6)  # which also takes it into the axis
    if len(shown) > 1:
        axis.legend(fontsize="small")
