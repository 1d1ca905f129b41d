"""The loop as a whole. Invariant 4 lives here: resume is invisible."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import time
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax import train as train_lib
from repulsor_jax import train_state as train_state_lib
from repulsor_jax import train_step as train_step_lib
from repulsor_jax.checkpoints.storage import CheckpointError, Storage
from repulsor_jax.data import pipeline
from repulsor_jax.evaluation import monitor
from repulsor_jax.inference import generator as generator_lib
from repulsor_jax.replay import replay
from repulsor_jax.runtime.guard import DivergedError
from repulsor_jax.runtime.metrics import read_jsonl
from repulsor_jax.runtime.preemption import Preempted
from repulsor_jax.train import train
from tests.oracles import tiny

WRITE_LOSS_CURVE = train_lib._write_loss_curve
MESH = {"mesh.data": 4, "mesh.fsdp": 2}


def run(workdir, data_dir, *, whole_mesh=False, **overrides):
    """Trains as the program does; one device does where the mesh is not the subject."""
    values = tiny.digits_dict(data_dir, **MESH, **overrides)
    workdir.mkdir(exist_ok=True)
    experiment, dataset = experiment_lib.prepare(
        config_lib.parse(values), workdir, draws_pictures=True
    )
    if not whole_mesh:
        experiment = dataclasses.replace(experiment, mesh=tiny.mesh())
    return train(experiment, dataset, monitor.make_monitor(experiment), values.to_dict())


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of equal configurations share their compiled step and first state; none draws curves."""
    sections = ("model", "flow", "regularizer", "optimizer")
    names = ("seed", "total_steps", "batch_size", *sections)

    def key(config):
        limits = (config.divergence.max_loss, config.divergence.max_grad_norm)
        return (*(getattr(config, name) for name in names), *limits)

    steps, programs, states = {}, {}, {}

    def make(config, *parts):
        return steps.setdefault(key(config), train_step_lib.make_train_step(config, *parts))

    def compiled(step, abstract, *about):
        if (step, about) not in programs:
            programs[step, about] = train_step_lib.compile_train_step(step, abstract, *about)
        return programs[step, about]

    def create(config, *parts):
        about = (key(config), parts[-1])
        if about not in states:
            states[about] = train_state_lib.create_train_state(config, *parts)
        return jax.tree.map(jnp.copy, states[about])  # for the step takes it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "make_train_step", make)
        patch.setattr(train_lib, "compile_train_step", compiled)
        patch.setattr(train_lib, "create_train_state", create)
        patch.setattr(train_lib, "_write_loss_curve", lambda workdir: None)
        yield


def losses(workdir):
    kept = ("loss", "flow_loss", "regularizer_loss", "grad_norm")
    return [
        {"step": line["step"]} | {name: line[name] for name in kept}
        for line in read_jsonl(workdir / "metrics.jsonl")
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    state = run(workdir, data_dir)
    return workdir, jax.device_get(tiny.raw(state))


@pytest.mark.parametrize("stop", [3, 5, 11])
def test_resume_is_invisible(tmp_path, data_dir, uninterrupted, stop):
    """Stopped and gone on with, every loss and the final state are the same bits."""
    reference, _ = uninterrupted
    run(tmp_path / "run", data_dir, total_steps=stop)
    assert_same_run(tmp_path / "run", run(tmp_path / "run", data_dir), uninterrupted)
    # The saved checkpoints too: state and position in the data.
    saved = [p / "checkpoints" / "12" / "data" / "metadata" for p in (reference, tmp_path / "run")]
    assert json.loads(saved[0].read_text()) == json.loads(saved[1].read_text())


def test_resume_is_invisible_on_the_whole_mesh(tmp_path, data_dir):
    expected = run(tmp_path / "reference", data_dir, whole_mesh=True)
    reference = (tmp_path / "reference", jax.device_get(tiny.raw(expected)))
    run(tmp_path / "run", data_dir, whole_mesh=True, total_steps=7)
    state = run(tmp_path / "run", data_dir, whole_mesh=True)
    assert_same_run(tmp_path / "run", state, reference)


def test_a_run_cut_between_checkpoints_repeats_the_lost_steps(tmp_path, data_dir, uninterrupted):
    """What a kill leaves: a checkpoint of step 5 and metrics up to step 9."""
    reference, expected = uninterrupted
    killed = tmp_path / "killed"
    shutil.copytree(reference, killed)
    for step in ("10", "12"):
        shutil.rmtree(killed / "checkpoints" / step)
    lines = (reference / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:9]))
    state = run(killed, data_dir)
    assert losses(killed) == losses(reference)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)


