"""Where numbers go: TensorBoard event files, a JSONL file, the console; and how fast steps are."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Self

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from repulsor_jax import atomic
from repulsor_jax.throughput import Throughput

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
        workdir = pathlib.Path(workdir)
        path = workdir / JSONL_NAME
        kept = [line for line in read_jsonl(path) if line["step"] <= first_step]
        atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = path.open("a")
        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1 if first_step else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._enabled:
            self._lines.close()
            self._events.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line and one event per scalar; `step` counts finished optimizer steps."""
        if not self._enabled:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text, as it stands, to the event file."""
        if self._enabled:
            self._events.add_text(name, f"```\n{text}\n```", step)

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Writes a picture file to the event file."""
        if self._enabled:
            picture = np.asarray(Image.open(path).convert("RGB"))
            self._events.add_image(name, picture, step, dataformats="HWC")


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


class NonFiniteLossError(RuntimeError):
    """The loss or the norm of its gradient became infinite or nan."""


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
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
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

    def push(self, step: int, step_metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the one before.

        Raises:
          NonFiniteLossError: the step before was not finite.
        """
        self.settle()
        self._pending = (step, step_metrics)

    def settle(self) -> None:
        """Reads what is pending, waiting for its step to finish.

        Raises:
          NonFiniteLossError: the step was not finite.
        """
        if self._pending is None:
            return
        (step, device_values), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(device_values).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteLossError(
                f"step {step}: loss {values['loss']}, grad_norm {values['grad_norm']}"
            )
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._bar.update(1)
        self._step = step
        if step % self._every_steps == 0:
            self._write_means(step)

    def flush(self) -> None:
        """Settles, and writes the means of the steps since the last ones written, if any.

        Called before a checkpoint, so that no mean spans it and a resumed run writes the same.
        """
        self.settle()
        if self._count:
            self._write_means(self._step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Settles, then stops the clock while something other than training runs."""
        self.settle()
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
