"""The loop as a whole, on one device where the mesh is not the subject."""

import dataclasses
import functools
import itertools
import json
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax import train as train_lib
from repulsor_jax.checkpoints.checkpointer import CheckpointError
from repulsor_jax.data.latents import decode_records, open_latent_dataset
from repulsor_jax.evaluation.monitor import make_monitor
from repulsor_jax.runtime.guard import DivergedError
from repulsor_jax.runtime.metrics import draw_curves, read_jsonl
from repulsor_jax.runtime.preemption import Preempted
from tests.oracles import tiny
from tests.oracles.runs import (
    acting,
    assert_same_run,
    losses,
    on_host,
    poisoned,
    position,
    read_events,
    saved_steps,
    told_to_stop,
)

# ---- Stopping and going on.


def test_a_run_cut_between_checkpoints_repeats_the_lost_steps(tmp_path, run, uninterrupted):
    """What a kill leaves: a checkpoint of step 5 and metrics up to step 9."""
    reference, _ = uninterrupted
    killed = tmp_path / "killed"
    shutil.copytree(reference, killed)
    for step in ("10", "12"):
        shutil.rmtree(killed / "checkpoints" / step)
    lines = (reference / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:9]))
    assert_same_run(killed, run(killed), uninterrupted)


def test_another_batch_size_goes_on_with_the_bank_and_the_data(tmp_path, run, capsys):
    """10 batches of 16 are 160 samples: 6 batches of 24, and 16 samples that are read again."""
    run(tmp_path, total_steps=10, checkpoint__every_steps=10)
    capsys.readouterr()
    changes = {"batch_size": 24, "repulsor.bank_rows": 48, "optimizer.clip_norm": 0.0}
    state = run(tmp_path, total_steps=11, **changes)
    said = capsys.readouterr().out
    assert "config.optimizer.clip_norm: 1.0 -> 0.0" in said
    (line,) = read_jsonl(tmp_path / "resumes.jsonl")
    assert line["step"] == 10
    assert "config.batch_size: 16 -> 24" in line["notes"]
    assert "re-slotted to 2 slots of 24 in float32" in said
    assert "batches of 16 are now of 24, from sample 144 on; 16 are read again" in said
    assert (int(state.step), state.bank.features.shape[:2]) == (11, (2, 24))
    assert position(tmp_path, 11) == 7


def test_failing_storage_and_a_damaged_checkpoint(tmp_path, run, uninterrupted, capsys):
    """Step 5 cannot be saved but 6 can, 10 is damaged: the run goes on from 6 and ends the same."""
    folder, away = tmp_path / "checkpoints", tmp_path / "away"

    def break_storage():
        folder.rename(away)
        folder.write_text("")

    def mend_storage():
        folder.unlink()
        away.rename(folder)

    run(tmp_path, total_steps=10, change=acting(_5=break_storage, _6=mend_storage))
    assert capsys.readouterr().out.count("warning: step 5 is not saved") == 1
    assert saved_steps(tmp_path) == [6, 10]
    (folder / "10" / "data" / "metadata").write_text('{"next_index": 11}')

    state = run(tmp_path)
    said = capsys.readouterr().out
    assert "DAMAGED: " in said
    assert "step 6 of 12" in said
    assert_same_run(tmp_path, state, uninterrupted)
    assert [p.name[:3] for p in (folder / "damaged").iterdir()] == ["10-"]


def test_a_bucket_that_stays_away_stops_training_in_time(bucket, tmp_path, run):
    opened = iter([False])
    bucket.trouble = "reset"
    bucket.fails = lambda method, name: method == "POST" and next(opened, True)
    options = {"directory": "gs://bucket/run", "max_lost_steps": 6, "patience_seconds": 0.0}
    message = "gs://bucket/run: step 6 cannot be saved .*The newest checkpoint is step 0"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, **{f"checkpoint__{key}": value for key, value in options.items()})


def test_another_data_set_is_refused_by_name(tmp_path, data_dir, run):
    run(tmp_path / "run", total_steps=1)
    shutil.copytree(data_dir, tmp_path / "data")
    for about in (tmp_path / "data").glob("*/dataset.json"):
        values = json.loads(about.read_text())
        values["class_names"][0] = "nought"
        about.write_text(json.dumps(values))
    with pytest.raises(config_lib.ConfigError, match="data set: class_names_sha256.*--force"):
        run(tmp_path / "run", data=tmp_path / "data", total_steps=1)


