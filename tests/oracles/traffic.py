"""The collectives of compiled programs, listed for the tests of what travels."""

from repulsor_jax.planning import hlo
from repulsor_jax.planning.hlo import Collective, Computation, Instruction, Module


def collectives(hlo_text: str) -> list[Collective]:
    """Lists the collectives of `compiled.as_text()`; one in a loop body is listed once."""
    module = hlo.parse(hlo_text)
    scatters = {}  # by the computation that is fused to one
    for computation in module.computations.values():
        for instruction in computation.values():
            if scatter := hlo.reduce_scatter(module, instruction):
                scatters[instruction.called[0]] = scatter
    found: dict[object, Collective] = {}
    for name, computation in module.computations.items():
        for instruction in computation.values():
            if each := hlo.collective(instruction):
                each = scatters.get(name, each)
                found.setdefault(each.key or instruction.name, each)
    return list(found.values())


def loops(module: Module) -> list[tuple[Instruction, list[Collective]]]:
    """Every `while`, with the collectives of one turn of it, those of inner loops included."""
    whiles = [i for c in module.computations.values() for i in c.values() if i.opcode == "while"]
    found = []
    for loop in whiles:
        inside, to_visit = dict[str, Computation](), list(loop.called)
        while to_visit:
            name = to_visit.pop()
            if name not in inside:
                inside[name] = module.computations[name]
                to_visit += [called for i in inside[name].values() for called in i.called]
        each = [hlo.collective(i) for computation in inside.values() for i in computation.values()]
        found.append((loop, [c for c in each if c]))
    return found