def test_another_batch_size_goes_on_with_the_bank_and_the_data(tmp_path, data_dir, capsys):
    """10 batches of 16 are 160 samples: 6 batches of 24, and 16 samples that are read again."""
    run(tmp_path, data_dir, total_steps=10, checkpoint__every_steps=10)
    capsys.readouterr()
    changes = {"batch_size": 24, "regularizer.bank_rows": 48, "optimizer.clip_norm": 0.0}
    state = run(tmp_path, data_dir, total_steps=11, **changes)
    said = capsys.readouterr().out
    assert "config.optimizer.clip_norm: 1.0 -> 0.0" in said
    (line,) = read_jsonl(tmp_path / "resumes.jsonl")
    assert line["step"] == 10
    assert "config.batch_size: 16 -> 24" in line["notes"]
    assert "re-slotted to 2 slots of 24 in float32" in said
    assert "batches of 16 are now of 24, from sample 144 on; 16 are read again" in said
    assert (int(state.step), state.bank.features.shape[:2]) == (11, (2, 24))
    saved = json.loads((tmp_path / "checkpoints" / "11" / "data" / "metadata").read_text())
    assert saved == {"next_index": 7}


def test_failing_storage_and_a_damaged_checkpoint(
    tmp_path, data_dir, uninterrupted, monkeypatch, capsys
):
    """Step 5 cannot be saved but 6 can, 10 is damaged: the run goes on from 6 and ends the same."""
    reference, expected = uninterrupted
    probe, answers = Storage._probe, iter(["", "No space left on device", ""])
    monkeypatch.setattr(Storage, "_probe", lambda self: next(answers, "") or probe(self))
    run(tmp_path, data_dir, total_steps=10)
    said = capsys.readouterr().out
    assert said.count("warning: step 5 is not saved (No space left on device)") == 1
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["10", "6"]
    (folder / "10" / "data" / "metadata").write_text('{"next_index": 11}')

    state = run(tmp_path, data_dir)
    said = capsys.readouterr().out
    assert "DAMAGED: " in said
    assert "step 6 of 12" in said
    assert losses(tmp_path) == losses(reference)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)
    assert [p.name[:3] for p in (folder / "damaged").iterdir()] == ["10-"]


def test_a_bucket_that_is_away_for_a_while(bucket, tmp_path, data_dir, uninterrupted, capsys):
    """Step 5 finds no bucket, 10 loses it in the middle, 12 is damaged: the run ends the same."""
    reference, expected = uninterrupted
    where = "gs://bucket/runs/a"
    asked = iter([False, True, True])  # at the start; for step 5, twice

    def fails(method, name):
        if method == "POST" and name.endswith("/probe"):
            return next(asked, False)
        return "/10/state/ocdbt.process_0/" in name

    bucket.trouble, bucket.fails = "503", fails
    run(tmp_path, data_dir, checkpoint__directory=where)
    said = capsys.readouterr().out
    for step, newest in ((5, 0), (10, 6)):
        warning = (
            rf"warning: step {step} is not saved \(ABORTED: .*newest.* in {where} is step {newest}:"
        )
        assert len(re.findall(warning, said)) == 1
    assert {name.split("/")[2] for name in bucket.names()} == {"6", "12"}
    bucket.put("runs/a/12/data/metadata", b'{"next_index": 13}')

    state = run(tmp_path, data_dir, checkpoint__directory=where)
    said = capsys.readouterr().out
    assert "DAMAGED: gs://bucket/runs/a/12: " in said
    assert "step 6 of 12" in said
    assert losses(tmp_path) == losses(reference)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)
    assert {name.split("/")[2] for name in bucket.names()} == {"6", "12", "damaged"}
    assert not (tmp_path / "checkpoints").exists()


def test_a_bucket_that_stays_away_stops_training_in_time(bucket, tmp_path, data_dir):
    opened = iter([False])
    bucket.trouble = "reset"
    bucket.fails = lambda method, name: method == "POST" and next(opened, True)
    options = {"directory": "gs://bucket/run", "max_lost_steps": 6, "patience_seconds": 0.0}
    message = "gs://bucket/run: step 6 cannot be saved .*The newest checkpoint is step 0"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, data_dir, **{f"checkpoint__{key}": value for key, value in options.items()})


