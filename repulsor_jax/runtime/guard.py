"""Guards the training state: what follows a step whose loss or gradient is not finite or too large.

The step itself refuses such an update: parameters, moments, average and bank stay as they were (see
`train_step.py`). The guard writes the event down and decides: stop, skip the batch, or go back to
a checkpoint. Where the state itself is no longer finite, only a checkpoint helps.
"""

import dataclasses
import enum
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
from pydantic import Field
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.config import DivergenceConfig
from repulsor_jax.files.atomic import Appender
from repulsor_jax.files.untrusted import checked, parse
from repulsor_jax.runtime.metrics import Refusal, read_jsonl

T = TypeVar("T")

EVENTS = "events.jsonl"
ADVICE = (
    "If it happens again, try a lower optimizer.learning_rate, optimizer.clip_norm=1.0, "
    "model.qk_norm=True, a lower weight of the terms, model.dtype='float32', or "
    "divergence.policy='skip' or 'rollback'."
)


class DivergedError(RuntimeError):
    """Training cannot go on by itself; the message says what happened and what to try."""


class Verdict(enum.Enum):
    """How the loop goes on after a step."""

    GO = "nothing was refused, and the state may be saved"
    AGAIN = "the state is good: the next batch takes the place of the refused one"
    BACK = "the state is to be that of the newest checkpoint"
    STOP = "training cannot go on by itself; `Guard.problem` says why"


@dataclasses.dataclass
class Guard:
    """Owns refused steps, states that are not finite, and the policy."""

    config: DivergenceConfig
    events: Appender  # of `<workdir>/events.jsonl`
    records_of: Callable[[int], np.ndarray]  # number of a batch -> of its records in the data set
    not_finite: Callable[[Any], str]  # state -> names of its arrays that are not finite, or ""
    newest_step: Callable[[], int | None]  # of the checkpoints
    problem: str = ""  # what happened last, in words
    spoiled: str = ""  # what `not_finite` gave at the last look
    _in_a_row: int = 0
    _last_step: int = -1

    def look(
        self, step: int, state: Any, refused: Sequence[Refusal], saves: bool, next_batch: int
    ) -> Verdict:
        """Decides how to go on after a step; every process takes part and gets the same verdict.

        Args:
          step: of the state; refused steps do not count.
          state: read only after a refused step and before it is saved. A refused step leaves the
            state as it was, good or not.
          refused: in their order.
          saves: whether the state is to be saved.
          next_batch: number of the first batch that was not tried yet.
        """
        self.spoiled = self.not_finite(state) if refused or saves else ""
        if not refused and not self.spoiled:
            return Verdict.GO
        for refusal in refused:
            self._count(refusal.step)
        if self.spoiled and not refused:
            self._count(step)
        goes_back = bool(self.spoiled) or self.config.policy == "rollback"
        stops = self.config.policy == "stop" or self._in_a_row > self.config.max_events
        back = self._way_back(next_batch) if goes_back and not stops else {}
        for refusal in refused:
            about = {
                "event": "refused",
                "step": refusal.step,
                "batch": refusal.batch,
                **{name: repr(value) for name, value in refusal.values.items()},  # JSON has no nan
                "records": self.records_of(refusal.batch).tolist(),
                "state_is_good": not self.spoiled,
                **back,
            }
            self._write_down(f"{refusal} was refused", about)
        problems = [f"{refusal} was refused" for refusal in refused[-1:]]
        if self.spoiled:
            problem = f"the state of step {step} is not finite: {self.spoiled}"
            about = {"event": "not finite", "step": step, "arrays": self.spoiled, **back}
            self._write_down(problem, about)
            problems.append(problem)
        self.problem = "; ".join(problems)
        if stops:
            if self.config.policy != "stop":
                self.problem += (
                    f", as {self._in_a_row - 1} times before it: "
                    f"config.divergence.max_events={self.config.max_events}"
                )
            return Verdict.STOP
        return Verdict.BACK if goes_back else Verdict.AGAIN

    def _way_back(self, next_batch: int) -> dict[str, Any]:
        """Where a run goes on that goes back now; see `batch_after_going_back`."""
        return {
            "goes_back_to": self.newest_step() or 0,
            "next_batch": next_batch,
            "next_records": self.records_of(next_batch).tolist(),
        }

    def _count(self, step: int) -> None:
        """Counts events without progress: a later step than any before starts the count anew."""
        self._in_a_row = 1 if step > self._last_step else self._in_a_row + 1
        self._last_step = max(self._last_step, step)

    def _write_down(self, message: str, event: Mapping[str, Any]) -> None:
        if jax.process_index() != 0:
            return
        about = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "policy": self.config.policy}
        self.events.append_or_keep((json.dumps(about | dict(event)) + "\n").encode())
        tqdm.write(f"warning: {message}; policy {self.config.policy!r}")


_BatchNumber = Annotated[int, Field(ge=0, lt=2**40)]  # times a batch size it fits into 64 bits


@checked
class _Refused:
    """What a line of events.jsonl says of a refused step."""

    batch: _BatchNumber
    records: tuple[int, ...]
    state_is_good: bool


@checked
class _Back:
    """What a line of events.jsonl says of a run that went back to a checkpoint."""

    goes_back_to: Annotated[int, Field(ge=0)]
    next_batch: _BatchNumber
    next_records: tuple[int, ...]


def _lines(
    path: pathlib.Path, schema: type[T], asked: Callable[[Any], bool], otherwise: str
) -> Iterator[T]:
    """The lines of events.jsonl that are `asked` for, on the first process; none on the others.

    A line that is not as in the schema is a warning, which says what follows `otherwise`.
    """
    for event in read_jsonl(path) if jax.process_index() == 0 else ():
        if not asked(event):
            continue
        known = {name: event.get(name) for name in schema.__annotations__}
        try:
            yield parse(schema, known, f"{path}: a line")
        except ValueError as error:
            tqdm.write(f"warning: {error}; {otherwise}")


def batch_after_going_back(
    path: pathlib.Path, step: int, records_of: Callable[[int], np.ndarray]
) -> int:
    """Number of the batch to go on with at a checkpoint that a run went back to; 0 for any other.

    The checkpoint holds a position before the batches that were given up then.

    Args:
      path, records_of: as of `bad_batches`.
      step: of the checkpoint.

    Returns:
      The number, the same on every process.
    """
    found, asked = 0, lambda event: event.get("goes_back_to") == step
    for line in _lines(path, _Back, asked, "the batches that were given up come again"):
        if records_of(line.next_batch).tolist() == list(line.next_records):
            found = line.next_batch
    return int(sharding.agree(found))


def bad_batches(path: pathlib.Path, records_of: Callable[[int], np.ndarray]) -> frozenset[int]:
    """Numbers of the batches to skip when a run goes on: those refused while the state was finite.

    Args:
      path: `<workdir>/events.jsonl`. A batch counts only if it still has the records of its line:
        another seed, batch size or data set numbers other batches.
      records_of: number of a batch -> numbers of its records in the data set.

    Returns:
      The numbers, the same on every process.
    """
    found, asked = set(), lambda event: event.get("event") == "refused"
    for line in _lines(path, _Refused, asked, "its batch is not left out"):
        if line.state_is_good and records_of(line.batch).tolist() == list(line.records):
            found.add(line.batch)
    return frozenset(sharding.agree_numbers(sorted(found)))
