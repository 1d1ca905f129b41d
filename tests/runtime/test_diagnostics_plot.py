"""The picture of diagnostics: which panels it has, and what lies in them."""

import numpy as np
from PIL import Image

from repulsor_jax.runtime.diagnostics_plot import diagnostics_figure, draw_diagnostics


def row(step, **values):
    return {"step": step, "loss": 1.0} | {f"diagnostics/{k}": v for k, v in values.items()}


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes}


def curves(axis):
    """The (steps, values) of the lines with data; limits and legends have none or two points."""
    lines = [np.asarray(line.get_data(), float).tolist() for line in axis.get_lines()]
    return [line for line in lines if len(line[0]) == 3]


ROWS = [
    row(
        step,
        **{
            "block_1/effective_rank": 10.0 + step,
            "block_10/effective_rank": 30.0,
            "block_2/effective_rank": 20.0,
            "repulsor/copies_found": 2,
            "repulsor/copies_expected": 2.5,
            "mine/half_life": 7.0,
        },
    )
    for step in (5, 10, 15)
]


def test_a_panel_where_there_are_data_and_one_for_a_new_name():
    found = panels(diagnostics_figure([{"step": 1, "loss": 3.0}, *ROWS]))
    assert list(found) == ["Collapse: effective rank", "Bank: own copies", "half life"]
    assert [[5, 10, 15], [15, 20, 25]] in curves(found["Collapse: effective rank"])
    assert [[5, 10, 15], [2.5] * 3] in curves(found["Bank: own copies"])
    legend = found["Bank: own copies"].get_legend()
    assert [text.get_text() for text in legend.texts] == ["copies found", "copies expected"]


def test_one_legend_names_terms_and_then_blocks_by_depth():
    (legend,) = diagnostics_figure(ROWS).legends
    names = [text.get_text() for text in legend.texts]
    assert names == ["mine", "repulsor", "block_1", "block_2", "block_10"]


def test_a_cosine_near_one_is_seen_to_be_near_one():
    rows = [row(step, **{"block_0/cosine_samples": 0.99}) for step in (1, 2, 3)]
    low, high = panels(diagnostics_figure(rows))["Collapse: cosine of samples"].get_ylim()
    assert low <= 0
    assert high >= 1


def test_numbers_that_are_not_finite_are_left_out():
    rows = [row(step, uniformity=value) for step, value in enumerate([1, float("nan"), 2, None, 3])]
    assert curves(panels(diagnostics_figure(rows))["Alignment and uniformity"]) == [
        [[0, 2, 4], [1, 2, 3]]
    ]


def test_the_picture_is_written_where_there_is_something_to_draw(tmp_path):
    draw_diagnostics([{"step": 1, "loss": 3.0}], tmp_path / "none.png")
    draw_diagnostics(ROWS, tmp_path / "some.png")
    assert [path.name for path in tmp_path.iterdir()] == ["some.png"]
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.width > picture.height > 100
