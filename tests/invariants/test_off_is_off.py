"""Invariant 7: what is off is not in the compiled step: no head, no bank, no extra FLOP."""

import re

from repulsor_jax.train_state import abstract_train_state
from tests.oracles import tiny


def program(**overrides):
    compiled = tiny.compile_only(tiny.config(**overrides), tiny.mesh(data=2))
    text = re.sub(r"metadata={[^}]*}", "", compiled.as_text())
    # Only names of the tables of source lines differ; the instructions must not.
    return compiled, [line for line in text.splitlines() if " = " in line]


def test_the_step_of_a_run_with_diagnostics_is_that_of_a_run_without():
    _, looking = program(log__diagnostics_every_steps=1)
    _, blind = program(log__diagnostics_every_steps=0)
    assert looking == blind


def test_weight_zero_compiles_to_the_program_without_a_regulariser():
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
