"""A profile of some steps, for XProf or Perfetto: what the devices did, and when they waited."""

import pathlib
from typing import Any

import jax
from tqdm import tqdm


def step_annotation(step: int) -> jax.profiler.StepTraceAnnotation:
    """Marks what is dispatched inside as one step, where a profile is being recorded."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


class Profiler:
    """Records steps a to b of a training run into `<workdir>/profile`, on the first process."""

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, ...]) -> None:
        """Plans the recording; nothing is started yet.

        Args:
          workdir: of the run.
          steps: the first and the last step to record; () is none.
        """
        self._directory = workdir / "profile"
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._enabled, self._recording = jax.process_index() == 0, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *unused: object) -> None:
        if self._recording:
            self._stop()

    def before(self, step: int, state: Any) -> None:
        """Starts before the first of the steps, when those before it are done."""
        if step in self._steps and self._enabled and not self._recording:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._recording = True

    def after(self, step: int, state: Any) -> None:
        """Stops after the last of the steps, when it is done."""
        if self._recording and step + 1 not in self._steps:
            jax.block_until_ready(state)
            self._stop()
            tqdm.write(
                f"profile of steps to {step}: {self._directory}; look at it with "
                f"`pip install xprof` and `xprof {self._directory}`"
            )

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._recording = False