def test_another_data_set_is_refused_by_name(tmp_path, data_dir):
    run(tmp_path / "run", data_dir, total_steps=1)
    shutil.copytree(data_dir, tmp_path / "data")
    for about in (tmp_path / "data").glob("*/dataset.json"):
        values = json.loads(about.read_text())
        values["class_names"][0] = "nought"
        about.write_text(json.dumps(values))
    with pytest.raises(config_lib.ConfigError, match="data set: class_names_sha256.*--force"):
        run(tmp_path / "run", tmp_path / "data", total_steps=1)


def test_keeps_the_last_and_every_nth_checkpoint(tmp_path, data_dir):
    run(
        tmp_path,
        data_dir,
        checkpoint__every_steps=2,
        checkpoint__keep_last=2,
        checkpoint__keep_every=6,
    )
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [6, 10, 12]


@pytest.mark.parametrize("at", [6, 7])  # right after a checkpoint, and not
def test_a_non_finite_loss_stops_with_the_last_good_state(tmp_path, data_dir, monkeypatch, at):
    with pytest.raises(DivergedError, match=f"step {at}: loss nan") as error:
        run_on(monkeypatch, _Poisoned, (at,), tmp_path, data_dir)
    for advice in ("optimizer.learning_rate", "optimizer.clip_norm", "regularizer.weight"):
        assert advice in str(error.value)
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"step {saved}" in str(error.value)
    position = json.loads((tmp_path / "checkpoints" / str(saved) / "data" / "metadata").read_text())
    assert position["next_index"] > saved  # past the bad batch

    state = run(tmp_path, data_dir)  # the same command goes on
    assert int(state.step) == 12
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tiny.raw(state))))


def test_pictures_and_distance_are_written_from_ema(tmp_path, data_dir, monkeypatch):
    drawn_from = []
    monkeypatch.setattr(train_lib, "_write_loss_curve", WRITE_LOSS_CURVE)

    def make_generator(*arguments, **options):
        generator = generator_lib.make_generator(*arguments, **options)

        def spy(params, first, guidance):
            drawn_from.append(jax.device_get(params))
            return generator.start(params, first, guidance)

        return dataclasses.replace(generator, start=spy)

    monkeypatch.setattr(monitor, "make_generator", make_generator)
    state = run(tmp_path, data_dir, sampling__grid_every_steps=8, evaluation__every_steps=8)
    assert len(drawn_from) == 2 * (2 + 2)  # twice, of 20 and of 32 samples, 16 at a time
    jax.tree.map(np.testing.assert_array_equal, drawn_from[-1], jax.device_get(state.ema_params))
    grids = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert grids == ["train_00000008.png", "train_00000012.png"]
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000
    distances = {
        line["step"]: line["frechet_pixels_32"]
        for line in read_jsonl(tmp_path / "metrics.jsonl")
        if "frechet_pixels_32" in line
    }
    assert sorted(distances) == [8, 12]
    assert min(distances.values()) > 0


class _Poisoned:
    """A data iterator whose batches of some numbers (from 1) are all nan."""

    def __init__(self, iterator, *at):
        self._iterator, self._at, self._count = iterator, at, 0

    def __next__(self):
        batch = next(self._iterator)
        self._count += 1
        if self._count in self._at:
            batch = batch | {"latents": np.full_like(batch["latents"], np.nan)}
        return batch

    def __getattr__(self, name):
        return getattr(self._iterator, name)


class _Without(_Poisoned):
    """A data iterator that leaves out batches of some numbers (from 1)."""

    def __next__(self):
        self._count += 1
        while self._count in self._at:
            next(self._iterator)
            self._count += 1
        return next(self._iterator)


def run_on(monkeypatch, iterator_class, at, workdir, data_dir, **overrides):
    """A run on a data iterator with a fault."""

    def iterator(*args, **kwargs):
        return iterator_class(pipeline.training_iterator(*args, **kwargs), *at)

    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "training_iterator", iterator)
        return run(workdir, data_dir, **overrides)


@pytest.fixture(scope="module")
def without(tmp_path_factory, data_dir):
    """Of batches (from 1): the folder and last state of a run whose data never held them."""

    @functools.cache
    def trained(numbers):
        workdir = tmp_path_factory.mktemp("without")
        with pytest.MonkeyPatch.context() as patch:
            state = run_on(patch, _Without, numbers, workdir, data_dir)
        return workdir, jax.device_get(tiny.raw(state))

    return trained


def read_events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


