"""Published files: where they are found, what they must fit, and what is drawn from them."""

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from repulsor_jax import config as config_lib
from repulsor_jax.evaluate import evaluate
from repulsor_jax.inference import pretrained
from repulsor_jax.models import published, torch_weights
from repulsor_jax.sample import sample
from repulsor_jax.train_state import create_train_state
from tests.oracles import sit, tiny
from tests.oracles.torch_files import Call, Global, dumps, tensor, write_zip

SIZES = {
    "model__latent_size": 8,
    "model__in_channels": 4,
    "model__hidden_size": 16,
    "model__depth": 2,
    "model__mlp_ratio": 3.0,
    "model__num_classes": 5,
    "model__learn_sigma": True,
}


def config(file="", **overrides):
    return tiny.config(**SIZES | {"model__init_from": str(file), "mesh__data": 1} | overrides)


@pytest.fixture(scope="module")
def state():
    return sit.tiny_state()


@pytest.fixture
def file(tmp_path, state):
    save_file(state, tmp_path / "sit.safetensors")
    return tmp_path / "sit.safetensors"


def write_checkpoint(path, **parts):
    """What training scripts save: state dicts, an optimizer's state, arguments."""
    arrays, value = {}, {}
    for part, tensors in parts.items():
        value[part] = {}
        for name, array in tensors.items():
            key = str(len(arrays))
            arrays[key] = array
            value[part][name] = tensor(key, array)
    moment = tensor("0", arrays["0"])
    value["opt"] = {"state": {0: {"step": 3, "exp_avg": moment}}, "param_groups": [{"params": [0]}]}
    return write_zip(path, dumps(value), arrays)


def test_the_average_of_a_checkpoint_of_training_is_taken(tmp_path, state):
    other = {f"module.{name}": array + 1 for name, array in state.items()}
    average = {f"module.{name}": array for name, array in state.items()}
    path = write_checkpoint(tmp_path / "0400000.pt", model=other, ema=average)
    found = pretrained.load(config(path)).params
    save_file(state, tmp_path / "plain.safetensors")
    expected = pretrained.load(config(tmp_path / "plain.safetensors")).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_checkpoint_that_torch_saved(tmp_path, state):
    import argparse

    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(model="SiT-XL/2", lr=1e-4, resume=None)
    content = {"model": {}, "ema": tensors, "opt": optimizer.state_dict(), "args": arguments}
    torch.save(content, tmp_path / "x.pt")
    found = pretrained.load(config(tmp_path / "x.pt"))
    assert found.record["convention"] == "sit"
    bias = state["x_embedder.proj.bias"]
    np.testing.assert_array_equal(found.params["patch_embed"]["bias"], bias)


def test_a_namespace_runs_nothing(tmp_path, state):
    """Arguments are built of a fresh class, and any other class is refused."""
    array = state["x_embedder.proj.bias"]
    evil = {"ema": {"x": tensor("0", array)}, "args": Call("os", "getcwd")}
    path = write_zip(tmp_path / "x.pt", dumps(evil), {"0": array})
    with pytest.raises(config_lib.ConfigError, match=r"os\.getcwd, which is refused"):
        pretrained.load(config(path))
    referred = {"ema": {"x": tensor("0", array)}, "args": Global("argparse", "Namespace")}
    path = write_zip(tmp_path / "x.pt", dumps(referred), {"0": array})
    with pytest.raises(config_lib.ConfigError, match="expected those of a SiT"):
        pretrained.load(config(path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__depth": 3, "model__learn_sigma": False},
            r"it needs --config.model.depth=2 --config.model.learn_sigma=True$",
        ),
        ({"flow__prediction": "noise"}, r"it needs --config.flow.prediction=velocity$"),
        (
            {"model__init_convention": "dit"},
            "it needs --config.model.time_steps=1000 --config.flow.prediction=noise "
            "--config.flow.path=ddpm_linear$",
        ),
        ({"model__num_heads": 4, "model__mlp_ratio": 2.0}, r"--config.model.mlp_ratio=3.0$"),
    ],
)
def test_what_does_not_fit_is_named_with_the_flags_to_set(file, overrides, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        pretrained.load(config(file, **overrides))


def test_a_learned_source_that_the_configuration_lacks(tmp_path, state):
    source = {"source.table.weight": np.zeros((5, 2), np.float32)}
    save_file(state | source, tmp_path / "source.safetensors")
    with pytest.raises(config_lib.ConfigError, match=r"it needs --config.source.name=class$"):
        pretrained.load(config(tmp_path / "source.safetensors"))


def test_a_convention_that_the_tensors_contradict(tmp_path, state):
    head = {"ap_head.linear.0.weight": np.zeros((2, 2), np.float32)}
    save_file(state | head, tmp_path / "sra.safetensors")
    with pytest.raises(config_lib.ConfigError, match="whose convention is 'dit'; leave it"):
        pretrained.load(config(tmp_path / "sra.safetensors", model__init_convention="sit"))


def test_reversed_files_are_turned_round(file, tmp_path):
    found = pretrained.load(config(file, model__init_convention="reversed"))
    expected = published.reverse(pretrained.load(config(file)).params)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected)
    stacked = pretrained.load(config(file, model__scan_blocks=True)).params
    assert stacked["blocks"]["qkv"]["bias"].shape == (2, 48)


