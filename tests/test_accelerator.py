"""The time limit of benchmarks/accelerator.py."""

import argparse
import multiprocessing
import time

import pytest

from benchmarks.accelerator import Clock, Setting
from benchmarks.step import Worker

LARGE, SMALL = Setting("XL", 64, "none", "dots"), Setting("B", 256, "none", "dots")


def test_what_takes_longer_than_is_left_is_not_begun():
    at = [0.0]
    clock = Clock(100.0, lambda: at[0])
    clock.took(LARGE, False, 60.0)
    clock.took(LARGE, True, 20.0)
    at[0] = 50.0
    assert not clock.has_time(LARGE, False)
    assert clock.has_time(LARGE, True)
    assert clock.has_time(SMALL, False)  # none of its size has been timed
    at[0] = 100.0
    assert not clock.has_time(SMALL, False)


def sleep(args):
    time.sleep(60)


def test_what_is_under_way_at_the_end_is_ended():
    with pytest.raises(TimeoutError):
        Worker(sleep, argparse.Namespace(), time.monotonic() + 0.1)
    assert not multiprocessing.active_children()
