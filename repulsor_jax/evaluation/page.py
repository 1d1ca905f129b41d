"""The page of a run, `<workdir>/report.html`: all that a run has written, in one file to look at.

It reads files of the working directory alone, so that the page of any run can be made after it.
"""

import base64
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import math
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from repulsor_jax import __version__, sharding
from repulsor_jax.checkpoints import resuming
from repulsor_jax.data.latents import LatentDataset
from repulsor_jax.data.listing import describe_classes
from repulsor_jax.evaluation import report
from repulsor_jax.experiment import Experiment
from repulsor_jax.files import atomic, charts
from repulsor_jax.files.untrusted import printable, read_json
from repulsor_jax.files.webpage import document, escaped, table
from repulsor_jax.runtime import diagnostics_plot
from repulsor_jax.runtime.guard import EVENTS
from repulsor_jax.runtime.metrics import JSONL_NAME, read_jsonl
from repulsor_jax.runtime.preemption import Preempted

PAGE_NAME = "report.html"
RECORD_NAME = "run.json"  # what is trained, on what and where, and each start and end

SHARE = 0.01  # of a run's time that making its page may take
MOST_POINTS = 600  # of a line
MOST_PANELS = 40  # of metrics
MOST_ROWS = 50  # of a table: the newest
MOST_GRIDS = 12
MOST_GRID_BYTES = 90_000

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def describe(
    experiment: Experiment, dataset: LatentDataset, params: Any, config_record: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run trains, on what and where, as plain values for its record.

    Args:
      experiment, dataset: of the run.
      params: of the model, or their shapes.
      config_record: the configuration as plain values.
    """
    config, mesh = experiment.config, experiment.mesh
    m, device = config.model, mesh.devices.flat[0]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    kind = type(experiment.model).__name__
    axes = ", ".join(f"{name} {size}" for name, size in sharding.sizes(mesh).items())
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    devices = "device" if mesh.size == 1 else "devices"
    return {
        "model": f"{kind}, {m.depth} blocks of width {m.hidden_size}, patch {m.patch_size}, "
        f"{count / 1e6:,.2f} million parameters",
        "terms": config.terms,
        "data": f"{dataset.num_images:,} images of {describe_classes(dataset.class_names)}",
        "data_directory": str(dataset.directory),
        "latents": f"{' x '.join(map(str, dataset.latent_shape))}, of {dataset.autoencoder!r}",
        "devices": f"{mesh.size:,} {devices}, {device.device_kind}; mesh {axes}; "
        f"{jax.process_count():,} " + ("process" if jax.process_count() == 1 else "processes"),
        "total_steps": config.total_steps,
        "batch_size": config.batch_size,
        "versions": {"repulsor_jax": __version__}
        | versions
        | {"Python": platform.python_version(), "system": platform.platform()},
        "config": dict(config_record),
    }


@dataclasses.dataclass
class Page:
    """Keeps the page of a run that trains; a context manager, at whose ends it is written too.

    What cannot be drawn or written is reported, and training goes on.
    """

    workdir: pathlib.Path
    enabled: bool  # on the first process, where the configuration asks for it
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._session: dict[str, Any] = {}
        self._record: dict[str, Any] = {}
        self._written, self._took = -math.inf, 0.0

    def __enter__(self) -> Self:
        return self

    def start(self, about: Mapping[str, Any], first_step: int) -> None:
        """Notes that the run starts, or goes on, from a step, and writes the page."""
        if not self.enabled:
            return
        self._session = {"began": _now(), "first_step": first_step}
        sessions = [*_sessions(_read_record(self.workdir)), self._session][-MOST_ROWS:]
        self._record = {"about": dict(about), "sessions": sessions}
        self._save()
        self._write()

    def refresh(self) -> None:
        """Writes the page anew, unless that took more than 1 % of the time since the last time."""
        if self.enabled and self.clock() - self._written >= self._took / SHARE:
            self._write()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if not self._session:
            return
        self._session["ended"] = _now()
        if kind is None:
            self._session |= {"state": "finished"}
        elif issubclass(kind, Preempted | KeyboardInterrupt):
            self._session |= {"state": "stopped", "how": printable(str(error)) or "interrupted"}
        else:
            how = printable(f"{kind.__name__}: {error}")[:1000]
            self._session |= {"state": "failed", "how": how}
        self._save()
        self._write()

    def _save(self) -> None:
        with reported(f"{RECORD_NAME} is not written"):
            text = json.dumps(self._record, indent=1) + "\n"
            atomic.write_text(self.workdir / RECORD_NAME, text)

    def _write(self) -> None:
        started = self.clock()
        with reported(f"{PAGE_NAME} is not written"):
            write_page(self.workdir, running="ended" not in self._session)
        self._written = self.clock()
        self._took = self._written - started


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Says what went wrong in one line, in place of raising it: no page is worth a run."""
    try:
        yield
    except Exception as error:
        tqdm.write(printable(f"warning: {what} ({type(error).__name__}: {error})"))


def make_page(workdir: pathlib.Path) -> pathlib.Path | None:
    """Makes the page of a run that is over, or that another job trains; None where there is none.

    Raises:
      OSError: it cannot be written.
    """
    if not any((workdir / name).is_file() for name in (RECORD_NAME, JSONL_NAME)):
        return None
    return write_page(workdir, running=_seems_alive(workdir))


def _seems_alive(workdir: pathlib.Path) -> bool:
    """Whether a job gives a sign of life as the one that trains here, see `files.locks`."""
    try:
        return time.time() - (workdir / ".locks" / "training.json").stat().st_mtime < 60.0
    except OSError:
        return False


def write_page(workdir: pathlib.Path, *, running: bool) -> pathlib.Path:
    """Writes `<workdir>/report.html`, atomically, of what is there; `running` if it still trains.

    Text and numbers of the files are from outside: what does not fit is left out, or named.
    """
    record = _read_record(workdir)
    rows = [row for row in read_jsonl(workdir / JSONL_NAME) if _is_count(row.get("step"))]
    curves = _curves(rows)
    evaluations, unread = report.read_all(workdir / "evaluations")
    refused = list(read_jsonl(workdir / EVENTS))
    state = _state(record, curves, running)
    name = workdir.absolute().name
    body = [
        _head(name, record, state),
        _tiles(state, curves, refused),
        _grids(workdir / "samples"),
        _metric_charts(curves, _sessions(record), refused),
        _evaluation_section(evaluations, unread),
        _history(workdir, record, refused, running),
        _diagnostics(rows),
        _set_up(record),
    ]
    title = f"{name}: {state.label}, {state.words}"
    path = workdir / PAGE_NAME
    atomic.write_text(path, document(title, "\n".join(body), charts.STYLE + _STYLE, _SCRIPT))
    return path


# ---------------------------------------------------------------- what the files say


def _read_record(workdir: pathlib.Path) -> dict[str, Any]:
    try:
        record = read_json(workdir / RECORD_NAME)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _sessions(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = record.get("sessions")
    return [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []


def _about(record: Mapping[str, Any]) -> dict[str, Any]:
    found = record.get("about")
    return found if isinstance(found, dict) else {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Metrics but the diagnostics, each over the steps."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            is_metric = name != "step" and not name.startswith(diagnostics_plot.PREFIX)
            if is_metric and _is_number(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return {name: (np.array(x), np.array(y, float)) for name, (x, y) in found.items()}


class _State(NamedTuple):
    """How far a run is."""

    kind: str  # "running", "finished", "stopped", "failed" or "unknown"
    words: str
    step: int
    total: int | None
    left: str  # time, in words, or ""
    why: str  # it stopped

    @property
    def label(self) -> str:
        """The kind in words."""
        return "not running" if self.kind == "unknown" else self.kind


def _state(record: Mapping[str, Any], curves: Mapping[str, Curve], running: bool) -> _State:
    sessions, total = _sessions(record), _about(record).get("total_steps")
    total = total if _is_count(total) else None
    steps = [int(x[-1]) for x, _ in curves.values()]
    steps += [s["first_step"] for s in sessions if _is_count(s.get("first_step"))]
    step = max(steps, default=0)
    last = sessions[-1] if sessions else {}
    kind, why = str(last.get("state", "")), str(last.get("how", ""))
    if kind not in ("finished", "stopped", "failed"):
        kind = "running" if running else "unknown"
        why = "" if running or not sessions else "it ended without a word"
    left = ""
    if kind == "running" and total is not None and "seconds_per_step" in curves:
        per_step = statistics.median(curves["seconds_per_step"][1][-20:])
        left = f"{_duration((total - step) * per_step)} left"
    of = f"step {step:,}" + (f" of {total:,}" if total is not None else "")
    words = ", ".join(filter(None, [of, left]))
    return _State(kind, words, step, total, left, why)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 60 * 48 else f"{minutes / 60 / 24:.1f} days"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


# ---------------------------------------------------------------- the page's parts

_STYLE = """
header{margin-bottom:1.2rem}
header p{margin:.3em 0;color:var(--dim)}
.state{display:inline-block;border-radius:1em;padding:.1em .8em;font-weight:600;color:var(--page)}
.running{background:var(--line-0)}.finished{background:var(--line-2)}
.stopped,.unknown{background:var(--mark)}.failed{background:#c62828;color:#fff}
.done{display:block;width:100%;height:.5rem;margin:.8rem 0;accent-color:var(--line-0)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.7rem}
.tiles div{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
.tiles b{display:block;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;
line-height:1.3}
.tiles span{color:var(--dim);font-size:.85rem;display:block}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem}
.grids{max-width:36rem}
.grids input{width:100%;margin:.6rem 0;accent-color:var(--line-0)}
.grids figure{margin:0}
.grids img{width:100%;height:auto;display:block;border-radius:.3rem}
figcaption,.note{color:var(--dim);font-size:.9rem}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.4rem 0 .8rem;font-size:.9rem}
.key i{display:inline-block;width:1.1em;height:.25em;border-radius:.1em;margin-right:.4em;
vertical-align:middle}
.facts td:first-child{color:var(--dim)}
.facts td{white-space:normal}
summary{cursor:pointer;margin:.6rem 0}
.bad{color:var(--mark)}
"""

_SCRIPT = """
for (const box of document.querySelectorAll(".grids")) {
  const range = box.querySelector("input"), all = box.querySelectorAll("figure");
  const show = () => all.forEach((each, k) => { each.hidden = k !== Number(range.value); });
  range.hidden = all.length < 2;
  range.addEventListener("input", show);
  show();
}
"""


def _head(name: str, record: Mapping[str, Any], state: _State) -> str:
    about = _about(record)
    lines = [about.get("model"), about.get("data"), about.get("devices")]
    shown = "".join(f"<p>{escaped(line)}</p>" for line in lines if line)
    why = f"<p>{escaped(state.why)}</p>" if state.why else ""
    bar = ""
    if state.total:
        bar = f'<progress class="done" max="{state.total}" value="{state.step}"></progress>'
    return (
        f"<header><h1>{escaped(name)}</h1>"
        f'<p><span class="state {state.kind}">{state.label}</span> {escaped(state.words)}</p>'
        f"{why}{bar}{shown}<p>as of {_now()}</p></header>"
    )


def _tiles(state: _State, curves: Mapping[str, Curve], events: Sequence[Any]) -> str:
    def last(name: str) -> float | None:
        return float(curves[name][1][-1]) if name in curves else None

    tiles = [("step", f"{state.step:,}", f"of {state.total:,}" if state.total else "")]
    if state.left:
        tiles.append(("time left", state.left.removesuffix(" left"), "at the present speed"))
    if (loss := last("loss")) is not None:
        tiles.append(("loss", f"{loss:.4g}", "mean of the last steps"))
    for name in [name for name in curves if _is_evaluation(name)][:2]:
        steps, values = curves[name]
        best = int(values.argmin())
        metric, _, count = name.rpartition("_")
        if metric.startswith(("fid", "sfid", "frechet", "kid")):
            where = f"lowest, at step {steps[best]:,}; {int(count):,} samples"
            tiles.append((metric.replace("_", " "), f"{values[best]:.4g}", where))
    if (speed := last("images_per_second")) is not None:
        mfu = last("mfu")
        tiles.append(("images/s", f"{speed:,.0f}", f"{mfu:.1%} MFU" if mfu is not None else ""))
    if refused := sum(event.get("event") == "refused" for event in events):
        tiles.append(("refused steps", f"{refused:,}", "see the faults below"))
    cells = [
        f"<div><span>{escaped(label)}</span><b>{escaped(value)}</b><span>{escaped(note)}</span></div>"
        for label, value, note in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _is_evaluation(name: str) -> bool:
    """Metrics of samples that training drew have the number of samples at their end."""
    return re.search(r"_\d+$", name) is not None


def _grids(folder: pathlib.Path) -> str:
    paths = sorted(folder.glob("train_*.png"))
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MOST_GRIDS)).round())
    figures = []
    for path in [paths[int(k)] for k in chosen] if paths else []:
        try:
            kind, content = _small_picture(path)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # it is being replaced, or is no picture
        step = path.stem.removeprefix("train_")
        caption = f"step {int(step):,}" if step.isdecimal() else path.stem
        data = base64.b64encode(content).decode()
        figures.append(
            f'<figure><img alt="samples, {escaped(caption)}" src="data:image/{kind};base64,{data}">'
            f"<figcaption>{escaped(caption)}</figcaption></figure>"
        )
    if not figures:
        return ""
    last = len(figures) - 1
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="training step">'
    note = f"{len(figures)} of {len(paths)} grids; " if len(paths) > len(figures) else ""
    return (
        f'<section><h2>Samples along training</h2><p class="note">{note}drawn from the EMA '
        f'parameters, always of the same noise</p><div class="grids">{slider}'
        f"{''.join(figures)}</div></section>"
    )


def _small_picture(path: pathlib.Path) -> tuple[str, bytes]:
    """Kind and bytes of a picture: the file's own where they are few, else a WebP that is small."""
    return _encoded(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2 * MOST_GRIDS)
def _encoded(path: pathlib.Path, changed: int) -> tuple[str, bytes]:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
        if len(content) <= MOST_GRID_BYTES:
            picture.verify()
            return "png", content
        shown = picture.convert("RGB")
    side = 1024.0
    while True:
        shown.thumbnail((side, side))
        file = io.BytesIO()
        shown.save(file, format="WEBP", quality=80, method=1)
        if file.tell() <= MOST_GRID_BYTES or side < 64:
            return "webp", file.getvalue()
        side = min(side, *shown.size) * 0.9 * math.sqrt(MOST_GRID_BYTES / file.tell())


def _metric_charts(
    curves: Mapping[str, Curve], sessions: Sequence[Mapping[str, Any]], events: Sequence[Any]
) -> str:
    """Losses, distances of samples, the course of the optimisation, the speed."""
    goes_on = [s["first_step"] for s in sessions if _is_count(s.get("first_step"))]
    goes_on = [step for step in goes_on if step]
    refused = [event["step"] for event in events if _is_count(event.get("step"))]
    constant = [n for n, (_, y) in curves.items() if n.endswith("_weight") and np.ptp(y) == 0]
    left_out = ("seconds_per_step", "images_per_second_per_chip", "teraflops_per_chip", *constant)

    def place(name: str) -> tuple[int, str]:
        if name == "loss" or name.endswith("_loss"):
            return 0, "" if name == "loss" else name
        return 1 if _is_evaluation(name) else 3 if name in ("images_per_second", "mfu") else 2, name

    names = sorted((name for name in curves if name not in left_out), key=place)
    if not names:
        return ""
    drawn = [
        _metric_chart(
            name, *curves[name], *((goes_on, refused) if place(name)[0] == 0 else ([], []))
        )
        for name in names[:MOST_PANELS]
    ]
    notes = [f"{name.replace('_', ' ')} is {curves[name][1][0]:g} throughout" for name in constant]
    if len(names) > MOST_PANELS:
        notes.append(f"{len(names) - MOST_PANELS:,} more metrics are in {JSONL_NAME}")
    if goes_on or refused:
        notes.append(
            "vertical lines in the losses: dashed where the run went on from a checkpoint, dotted "
            "where a step was refused"
        )
    return (
        f'<section><h2>Curves</h2><div class="charts">{"".join(drawn)}</div>'
        f'<p class="note">{escaped("; ".join(notes))}</p></section>'
    )


def _metric_chart(
    name: str, steps: np.ndarray, values: np.ndarray, goes_on: list[int], refused: list[int]
) -> str:
    def draw(axis: Any) -> None:
        faint = len(values) >= 100
        marker = "." if len(values) < 30 else ""
        x, y = charts.thinned(steps, values, MOST_POINTS)
        colour = charts.line_colour(0)
        axis.plot(
            x, y, color=colour, lw=0.7 if faint else 1.3, alpha=0.4 if faint else 1.0, marker=marker
        )
        if faint:
            mean = charts.smoothed(values, max(3, len(values) // 40))
            axis.plot(*charts.thinned(steps, mean, MOST_POINTS // 3), color=colour, lw=1.5)
        if values.min() > 0 and values.max() > 30 * values.min():
            axis.set_yscale("log")
        for places, style in ((goes_on, "--"), (refused, ":")):
            for step in sorted({*places})[-30:]:
                axis.axvline(step, color=charts.MARK, lw=0.8, linestyle=style)
        axis.set_title(name.replace("_", " "), fontsize="medium")
        axis.grid(alpha=0.15)
        axis.tick_params(labelsize="small")
        axis.locator_params(axis="x", nbins=5)

    return charts.chart(printable(name)[:60], draw)


def _evaluation_section(records: Sequence[report.Record], unread: Sequence[str]) -> str:
    parts = []
    if records:
        heads, *lines = report.rows(records[-MOST_ROWS:])
        parts.append(table([heads, *lines]))
    for record in records[-MOST_ROWS:]:
        for warning in record.get("warnings") or ():
            parts.append(f'<p class="bad">{escaped(record["file"])}: {escaped(warning)}</p>')
    if unread:
        names = escaped(", ".join(unread[:10]))
        parts.append(f'<p class="bad">files that hold no evaluation: {names}</p>')
    return f"<section><h2>Evaluations</h2>{''.join(parts)}</section>" if parts else ""


def _diagnostics(rows: Sequence[Mapping[str, Any]]) -> str:
    curves: dict[str, dict[str, diagnostics_plot.Curve]] = {}
    for what, lines in diagnostics_plot.curves_of(rows).items():
        for where, (steps, values) in lines.items():
            x, y = charts.thinned(np.array(steps), np.array(values), MOST_POINTS // 2)
            curves.setdefault(what, {})[where] = x.tolist(), y.tolist()
    if not curves:
        return ""
    places = list(diagnostics_plot.place_colours({w for lines in curves.values() for w in lines}))
    blocks = [place for place in places if re.search(r"\d+$", place)]
    terms = [place for place in places if place not in blocks]
    colours = {place: charts.line_colour(k) for k, place in enumerate(terms)}
    for k, block in enumerate(blocks):
        colours[block] = charts.ramp_colour(k / max(len(blocks) - 1, 1))
    drawn = [
        charts.chart(
            panel.title,
            functools.partial(
                diagnostics_plot.draw_panel, panel=panel, curves=curves, colours=colours
            ),
        )
        for panel in diagnostics_plot.panels_of(curves)[:MOST_PANELS]
    ]
    key = "".join(
        f'<span><i style="background:{charts.css(colours[p])}"></i>{escaped(p)}</span>'
        for p in places
        if p
    )
    return (
        '<section><h2>Diagnostics</h2><p class="note">What the terms do to the representation; '
        f'docs/training.md says what is healthy.</p><div class="key">{key}</div>'
        f'<div class="charts">{"".join(drawn)}</div></section>'
    )


def _history(
    workdir: pathlib.Path, record: Mapping[str, Any], events: Sequence[Any], running: bool
) -> str:
    """Starts and ends, refused steps, what changed or was damaged, hangs."""
    sessions = _sessions(record)
    starts = []
    for k, session in enumerate(sessions, start=1):
        open_end = "runs" if running and k == len(sessions) else "without a word"
        how = session.get("how") or session.get("state") or open_end
        starts.append([*(session.get(key, "") for key in ("began", "first_step", "ended")), how])
    notes = [
        [line.get("time", ""), line.get("step", ""), note]
        for line in read_jsonl(workdir / resuming.JSONL_NAME)
        for note in (line["notes"] if isinstance(line.get("notes"), list) else [])
    ]
    keys = ("time", "event", "step", "batch", "loss", "grad_norm", "policy", "arrays")
    refused = [[_short_number(event.get(key, "")) for key in keys] for event in events]
    hangs = [[line] for path in sorted((workdir / "hangs").glob("*.txt")) for line in _heads(path)]
    parts = [
        _folded("Starts and ends", ("began", "at step", "ended", "how"), starts),
        _folded("Damaged checkpoints and changes", ("time", "from step", "what"), notes),
        _folded("Refused steps", keys, refused),
        _folded("Hangs", ("report of the watchdog",), hangs),
    ]
    if not (notes or refused or hangs):
        calm = "No step was refused, no checkpoint was damaged, no process hung."
        parts.append(f'<p class="note">{calm}</p>')
    return f"<section><h2>Faults and restarts</h2>{''.join(parts)}</section>"


def _folded(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The newest rows of a table under a title that opens it; open where they are few."""
    if not rows:
        return ""
    shown = [[str(cell)[:500] for cell in row] for row in rows[-MOST_ROWS:]]
    newest = f", the newest {len(shown)}" if len(shown) < len(rows) else ""
    return (
        f"<details{' open' if len(rows) <= 10 else ''}><summary>{title}: {len(rows):,}{newest}"
        f"</summary>{table([heads, *shown])}</details>"
    )


def _short_number(value: object) -> object:
    """A number as text, as the guard writes it, with few digits; anything else as it is."""
    try:
        return f"{float(value):.5g}" if isinstance(value, str) else value
    except ValueError:
        return value


def _heads(path: pathlib.Path) -> list[str]:
    """The first line of each report of the watchdog."""
    with path.open("rb") as file:
        text = file.read(1 << 20).decode("utf-8", "replace")
    return [
        line[:300] for line in text.splitlines() if re.match(r"\d{4}-\d\d-\d\d .*: process", line)
    ]


def _set_up(record: Mapping[str, Any]) -> str:
    about = _about(record)
    if not about:
        return ""
    names = ("model", "terms", "data", "data_directory", "latents", "devices", "batch_size")
    rows = [[name.replace("_", " "), about[name]] for name in names if name in about]
    versions = about.get("versions")
    rows += [[n, v] for n, v in versions.items()] if isinstance(versions, dict) else []
    config = json.dumps(about.get("config", {}), indent=2)
    return (
        f'<section><h2>Set-up and versions</h2><div class="facts">{table(rows, headed=False)}</div>'
        f"<details><summary>The whole configuration</summary><pre>{escaped(config)}</pre></details>"
        "</section>"
    )
