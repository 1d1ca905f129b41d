"""Charts as SVG inside a page: their text is text, and their colours are the page's.

matplotlib draws with colours that stand for others, which `STYLE` defines for light and dark.
"""

import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from repulsor_jax.files.webpage import escaped

STYLE = """
:root{--line-0:#2563c9;--line-1:#c8501e;--line-2:#2c8a4b;--line-3:#8a4fc0;--line-4:#b0256b;
--line-5:#7a6a16;--ramp-0:#5b2a86;--ramp-1:#c9a400;--mark:#b45309}
@media(prefers-color-scheme:dark){
:root{--line-0:#74a9ff;--line-1:#ff9566;--line-2:#67c98a;--line-3:#c39bf0;--line-4:#ff86bb;
--line-5:#cdb95a;--ramp-0:#a06bdc;--ramp-1:#ffe04d;--mark:#fbbf24}}
svg.chart{width:100%;height:auto;display:block}
svg.chart text{font-family:inherit!important}
"""
NUM_LINES = 6
INK, MARK = "#010000", "#020000"
_VARIABLES = {"01": "var(--ink)", "02": "var(--mark)"}


def line_colour(k: int) -> str:
    """Stands for the page's colour number k, counted around."""
    return f"#0300{k % NUM_LINES:02x}"


def ramp_colour(part: float) -> str:
    """Stands for a colour between the two ends of the page's ramp, 0 and 1."""
    return f"#0400{round(100 * part):02x}"


def css(colour: str) -> str:
    """What a colour that stands for another is in the page."""
    kind, number = colour[1:3], int(colour[5:7], 16)
    if kind == "03":
        return f"var(--line-{number})"
    if kind == "04":
        return f"color-mix(in oklab, var(--ramp-1) {number}%, var(--ramp-0))"
    return _VARIABLES[kind]


def thinned(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of a line: the least and the greatest of each of `most / 2` stretches, and the ends.

    What a picture of as many columns shows of the line stays as it is.
    """
    if len(y) <= most:
        return x, y
    edges = np.linspace(0, len(y), most // 2 + 1).astype(int)
    kept = {0, len(y) - 1}
    for start, end in itertools.pairwise(edges):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    places = sorted(kept)
    return x[places], y[places]


def smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and its neighbours, `width` in all; fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(y, dtype=np.float64)])
    middle, half = np.arange(len(y)), width // 2
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def chart(title: str, draw: Callable[[Any], None]) -> str:
    """An SVG element as wide as its place in the page, of one pair of axes that `draw` fills."""
    # Imported here: only some programs draw, and every one would start later.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    settings: Any = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    settings |= {"axes.facecolor": "none", "legend.facecolor": "none", "legend.edgecolor": "none"}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.5}
    settings |= {
        "axes.titlelocation": "left",
        "axes.titley": 1.03,
        "font.size": 9.0,
        "grid.color": INK,
    }
    settings |= {"xtick.major.width": 0.5, "ytick.major.width": 0.5, "grid.linewidth": 0.4}
    settings["text.parse_math"] = False  # a name may have a $ in it
    settings |= {"svg.fonttype": "none", "svg.hashsalt": title, "axes.formatter.useoffset": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.0, 2.3))
        FigureCanvasSVG(figure)
        axis = figure.add_axes((0.13, 0.12, 0.84, 0.74))
        draw(axis)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if axis.get_yscale() == "log":
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z.]+_?\d+"', "", text)
    text = re.sub(r' d="([^"]*)"', _short_path, text)
    text = re.sub(r"(?<=: )#0[1-4]00[0-9a-f]{2}", lambda found: css(found[0]), text)
    _, _, content = text.partition("<svg ")
    box = re.search(r'viewBox="[^"]*"', content)
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    start = f'<svg class="chart" role="img" aria-label="{escaped(title)}" {links} {box and box[0]}>'
    return start + content.partition(">")[2]


def _short_path(found: re.Match[str]) -> str:
    """A path with coordinates to a hundredth of a point, on one line."""
    numbers = re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", found[1])
    return f' d="{" ".join(numbers.split())}"'
