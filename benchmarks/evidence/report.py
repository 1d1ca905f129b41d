"""Tables and pictures of what was measured, partial where runs are missing."""

import argparse
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.evidence.statistics import mean_and_spread, paired_ratio
from repulsor_jax.files import atomic
from repulsor_jax.files.pictures import Curve, save_curves
from repulsor_jax.runtime.metrics import JSONL_NAME, read_jsonl

SEARCH_SEED = 100  # of the search for learning rates; never among those that count
SECONDS_NAME = "seconds.json"  # of a step, by arm
MEASURES = {"features": "features", "pixels": "pixels", "flow_loss": "held-out flow loss"}

Numbers = Mapping[int, dict[str, Any]]  # step -> numbers by name


class Run(NamedTuple):
    """A measured run."""

    measures: Numbers
    seconds_per_step: float  # nan where it is not known


def read_run(workdir: pathlib.Path) -> Run:
    """Reads what `measure_run` wrote, and the time of a step: the 10th percentile of the log.

    A low percentile, because other programs on the machine can only slow a step down.
    """
    measures = {
        int(path.stem.partition("_")[2]): json.loads(path.read_text())
        for path in workdir.glob("measure_*.json")
    }
    lines = read_jsonl(workdir / JSONL_NAME)
    times = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    fast = float(np.quantile(times, 0.1)) if times else math.nan
    return Run(dict(sorted(measures.items())), fast)


def is_whole(args: argparse.Namespace, run: Run, steps: int) -> bool:
    """Whether a run has all numbers of its last step, those of every stretch included."""
    last = run.measures.get(steps, {})
    return all(f"features@{scale:g}" in last for scale in (1.0, *args.stretches))


def run_folder(root: pathlib.Path, arm: str, rate: float, seed: int) -> pathlib.Path:
    """Where a run lies."""
    return root / "runs" / arm / f"lr_{rate:g}" / f"seed_{seed}"


def read_search(
    root: pathlib.Path, arms: Sequence[str], rates: Sequence[float]
) -> dict[str, dict[float, dict[str, Any]]]:
    """arm -> rate -> numbers of the search, at the newest step that all its runs have."""
    runs = {
        a: {r: read_run(run_folder(root, a, r, SEARCH_SEED)).measures for r in rates} for a in arms
    }
    found = {}
    for arm, by_rate in runs.items():
        measured = {rate: numbers for rate, numbers in by_rate.items() if numbers}
        shared = set.intersection(*map(set, measured.values())) if measured else set()
        if shared:
            found[arm] = {rate: numbers[max(shared)] for rate, numbers in measured.items()}
    return found


