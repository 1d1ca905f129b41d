import pathlib
import re

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


def test_the_code_of_the_readme_runs_and_does_what_it_says():
    [block] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    assert int(names["bank"].filled) == 1
    before = names["w"]
    for _ in range(3):
        names["w"], names["bank"] = names["train_step"](
            names["w"], names["bank"], names["jax"].numpy.eye(32, 384)
        )
    assert int(names["bank"].filled) == 4
    assert (names["w"] != before).any()
    assert (
        len([line for line in block.splitlines() if line.strip()]) <= 16
    )  # "ten lines", and set-up
