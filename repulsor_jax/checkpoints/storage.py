"""Where checkpoints lie: orbax's manager, made to fail in two ways only, of reading and of writing.

orbax reports a failed asynchronous save at some later call, keeps what was half written, and its
manager is then not to be relied on: here an outcome is asked for, what is half written is removed,
and the manager is made anew.

Several processes act together: whatever fails on one of them fails on all, at the same call. Those
that wait for one that failed give up after `BARRIER_SECONDS`; none of them waits for ever.
"""

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from repulsor_jax import sharding
from repulsor_jax.checkpoints.places import DAMAGED, RECORDS, REPLACED, is_bucket, open_folder

BARRIER_SECONDS = 600
_READ_ATTEMPTS = 2
# How tensorstore calls a storage in trouble; what a file holds is INVALID_ARGUMENT or DATA_LOSS.
_TROUBLE = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
)


class CheckpointError(ValueError):
    """A checkpoint that is not there, cannot be saved, or does not fit; says which and why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be read, or came back otherwise than it was saved."""


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX's preemption service, as orbax does at every save, with the step.

    The service takes the number it was last asked with for the place of this process, and has all
    stop after the furthest; it is the training loop that asks, and it counts otherwise.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Storage:
    """The checkpoints of one directory."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None,
        keep_every: int | None,
        read_only: bool,
        read_delay: float = 1.0,
    ) -> None:
        """Opens the directory, and creates it where absent unless `read_only`.

        Args:
          directory: the folder, or gs://bucket/path.
          keep_last: how many of the newest checkpoints to keep; None keeps all.
          keep_every: keep those whose step is a multiple of this as well; None keeps no more.
          read_only: neither create nor delete anything.
          read_delay: seconds before a read that failed, but may yet succeed, is tried once more.

        Raises:
          CheckpointError: the folder is not there, or cannot be made, read or written.
        """
        self._folder = open_folder(directory)
        self.directory = self._folder.path
        self.read_only = read_only
        self._read_delay = read_delay
        self._keep_last, self._keep_every = keep_last, keep_every
        self._opened = 0
        self._seen: list[int] = []
        self._waiter = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._opened_manager: _Manager | None = None
        if not read_only:
            problem = self._tidy() or self._probe()
            if problem:
                raise CheckpointError(f"{self.directory} cannot be written ({problem})")
        there, problem = True, ""
        try:
            there, self._seen = self._folder.exists(), self._folder.steps()
        except OSError as error:
            problem = one_line(error)
        problem = agreed(problem)
        if problem:
            raise CheckpointError(f"{self.directory} cannot be read ({problem})")
        if read_only and sharding.any_process(not there):
            raise CheckpointError(
                f"{self.directory} is not there: train first, or check --workdir and "
                "--config.checkpoint.directory"
            )

    def close(self) -> None:
        """Waits for what is being saved, and closes; call `outcome` first to learn how it went."""
        self._waiter.shutdown()
        self._forget()

    def steps(self) -> list[int]:
        """Steps that are there now, ascending, as the first process sees them.

        While the directory cannot be read, those that were there last.
        """
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._seen = self._folder.steps()
        count = int(sharding.agree(len(self._seen)))
        steps = np.resize(np.array(sorted(self._seen), np.int64), count)
        return sharding.agree(steps).tolist() if count else []

    # Writing.

    def begin(self, step: int, state: Any, records: Mapping[str, Any]) -> str:
        """Starts saving; the state may be donated right after.

        Call `outcome` first, where something was begun before.

        Returns:
          What went wrong already, or "".
        """
        items = {name: ocp.args.JsonSave(dict(values)) for name, values in records.items()}
        # Most failures are found here, by all at once: in orbax, others would wait for the first.
        problem = self._probe()
        if problem:
            return problem
        try:
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), **items)
            if not self._manager.save(step, args=args):
                self._forget()  # it remembers later steps, which are gone
                self._manager.save(step, args=args)
        except Exception as error:  # of orbax, tensorstore, the file system
            problem = one_line(error)
        problem = agreed(problem)
        if problem:
            self._recover()
        else:
            self._pending = self._waiter.submit(self._finish)
        return problem

    def is_saving(self) -> bool:
        """Whether any process is still writing; does not wait for it."""
        busy = self._pending is not None and not self._pending.done()
        return sharding.any_process(busy)

    def outcome(self) -> str:
        """Waits for what was begun; returns what went wrong, or ""."""
        if self._pending is None:
            return ""
        error = self._pending.exception()
        self._pending = None
        problem = agreed(one_line(error) if error else "")
        if problem:
            self._recover()
        self.steps()
        return problem

    def put_aside(self, step: int) -> None:
        """Renames a checkpoint that is to be replaced; `finish_replacing` ends it.

        Raises:
          CheckpointError: it cannot be renamed.
        """
        self._rename({step: f"{step}{REPLACED}"})

    def finish_replacing(self) -> None:
        """Drops what `put_aside` renamed, or brings it back where nothing took its place."""
        self._recover()

    def set_aside(self, steps: Sequence[int]) -> dict[int, str]:
        """Moves damaged checkpoints into `damaged/`; returns the name of each there.

        Raises:
          CheckpointError: one cannot be moved.
        """
        now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        names = {step: f"{step}-{now}" for step in steps}
        self._rename({step: f"{DAMAGED}/{name}" for step, name in names.items()})
        return names

    # Reading.

    def read_records(self, step: int, names: Sequence[str] = RECORDS) -> dict[str, Any]:
        """Reads the JSON records of a checkpoint.

        Raises:
          DamagedCheckpointError: one cannot be read.
        """
        found = {}
        for name in names:
            args = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
            value = self._read(step, name, args)
            if not isinstance(value, dict):
                raise DamagedCheckpointError(f"{self.directory / str(step)}: {name} is no record")
            found[name] = value
        return found

    def read_arrays(self, step: int, wanted: Any, *, partial: bool = False) -> Any:
        """Reads arrays onto the shardings of `wanted`, a tree of `jax.ShapeDtypeStruct`.

        Args:
          step: of the checkpoint.
          wanted: shapes with shardings.
          partial: `wanted` is only a part of what was saved.

        Raises:
          DamagedCheckpointError: they cannot be read. What came back otherwise is not noticed here.
        """
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=partial,
        )
        return self._read(step, "state", ocp.args.Composite(state=args))

    def structure(self, step: int) -> Any:
        """The tree of the saved state, as orbax knows it: its leaves are no arrays.

        Raises:
          DamagedCheckpointError: it cannot be read.
        """
        return self._attempts(
            step, "state", lambda: self._manager.item_metadata(step)["state"].tree
        )

    def holds(self, step: int, name: str) -> bool:
        """Whether a checkpoint has a record, as the first process sees it; True where it cannot."""
        found = True
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # of gcsfs, aiohttp, google.auth
                found = (self.directory / str(step) / name).exists()
        return bool(sharding.agree(found))

    def _read(self, step: int, name: str, args: ocp.args.Composite) -> Any:
        return self._attempts(step, name, lambda: self._manager.restore(step, args=args)[name])

    def _attempts(self, step: int, name: str, read: Callable[[], Any]) -> Any:
        for attempt in range(_READ_ATTEMPTS):
            problem, passes = "", False
            found = None
            try:
                found = read()
                problem = "" if found is not None else "nothing there"
            except Exception as error:  # of orbax, tensorstore, JSON, the file system
                problem = one_line(error)
                passes = _may_pass(error, is_bucket(self.directory))
            problem = agreed(problem)
            if not problem:
                return found
            if attempt == _READ_ATTEMPTS - 1 or not sharding.any_process(passes):
                break
            time.sleep(self._read_delay)
        said = f"{self.directory / str(step)}: {name} cannot be read ({problem})"
        if is_bucket(self.directory) and sharding.any_process(passes):
            raise CheckpointError(f"{said}; the bucket is away: the same command tries it again")
        raise DamagedCheckpointError(said)

    # Within.

    @property
    def _manager(self) -> _Manager:
        """Made when first needed: it asks the storage, which may be away."""
        if self._opened_manager is None:
            self._opened_manager = self._open()
        return self._opened_manager

    def _open(self) -> _Manager:
        count = jax.process_count()
        together = ocp.options.MultiprocessingOptions(
            # Named processes meet at barriers that end some time, and not in a collective.
            active_processes=set(range(count)) if count > 1 else None,
            # Those of a manager that failed may have stopped at different places.
            barrier_sync_key_prefix=f"{self.directory.name}{self._opened}" if count > 1 else None,
        )
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                lightweight_initialize=True,  # else one damaged step hides all
                multiprocessing_options=together,
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=BARRIER_SECONDS,
                    # Else threads wait five minutes for a directory that could not be made.
                    create_directories_asynchronously=False,
                ),
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=together),
                **{
                    name: ocp.JsonCheckpointHandler(multiprocessing_options=together)
                    for name in RECORDS
                },
            },
        )

    def _finish(self) -> None:
        """Waits for what is being saved, then removes the old; orbax says here what went wrong."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0 and self._keep_last is not None:
            with contextlib.suppress(OSError):  # what stays is removed after a later save
                self._folder.tidy()
            for step in self._old_steps():
                with contextlib.suppress(OSError):
                    self._folder.remove(str(step))

    def _old_steps(self) -> list[int]:
        """Steps that need not be kept; none while the folder cannot be read."""
        try:
            steps = sorted(self._folder.steps())[: -(self._keep_last or 0)]
        except OSError:
            return []
        return [step for step in steps if self._keep_every is None or step % self._keep_every]

    def _forget(self) -> None:
        """Closes the manager; the next one is made anew."""
        manager, self._opened_manager = self._opened_manager, None
        self._opened += 1  # here, where all processes come, whatever became of their managers
        if manager is not None:
            with contextlib.suppress(Exception):  # it may say once more what went wrong
                manager.close()

    def _recover(self) -> None:
        """Frees what a failed save took, and makes a new manager."""
        self._tidy()
        self._forget()

    def _tidy(self) -> str:
        """Removes what a save that failed or was killed left; returns what went wrong, or ""."""
        return self._on_first(self._folder.tidy)

    def _probe(self) -> str:
        """Writes a small file; returns what went wrong, or ""."""
        return self._on_first(self._folder.probe)

    def _rename(self, moves: Mapping[int, str]) -> None:
        def rename() -> None:
            for step, target in moves.items():
                self._folder.move(str(step), target)

        problem = self._on_first(rename)
        if problem:
            raise CheckpointError(
                f"{self.directory}: cannot move step {', '.join(map(str, moves))} ({problem}); "
                "make the directory writable"
            )
        self._forget()

    def _on_first(self, act: Callable[[], None]) -> str:
        """Acts on the first process alone; returns what went wrong, or "", on all."""
        problem = ""
        if jax.process_index() == 0:
            try:
                act()
            except OSError as error:
                problem = one_line(error)
        return agreed(problem)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of readable length.

    A process that failed, and did not meet the others, says why it failed.
    """
    while error.__context__ is not None and "Barrier timed out" in str(error):
        error = error.__context__
    text = " ".join(str(error).split()) or repr(error)
    return f"{text[:240]} [...] {text[-120:]}" if len(text) > 380 else text


def _may_pass(error: Exception, of_bucket: bool) -> bool:
    """Whether reading once more may help: a disk or network in trouble, not what a file holds.

    Of a bucket all does that is not known to be damage: gcsfs, aiohttp and google.auth have their
    own errors for a connection that ended, or a login that is over.
    """
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if any(code in str(error) for code in _TROUBLE):
        return True
    return of_bucket and not isinstance(error, ValueError | LookupError | TypeError)


def agreed(problem: str) -> str:
    """This process's problem, or that another one has one, or ""; the same truth on all."""
    if sharding.any_process(bool(problem)):
        return problem or "another process failed"
    return ""