# (bad batches, those that the run then never learnt from)
FAULTS = {
    "skip": [((7,), (7,)), ((5,), (5,)), ((5, 6), (5, 6)), ((12,), (12,)), ((13, 14), ())],
    # Steps 6 and 7 are lost with their batches, and the one dispatched before 7 was read.
    "rollback": [
        ((7,), (6, 7, 8)),
        ((6,), (6, 7)),
        ((10,), (6, 7, 8, 9, 10)),
        ((3,), (1, 2, 3, 4)),
    ],
}


@pytest.mark.parametrize(
    ("policy", "bad", "missing"),
    [(policy, *case) for policy, cases in FAULTS.items() for case in cases],
)
def test_a_run_goes_on_past_bad_batches(
    tmp_path, data_dir, monkeypatch, without, policy, bad, missing
):
    """Bit for bit as one whose data never held them."""
    options = {"divergence__policy": policy}
    state = run_on(monkeypatch, _Poisoned, bad, tmp_path, data_dir, **options)
    assert_same_run(tmp_path, state, without(missing))
    if not missing:
        assert not (tmp_path / "events.jsonl").exists()
        return
    events = read_events(tmp_path)
    assert [event["batch"] for event in events] == [number - 1 for number in bad]
    dataset = experiment_lib.latents.open_latent_dataset(data_dir / "train")
    for event in events:
        labels = np.load(event["kept"])["labels"]
        found = dataset.open().__getitems__(event["records"])
        kept = experiment_lib.latents.decode_records(found, dataset.shape, dataset.dtype)
        np.testing.assert_array_equal(labels, kept["labels"])  # the numbers are of these records


def test_too_many_bad_batches_stop_the_run(tmp_path, data_dir, monkeypatch):
    with pytest.raises(DivergedError, match=r"step 4: .* as 3 times before it: .*max_events=3"):
        run_on(
            monkeypatch,
            _Poisoned,
            range(4, 20),
            tmp_path,
            data_dir,
            divergence__policy="skip",
            divergence__max_events=3,
        )
    assert len(read_events(tmp_path)) == 4


def test_a_gradient_above_the_limit_is_refused(tmp_path, data_dir, uninterrupted):
    norms = [line["grad_norm"] for line in losses(uninterrupted[0])]
    limit = sorted(norms)[-2]  # the largest is above it
    first = norms.index(max(norms)) + 1
    with pytest.raises(DivergedError, match=f"step {first}: "):
        run(tmp_path, data_dir, divergence__max_grad_norm=float(limit))


class _Loud(_Poisoned):
    """A data iterator some of whose batches are far too large."""

    def __next__(self):
        batch = next(self._iterator)
        self._count += 1
        scale = 100 if self._count in self._at else 1
        return batch | {"latents": batch["latents"] * np.float16(scale)}


def test_a_kept_batch_replays_to_the_very_numbers(tmp_path, data_dir, monkeypatch, capsys):
    limits = {"divergence__policy": "skip", "divergence__max_loss": 50.0, "total_steps": 8}
    run_on(monkeypatch, _Loud, (6,), tmp_path, data_dir, whole_mesh=True, **limits)
    (event,) = read_events(tmp_path)
    assert float(event["loss"]) > 50
    values = tiny.digits_dict(data_dir, **MESH, **limits)
    found = replay(config_lib.parse(values), tmp_path, pathlib.Path(event["kept"]))
    assert found.pop("refused") == 1.0
    assert found == {name: float(event[name]) for name in found}
    said = capsys.readouterr().out
    assert "batch 5, kept of step 6, on the state of step 5" in said


@functools.cache
def bad_gradients(train_step):
    """The step, with one number of the gradients nan, and the loss and the batch as they are."""
    real = train_step_lib.accumulate

    def accumulate(*arguments):
        grads, others = real(*arguments)
        bias = grads["model"]["final"]["bias"]
        grads["model"]["final"]["bias"] = bias.at[0].set(jnp.nan)
        return grads, others

    def bad(state, batch):
        with unittest.mock.patch.object(train_step_lib, "accumulate", accumulate):
            return train_step(state, batch)

    return bad


