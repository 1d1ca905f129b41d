"""The sample mode: what it writes, and that a job which was stopped ends with the same bytes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from repulsor_jax import config as config_lib
from repulsor_jax.checkpoints.checkpointer import CheckpointError
from repulsor_jax.flows import sampler
from repulsor_jax.inference import generator as generator_lib
from repulsor_jax.inference import run as run_lib
from repulsor_jax.models.build import build_model
from repulsor_jax.sample import draw_trajectory, sample
from tests.oracles import tiny

OPTIONS = {
    "model__in_channels": 3,
    "sampling__num_samples": 40,
    "sampling__images_per_shard": 16,
    "sampling__batch_size": 8,
    "sampling__grid_samples": 6,
    "sampling__grid_columns": 2,
    "mesh__data": 8,
}


def values(**overrides):
    return tiny.config_dict(**OPTIONS | overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of other parameters at steps 3 and 5."""
    workdir = tmp_path_factory.mktemp("run")
    c = config_lib.parse(values())
    steps = {3: tiny.random_params(c, seed=3), 5: tiny.random_params(c, seed=5)}
    tiny.save_run(workdir, values(), steps)
    return workdir


@pytest.fixture
def workdir(run, tmp_path):
    """Another folder with the run's checkpoints."""
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    return tmp_path


def draw(workdir, step=None, **overrides):
    return sample(config_lib.parse(values(**overrides)), workdir, step)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_writes_images_labels_grid_pngs_and_protocol(workdir):
    path = draw(workdir, sampling__save_png=True)
    with np.load(path) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (40, 4, 4, 3)
    assert len({image.tobytes() for image in images}) == 40
    np.testing.assert_array_equal(labels, np.arange(40) % 3)
    pngs = sorted(path.with_suffix("").iterdir())
    assert [png.name for png in pngs] == [f"{k:06d}.png" for k in range(40)]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(png)) for png in pngs]), images)
    protocol = json.loads(path.with_suffix(".json").read_text())
    for key, value in {"step": 5, "num_samples": 40, "cfg_scale": 1.0, "solver": "heun"}.items():
        assert protocol[key] == value
    # Nothing else but locks: no work in progress.
    names = {entry.name for entry in workdir.joinpath("samples").iterdir()}
    assert names == {".locks", path.stem, *(path.stem + end for end in (".npz", ".png", ".json"))}
    # In the grid, 3 rows of 2 samples, 48 dots each, with a caption.
    width, height = Image.open(path.with_suffix(".png")).size
    assert width == 2 * 49 + 1
    assert 3 * 57 < height < 3 * 72

    before = path.stat().st_mtime_ns
    folder = path.with_suffix("")
    shutil.rmtree(folder)
    (killed := folder.with_name(f".{folder.name}.png.incomplete")).mkdir()
    (killed / "000000.png").write_text("half of a picture")
    assert draw(workdir, sampling__save_png=True) == path
    assert not killed.exists()
    assert path.stat().st_mtime_ns == before  # it is there, and not made again
    assert len(list(path.with_suffix("").iterdir())) == 40  # what was missing beside it is


def test_the_average_is_the_runs_and_a_grid_may_be_short(workdir):
    """One sample, in a grid that would have a column for each class."""
    path = draw(
        workdir,
        sampling__num_samples=1,
        sampling__grid_columns=3,
        optimizer__ema_decay=0.5,
    )
    assert json.loads(path.with_suffix(".json").read_text())["ema_decay"] == 0.9
    assert path.with_suffix(".png").is_file()


def test_chosen_classes(workdir):
    path = draw(workdir, sampling__classes=("c", 0))
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["arr_1"], np.resize([2, 0], 40))
    assert json.loads(path.with_suffix(".json").read_text())["chosen_classes"] == [2, 0]
    # A sample is that of its number and class, chosen or not.
    plain = draw(workdir)
    same = np.load(plain)["arr_1"] == np.load(path)["arr_1"]
    assert 0 < same.sum() < 40
    both = (np.load(each)["arr_0"][same] for each in (plain, path))
    np.testing.assert_array_equal(*both)
    with pytest.raises(config_lib.ConfigError, match="config.sampling.classes: found 'd', expect"):
        draw(workdir, sampling__classes=("d",))


