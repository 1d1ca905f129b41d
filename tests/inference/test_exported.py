"""The export: what PyTorch, diffusers and we ourselves draw from it, and its card."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from repulsor_jax import config as config_lib
from repulsor_jax.evaluation import report
from repulsor_jax.export import export
from repulsor_jax.flows.sampler import initial_noise
from repulsor_jax.inference import exported, pretrained
from repulsor_jax.inference import run as run_lib
from repulsor_jax.sample import sample
from tests.oracles import sit, tiny
from tests.oracles.autoencoders import load_diffusers

OPTIONS = {
    "model__in_channels": 3,
    "model__latent_size": 8,
    "model__depth": 2,
    "model__learn_sigma": True,
    "model__scan_blocks": True,
    "sampling__cfg_scale": 1.5,
    "sampling__grid_columns": 3,
}
FACTOR = {"shift": [0.1, 0.0, -0.2], "factor": [2.0, 1.0, 0.5]}


def values(**overrides):
    return tiny.config_dict(**OPTIONS | overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint, an evaluation of it, and its export."""
    workdir = tmp_path_factory.mktemp("run")
    c = config_lib.parse(values())
    saved = values(data__dir="/home/me/latents")
    tiny.save_run(workdir, saved, {7: tiny.random_params(c)}, **FACTOR)
    protocol = {"step": 7, "num_samples": 9, "reference": "/home/me/imagenet.npz"}
    (workdir / "evaluations").mkdir()
    # Of other weights, as those of a run that was in this folder before, and of these.
    for step, digest in ((6, "others"), (7, run_lib.params_sha256(tiny.random_params(c)))):
        record = {
            "metrics": {"fid": step + 0.25},
            "protocol": {"weights_sha256": digest, **protocol},
        }
        record |= {"features": {"name": "inception", "digest": "f"}}
        record["reference"] = {"name": "/home/me/x", "digest": "0"}
        report.write(workdir / "evaluations", f"step_{step}", record)
    export(config_lib.parse(values()), workdir)
    return workdir


@pytest.fixture(scope="module")
def folder(run):
    return run / "export" / "step_7"


def test_a_guide_is_named_and_its_folder_is_not(tmp_path):
    guide = tmp_path / "weak"
    tiny.save_run(guide, values(), {7: tiny.random_params(config_lib.parse(values()))})
    guided = values(sampling__guiding_run=str(guide), sampling__cfg_scale=2.0)
    c = config_lib.parse(guided)
    tiny.save_run(tmp_path, guided, {1: tiny.random_params(c, 1)})
    folder = export(c, tmp_path)
    card = (folder / "README.md").read_text()
    assert "by weak, step 7" in card
    assert "guiding_run=RUN --config.sampling.cfg_scale=2" in card
    assert "guidance_scale" not in card  # the pipeline knows no such guide
    saved = json.loads((folder / exported.TRAINING_CONFIG).read_text())["sampling"]
    assert (saved["guiding_run"], saved["cfg_scale"]) == ("", 1.0)
    drawn = (folder / "samples.png").read_bytes()
    export(config_lib.parse(values(sampling__cfg_scale=2.0)), tmp_path)
    assert (folder / "samples.png").read_bytes() != drawn  # by the model without a class


@pytest.fixture(scope="module")
def ours(run):
    """The first images of the run itself, before they are rounded, and the noise of each."""
    path = sample(config_lib.parse(values()), run)
    noise = initial_noise(0, jnp.arange(8), (8, 8, 3))
    return np.load(path), np.asarray(noise).transpose(0, 3, 1, 2)


def test_an_independent_sit_in_pytorch_draws_the_same_images(folder, ours):
    """Heun's method with guidance, on the published equations in float64."""
    pytest.importorskip("torch")
    state = load_file(folder / "model.safetensors")
    images, noise = ours[0], ours[1][:2].astype(np.float64)
    labels = images["arr_1"][:2]
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3}

    def velocity(x, t):
        both = (labels, np.full(2, 3))
        strong, weak = (sit.evaluate(state, x, np.full(2, t), y, **sizes) for y in both)
        return weak + 1.5 * (strong - weak)

    x, dt = noise, 1 / 3
    for step in range(3):
        first = velocity(x, step * dt)
        x = x + dt / 2 * (first + velocity(x + dt * first, (step + 1) * dt))
    x = x.transpose(0, 2, 3, 1) / FACTOR["factor"] + FACTOR["shift"]
    levels = np.clip(x * 127.5 + 128, 0, 255)
    # Before rounding: half a level off is another one.
    assert np.abs(levels - 0.5 - images["arr_0"][:2]).max() < 0.5 + 1e-2


def test_diffusers_draws_the_same_images(folder, ours):
    diffusers = load_diffusers()
    import torch

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images, noise = ours
    options = {"num_inference_steps": 3, "guidance_scale": 1.5, "solver": "heun"}
    noise, labels = torch.from_numpy(noise.copy()), images["arr_1"].tolist()
    found = pipe(labels, latents=noise, output_type="pt", **options).images.numpy()
    expected = exact_images(folder, ours)
    np.testing.assert_allclose(found.transpose(0, 2, 3, 1), expected, atol=1e-5)
    pictures = [np.asarray(each) for each in pipe(["b"], latents=noise[1:2], **options).images]
    assert np.abs(pictures[0].astype(int) - images["arr_0"][1]).max() <= 1


