"""Records a profile of some training steps, for XProf or Perfetto."""

import pathlib
from typing import Any, Self

import jax
from tqdm import tqdm


class Profiler:
    """Records a range of steps into `<workdir>/profile`, on the first process."""

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, ...]) -> None:
        """Plans to record from the first to the last of two steps; () records nothing."""
        self._directory = workdir / "profile"
        enabled = steps and jax.process_index() == 0
        self._steps = range(steps[0], steps[1] + 1) if enabled else range(0)
        self._recording = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._recording:
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        """Starts before the first of the steps, after the devices finished the earlier steps."""
        if step in self._steps and not self._recording:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._recording = True

    def after(self, step: int, state: Any) -> None:
        """Stops after the last of the steps, when the devices finished it."""
        if self._recording and step + 1 not in self._steps:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._recording = False
            tqdm.write(
                f"profile of steps to {step}: {self._directory}; look at it with "
                f"`pip install xprof` and `xprof {self._directory}`"
            )