@functools.cache
def bad_state(part):
    """The step, after which one number of a part of the state is nan."""

    def spoil(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.at[(-1,) * leaf.ndim].set(jnp.nan) if name == part else leaf

    @functools.cache
    def fault(train_step):
        def bad(state, batch):
            state, metrics = train_step(state, batch)
            return jax.tree_util.tree_map_with_path(spoil, state), metrics

        return bad

    return fault


def run_with_fault(monkeypatch, fault, at, workdir, data_dir, **overrides):
    """A run some of whose steps, of these numbers (from 1) of all that are tried, have a fault."""

    compiled = train_lib.compile_train_step

    def compile_both(train_step, *arguments):
        good, bad = (compiled(step, *arguments) for step in (train_step, fault(train_step)))
        numbers = itertools.count(1)
        return lambda *inputs: (bad if next(numbers) in at else good)(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "compile_train_step", compile_both)
        return run(workdir, data_dir, **overrides)


def assert_same_run(workdir, state, reference):
    """Every loss and the last state are those of a reference, a folder and a state, bit for bit."""
    other, expected = reference
    assert losses(workdir) == losses(other)
    assert [line["step"] for line in losses(workdir)] == list(range(1, 13))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)


@pytest.mark.parametrize(("policy", "missing"), [("skip", (7,)), ("rollback", (6, 7, 8))])
def test_a_run_goes_on_past_gradients_that_are_not_finite(
    tmp_path, data_dir, monkeypatch, without, policy, missing
):
    """Bit for bit as one whose data never held the batches that came to nothing."""
    policy = {"divergence__policy": policy}
    state = run_with_fault(monkeypatch, bad_gradients, (7,), tmp_path, data_dir, **policy)
    assert_same_run(tmp_path, state, without(missing))
    (event,) = read_events(tmp_path)
    assert np.isfinite(float(event["loss"]))
    assert event["grad_norm"] == "nan"


def test_gradients_that_are_not_finite_stop_with_the_last_good_state(
    tmp_path, data_dir, monkeypatch, without
):
    with pytest.raises(DivergedError, match=r"step 7: .*grad_norm nan.*saved as step 7"):
        run_with_fault(monkeypatch, bad_gradients, (7,), tmp_path, data_dir)
    assert_same_run(tmp_path, run(tmp_path, data_dir), without((7,)))


BANK, NU, EMA = "bank/features", "opt_state/1/0/nu/model/final/bias", "ema_params/final/bias"


@pytest.mark.parametrize(
    ("policy", "part", "at", "missing"),
    [
        ("skip", BANK, 7, (6, 7, 8, 9)),  # 8 is refused, and 9 was tried before that was known
        ("rollback", BANK, 5, (1, 2, 3, 4, 5)),  # found where it was to be saved
        ("rollback", BANK, 12, (11, 12)),
        ("skip", NU, 7, (6, 7, 8, 9, 10)),  # 8 takes it into the parameters, 9 is refused
        ("rollback", EMA, 6, (6, 7, 8, 9, 10)),  # no step reads it
    ],
)
def test_a_run_goes_back_to_before_its_state_was_spoiled(
    tmp_path, data_dir, monkeypatch, without, policy, part, at, missing
):
    """Bit for bit as one whose data never held the batches that came to nothing."""
    policy = {"divergence__policy": policy}
    state = run_with_fault(monkeypatch, bad_state(part), (at,), tmp_path, data_dir, **policy)
    assert_same_run(tmp_path, state, without(missing))
    event = read_events(tmp_path)[-1]
    assert (event["event"], "number" in event["arrays"]) == ("not finite", True)


def test_a_spoiled_state_on_the_whole_mesh(tmp_path, data_dir, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    options = {"whole_mesh": True, "divergence__policy": "rollback"}
    state = run_with_fault(monkeypatch, bad_state(BANK), (7,), one, data_dir, **options)
    expected = run_on(monkeypatch, _Without, (6, 7, 8, 9), other, data_dir, **options)
    assert_same_run(one, state, (other, jax.device_get(tiny.raw(expected))))


@pytest.mark.parametrize(("part", "at"), [(BANK, 5), (BANK, 7), (EMA, 6)])
def test_a_spoiled_state_is_never_saved(tmp_path, data_dir, monkeypatch, uninterrupted, part, at):
    """Training stops, and the same command ends as if nothing had been."""
    with pytest.raises(DivergedError, match=r"state of step \d+ is not finite: ") as error:
        run_with_fault(monkeypatch, bad_state(part), (at,), tmp_path, data_dir)
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert steps == ([5] if at > 5 else [])
    assert ("saved as step 5 in" if steps else "starts anew") in str(error.value)
    assert_same_run(tmp_path, run(tmp_path, data_dir), uninterrupted)


def test_a_state_that_is_spoiled_each_time_stops_the_run(
    tmp_path, data_dir, monkeypatch, uninterrupted
):
    limits = {"divergence__policy": "skip", "divergence__max_events": 3}
    with pytest.raises(DivergedError, match=r"is not finite: .*max_events=3.*saved as step 5 in"):
        run_with_fault(monkeypatch, bad_state(BANK), range(7, 99), tmp_path, data_dir, **limits)
    assert_same_run(tmp_path, run(tmp_path, data_dir), uninterrupted)


class _Signals(_Poisoned):
    """A data iterator that sends this process a signal before some batches."""

    def __next__(self):
        self._count += 1
        if self._count in self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self._iterator)


