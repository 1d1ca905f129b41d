"""Being told to stop: SIGTERM of a preempted machine, SIGUSR1 of a Slurm job near its time limit.

The training loop asks after every step. With one process, a handler of ours keeps the word; with
several, JAX's preemption service hears SIGTERM on any of them, and all learn of the same step.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from repulsor_jax import sharding

EXIT_CODE = 75  # EX_TEMPFAIL: saved; run the same command again
_LOOKS_EVERY = 1.0  # seconds, of JAX's service for the signal
_ONE_REQUEST = 1.0  # seconds; `timeout` and some launchers signal a process and then its group


class Preempted(Exception):
    """The run was told to stop, and its state is saved."""


class Preemption:
    """Hears the signals while it is entered; the second one ends the process at once.

    Of several processes each hears the second one once all have agreed on the step. Python lets the
    main thread alone handle signals: in another, as of a notebook or a test, nothing is heard.
    """

    def __init__(self) -> None:
        """Nothing is installed before it is entered."""
        self._told_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            self._listen(signal.SIGTERM, self._remember)
            self._listen(signal.SIGUSR1, self._remember)
        else:  # SIGTERM is the service's own
            self._listen(signal.SIGUSR1, _as_sigterm)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            # None is a handler of native code, which Python cannot give back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def reached(self, step: int) -> bool:
        """Whether to save and leave after this step; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._told_at is not None
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached and self._before:  # the service has done its work, and would swallow the next
            self._listen(signal.SIGTERM, signal.SIG_DFL)
            self._listen(signal.SIGUSR1, signal.SIG_DFL)
        return reached

    def _listen(self, number: signal.Signals, handler: Any) -> None:
        before = signal.signal(number, handler)
        self._before.setdefault(number, before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._told_at is not None:
            if time.monotonic() - self._told_at > _ONE_REQUEST:
                # What is being saved is not listed until it is whole: nothing is harmed.
                os._exit(128 + number)
            return
        self._told_at = time.monotonic()
        os.write(2, b"\ntold to stop: saving after this step; a second signal ends at once\n")


def settle() -> None:
    """Call at the end of a program that has saved all, on every process: it must still end.

    JAX's service, told to stop in the last moment, has all processes agree on a step. One that is
    about to leave waits in its own shutdown for the others to agree, and they in theirs for it. It
    looks for the signal once a second: here all wait until it has looked, and agreed. From now on
    the signal ends a process at once.
    """
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sharding.any_process(False)
        time.sleep(_LOOKS_EVERY + 1.0)


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
