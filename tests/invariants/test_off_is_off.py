"""Invariant 7: with weight 0 the compiled step holds no head, no bank and no extra FLOP."""

import re

from repulsor_jax.train_state import abstract_train_state
from tests.oracles import tiny


def test_weight_zero_compiles_to_the_program_without_a_regulariser():
    def program(**overrides):
        compiled = tiny.compile_only(tiny.config(**overrides), tiny.mesh(data=2))
        text = re.sub(r"metadata={[^}]*}", "", compiled.as_text())
        # Only names of the tables of source lines differ; the instructions must not.
        return compiled, [line for line in text.splitlines() if " = " in line]

    zero, zero_lines = program(repulsor__weight=0.0)
    none, none_lines = program(terms="none")
    on, _ = program()
    assert zero_lines == none_lines
    assert zero.cost_analysis()["flops"] == none.cost_analysis()["flops"]
    assert on.cost_analysis()["flops"] > none.cost_analysis()["flops"]
    c = tiny.config(repulsor__weight=0.0)
    state = abstract_train_state(tiny.trainer(c), tiny.mesh())
    assert state.bank is None
    assert state.params["terms"] == {}
