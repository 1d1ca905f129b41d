"""Stops a run in order: SIGTERM of a preempted machine, SIGUSR1 of a Slurm job near its time limit.

The training loop asks after every step. In a single process, our handler remembers the signal. With
several processes, JAX's preemption service hears SIGTERM in any of them, and all processes agree on
the step after which they stop.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from repulsor_jax import sharding

EXIT_CODE = 75  # EX_TEMPFAIL: saved; run the same command again


class Preempted(Exception):
    """The run was told to stop, and its state is saved."""


class Preemption:
    """Listens for the signals while it is entered; the second signal ends the process at once.

    With several processes, "second" counts from the agreed step. Outside the main thread, as in a
    notebook or a test, nothing is heard: Python handles signals only in the main thread.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, end: Callable[[int], Any] = os._exit
    ) -> None:
        """Installs nothing; `clock` returns seconds, `end` ends the process with an exit code."""
        self._clock, self._end = clock, end
        self._told_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            self._listen(signal.SIGTERM, self._remember)
            self._listen(signal.SIGUSR1, self._remember)
        else:  # JAX's service has a handler of SIGTERM
            self._listen(signal.SIGUSR1, _as_sigterm)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler of native code, which Python cannot install again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def reached(self, step: int) -> bool:
        """Whether to save and leave after this step; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._told_at is not None
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached and self._before:
            # The service has done its work; left in place, it would swallow the second signal.
            self._listen(signal.SIGTERM, signal.SIG_DFL)
            self._listen(signal.SIGUSR1, signal.SIG_DFL)
        return reached

    def _listen(self, number: signal.Signals, handler: Any) -> None:
        before = signal.signal(number, handler)
        self._before.setdefault(number, before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._told_at is None:
            self._told_at = self._clock()
            os.write(2, b"\ntold to stop: saving after this step; a second signal ends at once\n")
        elif self._clock() - self._told_at > 1.0:
            # Within a second, `timeout` and some launchers signal a process and then its group.
            # Safe to end here: only complete checkpoints are listed.
            self._end(128 + number)


def settle() -> None:
    """Avoids a deadlock at exit; call it on every process, after all is saved.

    If SIGTERM arrives now, JAX's service waits for all processes to agree on a step, and `shutdown`
    waits for the service. So every process waits here until the service has looked for the signal
    once more, and agreed. From now on SIGTERM ends the process at once.
    """
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sharding.any_process(False)
        time.sleep(2.0)  # the service looks for the signal every second


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
