"""Charts of a page: what thinning keeps, what smoothing is, and what the SVG holds."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from repulsor_jax.files import charts


@pytest.mark.parametrize("count", [10, 99, 100, 101, 5_000])
def test_thinning_keeps_the_extremes_the_ends_and_the_order(count):
    rng = np.random.default_rng(count)
    x, y = np.arange(count), rng.standard_normal(count)
    y[count // 3], y[2 * count // 3] = 50.0, -50.0
    few_x, few_y = charts.thinned(x, y, 100)
    assert len(few_x) == len(few_y) <= min(count, 102)
    assert (few_y.max(), few_y.min()) == (50.0, -50.0)
    assert (few_x[0], few_x[-1]) == (0, count - 1)
    assert (np.diff(few_x) > 0).all()
    np.testing.assert_array_equal(few_y, y[few_x])
    if count == 5_000:  # of every stretch, not of the whole alone
        for part in np.array_split(np.arange(count), 25):
            inside = (few_x >= part[0]) & (few_x <= part[-1])
            assert abs(few_y[inside].max() - y[part].max()) < 1e-12


def test_smoothing_is_the_mean_of_the_neighbours_that_are_there():
    y = np.array([1.0, 2.0, 6.0, 3.0])
    np.testing.assert_allclose(charts.smoothed(y, 3), [1.5, 3.0, 11 / 3, 4.5])


def test_a_chart_has_text_as_text_and_only_the_colours_of_the_page():
    def draw(axis):
        axis.plot([1, 2, 3], [3, 1, 2], color=charts.line_colour(1), marker=".")
        axis.plot([1, 2, 3], [3, 2, 2], color=charts.ramp_colour(0.5))
        axis.axvline(2, color=charts.MARK)
        axis.set_title("<loss> & $more{$")

    svg = charts.chart('"loss" <b>', draw)
    root = ET.fromstring(svg)
    assert root.get("aria-label") == '"loss" <b>'
    texts = ["".join(each.itertext()) for each in root.iter("text")]
    assert "<loss> & $more{$" in texts
    assert not list(root.iter("metadata"))
    found = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg))
    expected = {"var(--ink)", "var(--mark)", "var(--line-1)"}
    assert found == expected | {"none", "color-mix(in oklab, var(--ramp-1) 50%, var(--ramp-0))"}
    for name in ("line-5", "mark", "ramp-0"):  # light and dark
        assert charts.STYLE.count(f"--{name}:") == 2
