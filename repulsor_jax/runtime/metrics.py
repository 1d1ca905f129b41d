"""Writes the numbers of a run: TensorBoard event files, a JSONL file, the console."""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
from tqdm import tqdm

from repulsor_jax.files import pictures
from repulsor_jax.files.atomic import Appender
from repulsor_jax.runtime.throughput import Throughput

JSONL_NAME = "metrics.jsonl"


class Refusal(NamedTuple):
    """A step that was refused: the number that it would have had, and that of its batch, from 0."""

    step: int
    batch: int
    values: Mapping[str, float]  # its metrics: "loss", "grad_norm" and others

    def __str__(self) -> str:
        loss, grad_norm = self.values["loss"], self.values["grad_norm"]
        return f"step {self.step}: loss {loss:.6g}, grad_norm {grad_norm:.6g} (batch {self.batch})"


class Tracker(Protocol):
    """Where the numbers of a run go; `step` counts finished optimizer steps.

    A fault of its storage or network is its own: it raises nothing of that kind, and never waits.
    """

    def rewind(self, step: int) -> None:
        """Drops what came after a step, as far as it can, to go on from that step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers by name."""

    def text(self, step: int, name: str, text: str) -> None:
        """Takes a text, to be shown as it stands."""

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Takes a picture file."""

    def flush(self) -> None:
        """Puts what it holds where it is to stay."""

    def close(self, *, failed: bool) -> None:
        """The last call: the run is over, or an error ended it."""


class MetricWriter:
    """Writes scalars and pictures of one run; on processes but the first it does nothing.

    They go to `metrics.jsonl` and to event files in `tensorboard/`, there, and to `others`. Lines
    and events that a full or absent disk refuses are kept and written later.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        first_step: int,
        enabled: bool = True,
        others: Sequence[Tracker] = (),
    ):
        """Goes on after `first_step`; later lines, of an interrupted run, are dropped."""
        self._trackers: list[Tracker] = []
        if enabled:
            # tensorboardX imports torch where that is installed: seconds that other modes save.
            from repulsor_jax.runtime.event_files import EventFiles

            path = pathlib.Path(workdir)
            own = _Lines(path / JSONL_NAME), EventFiles(path / "tensorboard")
            self._trackers += [*own, *others]
        self.rewind(first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def rewind(self, step: int) -> None:
        """Drops the lines and events after a step, to go on from that step."""
        for tracker in self._trackers:
            tracker.rewind(step)
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line and one event per scalar; `step` counts finished optimizer steps."""
        for tracker in self._trackers:
            tracker.scalars(step, values)
        if time.monotonic() - self._flushed > 10.0:
            self.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text, as it stands."""
        for tracker in self._trackers:
            tracker.text(step, name, text)

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Writes a picture file."""
        for tracker in self._trackers:
            tracker.image(step, name, path)

    def flush(self) -> None:
        """Writes all kept lines and events, and waits until the disk has them."""
        self._flushed = time.monotonic()
        for tracker in self._trackers:
            tracker.flush()


class _Lines:
    """A file of JSON lines, of scalars alone; it is what the program itself reads again."""

    def __init__(self, path: pathlib.Path) -> None:
        self._lines = Appender(path)
        self._ends = _ends(path)

    def rewind(self, step: int) -> None:
        while self._ends and self._ends[-1][0] > step:
            self._ends.pop()
        self._lines.cut(self._ends[-1][1] if self._ends else 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.append_or_keep((json.dumps({"step": step, **values}) + "\n").encode())
        self._ends.append((step, self._lines.size()))

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        pass

    def flush(self) -> None:
        self._lines.append_or_keep(b"")

    def close(self, *, failed: bool) -> None:
        self.flush()


def _ends(path: pathlib.Path) -> list[tuple[int, int]]:
    """Step of each line of a metrics file, in their order, and the size of the file up to there."""
    ends: list[tuple[int, int]] = []
    size = 0
    for raw in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        size += len(raw)
        line = _parse_line(raw)
        if line is not None and isinstance(line.get("step"), int) and raw.endswith(b"\n"):
            ends.append((line["step"], size))
    return ends


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines; an absent file is empty.

    A line that holds no object, as one that a kill cut short, is left out.
    """
    path = pathlib.Path(path)
    lines = path.read_bytes().splitlines() if path.is_file() else []
    yield from (line for line in map(_parse_line, lines) if line is not None)


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


@dataclasses.dataclass(kw_only=True)
class StepRecorder:
    """Takes the metrics of each step and reads them one step late, so that dispatch never waits.

    Keeps the progress bar; writes means over `every_steps` steps, with seconds per step and the
    rates of `throughput`. Those leave out what happens inside `pause`.
    """

    writer: MetricWriter = dataclasses.field(kw_only=False)
    first_step: int
    total_steps: int
    throughput: Throughput
    every_steps: int
    enabled: bool = True

    def __post_init__(self) -> None:
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None  # number of its batch
        self._step = self.first_step
        self._begin_mean(time.perf_counter())
        # On a terminal the bar says it all; in a log file it would be one endless line.
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.first_step,
            desc="train",
            unit="step",
            disable=None if self.enabled else True,
            dynamic_ncols=True,
        )
        self._print_lines = self.enabled and self._bar.disable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def push(self, batch: int, step_metrics: Mapping[str, jax.Array]) -> list[Refusal]:
        """Takes the metrics of a step on this batch, and reads those of the step before.

        Returns that step if it was refused: then the one just dispatched has its number.
        """
        refused = self.settle()
        self._pending = (batch, step_metrics)
        return refused

    def settle(self) -> list[Refusal]:
        """Waits for the pending step and reads its metrics; returns the step if it was refused."""
        if self._pending is None:
            return []
        (batch, device_values), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(device_values).items()}
        if values.pop("refused"):
            return [Refusal(self._step + 1, batch, values)]
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._bar.update(1)
        self._count += 1
        self._step += 1
        if self._step % self.every_steps == 0:
            self._write_means(self._step)
        return []

    def rewind(self, step: int) -> None:
        """Goes on counting from an earlier step, and forgets the metrics that are pending."""
        self._pending, self._step = None, step
        self._begin_mean(time.perf_counter())
        self._bar.n = step
        self._bar.refresh()

    def flush(self) -> None:
        """Writes the means of the steps since the last ones written, if any, when all is settled.

        Before every checkpoint: where no mean spans one, a resumed run writes the same.
        """
        if self._count:
            self._write_means(self._step)
        self.writer.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock, when all is settled, while something other than training runs."""
        stopped = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - stopped

    def _write_means(self, step: int) -> None:
        now = time.perf_counter()
        seconds = (now - self._started - self._paused_seconds) / self._count
        rates = self.throughput.rates(seconds)
        means = {name: total / self._count for name, total in self._sums.items()}
        means |= {"seconds_per_step": seconds} | rates
        self.writer.scalars(step, means)
        shown = f"loss {means['loss']:.4f}, {rates['images_per_second']:.0f} images/s"
        shown += f", {rates['mfu']:.1%} MFU" if "mfu" in rates else ""
        shown += f", {1e3 * seconds:.1f} ms/step"
        self._bar.set_postfix_str(shown, refresh=False)
        if self._print_lines:
            left = tqdm.format_interval((self.total_steps - step) * seconds)
            print(f"step {step}/{self.total_steps}: {shown}, {left} left", flush=True)
        self._begin_mean(now)

    def _begin_mean(self, now: float) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0
        self._started, self._paused_seconds = now, 0.0


def draw_curves(workdir: pathlib.Path) -> None:
    """Draws losses and distances over the steps as `<workdir>/loss_curve.png`, if there are any."""
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in read_jsonl(workdir / JSONL_NAME):
        for name in line:
            if name.endswith("_loss") or name.startswith(("fid_", "frechet_")):
                steps, values = curves.setdefault(name, {}).setdefault("", ([], []))
                steps.append(line["step"])
                values.append(line[name])
    if curves:
        pictures.save_curves(workdir / "loss_curve.png", curves, "training step")
