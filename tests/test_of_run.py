"""The configuration that a run's checkpoint holds, by which later modes need no --config."""

import json
import pathlib

import pytest

from configs import of_run
from repulsor_jax import config as config_lib
from tests.oracles import tiny

FIRST = pathlib.Path(__file__).parent / "data" / "first_layout" / "checkpoints"


def load(directory, step=""):
    return of_run.get_config(json.dumps([str(directory), step]))


def test_it_is_that_of_the_run(tmp_path):
    changes = {
        "model__learn_sigma": True,
        "flow__path": "gvp",
        "evaluation__cfg_scales": (1.5, 2.0),
    }
    changes |= {"evaluation__cfg_intervals": ((0.0, 0.5),), "sampling__classes": ("b", 2)}
    values = tiny.config_dict(**changes, mesh__fsdp=2, checkpoint__directory="elsewhere")
    params = tiny.random_params(config_lib.parse(values))
    tiny.save_run(tmp_path, values, {2: params})
    tiny.save_run(tmp_path, tiny.config_dict(**changes, total_steps=9), {5: params})
    found = load(tmp_path / "checkpoints", "2")
    assert config_lib.parse(found) == tiny.config(**changes)  # of another mesh and folder
    assert load(tmp_path / "checkpoints").total_steps == 9  # the newest


def test_a_run_of_an_older_version(tmp_path):
    saved = json.loads((FIRST / "3" / "config" / "metadata").read_text())
    found = config_lib.parse(load(FIRST))
    assert found.model.hidden_size == saved["model"]["hidden_size"]
    assert found.terms == saved["regularizer"]["name"]


def test_what_an_export_wrote(tmp_path):
    values = tiny.config_dict(model__qk_norm=True, sampling__classes=("a",))
    (tmp_path / "x.json").write_text(json.dumps(values.to_dict()))
    assert config_lib.parse(load(tmp_path / "x.json")) == config_lib.parse(values)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint: check --workdir and --config.check"):
        load(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"holds no step 4, but \[3\]"):
        load(FIRST, "4")
    (tmp_path / "checkpoints" / "2" / "config").mkdir(parents=True)
    (tmp_path / "checkpoints" / "2" / "config" / "metadata").write_text("[1]")
    with pytest.raises(ValueError, match="2: found no readable configuration of a run"):
        load(tmp_path / "checkpoints")
