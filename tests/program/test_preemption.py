import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from repulsor_jax.runtime import preemption
from repulsor_jax.runtime.preemption import Preemption


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `preemption` reads, in a list."""
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def exits(monkeypatch):
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_remembered_and_a_later_one_ends_at_once(clock, exits, number):
    with Preemption() as told:
        assert not told.reached(1)
        os.kill(os.getpid(), number)
        assert told.reached(2)
        assert told.reached(3)
        assert exits == []
        clock[0] += 5
        os.kill(os.getpid(), number)
        assert exits == [128 + number]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_to_the_process_and_to_its_group_is_one(clock, exits):
    """As GNU timeout sends it: to the child, then to the group that the child is in."""
    with Preemption() as told:
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 0.1
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.reached(1)
    assert exits == []


def test_in_another_thread_nothing_is_heard_and_nothing_fails():
    answers = []

    def run():
        with Preemption() as told:
            answers.append(told.reached(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_of_several_processes_the_signal_after_the_agreed_step_ends_at_once(monkeypatch):
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", lambda step: step == 4
    )
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the service's own
    try:
        with Preemption() as told:
            assert [told.reached(step) for step in (2, 3)] == [False, False]
            assert callable(signal.getsignal(signal.SIGTERM))
            assert told.reached(4)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_processes_told_to_stop_in_their_last_moment_end_at_once():
    """Where they do not settle, each waits for the other, for minutes, and dies of it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.program.run_leaving_process", address, str(rank)],
            cwd=pathlib.Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
            (seconds,) = re.findall(r"left after ([\d.]+) s", said)
            assert float(seconds) < 30
    finally:
        for process in processes:
            process.kill()
