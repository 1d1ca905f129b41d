"""A checkpoint of the first layout, one regulariser and no tags in the bank, is gone on from."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from repulsor_jax.checkpoints import older
from tests.invariants import golden

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


def test_sections_of_the_first_layout_are_those_of_today():
    saved = {"name": "dispersive", "weight": 0.5, "block": 2, "bank_rows": 8, "variant": "hinge"}
    assert older.config_record({"seed": 1, "regularizer": saved}) == {
        "seed": 1,
        "terms": "dispersive",
        "dispersive": {"weight": 0.5, "block": 2, "variant": "hinge"},
    }
    saved = {"name": "repulsor", "weight": 0.5, "bank_rows": 8, "variant": "l2", "margin": 1.0}
    assert older.config_record({"regularizer": saved}) == {
        "terms": "repulsor",
        "repulsor": {"weight": 0.5, "bank_rows": 8},
    }
    assert older.config_record({"regularizer": {"name": "none", "weight": 0.5}})["terms"] == "none"
    assert older.config_record({"terms": "sra"}) == {"terms": "sra"}
