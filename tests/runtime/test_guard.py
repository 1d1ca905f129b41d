"""What a run reads of its refused steps when it goes on."""

import json

import numpy as np
import pytest

from repulsor_jax.files.atomic import Appender
from repulsor_jax.runtime.guard import bad_batches, batch_after_going_back

GOOD = {"event": "refused", "batch": 3, "records": [7, 8], "state_is_good": True}


def records_of(batch):
    return np.array([2 * batch + 1, 2 * batch + 2])


def write(path, *lines):
    texts = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(texts) + b"\n")


def test_only_batches_with_the_same_records_refused_in_a_good_state_count(tmp_path):
    path = tmp_path / "events.jsonl"
    assert bad_batches(path, records_of) == set()
    other_seed = GOOD | {"batch": 4}
    spoiled = GOOD | {"batch": 5, "records": [11, 12], "state_is_good": False}
    write(path, GOOD, GOOD, other_seed, spoiled, {"event": "not finite", "step": 9})
    assert bad_batches(path, records_of) == {3}


@pytest.mark.parametrize(
    "line",
    [b'{"event": "refu', b"\xff", b"[1, 2]", GOOD | {"batch": "x"}, GOOD | {"records": None}],
    ids=str,
)
def test_lines_that_are_no_events_are_left_out(tmp_path, line, capsys):
    path = tmp_path / "events.jsonl"
    write(path, line, GOOD)
    assert bad_batches(path, records_of) == {3}
    assert ("a line.records: expected" in capsys.readouterr().out) == (
        line == GOOD | {"records": None}
    )


def test_the_newest_way_back_to_a_checkpoint_counts(tmp_path):
    path = tmp_path / "events.jsonl"
    assert batch_after_going_back(path, 5, records_of) == 0
    back = GOOD | {"goes_back_to": 5, "next_batch": 5, "next_records": [11, 12]}
    later = back | {"next_batch": 8, "next_records": [17, 18]}
    other_seed = back | {"next_batch": 9}
    write(path, GOOD, back, later, other_seed, later | {"goes_back_to": 10}, back | {"records": 0})
    assert batch_after_going_back(path, 5, records_of) == 5
    write(path, back, later, other_seed, later | {"goes_back_to": 10, "next_batch": "x"})
    assert batch_after_going_back(path, 5, records_of) == 8
    assert batch_after_going_back(path, 10, records_of) == 0
    assert batch_after_going_back(path, 6, records_of) == 0


def test_a_line_after_a_torn_one_is_read(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "refu')
    with Appender(path) as events:
        events.append(json.dumps(GOOD).encode() + b"\n")
    assert path.read_bytes().startswith(b'{"event": "refu\n{')
    assert bad_batches(path, records_of) == {3}