def test_other_samples_go_elsewhere(workdir):
    changes = [
        {},
        {"step": 3},
        {"sampling__cfg_scale": 2.0},
        {"sampling__num_samples": 8},
    ]
    paths = [draw(workdir, **change) for change in changes]
    assert len(set(paths)) == len(changes)
    assert paths[1].name.startswith("step_3-")
    contents = {np.load(path)["arr_0"][:8].tobytes() for path in paths}
    assert len(contents) == len(changes) - 1  # fewer samples are the first of more


@pytest.mark.parametrize(("killed_at", "resumed_at"), [(0, 0), (24, 16)])
def test_a_stopped_job_goes_on_and_ends_with_the_same_bytes(
    workdir, monkeypatch, killed_at, resumed_at
):
    """40 samples are 5 batches of 8, kept 16 at a time."""
    whole = draw(workdir)
    finished = files(whole.parent)
    shutil.rmtree(whole.parent)
    started = []

    def make_generator(*arguments):
        generator = generator_lib.make_generator(*arguments)

        def start(params, first, guidance):
            started.append(first)
            if first == killed_at:
                raise KeyboardInterrupt
            return generator.start(params, first, guidance)

        return dataclasses.replace(generator, start=start)

    monkeypatch.setattr("repulsor_jax.sample.make_generator", make_generator)
    with pytest.raises(KeyboardInterrupt):
        draw(workdir)
    killed_at = None
    started.clear()
    assert draw(workdir) == whole
    assert started == list(range(resumed_at, 40, 8))  # whole shards are kept
    assert files(whole.parent) == finished


