"""Checkpoints: the state, the position in the data and the configuration, saved together.

Layout: `<directory>/<step>/{state,data,config,latents,manifest}`. Saving is asynchronous and
atomic: a checkpoint that was interrupted is never listed. Arrays come back exactly, on any mesh and
any number of processes, or not at all. A run may go on with another batch size or number of bank
rows: the position in the data and the bank are then translated.

Storage that fails does not stop training: saving is tried again, with a warning each time, until
more steps would be lost than allowed.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.checkpoints import grown, manifest, older
from repulsor_jax.checkpoints.manifest import CheckpointError, DamagedCheckpointError, Manifest
from repulsor_jax.checkpoints.places import DAMAGED, Folder, is_bucket, open_folder
from repulsor_jax.checkpoints.storage import Storage
from repulsor_jax.config import CheckpointConfig
from repulsor_jax.data.pipeline import rescale_position
from repulsor_jax.method import memory_bank
from repulsor_jax.train_state import TrainState

__all__ = ["CheckpointError", "Checkpointer", "DamagedCheckpointError"]

Records = Mapping[str, Any]


def checkpoint_directory(config: CheckpointConfig, workdir: pathlib.Path) -> str | pathlib.Path:
    """Where a run's checkpoints are: a folder, or the address of a bucket."""
    if is_bucket(config.directory):
        return config.directory
    if config.directory:
        return pathlib.Path(config.directory)
    return workdir / "checkpoints"


