import json
import math

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from repulsor_jax.runtime import metrics
from repulsor_jax.runtime.throughput import Throughput

THROUGHPUT = Throughput(batch_size=8, flops=4e12, num_chips=2, peak_flops=4e14)


def recorder(writer, **kwargs):
    arguments = {"first_step": 0, "total_steps": 4, "every_steps": 2, "throughput": THROUGHPUT}
    return metrics.StepRecorder(writer, **arguments | kwargs, enabled=False)


def values(loss, refused=0.0):
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(1.0),
        "refused": jnp.float32(refused),
    }


def test_means_over_the_interval_go_to_jsonl_and_events(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer, recorder(writer) as r:
        for step, loss in enumerate([1.0, 3.0, 5.0, 9.0], start=1):
            r.push(step, values(loss))
        r.settle()
    lines = list(metrics.read_jsonl(tmp_path / "metrics.jsonl"))
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 2.0), (4, 7.0)]
    for line in lines:
        rate = 1 / line["seconds_per_step"]
        assert line["images_per_second"] == pytest.approx(8 * rate)
        assert line["images_per_second_per_chip"] == pytest.approx(4 * rate)
        assert line["teraflops_per_chip"] == pytest.approx(2 * rate)
        assert line["mfu"] == pytest.approx(0.01 * rate)
    assert events(tmp_path)["loss"] == [(2, 2.0), (4, 7.0)]


def test_the_newest_step_is_not_waited_for(tmp_path):
    class Unfinished:
        def __float__(self):
            raise AssertionError("read before its turn")

    with metrics.MetricWriter(tmp_path, 0) as writer, recorder(writer) as r:
        r.push(1, values(1.0))
        r.push(2, {"loss": Unfinished()})


def test_what_was_written_after_the_checkpoint_is_dropped_on_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo')  # the last line is torn
    with metrics.MetricWriter(tmp_path, 4) as writer:
        writer.scalars(6, {"loss": 2.0})
    assert [line["step"] for line in metrics.read_jsonl(path)] == [2, 4, 6]
    assert list(metrics.read_jsonl(path))[-1]["loss"] == 2.0


def test_a_refused_step_is_told_one_step_later_and_does_not_count(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer, recorder(writer) as r:
        assert r.push(0, values(1.0)) == []
        assert r.push(1, values(math.nan, refused=1.0)) == []
        (refusal,) = r.push(2, values(5.0))
        assert (refusal.step, refusal.batch) == (2, 1)
        assert math.isnan(refusal.values["loss"])
        assert r.settle() == []
    [line] = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert (line["step"], line["loss"]) == (2, 3.0)


def test_rewinding_drops_what_came_after(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer, recorder(writer) as r:
        for number, loss in enumerate([1.0, 2.0, 3.0, 4.0, 5.0]):
            r.push(number, values(loss))
        r.rewind(2)
        writer.rewind(2)
        r.push(5, values(7.0))
        r.push(6, values(9.0))
        r.settle()
    lines = list(metrics.read_jsonl(tmp_path / "metrics.jsonl"))
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.5), (4, 8.0)]


@pytest.mark.parametrize(
    ("back_to", "expected"),
    [(4, [1.0, 2.0, 3.0, 4.0, 50.0]), (3, [1.0, 2.0, 3.0, 50.0]), (2, [1.0, 2.0, 50.0])],
)
def test_rewinding_while_nothing_can_be_written(tmp_path, back_to, expected):
    """Lines 1 to 3 are written, 4 and 5 are kept."""
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": float(step)})
        path.rename(tmp_path / "away")
        path.mkdir()
        for step in (4, 5):
            writer.scalars(step, {"loss": float(step)})
        writer.rewind(back_to)
        writer.scalars(back_to + 1, {"loss": 50.0})
        path.rmdir()
        (tmp_path / "away").rename(path)
    assert [line["loss"] for line in metrics.read_jsonl(path)] == expected


def test_pauses_do_not_count_as_stepping(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 110.0, 120.0])  # start, pause from 10 to 110, means at 120
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    with metrics.MetricWriter(tmp_path, 0) as writer, recorder(writer) as r:
        r.push(1, values(1.0))
        with r.pause():
            pass
        r.push(2, values(1.0))
        r.settle()
    [line] = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert line["seconds_per_step"] == 10.0


def test_a_writer_of_another_process_touches_nothing(tmp_path):
    with metrics.MetricWriter(tmp_path, 0, enabled=False) as writer:
        writer.scalars(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def events(folder):
    """Scalars of the event file, read without TensorBoard: length, crc, record, crc."""
    found = {}
    for path in (folder / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + length :]
    return found


def test_a_disk_that_is_full_for_a_while_loses_no_line(tmp_path, capsys):
    with metrics.MetricWriter(tmp_path, 0) as writer:
        writer.scalars(1, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").rename(tmp_path / "kept.jsonl")
        (tmp_path / "tensorboard").rename(tmp_path / "kept")
        (tmp_path / "metrics.jsonl").mkdir()
        (tmp_path / "tensorboard").write_text("")
        writer.scalars(2, {"loss": 2.0})
        writer.scalars(3, {"loss": 3.0})
        assert capsys.readouterr().out.count("warning: metrics.jsonl cannot be written") == 1
        (tmp_path / "metrics.jsonl").rmdir()
        (tmp_path / "tensorboard").unlink()
        (tmp_path / "kept.jsonl").rename(tmp_path / "metrics.jsonl")
        (tmp_path / "kept").rename(tmp_path / "tensorboard")
        writer.scalars(4, {"loss": 4.0})
    lines = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [1.0, 2.0, 3.0, 4.0]
    assert events(tmp_path)["loss"] == [(k, float(k)) for k in (1, 2, 3, 4)]


def test_a_damaged_line_costs_no_other_line_on_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
    path.write_bytes("\n".join([good[0], "garbage", "[1]", *good[1:]]).encode() + b"\n\xff\n")
    with metrics.MetricWriter(tmp_path, 4) as writer:
        writer.scalars(6, {"loss": 2.0})
    found = [(line["step"], line["loss"]) for line in metrics.read_jsonl(path)]
    assert found == [(2, 1.0), (4, 1.0), (6, 2.0)]
