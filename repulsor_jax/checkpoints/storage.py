"""Checkpoints as orbax writes and reads them, made to fail in two ways only: saving and reading.

orbax reports a failed asynchronous save at some later call, and keeps what was half written: here
`outcome` reports it, what is half written is removed, and orbax's checkpointer is made anew.

Whatever is read is compared with the manifest: orbax alone returns changed bytes without a word.

Several processes act together: whatever fails on one of them fails on all, at the same call. A
process gives up waiting for one that failed after `BARRIER_SECONDS`.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from repulsor_jax import sharding
from repulsor_jax.checkpoints import manifest
from repulsor_jax.checkpoints.manifest import CheckpointError, DamagedCheckpointError, Manifest
from repulsor_jax.checkpoints.places import DAMAGED, RECORDS, Folder, is_bucket

BARRIER_SECONDS = 600
_READ_ATTEMPTS = 2
_READ_PAUSE = 1.0  # seconds between two attempts
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


class Storage:
    """The checkpoints of one folder."""

    def __init__(
        self,
        folder: Folder,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        """Opens the folder, and creates it where absent unless `read_only`.

        Args:
          folder: where the checkpoints are.
          keep_last: how many of the newest checkpoints to keep; 0 keeps all.
          keep_every: keep those whose step is a multiple of this as well; 0 keeps no more.
          read_only: neither create nor delete anything.

        Raises:
          CheckpointError: the folder cannot be made, read or written.
        """
        self._folder = folder
        self.directory = folder.path
        self._keep_last, self._keep_every = keep_last, keep_every
        self._seen: list[int] = []
        self._waiter = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._opened = 0
        self._orbax = self._open()
        if not read_only:
            problem = self._on_first(folder.tidy) or self._on_first(folder.probe)
            if problem:
                raise CheckpointError(f"{self.directory} cannot be written ({problem})")
        problem = self._on_first(self._look)
        if problem:
            raise CheckpointError(f"{self.directory} cannot be read ({problem})")

    def close(self) -> None:
        """Waits for what is being saved, and closes; call `outcome` first to learn how it went."""
        self._waiter.shutdown()
        self._close_orbax()

    def steps(self) -> list[int]:
        """Steps that are there now, ascending, as the first process sees them.

        While the folder cannot be read, those that were there last.
        """
        self._on_first(self._look)
        count = int(sharding.agree(len(self._seen)))
        steps = np.resize(np.array(self._seen, np.int64), count)
        return sharding.agree(steps).tolist() if count else []

    # Writing.

    def begin(self, step: int, state: Any, records: Mapping[str, Any]) -> str:
        """Starts saving, with a manifest; the state may be donated right after.

        Call `outcome` first, where something was begun before.

        Returns:
          What went wrong already, or "".
        """
        # Finds most failures on all processes at once: within orbax, the others would wait for the
        # one that fails.
        if problem := self._on_first(self._folder.probe):
            return problem
        records = dict(records) | {"manifest": manifest.describe(step, state, records)}
        items = {name: ocp.args.JsonSave(values) for name, values in records.items()}
        try:
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), **items)
            self._orbax.save(self._path(step), args=args)
        except Exception as error:  # of orbax, tensorstore, the file system
            problem = one_line(error)
        problem = agreed(problem)
        if problem:
            self._recover()
        else:
            self._saving = step, self._waiter.submit(self._finish)
        return problem

    def is_saving(self) -> bool:
        """Whether any process is still writing; does not wait for it."""
        return sharding.any_process(self._saving is not None and not self._saving[1].done())

    def outcome(self) -> str:
        """Waits for what was begun; returns what went wrong, or ""."""
        if self._saving is None:
            return ""
        (step, future), self._saving = self._saving, None
        error = future.exception()
        problem = agreed(one_line(error) if error else "")
        if problem:
            self._recover()
        return "" if step in self.steps() else problem

    def set_aside(self, steps: Sequence[int]) -> dict[int, str]:
        """Moves damaged checkpoints into `damaged/`; returns the name of each there.

        Raises:
          CheckpointError: one cannot be moved.
        """
        now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        names = {step: f"{step}-{now}" for step in steps}

        def move() -> None:
            for step, name in names.items():
                self._folder.move(str(step), f"{DAMAGED}/{name}")

        if problem := self._on_first(move):
            raise CheckpointError(
                f"{self.directory}: cannot move step {', '.join(map(str, steps))} ({problem}); "
                "make the directory writable"
            )
        return names

    # Reading.

    def read_records(
        self, step: int, names: Sequence[str] = RECORDS[1:]
    ) -> tuple[Manifest, dict[str, Any]]:
        """Reads the manifest and JSON records of a checkpoint, and compares them.

        Raises:
          DamagedCheckpointError: one cannot be read, or was changed.
          CheckpointError: the bucket is away.
        """
        found = {}
        for name in ("manifest", *names):
            found[name] = self._restore(step, name, ocp.args.JsonRestore())
            if not isinstance(found[name], dict):
                raise DamagedCheckpointError(f"{self._path(step)}: {name} is no record")
        values = found.pop("manifest")
        return manifest.check(values, step, found, str(self._path(step))), found

    def read_arrays(self, step: int, about: Manifest, wanted: Any, *, partial: bool = False) -> Any:
        """Reads arrays onto the shardings of `wanted`, and compares them with the manifest.

        Args:
          step: of the checkpoint.
          about: its manifest.
          wanted: a tree of `jax.ShapeDtypeStruct` with shardings; `orbax.checkpoint.PLACEHOLDER`
            for an array that is not to be read.
          partial: `wanted` is only a part of what was saved.

        Raises:
          DamagedCheckpointError: they cannot be read, came back otherwise, or are not finite.
          CheckpointError: the bucket is away.
        """
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=partial,
        )
        found = self._restore(step, "state", args)
        arrays = {
            name: leaf
            for name, leaf in manifest.named_leaves(found).items()
            if leaf is not ocp.PLACEHOLDER
        }
        manifest.check_arrays(about, arrays, str(self._path(step)))
        return found

    def structure(self, step: int) -> Any:
        """The tree of the saved state, as orbax knows it: its leaves are no arrays.

        Raises:
          DamagedCheckpointError: it cannot be read.
          CheckpointError: the bucket is away.
        """
        path = self._path(step)
        read = self._orbax.metadata
        return self._read(step, "state", lambda: read(path).item_metadata["state"].tree)

    def _restore(self, step: int, name: str, args: Any) -> Any:
        items = ocp.args.Composite(**{name: args})
        read = self._orbax.restore
        return self._read(step, name, lambda: read(self._path(step), args=items)[name])

    def _read(self, step: int, name: str, read: Callable[[], Any]) -> Any:
        of_bucket = is_bucket(self.directory)
        for attempt in range(_READ_ATTEMPTS):
            found, problem, passes = None, "", False
            try:
                found = read()
                problem = "" if found is not None else "nothing there"
            except Exception as error:  # of orbax, tensorstore, JSON, the file system
                problem, passes = one_line(error), may_pass(error, of_bucket)
            problem = agreed(problem)
            if not problem:
                return found
            passes = sharding.any_process(passes)
            if not passes:
                break
            if attempt < _READ_ATTEMPTS - 1:
                time.sleep(_READ_PAUSE)
        said = f"{self._path(step)}: {name} cannot be read ({problem})"
        if of_bucket and passes:
            raise CheckpointError(f"{said}; the bucket is away: the same command tries it again")
        raise DamagedCheckpointError(said)

    # Within.

    def _path(self, step: int) -> Any:
        return self.directory / str(step)

    def _look(self) -> None:
        self._seen = sorted(self._folder.steps())

    def _open(self) -> ocp.AsyncCheckpointer:
        count = jax.process_count()
        together = ocp.options.MultiprocessingOptions(
            # Processes that are named meet at barriers with a time limit, not in a collective.
            active_processes=set(range(count)) if count > 1 else None,
            # After a failure the processes may have stopped at different barriers: new names.
            barrier_sync_key_prefix=f"{self.directory.name}{self._opened}" if count > 1 else None,
        )
        beside = ocp.options.AsyncOptions(
            timeout_secs=BARRIER_SECONDS,
            # Threads would wait five minutes for a directory that could not be made.
            create_directories_asynchronously=False,
        )
        handlers = {
            name: ocp.JsonCheckpointHandler(multiprocessing_options=together) for name in RECORDS
        }
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(
                multiprocessing_options=together, async_options=beside
            ),
            state=ocp.PyTreeCheckpointHandler(multiprocessing_options=together),
            **handlers,
        )
        return ocp.AsyncCheckpointer(
            handler, async_options=beside, multiprocessing_options=together
        )

    def _finish(self) -> None:
        """Waits for what is being saved, then removes the old; orbax says here what went wrong.

        A bucket that is away is tried again by tensorstore for up to half an hour. Orbax's own time
        limit would leave the threads that do so behind, and the program could not end before them.
        """
        seconds = 0.9 * BARRIER_SECONDS
        timer = threading.Timer(seconds, self._orbax.cancel)
        started = time.monotonic()
        timer.start()
        try:
            self._orbax.wait_until_finished()
        finally:
            timer.cancel()
        if time.monotonic() - started >= seconds:
            raise TimeoutError(f"not written within {seconds:g} s")
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # what stays is removed after a later save
                self._folder.tidy()
                for step in sorted(self._folder.steps())[: -self._keep_last]:
                    if not self._keep_every or step % self._keep_every:
                        self._folder.remove(str(step))

    def _recover(self) -> None:
        """Frees what a failed save took, and has orbax begin anew."""
        self._on_first(self._folder.tidy)
        self._close_orbax()
        self._opened += 1
        self._orbax = self._open()

    def _close_orbax(self) -> None:
        with contextlib.suppress(Exception):  # it may say once more what went wrong
            self._orbax.close()

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

    Of a process that failed and therefore did not meet the others: why it failed.
    """
    while error.__context__ is not None and "Barrier timed out" in str(error):
        error = error.__context__
    text = " ".join(str(error).split()) or repr(error)
    return f"{text[:240]} [...] {text[-120:]}" if len(text) > 380 else text


def may_pass(error: Exception, of_bucket: bool) -> bool:
    """Whether reading once more may help: a disk or network in trouble, not what a file holds.

    Of a bucket, every error that is not known to be damage: gcsfs, aiohttp and google.auth have
    their own errors for a connection that ended, or a login that is over.
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
