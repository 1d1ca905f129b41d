"""Who may write here: locks among jobs, of which none outlives its holder."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from repulsor_jax import sharding
from repulsor_jax.files import atomic
from repulsor_jax.files.untrusted import printable, read_json

PathLike = str | os.PathLike[str]

_FOLDER = ".locks"
_WATCH_SECONDS = 12.0  # for which a sign of life of a holder on another machine is waited for


class BusyError(OSError):
    """Another job holds what this one needs alone; the message says which job."""


@contextlib.contextmanager
def sole(
    folder: PathLike, work: str, remedy: str, *, machine: str = "", watch: float = _WATCH_SECONDS
) -> Iterator[None]:
    """Lets one job at a time do some work in a folder; every process of the job calls it.

    The lock is the system's, on the file `.locks/<work>`, and ends with its holder, however that
    ends; `.locks/<work>.json` says who the holder is. Not every shared disk carries locks from one
    machine to another, so the holder touches the .json again and again, and a job on another
    machine, which gets the lock all the same, first waits for such a sign. A warning says where no
    lock can be had: in a read-only folder, or on storage without locks.

    Args:
      folder: what is held; made where absent.
      work: "training", "encoding".
      remedy: what a second job can do instead of waiting.
      machine: the name of this machine; its host name by default.
      watch: seconds for which a sign of life from another machine is waited for; a holder gives one
        every third of them.

    Raises:
      BusyError: another job does this work in this folder.
    """
    # Asking for the number of a process takes the devices, which the holder may need alone.
    has_others = jax.distributed.is_initialized()
    with contextlib.ExitStack() as stack:
        problem = ""
        if not has_others or jax.process_index() == 0:
            me = {"machine": machine or socket.gethostname(), "process": os.getpid()}
            me["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
            try:
                stack.enter_context(_held(pathlib.Path(folder), work, remedy, me, watch))
            except BusyError as error:
                problem = str(error)
            except OSError as error:
                reason = f"({error}): run one job at a time there"
                print(f"warning: no lock for {work} in {folder} {reason}", flush=True)
        if has_others and sharding.agree(int(bool(problem))):
            problem = problem or f"{folder}: another job is {work} here; the first process says who"
        if problem:
            raise BusyError(problem)
        yield


@contextlib.contextmanager
def _held(
    folder: pathlib.Path, work: str, remedy: str, me: dict[str, Any], watch: float
) -> Iterator[None]:
    """Raises OSError before it yields, where there is no lock to be had."""
    file = folder / _FOLDER / work
    note = file.with_name(f"{work}.json")
    with contextlib.ExitStack() as stack:
        is_locked = _try_lock(file, stack)[1]
        holder = _read(note)
        if not is_locked or (_is_elsewhere(holder, me) and _beats(note, watch)):
            who = "process {process} on {machine}, since {since}".format_map(holder)
            raise BusyError(f"{folder}: another job is {work} here ({who}): {remedy}, or wait")
        atomic.write_text(note, json.dumps(me))
        stack.callback(_forget, note)
        ends = threading.Event()
        beats = threading.Thread(target=_beat, args=(note, ends, watch / 3), daemon=True)
        beats.start()
        stack.callback(beats.join)
        stack.callback(ends.set)
        yield


def _try_lock(file: pathlib.Path, stack: contextlib.ExitStack) -> tuple[int, bool]:
    """Opens the file of a lock until the stack ends: its descriptor, and whether we have the lock.

    Raises OSError where there is no lock to be had.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return descriptor, False
    return descriptor, True


def _forget(note: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        note.unlink(missing_ok=True)


class _Unknown(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "unknown"


def _read(note: pathlib.Path) -> _Unknown:
    with contextlib.suppress(OSError, ValueError):
        found = read_json(note)
        if isinstance(found, dict):
            return _Unknown({key: printable(str(value))[:80] for key, value in found.items()})
    return _Unknown()


def _is_elsewhere(holder: _Unknown, me: dict[str, Any]) -> bool:
    return bool(holder) and holder["machine"] != me["machine"]


def _beats(note: pathlib.Path, watch: float) -> bool:
    """Whether the note is touched while it is watched; its holder may be alive elsewhere."""
    first, deadline = _touched(note), time.monotonic() + watch
    while first and time.monotonic() < deadline:
        time.sleep(watch / 20)
        if _touched(note) not in (0, first):
            return True
    return False


def _touched(note: pathlib.Path) -> int:
    try:
        with note.open("rb") as file:  # opening asks a shared disk anew
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _beat(note: pathlib.Path, ends: threading.Event, seconds: float) -> None:
    while not ends.wait(seconds):
        with contextlib.suppress(OSError):  # the folder may be away for a while
            os.utime(note)


@contextlib.contextmanager
def locked(path: PathLike, *, enabled: bool = True) -> Iterator[None]:
    """Holds the lock of `path` among jobs; waits, and says so, while another job has it.

    The lock is a file in `.locks` beside the path; a killed job holds none. A warning says where
    none can be had: in a read-only folder, or on storage without locks. Processes that do not
    write pass `enabled=False`, and hold no lock.
    """
    if not enabled:
        yield
        return
    path = pathlib.Path(path)
    file = path.parent / _FOLDER / path.name
    with contextlib.ExitStack() as stack:
        try:
            descriptor, is_locked = _try_lock(file, stack)
            if not is_locked:
                print(f"waiting for another job that makes {path}", flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            print(f"warning: no lock on {path} ({error}): run one job on it at a time", flush=True)
        yield
