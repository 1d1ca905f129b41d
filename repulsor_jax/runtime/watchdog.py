"""A watchdog: reports which process hangs, in which phase, and where in the code."""

import faulthandler
import pathlib
import sys
import threading
import time
from typing import Self

import jax


class Watchdog:
    """A thread that reports when the loop has not moved for some minutes; a context manager.

    The report goes to standard error and, with the stack of every thread, to
    `<workdir>/hangs/process_<k>.txt`. It repeats while nothing moves; the process goes on.
    """

    def __init__(self, workdir: pathlib.Path, minutes: float) -> None:
        """Reports after so many minutes without a beat, once entered; 0 watches nothing."""
        self._path = workdir / "hangs" / f"process_{jax.process_index()}.txt"
        self._who = f"process {jax.process_index()} of {jax.process_count()}"
        self._seconds = 60.0 * minutes
        self._beat = ("start", 0, time.monotonic())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, phase: str, step: int) -> None:
        """Notes that a phase begins, as "data", "step" or "save"; costs nothing."""
        self._beat = (phase, step, time.monotonic())

    def _watch(self) -> None:
        reported, seen = 0, self._beat
        while not self._done.wait(self._seconds / 4):
            if self._beat is not seen:
                seen, reported = self._beat, 0
            phase, step, since = seen
            stuck = time.monotonic() - since
            if stuck >= self._seconds * (reported + 1):
                reported = int(stuck / self._seconds)
                self._report(phase, step, stuck)

    def _report(self, phase: str, step: int, stuck: float) -> None:
        where = f"phase {phase!r} of step {step}"
        text = f"{self._who} has been in {where} for {stuck / 60:.1f} minutes"
        print(f"warning: {text}; stacks: {self._path}", file=sys.stderr, flush=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"warning: {self._path}: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
