"""Invariant 4: stopped anywhere and gone on with, every later loss is equal to the bit."""

import numpy as np
import pytest

from tests.oracles.runs import assert_same_run, on_host, position


@pytest.mark.parametrize("stop", [5, 11])  # at a checkpoint, and not
def test_resume_is_invisible(tmp_path, run, uninterrupted, stop):
    """Stopped and gone on with, every loss and the final state are the same bits."""
    workdir = tmp_path / "run"
    run(workdir, total_steps=stop)
    assert_same_run(workdir, run(workdir), uninterrupted)
    assert position(workdir, 12) == position(uninterrupted[0], 12)


def test_resume_with_a_teacher_and_a_source_is_invisible_on_the_whole_mesh(tmp_path, run):
    """The bank holds the teacher's keys, and has wrapped around where the run stops."""
    teacher = {"repulsor.positives": "view", "repulsor.bank_keys": "teacher", "whole_mesh": True}
    teacher |= {"source.name": "class", "source.rank": 8, "source.alignment_axis": "width"}
    expected = run(tmp_path / "reference", **teacher)
    assert {"head"} == expected.ema_terms["repulsor"].keys()
    assert np.abs(on_host(expected).ema_params["source"]["mean"]["bias"]).max() > 0
    run(tmp_path / "run", total_steps=7, **teacher)
    state = run(tmp_path / "run", **teacher)
    assert_same_run(tmp_path / "run", state, (tmp_path / "reference", on_host(expected)))
