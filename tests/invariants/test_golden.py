"""Invariant 9: the program computes what it computed, and reads what it wrote.

Where one of these fails and the change was meant, `python -m tests.invariants.golden` writes the
new values, and the commit says why they are new. Otherwise something moved by accident.
"""

import json
import shutil

import numpy as np
import pytest

from tests.invariants import golden

GOLDEN = json.loads((golden.FOLDER / "golden.json").read_text())
# The last bits are those of one compiler on one kind of processor.
EXACT = golden.machine() == GOLDEN["machine"]


def assert_same_losses(found, expected):
    if EXACT:
        assert found == expected
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_losses_samples_and_checkpoint_of_digits_are_those_of_the_golden_file(tmp_path):
    found, expected = golden.digits(tmp_path), GOLDEN["digits"]
    assert_same_losses(found["losses"], expected["losses"])
    if EXACT:
        assert found["digests"] == expected["digests"]
    np.testing.assert_allclose(found["samples"], expected["samples"], atol=1)
    assert found["arrays"] == expected["arrays"]


@pytest.mark.slow
def test_a_checkpoint_and_latents_of_an_older_version_are_read_and_training_goes_on(tmp_path):
    for name in ("checkpoints", "data"):
        shutil.copytree(golden.FOLDER / name, tmp_path / name)
    golden.run(tmp_path, *golden.SMALL, f"--config.total_steps={golden.LAST}")
    assert_same_losses(golden.losses(tmp_path), GOLDEN["small"]["losses"][golden.SAVED :])
