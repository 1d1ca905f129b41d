import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax.planning import hlo
from tests.oracles import tiny


def compiled_text(f, shape, spec_in, spec_out, mesh):
    shardings = (
        NamedSharding(mesh, PartitionSpec(*spec_in)),
        NamedSharding(mesh, PartitionSpec(*spec_out)),
    )
    jitted = jax.jit(f, in_shardings=shardings[0], out_shardings=shardings[1])
    return jitted.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()


def program(*lines):
    return "\n".join(["HloModule test", "", "ENTRY %main (x: f32[2]) -> f32[2] {", *lines, "}"])


def one(line):
    """The collectives of a program of one instruction."""
    return hlo.collectives(program(f"  %a = {line}"))


def test_finds_what_is_there_and_its_size():
    mesh = tiny.mesh(data=8)
    [gather] = hlo.collectives(compiled_text(lambda x: x, (64, 3), ("data",), (), mesh))
    assert (gather.kind, gather.largest, gather.num_bytes) == ("all-gather", 192, 768)
    assert gather.groups == (tuple(range(8)),)
    assert gather.sent_bytes == 768 * 7 / 8
    [reduce] = hlo.collectives(compiled_text(lambda x: x.sum(0), (64, 3), ("data",), (), mesh))
    assert (reduce.kind, reduce.largest, reduce.num_bytes) == ("all-reduce", 3, 12)
    assert reduce.sent_bytes == 2 * 12 * 7 / 8
    assert (
        hlo.collectives(compiled_text(lambda x: x + 1, (64, 3), ("data",), ("data",), mesh)) == []
    )


def test_reads_tuples_layouts_and_async_starts():
    text = program(
        "  %a = (bf16[8,4]{1,0:T(8,128)}, f32[]) all-reduce-start(%x, %y), replica_groups={{0,1}}",
        "  %b = u8[16]{0} all-to-all(%z), dimensions={0}",
        "  %c = f32[2] add(%p, %q)",
        "  %d = (f32[4]{0}, f32[8]{0:S(1)}) all-gather-start(%p), dimensions={0}",
    )
    first, second, third = hlo.collectives(text)
    assert [(a.dtype, a.shape) for a in first.arrays] == [("bf16", (8, 4)), ("f32", ())]
    assert first.num_bytes == 8 * 4 * 2 + 4
    assert (second.kind, second.num_bytes) == ("all-to-all", 16)
    assert (third.num_bytes, third.arrays[0].space) == (32, 1)  # the result, not the operand


def test_a_tuple_of_more_than_five_arrays_is_read_whole():
    """XLA numbers every fifth with a comment in which there is an equals sign."""
    arrays = ", ".join(["f32[2]"] * 5 + ["/*index=5*/f32[3]"])
    [found] = one(f"({arrays}) all-reduce(%x), replica_groups={{}}")
    assert found.num_bytes == 4 * (5 * 2 + 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # The mesh holds 0, 4, 1, 5, 2, 6, 3, 7: its first axis pairs 0 with 1.
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("mesh['a'=4], device_ids=([4]) {'a'}", ((0, 1, 2, 3),)),
    ],
)
def test_groups_in_all_their_forms(text, expected):
    [found] = one(f"f32[2] all-reduce(%x), channel_id=1, replica_groups={text}, to_apply=%add")
    assert found.groups == expected


def test_pairs_of_a_permutation():
    [found] = one("f32[2] collective-permute(%x), source_target_pairs={{0,1},{1,0}}")
    assert found.groups == ((0, 1), (1, 0))
    assert found.sent_bytes == 8


def loops(f, *arguments):
    module = hlo.parse(jax.jit(f).lower(*arguments).compile().as_text())
    return [
        module.trip_count(i)
        for c in module.computations.values()
        for i in c.values()
        if i.opcode == "while"
    ]


def test_rounds_of_loops():
    def body(x, _):
        return jnp.tanh(x @ x), None

    x = jnp.ones((4, 4))
    assert loops(lambda x: jax.lax.scan(body, x, None, length=7)[0], x) == [7]
    assert loops(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x), x, 5) == [None]


def test_rounds_of_a_loop_that_states_none():
    """As TPU programs come: from the condition alone."""
    text = """HloModule test

%condition (p: (s32[], f32[2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %p = (s32[], f32[2]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  ROOT %p = (s32[], f32[2]) parameter(0)
}

ENTRY %main (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %x = (s32[], f32[2]) parameter(0)
  ROOT %loop = (s32[], f32[2]) while(%x), condition=%condition, body=%body
}
"""
    module = hlo.parse(text)
    assert module.trip_count(module.root("main")) == 28
    # A loop whose body was doubled: its counter goes in twos, from 4.
    doubled = text.replace(
        "ROOT %p = (s32[], f32[2]) parameter(0)\n}\n\nENTRY",
        "%p = (s32[], f32[2]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n"
        "  %x = f32[2] get-tuple-element(%p), index=1\n"
        "  %two = s32[] constant(2)\n"
        "  %next = s32[] add(%i, %two)\n"
        "  ROOT %t = (s32[], f32[2]) tuple(%next, %x)\n}\n\nENTRY",
    ).replace(
        "%x = (s32[], f32[2]) parameter(0)\n  ROOT %loop = (s32[], f32[2]) while(%x)",
        "%f = s32[] constant(4)\n  %y = f32[2] parameter(0)\n"
        "  %s = (s32[], f32[2]) tuple(%f, %y)\n"
        "  ROOT %loop = (s32[], f32[2]) while(%s)",
    )
    module = hlo.parse(doubled)
    assert module.trip_count(module.root("main")) == 12
    unknown = hlo.parse(text.replace("constant(28)", "parameter(1)"))
    assert unknown.trip_count(unknown.root("main")) is None


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")


def test_a_loop_has_the_collectives_of_its_turns_and_of_loops_inside():
    def centre(x, _):
        return jnp.sin(x - x.sum(0)), None  # which all devices must agree on

    def many(x, _):
        return jax.lax.scan(centre, x, length=3)

    def f(x):
        x = jax.lax.fori_loop(0, 7, lambda i, y: jnp.sin(y), x)
        return jax.lax.scan(many, x - x.max(0), length=5)[0]

    text = compiled_text(f, (64, 3), ("data",), ("data",), tiny.mesh(data=8))
    module = hlo.parse(text)
    kinds = {module.trip_count(loop): [c.kind for c in found] for loop, found in hlo.loops(module)}
    assert kinds == {7: [], 3: ["all-reduce"], 5: ["all-reduce"]}
    assert len(hlo.collectives(text)) == 2  # with the maximum
