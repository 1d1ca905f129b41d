"""Plots of records that are made up; the table is in the tests of the mode."""

import pytest

from repulsor_jax.evaluation import report
from repulsor_jax.files import pictures


def record(fid, step=10, scale=1.0, interval=None, **protocol):
    protocol |= {"step": step, "weights_sha256": str(step), "cfg_scale": scale, "num_samples": 9}
    if interval:
        protocol |= {"cfg_interval": list(interval), "cfg_channels": 0, "guide": "null class"}
    by = {"name": "x", "digest": "0"}
    return {"protocol": protocol, "metrics": {"fid": fid}, "features": by, "reference": by}


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn: (name of the file, curves of fid, label of the axis)."""
    found = []
    monkeypatch.setattr(
        pictures,
        "save_curves",
        lambda path, curves, label: found.append((path.name, curves["fid"], label)),
    )
    return found


def test_one_evaluation_is_drawn_over_the_steps_of_others_like_it(tmp_path, drawn):
    assert report.plot(tmp_path, [record(5.0)]) is None
    for number, other in enumerate(
        [record(3.0, step=30), record(9.0, step=10), record(4.0, step=20, seed=1), record(5.0, 20)]
    ):
        report.write(tmp_path, str(number), other)
    report.plot(tmp_path, [record(5.0, step=20)])
    assert drawn == [("by_step.png", {"": ([10, 20, 30], [9.0, 5.0, 3.0])}, "training step")]


def test_a_sweep_is_drawn_over_the_scale_a_line_for_each_interval(tmp_path, drawn):
    sweep = [
        record(9.0),
        record(5.0, scale=2.0, interval=(0, 1)),
        record(6.0, scale=1.5, interval=(0, 1)),
        record(4.0, scale=2.0, interval=(0.2, 0.7)),
    ]
    assert report.plot(tmp_path, sweep) == tmp_path / "sweep_step_10.png"
    lines = {
        "t in [0, 1]": ([1.0, 1.5, 2.0], [9.0, 6.0, 5.0]),
        "t in [0.2, 0.7]": ([1.0, 2.0], [9.0, 4.0]),
    }
    assert drawn == [("sweep_step_10.png", lines, "guidance scale")]


def test_a_sweep_of_intervals_is_drawn_over_the_start_a_line_for_each_end(tmp_path, drawn):
    intervals = [(0.3, 1.0), (0.0, 1.0), (0.3, 0.8)]
    report.plot(tmp_path, [record(k, scale=2.0, interval=i) for k, i in enumerate(intervals)])
    lines = {"to t = 1": ([0.0, 0.3], [1, 0]), "to t = 0.8": ([0.3], [2])}
    assert drawn == [("sweep_step_10.png", lines, "guidance from t =")]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"metrics": {"fid": 1}, "protocol": {}}'])
def test_a_file_that_is_no_record_is_named_and_left_out(tmp_path, text):
    report.write(tmp_path, "b", record(5.0))
    (tmp_path / "a.json").write_text(text)
    if text == "{":
        with pytest.raises(ValueError, match=r"a\.json: found no JSON"):
            report.read(tmp_path, "a")
    assert report.write_table(tmp_path).endswith("no record can be read there: a.json")
    records, others = report.read_all(tmp_path)
    assert ([each["file"] for each in records], others) == (["b.json"], ["a.json"])
