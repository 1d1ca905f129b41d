import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


def test_the_code_of_the_readme_runs_and_does_what_it_says():
    [block] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    assert int(names["bank"].filled) == 1
    np.testing.assert_array_equal(names["bank"].tags.ids[0], np.arange(32))
    before = names["bank"]
    first = names["train_step"](np.eye(384, 128), before, names["h"], names["views"], np.arange(32))
    assert int(first[1].filled) == 2
    assert (first[0] != np.eye(384, 128)).any()
    # The rows of the bank are those of the same 32 images: without their numbers they would count.
    others = names["train_step"](
        np.eye(384, 128), before, names["h"], names["views"], np.arange(32) + 32
    )
    step = np.linalg.norm(first[0] - np.eye(384, 128))
    assert np.linalg.norm(first[0] - others[0]) > 1e-3 * step
    assert (
        len([line for line in block.splitlines() if line.strip()]) <= 16
    )  # "ten lines", and set-up