def test_what_ours_draws_from_the_export_is_what_the_run_draws(folder, ours, tmp_path):
    """Shift and factor of the latents are of the run, not of the autoencoder."""
    c = config_lib.parse(values(model__init_from=str(folder), sampling__classes=("b",)))
    with np.load(sample(c, tmp_path)) as found:
        assert set(found["arr_1"].tolist()) == {1}
    c = config_lib.parse(values(model__init_from=str(folder)))
    with np.load(sample(c, tmp_path)) as found:
        np.testing.assert_array_equal(found["arr_0"], ours[0]["arr_0"])


def exact_images(folder, ours):
    """What we draw from the export, as floats about [-1, 1]."""
    c = config_lib.parse(values(model__init_from=str(folder)))
    experiment, params = pretrained.open_published(c, folder)
    from repulsor_jax.inference.generator import make_latent_sampler

    solve = jax.jit(make_latent_sampler(c, experiment.model))
    labels = jnp.asarray(ours[0]["arr_1"], jnp.int32)
    noise = jnp.asarray(ours[1].transpose(0, 2, 3, 1))
    latents = solve(params, noise, labels, jnp.float32(1.5), (0.0, 1.0))
    return np.asarray(latents) / FACTOR["factor"] + FACTOR["shift"]


@pytest.mark.parametrize("convention", ["sit", "reversed"])
def test_the_export_is_read_back(run, tmp_path, convention):
    c = config_lib.parse(values())
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    folder = export(c, tmp_path, convention=convention)
    learns = {"model__learn_sigma": convention == "sit"}
    found = pretrained.load(config_lib.parse(values(model__init_from=str(folder), **learns)))
    other = values(model__init_from=str(folder), model__num_heads=4, **learns)
    with pytest.raises(config_lib.ConfigError, match="it needs --config.model.num_heads=2$"):
        pretrained.load(config_lib.parse(other))
    is_said = "--config.model.learn_sigma=False" in (folder / "README.md").read_text()
    assert is_said == (convention == "reversed")
    assert found.record["convention"] == convention
    expected = tiny.random_params(c)
    for name in ("time_in", "time_out", "label_embed", "blocks"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            found.params[name],
            expected[name],
        )
    kernel = expected["final"]["kernel"].reshape(32, 4, 6)
    kept = kernel if convention == "sit" else kernel[..., :3]
    np.testing.assert_array_equal(found.params["final"]["kernel"], kept.reshape(32, -1))


def test_the_card_says_what_the_model_is_and_how_it_was_measured(folder):
    card = (folder / "README.md").read_text()
    for part in (
        "2 blocks of width 32",
        "Trained for 7 steps of 16 images",
        "7.25",
        "model.load_state_dict",
        "trust_remote_code=True",
        "for 3 classes (a, b, c)",
    ):
        assert part in card, part
    assert "6.25" not in card
    [record] = (folder / "evaluations").iterdir()
    assert json.loads(record.read_text())["protocol"]["reference"] == "imagenet.npz"
    saved = json.loads((folder / "training_config.json").read_text())
    assert saved["model"]["depth"] == 2
    assert "/home/me" not in "".join(p.read_text() for p in folder.rglob("*.json"))
    with safe_open(folder / "model.safetensors", "np") as file:
        about = file.metadata()
    assert about["prediction"] == "velocity"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model__qk_norm": True}, "no norm of queries and keys"),
        ({"model__mlp_ratio": 2.0}, "diffusers' DiT has 4"),
        ({"flow__prediction": "noise"}, "the pipeline integrates velocities"),
    ],
)
def test_what_diffusers_cannot_express_is_said(tmp_path, overrides, said):
    c = config_lib.parse(values(**overrides))
    tiny.save_run(tmp_path, values(**overrides), {1: tiny.random_params(c)})
    folder = export(c, tmp_path)
    assert said in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "transformer").exists()


def test_another_network_is_refused(tmp_path):
    overrides = {"model__architecture": "blockwise", "model__segments": 2}
    overrides |= {"model__segment_depth": 1, "model__learn_sigma": False}
    overrides |= {"sampling__num_steps": 4}
    c = config_lib.parse(values(**overrides))
    tiny.save_run(tmp_path, values(**overrides), {1: tiny.random_params(c)})
    with pytest.raises(config_lib.ConfigError, match="is another: config.model.architecture="):
        export(c, tmp_path)


def test_a_folder_is_uploaded(folder, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, repository, exist_ok):
            calls.append((repository, exist_ok))

        def upload_folder(self, folder_path, repo_id, commit_message):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert exported.push(folder, "me/digits") == "https://huggingface.co/me/digits"
    files = ["README.md", "evaluations", "model.safetensors", "model_index.json", "pipeline.py"]
    files += ["samples.png", "training_config.json", "transformer"]
    assert calls == [("me/digits", True), ("me/digits", files)]

    def refuse(*unused, **options):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(config_lib.ConfigError, match=r"401 Unauthorized\). The folder is whole"):
        exported.push(folder, "me/digits")