def open_for_training(workdir: pathlib.Path, config: CheckpointConfig) -> "Checkpointer":
    """Opens a run's checkpoints as the configuration says."""
    return Checkpointer(
        checkpoint_directory(config, workdir),
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        retry_steps=max(1, config.every_steps // 10),
        max_lost_steps=config.max_lost_steps or 3 * config.every_steps,
        patience=config.patience_seconds,
    )


@dataclasses.dataclass(eq=False)
class Checkpointer:
    """Saves and restores the checkpoints of one run; a context manager that waits on leaving.

    Opening one creates its directory where absent unless `read_only`.

    Raises:
      CheckpointError: the directory cannot be made, written or read.
    """

    where: str | os.PathLike[str] | Folder  # a path, gs://bucket/path, or of `places.open_folder`
    _: dataclasses.KW_ONLY
    keep_last: int = 3  # as `checkpoint.*` of the configuration
    keep_every: int = 0
    retry_steps: int = 1  # from a save that failed to the next attempt
    # If the next attempt could lose more steps than this, saving blocks, and its failure raises.
    max_lost_steps: int = 0
    patience: float = 0.0  # seconds for which it is tried again before it is an error
    read_only: bool = False  # neither create nor delete anything, as beside a run that is training

    def __post_init__(self) -> None:
        where = self.where
        folder = open_folder(where) if isinstance(where, str | os.PathLike) else where
        self._storage = Storage(folder, self.keep_last, self.keep_every, self.read_only)
        self.directory = self._storage.directory
        self._pending: int | None = None  # step that is being saved
        self._check_at: int | None = None  # step at which to look how that went
        self._failed = False  # the newest attempt to save failed
        self._saved = max(self.steps(), default=0)  # newest step that is safe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        # An error of one process alone must not wait for the others' answer.
        if kind is None or jax.process_count() == 1:
            self.wait()
        self._storage.close()
        if self._failed and kind is None:
            raise CheckpointError(
                f"{self.directory}: the last checkpoint was not saved, see above; the newest is "
                f"step {self._saved}"
            )

    def wait(self) -> None:
        """Waits until what is being saved is saved; a failure is a warning here."""
        if self._pending is not None:
            step, self._pending = self._pending, None
            self._note(step, self._storage.outcome())

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None; waits for what is being saved."""
        self.wait()
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints that are there now, ascending."""
        return self._storage.steps()

    def is_saving(self) -> bool:
        """Whether any process is still saving, or deleting what is old; does not wait for it."""
        return self._storage.is_saving()

    def retry_due(self, step: int) -> bool:
        """Whether to try a save that failed again after this step; ask after every step.

        Costs nothing, but for a look at the pending save `retry_steps` after it began.
        """
        if self._check_at is None or step < self._check_at:
            return False
        self._check_at = step + self.retry_steps
        if not self.is_saving():
            self.wait()
        return self._failed and self._pending is None

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: Records,
        config: Records,
        latents: Records,
        *,
        patience: float | None = None,
    ) -> None:
        """Starts saving; the state may be donated to the next step right after.

        Storage that fails is a warning: ask `retry_due` when to try again.

        Args:
          step: of the state; nothing is done where a checkpoint of it exists.
          data_state: the data iterator's `get_state()`, the same on every process.
          config, latents: for the record; `experiment.latents_record`.
          patience: None saves in the background; a number waits until the checkpoint is there, and
            tries again for so many seconds, as at the end of a run.

        Raises:
          CheckpointError: it failed, and more steps than allowed would be lost, or patience is out.
        """
        self.wait()
        steps = self.steps()
        if step in steps:
            return
        newest = max(steps, default=0)
        if newest < self._saved:
            _warn(f"step {self._saved} is gone from {self.directory}; the newest is {newest}")
            self._saved = newest
        records = {"data": dict(data_state), "config": dict(config), "latents": dict(latents)}
        last_chance = step + self.retry_steps - self._saved > self.max_lost_steps
        waits = last_chance or patience is not None
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        pause = 1.0
        while True:
            problem = self._storage.begin(step, state, records)
            if not problem and not waits:
                self._pending, self._check_at = step, step + self.retry_steps
                return
            problem = problem or self._storage.outcome()
            self._note(step, problem)
            if not problem or not waits:
                return
            if sharding.agree(time.monotonic() + pause > deadline):
                raise CheckpointError(
                    f"{self.directory}: step {step} cannot be saved ({problem}). The newest "
                    f"checkpoint is step {self._saved}: free space there or make it writable; the "
                    "same command then goes on from it"
                )
            time.sleep(pause)
            pause = min(2 * pause, 30.0)

    def restore(
        self,
        abstract_state: TrainState,
        batch_size: int,
        *,
        check: Callable[[Records, Records], list[str]] | None = None,
        create: Callable[..., TrainState] | None = None,
    ) -> tuple[TrainState, dict[str, Any], list[str]]:
        """Restores the newest state onto the shardings of `abstract_state`.

        Where the newest is damaged, the one before it is taken, and so on; the damaged ones are
        then moved into `damaged/`. Where all are damaged, nothing is moved.

        Where the run had another batch size or number of bank rows, its bank is laid out anew and
        its position in the data stays that of the same sample: `memory_bank.reslot` and
        `pipeline.rescale_position` say what is kept.

        Args:
          abstract_state, batch_size: what the run goes on with; from `abstract_train_state`.
          check: is called with the saved configuration and latents before any array is read; it
            raises where the run must not go on from them, and returns lines to report.
          create: `TrainingProgram.create_state`, for a condition's parameters, which a run without
            a condition did not save.

        Returns:
          The state, the data iterator's state, and a line for each thing to report: what was
          damaged, changed or translated.

        Raises:
          DamagedCheckpointError: every checkpoint is damaged.
          CheckpointError: there is none, or the newest holds another model, head or optimizer.
        """
        self.wait()
        self.resolve(None)
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state, data_state, notes = self._restore(
                    step, abstract_state, batch_size, check, create
                )
                break
            except DamagedCheckpointError as error:
                problems[step] = str(error)
        else:
            raise DamagedCheckpointError(
                "; ".join(problems.values())
                + ". No other checkpoint is left to go on from, and nothing was moved: restore one "
                "from a copy, or start anew in another --workdir"
            )
        moved = self._storage.set_aside(list(problems)) if problems else {}
        said = [
            f"warning: DAMAGED: {problem}. Moved to {DAMAGED}/{moved[k]}; going on from step {step}"
            for k, problem in problems.items()
        ]
        self._saved, self._failed = step, False
        return state, data_state, said + notes

    def restore_ema(self, abstract_params: Any, step: int | None = None) -> tuple[Any, int]:
        """Restores the EMA parameters, no head, bank or optimizer state; returns their step too.

        Raises:
          DamagedCheckpointError: it is damaged.
          CheckpointError: no such checkpoint, or it holds another model.
        """
        step = self.resolve(step)
        wanted = {"ema_params": abstract_params}
        with self._advice():
            about, _ = self._storage.read_records(step, ())
            self._check_fits(step, about, wanted, "ema_params/")
            found = self._storage.read_arrays(step, about, wanted, partial=True)
        return found["ema_params"], step

    def records(self, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Reads the run's configuration, its `experiment.latents_record` and their step, no array.

        Raises:
          DamagedCheckpointError: it is damaged.
          CheckpointError: no such checkpoint.
        """
        step = self.resolve(step)
        with self._advice():
            _, found = self._storage.read_records(step, ("config", "latents"))
        return found["config"], found["latents"], step

    def resolve(self, step: int | None) -> int:
        """Returns the step, or the newest for None; raises CheckpointError if it is not there."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint: train first, or check --workdir and "
                "--config.checkpoint.directory"
            )
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} holds no step {step}; it holds {steps}")
        return steps[-1] if step is None else step

    def _note(self, step: int, problem: str) -> None:
        """Remembers how saving a step went, and warns where it failed."""
        self._failed = bool(problem)
        if not problem:
            self._saved, self._check_at = step, None
            return
        self._check_at = step + self.retry_steps
        if jax.process_index() == 0 or problem != "another process failed":
            _warn(
                f"step {step} is not saved ({problem}). The newest checkpoint in {self.directory} "
                f"is step {self._saved}: free space there or make it writable. Saving is tried "
                f"again; training stops rather than lose more than {self.max_lost_steps:,} steps"
            )

    def _restore(
        self,
        step: int,
        abstract_state: TrainState,
        batch_size: int,
        check: Callable[[Records, Records], list[str]] | None,
        create: Callable[..., TrainState] | None,
    ) -> tuple[TrainState, dict[str, Any], list[str]]:
        about, found = self._storage.read_records(step)
        notes = check(found["config"], found["latents"]) if check else []
        wanted: Any = _with_saved_bank(about, abstract_state)
        grows = create is not None and grown.has_grown(about, abstract_state)
        if grows:
            wanted = grown.without_new(wanted)
        is_older = older.is_older(found["config"])
        if is_older:
            wanted = older.to_older(wanted)
        self._check_fits(step, about, wanted)
        data_state = found["data"]
        saved_size = found["config"].get("batch_size", batch_size)
        position = data_state.get("next_index")
        for what, number, least in (("batch_size", saved_size, 1), ("next_index", position, 0)):
            if type(number) is not int or number < least:
                raise DamagedCheckpointError(f"{self.directory / str(step)}: {what} is {number!r}")
        state = self._storage.read_arrays(step, about, wanted)
        if is_older:
            state = older.from_older(state)
            notes.append("an older version saved it: the images of the bank's rows are not known")
        if grows and create is not None:
            state = grown.with_new(state, abstract_state, create)
            notes.append("the saved network had no condition: its kernel begins at zero")
        if (wanted_bank := abstract_state.bank) is not None and (
            memory_bank.describe(state.bank) != memory_bank.describe(wanted_bank)
        ):
            bank = memory_bank.lay_out(state.bank, wanted_bank)
            old, new = map(memory_bank.describe, (state.bank, bank))
            notes.append(f"bank: {old} re-slotted to {new}")
            state = state.replace(bank=bank)
        if saved_size != batch_size:
            data_state, repeated = rescale_position(data_state, saved_size, batch_size)
            position = data_state["next_index"] * batch_size
            sizes = f"batches of {saved_size:,} are now of {batch_size:,}"
            again = f"; {repeated:,} are read again" if repeated else ""
            notes.append(f"data: {sizes}, from sample {position:,} on{again}")
        return state, data_state, notes

    def _check_fits(self, step: int, about: Manifest, wanted: Any, within: str = "") -> None:
        """Compares names, shapes and dtypes with the saved ones, before anything is read."""
        if problem := manifest.misfit(about, wanted, within):
            raise CheckpointError(
                f"{self.directory / str(step)} does not fit this configuration: {problem}; use the "
                "run's own config"
            )

    @contextlib.contextmanager
    def _advice(self) -> Iterator[None]:
        """Says what to do about damage where no other checkpoint is tried."""
        try:
            yield
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(
                f"{error}. Choose another --checkpoint_step of {self.steps()}; --mode=verify says "
                "which are whole"
            ) from error


def _warn(message: str) -> None:
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    tqdm.write(f"warning: {who}{message}")


def _with_saved_bank(about: Manifest, wanted: TrainState) -> TrainState:
    """Asks for the bank in the layout in which it was saved."""
    saved = about.arrays.get("bank/features")
    if wanted.bank is None or saved is None:
        return wanted
    features: Any = saved.abstract()
    bank = dataclasses.replace(wanted.bank, features=features)
    return wanted.replace(bank=memory_bank.saved_layout(bank, wanted.bank))
