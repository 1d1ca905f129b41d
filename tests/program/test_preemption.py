import os
import re
import signal
import threading

import pytest

from repulsor_jax.runtime import preemption
from repulsor_jax.runtime.preemption import Preemption
from tests.oracles import processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_remembered_and_a_later_one_ends_at_once(number):
    now, exits = [100.0], []
    with Preemption(lambda: now[0], exits.append) as told:
        assert not told.reached(1)
        os.kill(os.getpid(), number)
        assert told.reached(2)
        # GNU timeout signals the child, and then the group that the child is in.
        now[0] += 0.1
        os.kill(os.getpid(), number)
        assert told.reached(3)
        assert exits == []
        now[0] += 5
        os.kill(os.getpid(), number)
        assert exits == [128 + number]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_another_thread_hears_nothing_and_does_not_fail():
    answers = []

    def run():
        with Preemption() as told:
            answers.append(told.reached(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_after_the_agreed_step_ends_one_of_several_processes_at_once(monkeypatch):
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
    """Without `settle`, each process waits minutes for the other and then dies."""
    address = processes.free_address()
    module = "tests.program.run_leaving_process"
    said = processes.wait([processes.start(module, address, rank) for rank in range(2)], 120)
    for text in said:
        (seconds,) = re.findall(r"left after ([\d.]+) s", text)
        assert float(seconds) < 30