def test_keeps_the_last_and_every_nth_checkpoint(tmp_path, run):
    options = {"every_steps": 2, "keep_last": 2, "keep_every": 6}
    run(tmp_path, **{f"checkpoint__{key}": value for key, value in options.items()})
    assert saved_steps(tmp_path) == [6, 10, 12]


def test_told_to_stop_it_saves_and_resuming_is_invisible(tmp_path, run, uninterrupted):
    with pytest.raises(Preempted, match="saved step 7 of 12"):
        run(tmp_path, change=acting(_7=told_to_stop))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same_run(tmp_path, run(tmp_path), uninterrupted)


# ---- Steps that are refused, and states that are not finite.


@pytest.mark.parametrize("bad", [(7,), (6, 7)])  # not right after a checkpoint, and so
def test_a_non_finite_loss_stops_and_the_same_command_leaves_its_batch_out(
    tmp_path, run, without, bad
):
    with pytest.raises(DivergedError, match=r"step \d: loss nan") as error:
        run(tmp_path, change=poisoned(*bad))
    for advice in ("optimizer.learning_rate", "optimizer.clip_norm", "weight of the terms"):
        assert advice in str(error.value)
    assert f"saved as step {saved_steps(tmp_path)[-1]}" in str(error.value)
    state = run(tmp_path, change=poisoned(*bad))
    assert_same_run(tmp_path, state, without(*bad))


