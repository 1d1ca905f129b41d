import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax.planning import hlo
from tests.oracles import tiny, traffic


def compiled_text(f, shape, spec_in, spec_out, mesh):
    shardings = (
        NamedSharding(mesh, PartitionSpec(*spec_in)),
        NamedSharding(mesh, PartitionSpec(*spec_out)),
    )
    jitted = jax.jit(f, in_shardings=shardings[0], out_shardings=shardings[1])
    return jitted.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()


def collectives(*lines):
    """The collectives of a program of these instructions."""
    head = ["HloModule test", "", "ENTRY %main (x: f32[2]) -> f32[2] {"]
    return traffic.collectives("\n".join([*head, *(f"  {line}" for line in lines), "}"]))


def test_collectives_are_found_with_their_sizes_and_groups():
    mesh = tiny.mesh(data=8)
    [gather] = traffic.collectives(compiled_text(lambda x: x, (64, 3), ("data_minor",), (), mesh))
    assert (gather.kind, gather.largest, gather.num_bytes) == ("all-gather", 192, 768)
    assert gather.groups == (tuple(range(8)),)
    assert gather.sent_bytes == 768 * 7 / 8
    [reduce] = traffic.collectives(
        compiled_text(lambda x: x.sum(0), (64, 3), ("data_minor",), (), mesh)
    )
    assert (reduce.kind, reduce.largest, reduce.num_bytes) == ("all-reduce", 3, 12)
    assert reduce.sent_bytes == 2 * 12 * 7 / 8
    local = compiled_text(lambda x: x + 1, (64, 3), ("data_minor",), ("data_minor",), mesh)
    assert traffic.collectives(local) == []


def test_tuples_layouts_and_async_starts_are_read():
    # XLA numbers every fifth array of a tuple with a comment that holds an equals sign.
    six = ", ".join(["f32[2]"] * 5 + ["/*index=5*/f32[3]"])
    first, second, third, fourth = collectives(
        "%a = (bf16[8,4]{1,0:T(8,128)}, f32[]) all-reduce-start(%x, %y), replica_groups={{0,1}}",
        "%b = u8[16]{0} all-to-all(%z), dimensions={0}",
        "%c = f32[2] add(%p, %q)",
        "%d = (f32[4]{0}, f32[8]{0:S(1)}) all-gather-start(%p), dimensions={0}",
        f"%e = ({six}) all-reduce(%x), replica_groups={{}}",
    )
    assert [(a.dtype, a.shape) for a in first.arrays] == [("bf16", (8, 4)), ("f32", ())]
    assert first.num_bytes == 8 * 4 * 2 + 4
    assert (second.kind, second.num_bytes) == ("all-to-all", 16)
    assert (third.num_bytes, third.arrays[0].space) == (32, 1)  # the result, not the operand
    assert fourth.num_bytes == 4 * (5 * 2 + 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # The mesh holds 0, 2, 1, 3: its first axis pairs 0 with 1.
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
    ],
)
def test_groups_are_read_in_every_form(text, expected):
    [found] = collectives(
        f"%a = f32[2] all-reduce(%x), channel_id=1, replica_groups={text}, to_apply=%add"
    )
    assert found.groups == expected


def test_a_permutation_has_pairs():
    [found] = collectives("%a = f32[2] collective-permute(%x), source_target_pairs={{0,1},{1,0}}")
    assert found.groups == ((0, 1), (1, 0))
    assert found.sent_bytes == 8


def test_turns_of_a_loop_are_read_where_xla_states_them():
    def turns(f, *arguments):
        module = hlo.parse(jax.jit(f).lower(*arguments).compile().as_text())
        instructions = [i for c in module.computations.values() for i in c.values()]
        return [module.trip_count(i) for i in instructions if i.opcode == "while"]

    x = jnp.ones((4, 4))
    assert turns(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0], x) == [7]
    assert turns(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x), x, 5) == [None]


LOOP = """HloModule test

%condition (p: (s32[], f32[2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %p = (s32[], f32[2]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %p = (s32[], f32[2]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[2] get-tuple-element(%p), index=1
  %step = s32[] constant(1)
  %next = s32[] add(%i, %step)
  ROOT %t = (s32[], f32[2]) tuple(%next, %x)
}

ENTRY %main (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %first = s32[] constant(0)
  %y = f32[2] parameter(0)
  %s = (s32[], f32[2]) tuple(%first, %y)
  ROOT %loop = (s32[], f32[2]) while(%s), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 28),
        ({"constant(1)": "constant(2)", "constant(0)": "constant(4)"}, 12),  # XLA doubled the body
        ({"constant(28)": "parameter(1)"}, None),
    ],
    ids=["counts to 28", "in twos from 4", "depends on data"],
)
def test_turns_of_a_tpu_loop_follow_from_its_condition(changes, expected):
    text = LOOP
    for old, new in changes.items():
        text = text.replace(old, new)
    module = hlo.parse(text)
    assert module.trip_count(module.root("main")) == expected


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")


def test_a_loop_has_the_collectives_of_its_turns_and_of_loops_inside():
    def centre(x, _):
        return jnp.sin(x - x.sum(0)), None  # the sum needs all devices

    def many(x, _):
        return jax.lax.scan(centre, x, length=3)

    def f(x):
        x = jax.lax.fori_loop(0, 7, lambda i, y: jnp.sin(y), x)
        return jax.lax.scan(many, x - x.max(0), length=5)[0]

    text = compiled_text(f, (64, 3), ("data_minor",), ("data_minor",), tiny.mesh(data=8))
    module = hlo.parse(text)
    found = traffic.loops(module)
    kinds = {module.trip_count(loop): [each.kind for each in inside] for loop, inside in found}
    assert kinds == {7: [], 3: ["all-reduce"], 5: ["all-reduce"]}
    assert len(traffic.collectives(text)) == 2  # with the maximum
