"""Writes and reads checkpoints with orbax, on storage that may fail and files that may be damaged.

A save that fails is a message that `begin` or `outcome` returns; what is half written is removed,
and orbax's checkpointer is made anew. A read that fails is a CheckpointError. Everything that is
read is compared with the manifest, because orbax returns changed bytes without an error.

Several processes call each method together, and a failure on one of them is a failure on all. A
process waits for another one at most `BARRIER_SECONDS`.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from repulsor_jax import sharding
from repulsor_jax.checkpoints import manifest
from repulsor_jax.checkpoints.manifest import CheckpointError, DamagedCheckpointError, Manifest
from repulsor_jax.checkpoints.places import DAMAGED, RECORDS, Folder, is_bucket

BARRIER_SECONDS = 600
# Tensorstore's codes for storage in trouble. Damaged files have others, as DATA_LOSS.
_TROUBLE = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "RESOURCE_EXHAUSTED"),
    *("UNAUTHENTICATED", "PERMISSION_DENIED"),
)


class Storage:
    """The checkpoints of one folder."""

    def __init__(
        self, folder: Folder, keep_last: int = 0, keep_every: int = 0, read_only: bool = False
    ) -> None:
        """Opens the folder, and creates it where absent unless `read_only`.

        The newest `keep_last` checkpoints are kept, all of them for 0, and those whose step is a
        multiple of `keep_every`. Where it is read only, nothing is created or deleted.

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
        problem = "" if read_only else self._on_first(folder.tidy) or self._on_first(folder.probe)
        if problem:
            raise CheckpointError(f"{self.directory} cannot be written ({problem})")
        if problem := self._on_first(self._look):
            raise CheckpointError(f"{self.directory} cannot be read ({problem})")

    def close(self) -> None:
        """Waits for a save in progress, and closes; call `outcome` first to learn how it went."""
        self._waiter.shutdown()
        self._close_orbax()

    def steps(self) -> list[int]:
        """Steps that are there now, ascending, as the first process sees them.

        While the folder cannot be read, those that were there last.
        """
        self._on_first(self._look)
        return sharding.agree_numbers(self._seen)

    def begin(self, step: int, state: Any, records: Mapping[str, Any]) -> str:
        """Starts saving, with a manifest; the state may be donated right after.

        Call `outcome` first, where something was begun before. Returns what went wrong, or "".
        """
        # A full or read-only disk fails here, on all processes at once. Within orbax one process
        # would fail, and the others would wait for it until the barrier's time is over.
        if problem := self._on_first(self._folder.probe):
            return problem
        records = dict(records) | {"manifest": manifest.describe(step, state, records)}
        items = {name: ocp.args.JsonSave(values) for name, values in records.items()}
        try:
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), **items)
            self._orbax.save(self._path(step), args=args)
        except Exception as error:  # of orbax, tensorstore, the file system
            problem = one_line(error)
        if problem := agreed(problem):
            self._recover()
        else:
            self._saving = step, self._waiter.submit(self._finish)
        return problem

    def is_saving(self) -> bool:
        """Whether any process is still writing; does not wait for it."""
        return sharding.any_process(self._saving is not None and not self._saving[1].done())

    def outcome(self) -> str:
        """Waits for the save that was begun; returns what went wrong, or ""."""
        if self._saving is None:
            return ""
        (step, future), self._saving = self._saving, None
        error = future.exception()
        if problem := agreed(one_line(error) if error else ""):
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
                raise DamagedCheckpointError(f"{self._path(step)}: {name}: expected a JSON object")
        values = found.pop("manifest")
        return manifest.check(values, step, found, str(self._path(step))), found

    def read_arrays(self, step: int, about: Manifest, wanted: Any, *, partial: bool = False) -> Any:
        """Reads arrays onto the shardings of `wanted`, and compares them with the manifest.

        Args:
          step, about: of the checkpoint, and its manifest.
          wanted: a tree of `jax.ShapeDtypeStruct` with shardings; `orbax.checkpoint.PLACEHOLDER`
            for an array that is not to be read.
          partial: `wanted` is only a part of what was saved.

        Raises:
          DamagedCheckpointError: they cannot be read, came back otherwise, or are not finite.
          CheckpointError: the bucket is away.
        """
        onto = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=onto, partial_restore=partial)
        found = self._restore(step, "state", args)
        named = manifest.named_leaves(found).items()
        arrays = {name: leaf for name, leaf in named if leaf is not ocp.PLACEHOLDER}
        manifest.check_arrays(about, arrays, str(self._path(step)))
        return found

    def structure(self, step: int) -> Any:
        """The tree of the saved state with orbax's metadata for arrays; raises as `read_arrays`."""
        path, read = self._path(step), self._orbax.metadata
        return self._read(step, "state", lambda: read(path).item_metadata["state"].tree)

    def _restore(self, step: int, name: str, args: Any) -> Any:
        items = ocp.args.Composite(**{name: args})
        read = self._orbax.restore
        return self._read(step, name, lambda: read(self._path(step), args=items)[name])

    def _read(self, step: int, name: str, read: Callable[[], Any]) -> Any:
        of_bucket = is_bucket(self.directory)
        for is_last in (False, True):
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
            if is_last or not passes:
                break
            time.sleep(1.0)
        said = f"{self._path(step)}: {name} cannot be read ({problem})"
        if of_bucket and passes:
            raise CheckpointError(f"{said}; the bucket is away: the same command tries it again")
        raise DamagedCheckpointError(said)

    def _path(self, step: int) -> Any:
        return self.directory / str(step)

    def _look(self) -> None:
        self._seen = sorted(self._folder.steps())

    def _open(self) -> ocp.AsyncCheckpointer:
        count = jax.process_count()
        together = ocp.options.MultiprocessingOptions(
            # Unless they are listed, processes meet in a collective, which has no time limit.
            active_processes=set(range(count)) if count > 1 else None,
            # After a failure the processes may have stopped at different barriers; under a new
            # prefix they start together again.
            barrier_sync_key_prefix=f"{self.directory.name}{self._opened}" if count > 1 else None,
        )
        beside = ocp.options.AsyncOptions(
            timeout_secs=BARRIER_SECONDS,
            # With True, threads wait five minutes for a directory that could not be made.
            create_directories_asynchronously=False,
        )
        options: Any = {"multiprocessing_options": together, "async_options": beside}
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(**options),
            state=ocp.PyTreeCheckpointHandler(multiprocessing_options=together),
            **{
                name: ocp.JsonCheckpointHandler(multiprocessing_options=together)
                for name in RECORDS
            },
        )
        return ocp.AsyncCheckpointer(handler, **options)

    def _finish(self) -> None:
        """Waits until orbax has saved, or raises why it could not; then removes old checkpoints."""
        # Tensorstore goes on for half an hour where a bucket is away, in threads that outlive
        # orbax's own time limit: without `cancel` the program could not end before them.
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
            with contextlib.suppress(OSError):  # the next save removes what stays
                self._folder.tidy()
                for step in sorted(self._folder.steps())[: -self._keep_last]:
                    if not self._keep_every or step % self._keep_every:
                        self._folder.remove(str(step))

    def _recover(self) -> None:
        """Removes what a failed save left, and makes orbax's checkpointer anew."""
        self._on_first(self._folder.tidy)
        self._close_orbax()
        self._opened += 1
        self._orbax = self._open()

    def _close_orbax(self) -> None:
        with contextlib.suppress(Exception):  # of the save, which `outcome` has reported
            self._orbax.close()

    def _on_first(self, act: Callable[[], None]) -> str:
        """Calls `act` on the first process alone; every process gets what went wrong, or ""."""
        try:
            if jax.process_index() == 0:
                act()
        except OSError as error:
            return agreed(one_line(error))
        return agreed("")


def one_line(error: BaseException) -> str:
    """The message of an exception, in one line of readable length.

    If this process missed a barrier because of an earlier failure, that failure's message.
    """
    while error.__context__ is not None and "Barrier timed out" in str(error):
        error = error.__context__
    text = " ".join(str(error).split()) or repr(error)
    text = text.partition(" [tensorstore_spec")[0]  # kilobytes of JSON, after the reason
    return f"{text[:240]} [...] {text[-120:]}" if len(text) > 380 else text


def may_pass(error: Exception, of_bucket: bool) -> bool:
    """Whether reading once more may help: the disk or network is in trouble, not the file damaged.

    For a bucket this is every error that is not known to be damage: gcsfs, aiohttp and google.auth
    have errors of their own for a connection that ended, or a login that is over.
    """
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if any(code in str(error) for code in _TROUBLE):
        return True
    return of_bucket and not isinstance(error, ValueError | LookupError | TypeError)


def agreed(problem: str) -> str:
    """Shares a failure: returns this process's message, or that another process failed, or ""."""
    return (problem or "another process failed") if sharding.any_process(bool(problem)) else ""
