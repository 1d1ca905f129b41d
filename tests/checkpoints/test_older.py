"""A checkpoint of the first layout, one regulariser and no tags in the bank, is gone on from."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax.checkpoints import older, resuming
from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.train_state import abstract_train_state, create_train_state
from tests.invariants import golden
from tests.oracles import tiny

FIRST = pathlib.Path(__file__).resolve().parents[1] / "data" / "first_layout"
# What the version that saved it went on to compute, on the same data.
LOSSES = [1.11249577999115, 1.0641340017318726, 1.0820872783660889]


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_of_the_first_layout(tmp_path):
    shutil.copytree(FIRST / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(golden.FOLDER / "data", tmp_path / "data")
    golden.run(tmp_path, *golden.SMALL, f"--config.total_steps={golden.LAST}")
    found = golden.losses(tmp_path)
    # The bank's own rows have no image; rows of the next steps have one, and are left out where it
    # is the sample's own.
    np.testing.assert_allclose(found[0], LOSSES[0], rtol=1e-5)
    np.testing.assert_allclose(found, LOSSES, rtol=2e-3)
    (line,) = (tmp_path / "resumes.jsonl").read_text().splitlines()
    assert any("an older version saved it" in note for note in json.loads(line)["notes"])


@pytest.mark.parametrize("terms", ["none", "dispersive", "repulsor"])
def test_every_regulariser_of_the_first_layout_is_restored(tmp_path, terms):
    values = tiny.config_dict(terms=terms)
    trainer = tiny.trainer(config_lib.parse(values))
    state = create_train_state(trainer, tiny.mesh())
    old = values.to_dict()
    old["regularizer"] = {"name": old.pop("terms"), "weight": 0.5}
    records = {"next_index": 1}, old, {}
    with Checkpointer(tmp_path, max_lost_steps=9) as checkpointer:
        checkpointer.save(1, older.to_older(state), *records, patience=0.0)
        abstract = abstract_train_state(trainer, tiny.mesh())
        found, _, notes = checkpointer.restore(abstract, tiny.BATCH)
        assert "older version" in notes[0]
        with_teacher = tiny.config(terms="repulsor", repulsor__positives="view")
        other = abstract_train_state(tiny.trainer(with_teacher), tiny.mesh())
        with pytest.raises(CheckpointError, match="use the run's own config"):
            checkpointer.restore(other, tiny.BATCH)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, tiny.raw(found), tiny.raw(state))


def test_what_the_first_layout_could_not_do_is_another_task():
    saved = tiny.config_dict().to_dict()
    del saved["terms"], saved["repulsor"]
    saved["regularizer"] = {"name": "repulsor", "projection_dim": tiny.DIM}
    present = tiny.config_dict(repulsor__positives="view").to_dict()
    with pytest.raises(config_lib.ConfigError, match="positives: 'none' -> 'view'.*--force"):
        resuming.check(present, {}, saved, {})


def test_sections_of_the_first_layout_are_those_of_today():
    saved = {"name": "dispersive", "weight": 0.5, "block": 2, "bank_rows": 8, "variant": "hinge"}
    schedule = {"decay_from": 1.0, "stop_step": 0}
    assert older.config_record({"seed": 1, "regularizer": saved}) == {
        "seed": 1,
        "terms": "dispersive",
        "dispersive": {"weight": 0.5, "block": 2, "variant": "hinge"} | schedule,
    }
    saved = {"name": "repulsor", "weight": 0.5, "bank_rows": 8, "variant": "l2", "margin": 1.0}
    found = older.config_record({"regularizer": saved})
    assert found["terms"] == "repulsor"
    expected = {"weight": 0.5, "bank_rows": 8, "positives": "none"}
    assert expected.items() <= found["repulsor"].items()
    assert not {"variant", "margin"} & found["repulsor"].keys()
    assert older.config_record({"regularizer": {"name": "none", "weight": 0.5}})["terms"] == "none"
    assert older.config_record({"terms": "sra"}) == {"terms": "sra"}