def test_told_to_stop_it_saves_and_resuming_is_invisible(
    tmp_path, data_dir, uninterrupted, monkeypatch
):
    with pytest.raises(Preempted, match="saved step 7 of 12"):
        run_on(monkeypatch, _Signals, (7,), tmp_path, data_dir)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same_run(tmp_path, run(tmp_path, data_dir), uninterrupted)


def frechet_lines(workdir):
    return [line for line in read_jsonl(workdir / "metrics.jsonl") if "frechet_pixels_32" in line]


def test_what_was_not_drawn_before_the_end_is_drawn_on_going_on(
    tmp_path, data_dir, monkeypatch, uninterrupted
):
    """Told to stop where an evaluation is due, it saves and leaves; killed in one, it has saved."""
    reference, expected = uninterrupted
    draws = {"sampling__grid_every_steps": 5, "evaluation__every_steps": 5}
    with pytest.raises(Preempted, match="saved step 5 of 12"):
        run_on(monkeypatch, _Signals, (5,), tmp_path, data_dir, **draws)
    assert not (tmp_path / "samples").exists()

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(monitor, "evaluate_params", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, data_dir, **draws)
    assert (tmp_path / "samples" / "train_00000005.png").is_file()
    assert frechet_lines(tmp_path) == []
    drawn = (tmp_path / "samples" / "train_00000005.png").stat().st_mtime_ns

    state = run(tmp_path, data_dir, **draws)
    assert [line["step"] for line in frechet_lines(tmp_path)] == [5, 10, 12]
    run(tmp_path, data_dir, **draws)  # all is there
    assert [line["step"] for line in frechet_lines(tmp_path)] == [5, 10, 12]
    assert (tmp_path / "samples" / "train_00000005.png").stat().st_mtime_ns == drawn
    assert losses(tmp_path) == losses(reference)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)


def test_told_to_stop_where_a_step_is_refused(tmp_path, data_dir, monkeypatch, without):
    """The signal comes with a bad batch, which does not count: the next one does, and is saved."""

    class Both(_Signals):
        def __next__(self):
            batch = super().__next__()
            if self._count in self._at:
                batch = batch | {"latents": np.full_like(batch["latents"], np.nan)}
            return batch

    with pytest.raises(Preempted, match="saved step 7 of 12"):
        run_on(monkeypatch, Both, (7,), tmp_path, data_dir, divergence__policy="skip")
    assert_same_run(tmp_path, run(tmp_path, data_dir), without((7,)))


class _Slow(_Poisoned):
    """A data iterator that takes its time over some batches."""

    def __next__(self):
        self._count += 1
        if self._count in self._at:
            time.sleep(1.5)
        return next(self._iterator)


def test_a_hang_is_reported_with_its_phase_and_stack(tmp_path, data_dir, monkeypatch, capsys):
    minutes = 0.5 / 60
    run_on(monkeypatch, _Slow, (6,), tmp_path, data_dir, log__watchdog_minutes=minutes)
    report = (tmp_path / "hangs" / "process_0.txt").read_text()
    assert "process 0 of 1 has been in phase 'data' of step 6" in report
    assert "__next__" in report  # the stack of the thread that sleeps
    assert "in phase 'data' of step 6" in capsys.readouterr().err


def test_samples_that_are_not_finite_do_not_stop_training(tmp_path, data_dir, capsys):
    state = run(
        tmp_path,
        data_dir,
        sampling__solver="dopri5",
        sampling__max_steps=1,
        sampling__grid_every_steps=12,
        evaluation__every_steps=12,
    )
    assert int(state.step) == 12
    said = capsys.readouterr().out
    assert "step 12: no grid: sample 0 is not finite" in said
    assert "step 12: not evaluated: sample 0 is not finite" in said


def test_a_profile_holds_the_steps_asked_for(tmp_path, data_dir):
    run(tmp_path, data_dir, log__profile_steps=(4, 5), total_steps=6)
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(steps) == [4, 5]
