"""Plain values against a schema: one line names the field, what was found, what is expected."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from repulsor_jax.files.untrusted import checked, parse


@checked
class Inner:
    depth: Annotated[int, Field(ge=1)]
    kind: Literal["none", "full"] = "none"
    rate: float = 1.0
    pairs: tuple[tuple[float, float], ...] = ()


@checked
class Outer:
    inner: Inner
    seed: int = 0


def test_plain_values_become_the_dataclass():
    values = {"inner": {"depth": 2, "rate": 3, "pairs": [[0, 1]]}, "seed": 4}
    expected = Outer(inner=Inner(depth=2, rate=3.0, pairs=((0.0, 1.0),)), seed=4)
    assert parse(Outer, values, "config") == expected


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"depth": 0}, "config.inner.depth: expected greater than or equal to 1, found 0"),
        ({"depth": "2"}, "config.inner.depth: expected a valid integer, found '2'"),
        ({"depth": True}, "config.inner.depth: expected a valid integer, found True"),
        ({"depth": 1, "kind": "x"}, "config.inner.kind: expected 'none' or 'full', found 'x'"),
        ({"depth": 1, "pairs": [[1]]}, "config.inner.pairs.0.1: missing"),
        ({"depth": 1, "rat": 2}, "config.inner.rat: unknown key; expected one of depth, kind"),
        ({}, "config.inner.depth: missing"),
        (3, "config.inner: expected an object, found 3"),
        ({"depth": "9" * 999}, "found '9{79}...$"),
        ({"depth": object()}, "config: expected plain values"),
    ],
)
def test_the_first_field_that_is_wrong_is_named(inner, message):
    with pytest.raises(ValueError, match=message):
        parse(Outer, {"inner": inner}, "config")