# (policy, bad batches, those that the run then never learnt from)
FAULTS = [
    ("skip", (5, 6), (5, 6)),
    ("skip", (12,), (12,)),
    ("skip", (13, 14), ()),
    # Steps 6 and 7 are lost with their batches, and the one dispatched before 7 was read.
    ("rollback", (7,), (6, 7, 8)),
    ("rollback", (10,), (6, 7, 8, 9, 10)),
    ("rollback", (3,), (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("policy", "bad", "missing"), FAULTS)
def test_a_run_goes_on_past_bad_batches(tmp_path, data_dir, run, without, policy, bad, missing):
    """Bit for bit as one whose data never held them."""
    state = run(tmp_path, change=poisoned(*bad), divergence__policy=policy)
    assert_same_run(tmp_path, state, without(*missing))
    if not missing:
        assert not (tmp_path / "events.jsonl").exists()
        return
    events = read_events(tmp_path)
    assert [event["batch"] for event in events] == [number - 1 for number in bad]
    # The numbers of the records are those of the batch.
    dataset = open_latent_dataset(data_dir / "train")
    raw = dataset.open().__getitems__(events[0]["records"])
    expected = decode_records(raw, dataset.shape, dataset.dtype)
    feed = iter_batches(data_dir)
    batch = next(itertools.islice(feed, events[0]["batch"], None))
    np.testing.assert_array_equal(batch["latents"], expected["latents"])


def iter_batches(data_dir):
    """The batches of a run on the digits."""
    config = config_lib.parse(tiny.digits_dict(data_dir))
    experiment, dataset = experiment_lib.prepare(config, data_dir)
    return train_lib.open_feed(experiment, dataset)


def test_too_many_bad_batches_stop_the_run(tmp_path, run):
    limits = {"divergence__policy": "skip", "divergence__max_events": 3}
    with pytest.raises(DivergedError, match=r"step 4: .* as 3 times before it: .*max_events=3"):
        run(tmp_path, change=poisoned(*range(4, 20)), **limits)
    assert len(read_events(tmp_path)) == 4


def test_a_gradient_above_the_limit_is_refused(tmp_path, run, uninterrupted):
    norms = [line["grad_norm"] for line in losses(uninterrupted[0])]
    limit = sorted(norms)[-2]  # the largest is above it
    first = norms.index(max(norms)) + 1
    with pytest.raises(DivergedError, match=f"step {first}: "):
        run(tmp_path, divergence__max_grad_norm=float(limit))


def nan_in_gradients(experiment, dataset, programs):
    """The step with the same loss, whose gradient is nan: the root of 0 has no slope."""
    return programs(experiment, dataset, _with_nan_slope).step


def _with_nan_slope(trainer):
    loss = trainer.objective.flow_loss

    def flow_loss(output, *others):
        return loss(output, *others) + jnp.sqrt(0.0 * output.sum())

    return trainer._replace(objective=trainer.objective._replace(flow_loss=flow_loss))


@functools.cache
def nan_in_state(part):
    """The step, after which the last number of an array of the state is nan."""

    def spoil(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.at[(-1,) * leaf.ndim].set(jnp.nan) if name == part else leaf

    @functools.partial(jax.jit, donate_argnums=0)
    def spoiled(state):
        return jax.tree_util.tree_map_with_path(spoil, state)

    def fault(experiment, dataset, programs):
        step = programs(experiment, dataset).step

        def bad(state, batch):
            state, metrics = step(state, batch)
            return spoiled(state), metrics

        return bad

    return fault


@pytest.mark.parametrize(("policy", "missing"), [("skip", (7,)), ("rollback", (6, 7, 8))])
def test_a_run_goes_on_past_gradients_that_are_not_finite(tmp_path, run, without, policy, missing):
    """Bit for bit as one whose data never held the batches that came to nothing."""
    state = run(tmp_path, fault=nan_in_gradients, at=(7,), divergence__policy=policy)
    assert_same_run(tmp_path, state, without(*missing))
    (event,) = read_events(tmp_path)
    assert np.isfinite(float(event["loss"]))
    assert event["grad_norm"] == "nan"


def test_a_run_that_is_killed_after_it_went_back_goes_on_where_it_was(tmp_path, run, without):
    """The checkpoint has the position before the batches that were given up."""

    def killed():
        raise KeyboardInterrupt

    policy = {"divergence__policy": "rollback"}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fault=nan_in_gradients, at=(7,), change=acting(_11=killed), **policy)
    assert saved_steps(tmp_path) == [5]
    assert_same_run(tmp_path, run(tmp_path, **policy), without(6, 7, 8))


BANK, NU, EMA = "bank/features", "opt_state/1/0/nu/model/final/bias", "ema_params/final/bias"


@pytest.mark.parametrize(
    ("policy", "part", "at", "missing"),
    [
        ("skip", BANK, 7, (6, 7, 8, 9)),  # 8 is refused, and 9 was tried before that was known
        ("rollback", BANK, 5, (1, 2, 3, 4, 5)),  # found where it was to be saved
        ("skip", NU, 7, (6, 7, 8, 9, 10)),  # 8 takes it into the parameters, 9 is refused
        ("rollback", EMA, 12, (11, 12)),  # no step reads it
    ],
)
def test_a_run_goes_back_to_before_its_state_was_spoiled(
    tmp_path, run, without, policy, part, at, missing
):
    """Bit for bit as one whose data never held the batches that came to nothing."""
    state = run(tmp_path, fault=nan_in_state(part), at=(at,), divergence__policy=policy)
    assert_same_run(tmp_path, state, without(*missing))
    event = read_events(tmp_path)[-1]
    assert (event["event"], "number" in event["arrays"]) == ("not finite", True)


def test_a_spoiled_state_on_the_whole_mesh(tmp_path, run):
    one, other = tmp_path / "one", tmp_path / "other"
    options = {"whole_mesh": True, "divergence__policy": "rollback"}
    state = run(one, fault=nan_in_state(BANK), at=(7,), **options)
    expected = run(other, without=(6, 7, 8, 9), **options)
    assert_same_run(one, state, (other, on_host(expected)))


@pytest.mark.parametrize(("part", "at"), [(BANK, 5), (BANK, 7), (EMA, 6)])
def test_a_spoiled_state_is_never_saved(tmp_path, run, uninterrupted, part, at):
    """Training stops, and the same command ends as if nothing had been."""
    with pytest.raises(DivergedError, match=r"state of step \d+ is not finite: ") as error:
        run(tmp_path, fault=nan_in_state(part), at=(at,))
    steps = saved_steps(tmp_path)
    assert steps == ([5] if at > 5 else [])
    assert ("saved as step 5 in" if steps else "starts anew") in str(error.value)
    assert_same_run(tmp_path, run(tmp_path), uninterrupted)


def test_a_state_that_is_spoiled_each_time_stops_the_run(tmp_path, run):
    limits = {"divergence__policy": "skip", "divergence__max_events": 3}
    with pytest.raises(DivergedError, match=r"is not finite: .*max_events=3.*saved as step 5 in"):
        run(tmp_path, fault=nan_in_state(BANK), at=range(7, 99), **limits)


def test_told_to_stop_where_a_step_is_refused(tmp_path, run, without):
    """The signal comes with a bad batch, which does not count: the next one does, and is saved."""

    def both(number, batch):
        if number == 7:
            told_to_stop()
        return poisoned(7)(number, batch)

    with pytest.raises(Preempted, match="saved step 7 of 12"):
        run(tmp_path, change=both, divergence__policy="skip")
    assert_same_run(tmp_path, run(tmp_path), without(7))


# ---- Looking on the way.


def test_pictures_and_distance_are_written_from_ema(tmp_path, run):
    drawn_from = []

    def watched(experiment):
        monitor = make_monitor(experiment)

        def spy(params, first, guidance):
            drawn_from.append(jax.device_get(params))
            return start(params, first, guidance)

        start = monitor.generator.start
        generator = dataclasses.replace(monitor.generator, start=spy)
        evaluator = dataclasses.replace(monitor.evaluator, generator=generator)
        return dataclasses.replace(monitor, generator=generator, evaluator=evaluator)

    draws = {"sampling__grid_every_steps": 8, "evaluation__every_steps": 8}
    state = run(tmp_path, monitor=watched, **draws)
    jax.tree.map(np.testing.assert_array_equal, drawn_from[-1], jax.device_get(state.ema_params))
    grids = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert grids == ["train_00000008.png", "train_00000012.png"]
    assert [line["step"] for line in frechet_lines(tmp_path)] == [8, 12]
    assert min(line["frechet_pixels_32"] for line in frechet_lines(tmp_path)) > 0
    draw_curves(tmp_path)
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000


def frechet_lines(workdir):
    return [line for line in read_jsonl(workdir / "metrics.jsonl") if "frechet_pixels_32" in line]


def test_what_was_not_drawn_before_the_end_is_drawn_on_going_on(tmp_path, run, uninterrupted):
    """Told to stop where an evaluation is due, it saves and leaves; killed in one, it has saved."""
    draws = {"sampling__grid_every_steps": 5, "evaluation__every_steps": 5}
    draws["monitor"] = make_monitor
    with pytest.raises(Preempted, match="saved step 5 of 12"):
        run(tmp_path, change=acting(_5=told_to_stop), **draws)
    assert not (tmp_path / "samples").exists()

    def killed(experiment):
        monitor = make_monitor(experiment)

        def interrupt(*unused):
            raise KeyboardInterrupt

        generator = dataclasses.replace(monitor.evaluator.generator, start=interrupt)
        evaluator = dataclasses.replace(monitor.evaluator, generator=generator)
        return dataclasses.replace(monitor, evaluator=evaluator)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **draws | {"monitor": killed})
    grid = tmp_path / "samples" / "train_00000005.png"
    drawn = grid.stat().st_mtime_ns
    assert frechet_lines(tmp_path) == []

    state = run(tmp_path, **draws)
    assert [line["step"] for line in frechet_lines(tmp_path)] == [5, 10, 12]
    run(tmp_path, **draws)  # all is there
    assert [line["step"] for line in frechet_lines(tmp_path)] == [5, 10, 12]
    assert grid.stat().st_mtime_ns == drawn
    assert_same_run(tmp_path, state, uninterrupted)


def test_a_hang_is_reported_with_its_phase_and_stack(tmp_path, run, capsys):
    asleep = acting(_6=lambda: time.sleep(1.5))
    run(tmp_path, change=asleep, log__watchdog_minutes=0.5 / 60)
    report = (tmp_path / "hangs" / "process_0.txt").read_text()
    assert "process 0 of 1 has been in phase 'data' of step 6" in report
    assert "__next__" in report  # the stack of the thread that sleeps
    assert "in phase 'data' of step 6" in capsys.readouterr().err


def test_samples_that_are_not_finite_do_not_stop_training(tmp_path, run, capsys):
    draws = {
        "sampling__solver": "dopri5",
        "sampling__max_steps": 1,
        "sampling__grid_every_steps": 12,
        "evaluation__every_steps": 12,
    }
    assert int(run(tmp_path, monitor=make_monitor, **draws).step) == 12
    said = capsys.readouterr().out
    assert "step 12: no grid: sample 0 is not finite" in said
    assert "step 12: not evaluated: sample 0 is not finite" in said


def test_diagnostics_change_nothing_of_a_run(tmp_path, run, uninterrupted):
    state = run(tmp_path, log__diagnostics_every_steps=5)
    assert_same_run(tmp_path, state, uninterrupted)
    found = {
        line["step"]: {name.removeprefix("diagnostics/") for name in line}
        for line in read_jsonl(tmp_path / "metrics.jsonl")
        if "loss" not in line
    }
    assert list(found) == [5, 10, 12]
    expected = {"repulsor/drift", "repulsor/gradient_share", "block_0/probe_accuracy"}
    assert all(expected <= names for names in found.values())
    assert (tmp_path / "diagnostics.png").is_file()


def test_a_profile_holds_the_steps_asked_for(tmp_path, run):
    run(tmp_path, log__profile_steps=(4, 5), total_steps=6)
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(steps) == [4, 5]
