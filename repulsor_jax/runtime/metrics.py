"""Where numbers go: TensorBoard event files, a JSONL file, the console; and how fast steps are."""

import contextlib
import json
import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from repulsor_jax.files import atomic
from repulsor_jax.runtime.guard import Refusal
from repulsor_jax.runtime.throughput import Throughput

JSONL_NAME = "metrics.jsonl"


class MetricWriter:
    """Writes scalars and pictures of one run; on processes but the first it does nothing."""

    def __init__(self, workdir: str | os.PathLike[str], first_step: int, enabled: bool = True):
        """Opens the writers to go on after `first_step`.

        Args:
          workdir: events go to `<workdir>/tensorboard`, lines to `<workdir>/metrics.jsonl`.
          first_step: step resumed from; what an interrupted run wrote after it is dropped.
          enabled: False on processes that do not write.
        """
        self._enabled = enabled
        if not enabled:
            return
        path = pathlib.Path(workdir) / JSONL_NAME
        self._lines = atomic.Appender(path)
        self._ends = _ends(path)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"
        self._events = atomic.Appender(path.parent / "tensorboard" / name)
        version = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
        self._events.append_or_keep(_record(version))
        self.rewind(first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._enabled:
            for file in (self._lines, self._events):
                file.append_or_keep(b"")  # what is kept, if that works now

    def rewind(self, step: int) -> None:
        """Drops what was written after a step, to go on from there."""
        if not self._enabled:
            return
        while self._ends and self._ends[-1][0] > step:
            self._ends.pop()
        self._lines.cut(self._ends[-1][1] if self._ends else 0)
        self._lines.append_or_keep(b"")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        hides = event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start)
        self._events.append_or_keep(_record(hides))  # what this and other files have after the step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line and one event per scalar; `step` counts finished optimizer steps."""
        if not self._enabled:
            return
        self._lines.append_or_keep((json.dumps({"step": step, **values}) + "\n").encode())
        self._ends.append((step, self._lines.size()))
        self._add(step, [summary.scalar(name, value) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text, as it stands, to the event file."""
        if self._enabled:
            self._add(step, [summary.text(name, f"```\n{text}\n```")])

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Writes a picture file to the event file."""
        if self._enabled:
            picture = np.asarray(Image.open(path).convert("RGB"))
            self._add(step, [summary.image(name, picture, dataformats="HWC")])

    def _add(self, step: int, summaries: Iterable[Any]) -> None:
        events = [
            event_pb2.Event(wall_time=time.time(), step=step, summary=each) for each in summaries
        ]
        self._events.append_or_keep(b"".join(map(_record, events)))


def _record(event: Any) -> bytes:
    """An event as an event file holds it: length, checksum, content, checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + sums[0] + content + sums[1]


def _ends(path: pathlib.Path) -> list[tuple[int, int]]:
    """Step of each line of a metrics file, in their order, and the size of the file up to there."""
    ends: list[tuple[int, int]] = []
    size = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for raw, line in zip(lines, read_jsonl(path), strict=False):  # which stops at a torn one
        if not raw.endswith(b"\n"):
            break
        size += len(raw)
        ends.append((int(line["step"]), size))
    return ends


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, float]]:
    """Yields the lines of a metrics file; an absent file is empty, a torn last line is dropped."""
    path = pathlib.Path(path)
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class StepRecorder:
    """Takes the metrics of each step and reads them one step late, so that dispatch never waits.

    Keeps the progress bar; writes means over `every_steps` steps, with seconds per step and the
    rates of `throughput`. Those leave out what happens inside `pause`.
    """

    def __init__(
        self,
        writer: MetricWriter,
        *,
        first_step: int,
        total_steps: int,
        throughput: Throughput,
        every_steps: int,
        enabled: bool = True,
    ) -> None:
        """Starts the clock and the bar.

        Args:
          writer: where the means go.
          first_step: step resumed from.
          total_steps: last step of the run.
          throughput: of the steps.
          every_steps: steps in a mean.
          enabled: False on processes that do not print.
        """
        self._writer = writer
        self._throughput = throughput
        self._every_steps = every_steps
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None  # number of its batch
        self._sums: dict[str, float] = {}
        self._count = 0
        self._step = first_step
        self._paused_seconds = 0.0
        self._started = time.perf_counter()
        # On a terminal the bar says it all; in a log file it would be one endless line.
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            disable=None if enabled else True,
            dynamic_ncols=True,
        )
        self._print_lines = enabled and self._bar.disable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def push(self, batch: int, step_metrics: Mapping[str, jax.Array]) -> list[Refusal]:
        """Takes the metrics of a step just dispatched, and reads those of the one before.

        Args:
          batch: number of its batch.
          step_metrics: its metrics, on the devices.

        Returns:
          The step before, if it was refused: it did not count, and the one just dispatched has its
          number.
        """
        refused = self.settle()
        self._pending = (batch, step_metrics)
        return refused

    def settle(self) -> list[Refusal]:
        """Reads what is pending, waiting for its step to finish; returns it if it was refused."""
        if self._pending is None:
            return []
        (batch, device_values), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(device_values).items()}
        if values.pop("refused"):
            return [Refusal(self._step + 1, batch, values)]
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._bar.update(1)
        self._step += 1
        if self._step % self._every_steps == 0:
            self._write_means(self._step)
        return []

    def rewind(self, step: int) -> None:
        """Goes on counting from a step before; what is pending is forgotten."""
        self._pending, self._step, self._count, self._sums = None, step, 0, {}
        self._started, self._paused_seconds = time.perf_counter(), 0.0
        self._bar.n = step
        self._bar.refresh()

    def flush(self) -> None:
        """Writes the means of the steps since the last ones written, if any.

        Called, when all is settled, before a checkpoint: no mean spans it, and a resumed run writes
        the same.
        """
        if self._count:
            self._write_means(self._step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock, when all is settled, while something other than training runs."""
        stopped = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - stopped

    def _write_means(self, step: int) -> None:
        now = time.perf_counter()
        seconds = (now - self._started - self._paused_seconds) / self._count
        means = {name: total / self._count for name, total in self._sums.items()}
        rates = self._throughput.rates(seconds)
        means |= {"seconds_per_step": seconds} | rates
        self._writer.scalars(step, means)
        shown = f"loss {means['loss']:.4f}, {rates['images_per_second']:.0f} images/s"
        if "mfu" in rates:
            shown += f", {rates['mfu']:.1%} MFU"
        self._bar.set_postfix_str(f"{shown}, {1e3 * seconds:.1f} ms/step", refresh=False)
        if self._print_lines:
            remaining = (self._bar.total - step) * seconds
            print(
                f"step {step}/{self._bar.total}: {shown}, {1e3 * seconds:.1f} ms/step, "
                f"{tqdm.format_interval(remaining)} left",
                flush=True,
            )
        self._count, self._sums = 0, {}
        self._started, self._paused_seconds = now, 0.0