def test_a_kill_at_the_very_end_is_mended(workdir, monkeypatch):
    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("repulsor_jax.files.atomic.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            draw(workdir)
    path = draw(workdir)
    names = {name.name for name in path.parent.iterdir()} - {".locks"}
    assert names == {path.name, path.with_suffix(".png").name, path.with_suffix(".json").name}


def test_a_sample_that_is_not_finite_is_an_error_that_names_it(workdir):
    """A solver that gives a sample up, as dopri5 does, must not write a black picture."""
    with pytest.raises(generator_lib.SamplingError, match=r"sample 0 is not finite.*max_steps"):
        draw(workdir, sampling__solver="dopri5", sampling__max_steps=1)


@pytest.mark.parametrize(
    ("overrides", "step", "message"),
    [
        ({}, 4, r"holds no step 4; it holds \[3, 5\]"),
        (
            {"model__hidden_size": 64},
            None,
            "does not fit this configuration: config.model.hidden_size is 64",
        ),
        ({"flow__prediction": "noise"}, None, "config.flow.prediction is 'noise', but the run"),
        ({"model__in_channels": 4}, None, "config.model.in_channels is 4, but the run has 3"),
        (
            {"data__autoencoder": "taesd"},
            None,
            "config.data.autoencoder is 'taesd', but the run has 'identity'",
        ),
        ({"mesh__data": 3}, None, "config.mesh.data=3"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_run_is_refused(workdir, overrides, step, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        draw(workdir, step, **overrides)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoints holds no checkpoint"):
        draw(tmp_path)
    assert not list(tmp_path.iterdir())


def test_autoguidance_leads_away_from_the_weak_run(run, workdir, tmp_path_factory):
    """One Euler step by hand, with a weak model of another depth."""
    weak_run = tmp_path_factory.mktemp("weak")
    weak_values = values(model__depth=2)
    del weak_values.model.attention_separation  # as saved before this key
    weak_config = config_lib.parse(weak_values)
    weak_params = tiny.random_params(weak_config, seed=7)
    tiny.save_run(weak_run, weak_values, {2: weak_params})
    options = {
        "sampling__solver": "euler",
        "sampling__num_steps": 1,
        "sampling__cfg_scale": 2.5,
        "sampling__num_samples": 8,
        "sampling__guiding_run": str(weak_run),
    }
    path = draw(workdir, **options)
    c = config_lib.parse(values())
    strong_params = tiny.random_params(c, seed=5)
    draw_one = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (4, 4, 3))
    noise = np.asarray(jax.jit(jax.vmap(draw_one))(np.arange(8)))
    labels, at = np.arange(8) % 3, np.zeros(8, np.float32)
    strong, weak = (
        np.asarray(jax.jit(build_model(part.model).apply)({"params": params}, noise, at, labels))
        for part, params in ((c, strong_params), (weak_config, weak_params))
    )
    pixels = noise + weak + 2.5 * (strong - weak)
    expected = np.clip(127.5 * pixels + 128, 0, 255).astype(int)
    assert np.abs(np.load(path)["arr_0"].astype(int) - expected).max() <= 1
    assert np.abs(strong - weak).max() > 0.1
    guide = json.loads(path.with_suffix(".json").read_text())["guide"]
    assert guide["step"] == 2
    assert guide["weights_sha256"] == run_lib.params_sha256(weak_params)


@pytest.mark.parametrize(
    ("overrides", "record", "message"),
    [
        ({"flow__path": "gvp"}, {}, "config.flow.path is 'gvp', and 'linear'"),
        ({}, {"factor": [2.0] * 3}, r"the latents' factor is \[2.0, 2.0, 2.0\], and \[1.0"),
    ],
    ids=str,
)
def test_a_guide_that_does_not_fit_is_refused(
    workdir, tmp_path_factory, overrides, record, message
):
    weak_run = tmp_path_factory.mktemp("weak")
    weak_values = values(**overrides)
    params = tiny.random_params(config_lib.parse(weak_values))
    tiny.save_run(weak_run, weak_values, {1: params}, **record)
    with pytest.raises(config_lib.ConfigError, match=f"config.sampling.guiding_run.*{message}"):
        draw(workdir, sampling__cfg_scale=2.0, sampling__guiding_run=str(weak_run))


def test_a_guide_that_is_not_there_is_named_by_its_key(workdir, tmp_path):
    with pytest.raises(config_lib.ConfigError, match="config.sampling.guiding_run=.*no checkpoint"):
        draw(workdir, sampling__cfg_scale=2.0, sampling__guiding_run=str(tmp_path / "none"))


def test_a_digest_of_parameters_is_that_of_their_values_alone():
    c = config_lib.parse(values())
    params = tiny.random_params(c)
    sharded = jax.device_put(params, tiny.sharding.replicated(tiny.mesh(8)))
    assert run_lib.params_sha256(sharded) == run_lib.params_sha256(params)
    assert run_lib.params_sha256(tiny.random_params(c, seed=1)) != run_lib.params_sha256(params)


def test_guidance_of_a_run_without_a_trained_null_class_is_refused(tmp_path):
    trained = values(model__label_dropout=0.0)
    tiny.save_run(tmp_path, trained, {1: tiny.random_params(config_lib.parse(trained))})
    with pytest.raises(
        config_lib.ConfigError, match="was trained with config.model.label_dropout=0"
    ):
        draw(tmp_path, sampling__cfg_scale=1.5)
    assert draw(tmp_path).is_file()


@pytest.mark.parametrize("mode", ["balanced", "random"])
def test_a_class_without_images_is_never_sampled(tmp_path, mode):
    c = config_lib.parse(values())
    tiny.save_run(tmp_path, values(), {1: tiny.random_params(c)}, absent_classes=[1])
    path = draw(tmp_path, sampling__labels=mode)
    with np.load(path) as archive:
        labels = archive["arr_1"]
    assert set(labels.tolist()) == {0, 2}
    if mode == "balanced":
        np.testing.assert_array_equal(labels, np.arange(40) % 2 * 2)
    assert json.loads(path.with_suffix(".json").read_text())["absent_classes"] == [1]


def test_the_way_from_noise(workdir):
    path = draw(workdir)
    draw_trajectory(config_lib.parse(values()), workdir, path)
    c = config_lib.parse(values())
    with run_lib.open_checkpoints(c, workdir) as checkpointer:
        experiment = run_lib.open_experiment(c, workdir, checkpointer, 5)
        params = run_lib.restore_params(experiment, checkpointer, 5)
    frames, times = generator_lib.trajectory(experiment, params)
    np.testing.assert_allclose(times, [0, 1 / 3, 2 / 3, 1])
    assert frames.shape == (4, 2, 4, 4, 3)
    np.testing.assert_array_equal(frames[-1], np.load(path)["arr_0"][:2])  # it ends at the samples
    noise = np.asarray(sampler.initial_noise(0, np.arange(2), (4, 4, 3)))
    levels = np.clip(noise * 127.5 + 128, 0, 255)
    assert np.abs(frames[0] - (levels - 0.5)).max() < 0.501
    strip = Image.open(path.with_name(f"{path.stem}_trajectory.png"))
    assert strip.size[0] == 4 * 49 + 1
    assert Image.open(path.with_name(f"{path.stem}_trajectory.webp")).n_frames == 4
    with pytest.raises(config_lib.ConfigError, match="--trajectory follows euler, midpoint, heun"):
        generator_lib.check_trajectory(config_lib.parse(values(sampling__solver="dopri5")))
