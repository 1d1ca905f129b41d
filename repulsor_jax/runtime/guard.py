"""What to do with a step whose loss or gradient is not finite, or too large.

The step itself refuses such an update: parameters, moments, average and bank stay as they were (see
`train_step.py`). Here it is logged, its batch kept for study, and the run stopped, or not. Where
the state itself is no longer finite, no batch can follow: it takes a checkpoint to go on.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.config import DivergenceConfig
from repulsor_jax.files import atomic

EVENTS, FOLDER = "events.jsonl", "divergence"


class DivergedError(RuntimeError):
    """Training cannot go on by itself; the message says what happened and what to try."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A step that was refused.

    Attributes:
      step: that it would have been.
      batch: number of its batch in the data's sequence, from 0.
      values: its metrics: "loss", "grad_norm" and others.
    """

    step: int
    batch: int
    values: Mapping[str, float]

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.values['loss']:.6g}, grad_norm "
            f"{self.values['grad_norm']:.6g} (batch {self.batch})"
        )


class DivergencePolicy:
    """Logs what was refused, and decides."""

    def __init__(
        self,
        config: DivergenceConfig,
        workdir: pathlib.Path,
        events: atomic.Appender,
        records_of: Callable[[int], np.ndarray],
    ) -> None:
        """Nothing is written before something is refused.

        Args:
          config: of the run.
          workdir: batches go to `<workdir>/divergence`.
          events: the file that lines go to, as `<workdir>/events.jsonl`.
          records_of: number of a batch -> numbers of its records in the data set.
        """
        self._config = config
        self._workdir = workdir
        self._events = events
        self._records_of = records_of
        self._in_a_row = 0
        self._last_step = -1

    def rolls_back(
        self,
        step: int,
        refusals: Sequence[Refusal],
        spoiled: str,
        recent: Iterable[tuple[int, Mapping[str, jax.Array]]],
    ) -> bool:
        """Takes note of refused steps and of a state that is not finite; all processes take part.

        Args:
          step: of the state.
          refusals: in their order.
          spoiled: what of the state is not finite, `integrity.not_finite`; "" where all is.
          recent: number and content of the batches of late, those of the refusals among them.

        Returns:
          True where the state is to be that of the newest checkpoint, by the policy "rollback" or
          because this one is not finite; False to go on as it is.

        Raises:
          DivergedError: by the policy "stop", or as one time too many of another.
        """
        batches = dict(recent)
        for refusal in refusals:
            self._count(refusal.step)
            self._log_refusal(refusal, batches.get(refusal.batch))
        what = f"{refusals[-1]} was refused" if refusals else ""
        if spoiled:
            if not refusals:
                self._count(step)
            problem = f"the state of step {step} is not finite: {spoiled}"
            self._log(problem, {"event": "not finite", "step": step, "arrays": spoiled})
            what = f"{what}; {problem}" if what else problem
        if self._config.policy == "stop":
            raise DivergedError(what)
        if self._in_a_row > self._config.max_events:
            raise DivergedError(
                f"{what}, as {self._in_a_row - 1} times before it: "
                f"config.divergence.max_events={self._config.max_events}"
            )
        return bool(spoiled) or self._config.policy == "rollback"

    def _count(self, step: int) -> None:
        """Counts for a run that gets nowhere; one that moved on starts to count anew."""
        self._in_a_row = 1 if step > self._last_step else self._in_a_row + 1
        self._last_step = max(self._last_step, step)

    def _log_refusal(self, refusal: Refusal, batch: Mapping[str, jax.Array] | None) -> None:
        records = self._records_of(refusal.batch)
        path = None
        if batch is not None and self._config.keep_batches:
            path = self._workdir / FOLDER / f"step_{refusal.step:08d}_batch_{refusal.batch}.npz"
            content = sharding.to_host(dict(batch))
            if jax.process_index() == 0:
                about: dict[str, Any] = {
                    "step": refusal.step,
                    "batch": refusal.batch,
                    "records": records,
                }
                try:
                    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
                        np.savez(file, allow_pickle=False, **content, **about)
                except OSError as error:  # no reason to lose the run
                    tqdm.write(f"warning: the refused batch is not kept ({error})")
                    path = None
        study = f"; study it with --mode=replay --event={path}" if path else ""
        self._log(
            f"{refusal} was refused{study}",
            {
                "event": "refused",
                "step": refusal.step,
                "batch": refusal.batch,
                **{name: repr(value) for name, value in refusal.values.items()},  # JSON has no nan
                "kept": str(path) if path else "",
                "records": records.tolist(),
            },
        )

    def _log(self, message: str, event: Mapping[str, Any]) -> None:
        if jax.process_index() != 0:
            return
        about = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "policy": self._config.policy}
        self._events.append_or_keep((json.dumps(about | dict(event)) + "\n").encode())
        tqdm.write(f"warning: {message}; policy {self._config.policy!r}")
