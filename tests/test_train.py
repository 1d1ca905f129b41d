"""The loop as a whole. Invariant 4 lives here: resume is invisible."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import encode as encode_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax import generation, monitor
from repulsor_jax import train as train_lib
from repulsor_jax.data import pipeline
from repulsor_jax.metrics import NonFiniteLossError, read_jsonl
from repulsor_jax.train import train
from tests import tiny

MESH = {"mesh.data": 4, "mesh.fsdp": 2}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The digits, encoded once for all tests of this process."""
    workdir = tmp_path_factory.mktemp("digits")
    encode_lib.encode(config_lib.parse(tiny.digits_dict()), workdir)
    return workdir / "data"


def run(workdir, data_dir, **overrides):
    values = tiny.digits_dict(data_dir, **MESH, **overrides)
    workdir.mkdir(exist_ok=True)
    experiment, dataset = experiment_lib.prepare(
        config_lib.parse(values), workdir, draws_pictures=True
    )
    return train(experiment, dataset, monitor.make_monitor(experiment), values.to_dict())


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
    reference, expected = uninterrupted
    run(tmp_path / "run", data_dir, total_steps=stop)
    state = run(tmp_path / "run", data_dir)
    assert losses(tmp_path / "run") == losses(reference)
    assert [line["step"] for line in losses(reference)] == list(range(1, 13))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)
    # The saved checkpoints too: state and position in the data.
    saved = [p / "checkpoints" / "12" / "data" / "metadata" for p in (reference, tmp_path / "run")]
    assert json.loads(saved[0].read_text()) == json.loads(saved[1].read_text())


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
    state = run(tmp_path, data_dir, total_steps=11, batch_size=24, regularizer__bank_rows=48)
    said = capsys.readouterr().out
    assert "bank: 4 slots of 16 re-slotted to 2 of 24" in said
    assert "batches of 16 are now of 24, from sample 144 on; 16 are read again" in said
    assert (int(state.step), state.bank.features.shape[:2]) == (11, (2, 24))
    saved = json.loads((tmp_path / "checkpoints" / "11" / "data" / "metadata").read_text())
    assert saved == {"next_index": 7}


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
    def poisoned(*args, **kwargs):
        return _Poisoned(pipeline.training_iterator(*args, **kwargs), at=at)

    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "training_iterator", poisoned)
        with pytest.raises(NonFiniteLossError, match=f"step {at}: loss nan") as error:
            run(tmp_path, data_dir)
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

    def make_generator(*arguments):
        generator = generation.make_generator(*arguments)

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
    """A data iterator whose batch `at` (from 1) is all nan."""

    def __init__(self, iterator, at):
        self._iterator, self._left = iterator, at

    def __next__(self):
        batch = next(self._iterator)
        self._left -= 1
        if self._left == 0:
            batch = batch | {"latents": np.full_like(batch["latents"], np.nan)}
        return batch

    def __getattr__(self, name):
        return getattr(self._iterator, name)


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