def test_a_repository_is_downloaded_from(file, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *asked: asked == ("a/b", "c/d.pt") and file
    )
    assert pretrained.locate("a/b/c/d.pt") == pretrained.locate("hf://a/b/c/d.pt") == file

    def offline(*unused):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(config_lib.ConfigError, match=r"no network\). Fetch d.pt from https://hug"):
        pretrained.locate("a/b/d.pt")
    with pytest.raises(config_lib.ConfigError, match="found nothing there"):
        pretrained.locate("weights.pt")


def test_samples_and_numbers_of_a_file_are_those_of_a_run(tmp_path):
    """Drawn without a checkpoint, and from a checkpoint of the same parameters."""
    options = {"model__in_channels": 3, "evaluation__features": "pixels"}
    options |= {"evaluation__reference": str(tmp_path / "reference.npy")}
    options |= {"evaluation__num_samples": 8, "evaluation__reference_features": 8}
    values = tiny.config_dict(**options)
    params = tiny.random_params(config_lib.parse(values))
    tiny.save_run(tmp_path / "run", values, {4: params})
    sizes = {"num_heads": 2, "patch_size": 2, "latent_size": 4}
    save_file(torch_weights.to_torch_state_dict(params, **sizes), tmp_path / "x.safetensors")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "reference.npy", rng.integers(0, 256, (16, 4, 4, 3)).astype(np.uint8))

    c = tiny.config(**options, model__init_from=str(tmp_path / "x.safetensors"))
    path = sample(c, tmp_path / "file")
    of_run = sample(config_lib.parse(values), tmp_path / "run")
    for key in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(np.load(path)[key], np.load(of_run)[key])
    protocol = json.loads(path.with_suffix(".json").read_text())
    digest = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    expected = {"file": "x.safetensors", "sha256": digest, "convention": "sit"}
    assert protocol["weights_file"] == expected
    [record] = evaluate(c, tmp_path / "file")
    assert record["protocol"]["weights_file"] == expected
    [of_run] = evaluate(config_lib.parse(values), tmp_path / "run")
    assert record["metrics"] == of_run["metrics"]
    # A checkpoint that is there comes first.
    assert sample(c, tmp_path / "run").name.startswith("step_4-")


def test_training_starts_from_the_file(file, tmp_path):
    c = config(file)
    weights = pretrained.load(c)
    start = create_train_state(tiny.trainer(c), tiny.mesh())
    found = pretrained.start_from(start, weights)
    for tree in (found.params["model"], found.ema_params):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), weights.params)
    # The step donates both.
    leaves = [jax.tree.leaves(tree) for tree in (found.params["model"], found.ema_params)]
    for one, other in zip(*leaves, strict=True):
        assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