def best_rates(root: pathlib.Path, arms: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
    """arm -> the rate whose run of the search has the smallest held-out flow loss.

    Of one run, only that is known well enough to choose by: it differs by a thousandth between
    seeds, distances by a tenth. Arms without a search have the only rate, or are left out.
    """
    if len(rates) == 1:
        return dict.fromkeys(arms, rates[0])
    search = read_search(root, arms, rates)
    return {
        arm: min(by_rate, key=lambda rate: by_rate[rate]["flow_loss"])
        for arm, by_rate in search.items()
    }


def write(args: argparse.Namespace) -> str:
    """Returns the tables as Markdown; writes them to `report.md`, and pictures beside it.

    Args:
      args: `root` of a bench, `arms`, `baseline`, `rates`, `seeds`, `steps`, `batch_size`.
    """
    rates = best_rates(args.root, args.arms, args.rates)
    runs: dict[str, dict[int, Run]] = {}
    for arm, rate in rates.items():
        by_seed = {s: read_run(run_folder(args.root, arm, rate, s)) for s in args.seeds}
        runs[arm] = {s: run for s, run in by_seed.items() if is_whole(args, run, args.steps)}
    missing = sum(len(args.seeds) - len(runs.get(arm, ())) for arm in args.arms)
    parts = [_floor(args), _search(args, rates)]
    runs = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    if runs.get(args.baseline):
        sections = (_arms, _seeds, _stretched, _times, _against_no_bank, _seconds)
        parts += [section(args, runs, rates) for section in sections]
        _draw_curves(args, runs)
        _draw_ratios(args, runs)
    if missing:
        parts.insert(
            0, f"PARTIAL: {missing} of {len(args.arms) * len(args.seeds)} runs are missing."
        )
    text = "\n\n".join(filter(None, parts)) + "\n"
    args.root.mkdir(parents=True, exist_ok=True)
    atomic.write_text(args.root / "report.md", text)
    return text


Runs = Mapping[str, Mapping[int, Run]]
Rates = Mapping[str, float]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _floor(args: argparse.Namespace) -> str:
    path = args.root / "floor.json"
    if not path.is_file():
        return ""
    f = json.loads(path.read_text())
    return (
        f"Distances of {f['samples']:,} samples to all held-out pictures; as many real pictures "
        f"that the classifier has seen get {f['features']:.2f} (features) and {f['pixels']:.2f} "
        f"(pixels). The classifier's accuracy on held-out pictures is {f['accuracy']:.3f}."
    )


def _search(args: argparse.Namespace, rates: Rates) -> str:
    search = read_search(args.root, args.arms, args.rates)
    if len(args.rates) == 1 or not search:
        return ""

    def cell(arm: str, rate: float) -> str:
        found = search[arm].get(rate)
        if not found:
            return "-"
        text = f"{_smallest(found, 'features'):.2f} / {_smallest(found, 'pixels'):.2f}"
        text += f" / {found['flow_loss']:.4f}"
        return f"**{text}**" if rates[arm] == rate else text

    rows = [[arm, *(cell(arm, rate) for rate in args.rates)] for arm in search]
    title = (
        f"Search, seed {SEARCH_SEED}, {args.search_steps:,} steps: features / pixels / flow loss"
    )
    return _table(title, ["arm", *(f"{rate:g}" for rate in args.rates)], rows)


def _smallest(numbers: Mapping[str, Any], measure: str) -> float:
    """A distance of a run at the stretch of the velocity that is the best for it."""
    return min(value for name, value in numbers.items() if name.startswith(f"{measure}@"))


def _values(by_seed: Mapping[int, Run], step: int, name: str) -> dict[int, float]:
    return {seed: run.measures[step][name] for seed, run in by_seed.items()}


def _at_best(
    args: argparse.Namespace, by_seed: Mapping[int, Run], measure: str
) -> dict[int, float]:
    """seed -> a measure after all steps; a distance at one stretch for all seeds, the best."""
    if measure == "flow_loss":
        return _values(by_seed, args.steps, measure)
    scales = (1.0, *args.stretches)
    found = [_values(by_seed, args.steps, f"{measure}@{scale:g}") for scale in scales]
    return min(found, key=lambda values: float(np.mean(list(values.values()))))


def _best_probe(args: argparse.Namespace, by_seed: Mapping[int, Run]) -> dict[int, float]:
    """seed -> accuracy of the linear probe of the best block."""
    return {s: max(run.measures[args.steps]["probe_by_block"]) for s, run in by_seed.items()}


def _compared(own: Mapping[int, float], base: Mapping[int, float], digits: int = 2) -> str:
    """The paired ratio as text; "-" where no seed is in both."""
    if not own.keys() & base.keys():
        return "-"
    r = paired_ratio(own, base)
    text = f"{r.ratio:.{digits}f}"
    return text if math.isnan(r.low) else f"{text} [{r.low:.{digits}f}, {r.high:.{digits}f}]"


def _arms(args: argparse.Namespace, runs: Runs, rates: Rates) -> str:
    """Every arm beside the baseline at equal steps."""
    head = ["arm", "rate", "seeds"]
    head += [each for what in (*MEASURES.values(), "best probe") for each in (what, "ratio")]
    head += ["rank", "near copies", "ms/step"]
    seconds = _step_seconds(args, runs)
    rows = []
    for arm, by_seed in runs.items():
        row = [arm, f"{rates[arm]:g}", str(len(by_seed))]
        for name in MEASURES:
            own, base = (_at_best(args, each, name) for each in (by_seed, runs[args.baseline]))
            row.append(mean_and_spread(list(own.values())))
            row.append(_compared(own, base, 3 if name == "flow_loss" else 2))
        last = [run.measures[args.steps] for run in by_seed.values()]
        own, base = (_best_probe(args, each) for each in (by_seed, runs[args.baseline]))
        row += [f"{np.mean(list(own.values())):.3f}", _compared(own, base)]
        # Of the block that most terms act on.
        ranks = [m["rank_by_block"][len(m["rank_by_block"]) // 4] for m in last]
        row.append(f"{np.mean(ranks):.1f}")
        row.append(f"{np.mean([m['near_copies@1'] for m in last]):.3f}")
        row.append("-" if math.isnan(seconds[arm]) else f"{1e3 * seconds[arm]:.1f}")
        rows.append(row)
    title = f"After {args.steps:,} steps ({args.steps * args.batch_size:,} images), "
    title += "each arm at the stretch of the velocity that is the best for it; "
    title += f"ratios to {args.baseline}, by seed"
    return _table(title, head, rows)


def _seeds(args: argparse.Namespace, runs: Runs, rates: Rates) -> str:
    def cell(run: Run | None) -> str:
        if run is None:
            return "-"
        m = run.measures[args.steps]
        stretched = f"{_smallest(m, 'features'):.2f} ({m['features@1']:.2f})"
        stretched += f" / {_smallest(m, 'pixels'):.2f} ({m['pixels@1']:.2f})"
        return f"{stretched} / {m['flow_loss']:.4f}"

    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    rows = [[arm, *(cell(by_seed.get(s)) for s in seeds)] for arm, by_seed in runs.items()]
    title = "By seed: features / pixels / flow loss; in brackets without a stretch"
    return _table(title, ["arm", *(f"seed {s}" for s in seeds)], rows)


def _stretched(args: argparse.Namespace, runs: Runs, rates: Rates) -> str:
    """Every arm at every stretch of the velocity, and without one beside the baseline's."""
    scales, rows = (1.0, *args.stretches), []
    base = _values(runs[args.baseline], args.steps, "features@1")
    for arm, by_seed in runs.items():
        found = [_values(by_seed, args.steps, f"features@{scale:g}") for scale in scales]
        means = [f"{np.mean(list(values.values())):.2f}" for values in found]
        rows.append([arm, *means, _compared(found[0], base)])
    head = ["arm", *(f"x {scale:g}" for scale in scales), "x 1, ratio"]
    title = f"Features by the stretch of the velocity, and the ratio to {args.baseline}"
    return _table(title, head, rows)


def _times(args: argparse.Namespace, runs: Runs, rates: Rates) -> str:
    """Held-out flow loss by bins of t, in per cent of the baseline's."""
    base = runs[args.baseline]
    bins = len(next(iter(base.values())).measures[args.steps]["flow_loss_by_t"])

    def row(arm: str, by_seed: Mapping[int, Run]) -> list[str]:
        changes = [
            np.array(by_seed[s].measures[args.steps]["flow_loss_by_t"])
            / base[s].measures[args.steps]["flow_loss_by_t"]
            - 1
            for s in by_seed.keys() & base.keys()
        ]
        return [arm, *(f"{100 * x:+.1f}" for x in np.mean(changes, axis=0))] if changes else [arm]

    own = [r.measures[args.steps]["flow_loss_by_t"] for r in base.values()]
    rows = [[f"{args.baseline} itself", *(f"{x:.3f}" for x in np.mean(own, axis=0))]]
    rows += [row(arm, by_seed) for arm, by_seed in runs.items() if arm != args.baseline]
    head = ["arm", *(f"{b / bins:.1f}" for b in range(bins))]
    title = f"Held-out flow loss from t = ... on, change against {args.baseline} in %"
    return _table(title, head, rows)


def _against_no_bank(args: argparse.Namespace, runs: Runs, rates: Rates) -> str:
    """Contrast with positives at every K against itself without a bank.

    The arm without one is `positives_0` or `crops_0`, with the same other values.
    """
    rows = []
    for arm in runs:
        without = re.sub(r"\+repulsor\.bank_\w+=[^+]*", "", arm)
        without = re.sub(r"^(positives|crops)_\d+", r"\1_0", without)
        if without == arm or without not in runs:
            continue
        row = [arm]
        for name in MEASURES:
            own, base = (_at_best(args, runs[a], name) for a in (arm, without))
            row.append(_compared(own, base, 3 if name == "flow_loss" else 2))
        rows.append(row)
    if not rows:
        return ""
    return _table("Is it the bank? Ratio to K = 0", ["arm", *MEASURES.values()], rows)


def _seconds(args: argparse.Namespace, runs: Runs, rates: Rates) -> str:
    """Every arm after the seconds that the baseline takes for all steps."""
    fastest, rows = _step_seconds(args, runs), []
    budget = args.steps * fastest[args.baseline]
    base = _values(runs[args.baseline], args.steps, "features@1")
    for arm, by_seed in runs.items():
        if math.isnan(budget + fastest[arm]):
            continue
        step = min(args.steps, budget / fastest[arm])
        own = {seed: _at(run.measures, step, "features@1") for seed, run in by_seed.items()}
        rows.append([arm, f"{step:,.0f}", _compared(own, base)])
    if not rows:
        return ""
    title = f"Features, no stretch, after the {budget:.0f} s that {args.baseline} takes"
    return _table(title, ["arm", "steps in that time", f"of {args.baseline}"], rows)


def _step_seconds(args: argparse.Namespace, runs: Runs) -> dict[str, float]:
    """Of each arm: what `--time_steps` found, or nan; if it never ran, the fastest of the logs."""
    path = args.root / SECONDS_NAME
    if path.is_file():
        known = json.loads(path.read_text())
        return {arm: known.get(arm, math.nan) for arm in runs}
    return {
        arm: float(np.nanmin([run.seconds_per_step for run in by_seed.values()]))
        for arm, by_seed in runs.items()
    }


def _at(measures: Numbers, step: float, name: str) -> float:
    """A measure between checkpoints, its logarithm interpolated."""
    logs = [math.log(numbers[name]) for numbers in measures.values()]
    return math.exp(float(np.interp(step, list(measures), logs)))


def _draw_curves(args: argparse.Namespace, runs: Runs) -> None:
    """Means over seeds, no stretch, against images seen and against seconds."""

    def curve(by_seed: Mapping[int, Run], name: str, scale: float) -> Curve:
        steps = sorted(set.intersection(*(set(run.measures) for run in by_seed.values())))
        means = [float(np.mean(list(_values(by_seed, s, name).values()))) for s in steps]
        return [step * scale for step in steps], means

    quantities = {"features": "features@1", "pixels": "pixels@1", "flow loss": "flow_loss"}
    seconds = _step_seconds(args, runs)
    images = dict.fromkeys(runs, float(args.batch_size))
    for file, label, scales in (
        ("images", "images seen", images),
        ("seconds", "seconds of training", seconds),
    ):
        panels = {
            quantity: {
                arm: curve(by_seed, name, scales[arm])
                for arm, by_seed in runs.items()
                if not math.isnan(scales[arm])
            }
            for quantity, name in quantities.items()
        }
        save_curves(args.root / f"curves_{file}.png", panels, label)


def _draw_ratios(args: argparse.Namespace, runs: Runs) -> None:
    """Each arm's ratio to the baseline with its interval, an arm a row and a measure a panel."""
    panels: dict[str, Callable[[Mapping[int, Run]], dict[int, float]]] = {
        "features, best stretch": lambda arm: _at_best(args, arm, "features"),
        "features, no stretch": lambda arm: _values(arm, args.steps, "features@1"),
        "pixels, best stretch": lambda arm: _at_best(args, arm, "pixels"),
        "held-out flow loss": lambda arm: _values(arm, args.steps, "flow_loss"),
    }
    base = runs[args.baseline]
    others = {a: by_seed for a, by_seed in runs.items() if by_seed.keys() & base.keys()}
    del others[args.baseline]
    if not others:
        return
    figure = Figure(figsize=(10, 1.3 + 0.28 * len(others)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for row, by_seed in enumerate(others.values()):
            found = paired_ratio(values(by_seed), values(base))
            axis.plot([found.low, found.high], [row, row], color="C0", linewidth=1.5)
            axis.plot(found.ratio, row, "o", color="C0", markersize=4)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize="medium")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(others)), list(others), fontsize="small")
    axes[0].invert_yaxis()
    figure.supxlabel(f"ratio to {args.baseline}, with its 95 % interval", fontsize="medium")
    with atomic.replacing(args.root / "ratios.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
