"""The walk through the HLO against closed forms, hand counts and XLA's count of flat programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax.planning.cost import program_cost
from repulsor_jax.runtime import throughput
from tests.oracles import tiny


def compiled(f, *shapes, shardings=None, out=None):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings and shardings[k])
        for k, shape in enumerate(shapes)
    ]
    return jax.jit(f, out_shardings=out).lower(*arguments).compile()


def cost(f, *shapes, **kwargs):
    return program_cost(compiled(f, *shapes, **kwargs).as_text())


def test_a_product_is_two_flops_per_multiply_add():
    found = compiled(lambda x, y: x @ y, (24, 40), (40, 56))
    ours = program_cost(found.as_text())
    assert ours.matmul_flops == 2 * 24 * 40 * 56
    assert ours.matmul_flops == found.cost_analysis()["flops"]
    assert ours.bytes_accessed == 4 * (24 * 40 + 40 * 56 + 24 * 56)
    assert ours.bytes_accessed == found.cost_analysis()["bytes accessed"]
    batched = cost(lambda x, y: jnp.einsum("bijk,bljk->bil", x, y), (3, 4, 5, 6), (3, 7, 5, 6))
    assert batched.matmul_flops == 2 * 3 * 4 * 7 * 5 * 6


@pytest.mark.parametrize(
    ("padding", "strides", "dilation", "taps_dilation"),
    [
        (((0, 0), (0, 0)), (1, 1), (1, 1), (1, 1)),
        (((1, 1), (2, 0)), (2, 1), (1, 2), (1, 1)),
        (((1, 1), (2, 0)), (1, 2), (1, 1), (2, 1)),
    ],
)
def test_a_convolution_counts_no_padding(padding, strides, dilation, taps_dilation):
    def f(x, w):
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, dilation, taps_dilation, ("NHWC", "HWIO", "NHWC")
        )

    found = compiled(f, (2, 9, 8, 3), (3, 3, 3, 5))
    ones = f(jnp.ones((2, 9, 8, 1)), jnp.ones((3, 3, 1, 1)))  # taps that meet an element
    assert program_cost(found.as_text()).matmul_flops == 2 * 3 * 5 * float(ones.sum())


def test_a_loop_counts_as_often_as_it_runs():
    def looped(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def flat(x, w):
        for k in range(6):
            x = jnp.tanh(x @ w[k])
        return x

    shapes = (16, 32), (6, 32, 32)
    ours = cost(looped, *shapes)
    assert ours.matmul_flops == cost(flat, *shapes).matmul_flops == 6 * 2 * 16 * 32 * 32
    assert ours.other_flops >= 6 * 16 * 32
    once = compiled(looped, *shapes).cost_analysis()["flops"]
    assert once < 2 * 2 * 16 * 32 * 32  # XLA's own count: the reason for this module
    # The weights are read once, a slice in each round, and not whole in each.
    assert ours.bytes_accessed < 4 * (2 * 6 * 32 * 32 + 12 * 6 * 16 * 32)


def test_loops_in_loops_multiply():
    def f(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    assert cost(f, (8, 8)).matmul_flops == 15 * 2 * 8**3


def test_a_loop_without_a_known_end_is_counted_once_and_reported():
    def f(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    ours = cost(f, (8, 8))
    assert ours.unknown_loops == 1
    assert ours.matmul_flops == 2 * 8**3


def test_the_dearer_of_two_branches_counts():
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)

    assert cost(f, (8, 8)).matmul_flops == 2 * 2 * 8**3


def test_a_train_step_is_three_forward_passes_scanned_or_not():
    changes = {"terms": "none", "model__depth": 3, "model__hidden_size": 64}
    unrolled, scanned = (
        program_cost(
            tiny.compile_only(
                tiny.config(**changes, model__scan_blocks=scan), tiny.mesh()
            ).as_text()
        )
        for scan in (False, True)
    )
    closed = tiny.BATCH * throughput.training_flops(tiny.config(**changes).model)
    # Without the gradient of the latents, which no step needs.
    assert unrolled.matmul_flops == pytest.approx(closed, rel=0.03)
    assert scanned.matmul_flops == pytest.approx(unrolled.matmul_flops, rel=0.01)


def test_collectives_in_a_loop_count_each_round():
    mesh = tiny.mesh(data=8)

    def f(x):
        def body(x, _):
            return jax.lax.psum(x, "data_minor") / 8, None

        return jax.lax.scan(body, x, None, length=5)[0]

    mapped = jax.shard_map(
        f, mesh=mesh, in_specs=PartitionSpec("data_minor"), out_specs=PartitionSpec("data_minor"),
        check_vma=False,
    )  # fmt: skip
    rows = NamedSharding(mesh, PartitionSpec("data_minor"))
    ours = cost(mapped, (8, 128), shardings=[rows], out=rows)
    assert [(each.kind, count) for each, count in ours.collectives] == [("all-reduce", 5)]
    assert ours.collective_bytes == 5 * 128 * 4


def test_the_gradient_of_a_sharded_product_is_reduced_once():
    mesh = tiny.mesh(data=8)
    rows = NamedSharding(mesh, PartitionSpec("data_minor"))
    whole = NamedSharding(mesh, PartitionSpec())

    def gradient(w, x):
        return jax.grad(lambda w: ((x @ w) ** 2).sum())(w)

    ours = cost(gradient, (32, 16), (64, 32), shardings=[whole, rows], out=whole)
    [(reduce, count)] = ours.collectives
    assert (reduce.kind, count, reduce.num_bytes) == ("all-reduce", 1, 32 * 16 * 4)
    assert ours.matmul_flops == 2 * 2 * (64 // 8) * 32 * 16  # forward and gradient, a device's rows


FUSIONS = """HloModule test

%sliced (a: f32[10,64], i: s32[]) -> f32[64] {
  %a = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%row)
}

%updated (a: f32[10,64], r: f32[1,64], i: s32[]) -> f32[10,64] {
  %a = f32[10,64]{1,0} parameter(0)
  %r = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %twice = f32[1,64]{1,0} add(%r, %r)
  ROOT %new = f32[10,64]{1,0} dynamic-update-slice(%a, %twice, %i, %zero)
}

ENTRY %main (a: f32[10,64], r: f32[1,64], i: s32[]) -> f32[10,64] {
  %a = f32[10,64]{1,0} parameter(0)
  %r = f32[1,64]{1,0} parameter(1)
  %i = s32[]{:S(2)} parameter(2)
  %one = f32[64]{0:S(1)} fusion(%a, %i), kind=kLoop, calls=%sliced
  %start = (f32[1,64]{1,0:S(1)}, f32[1,64]{1,0}, u32[]{:S(2)}) copy-start(%r)
  %near = f32[1,64]{1,0:S(1)} copy-done(%start)
  ROOT %two = f32[10,64]{1,0} fusion(%a, %near, %i), kind=kLoop, calls=%updated
}
"""


def test_slices_and_updates_in_place_move_only_the_slice():
    """By hand: one row read, one row copied to the chip's own memory, one row written."""
    ours = program_cost(FUSIONS)
    assert ours.bytes_accessed == 3 * 64 * 4
    assert ours.other_flops == 64


RETILED = """HloModule test

%tiled (a: bf16[10,64]) -> bf16[10,64] {
  %a = bf16[10,64]{1,0:T(16,128)} parameter(0)
  ROOT %c = bf16[10,64]{1,0:T(8,128)} copy(%a)
}

%row_of (a: bf16[10,64], i: s32[]) -> bf16[1,64] {
  %a = bf16[10,64]{1,0:T(16,128)} parameter(0)
  %v = bf16[10,64]{1,0:T(8,128)} fusion(%a), output_to_operand_aliasing={{}: (0, {})}, calls=%tiled
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = bf16[1,64]{1,0:T(8,128)} dynamic-slice(%v, %i, %zero), dynamic_slice_sizes={1,64}
}

%flat (w: bf16[4,32]) -> bf16[128] {
  %w = bf16[4,32]{1,0} parameter(0)
  ROOT %f = bf16[128]{0} bitcast(%w)
}

%step (a: bf16[10,64], b: bf16[10,64], w: bf16[4,32], i: s32[]) -> bf16[10,64] {
  %a = bf16[10,64]{1,0:T(16,128)} parameter(0)
  %b = bf16[10,64]{1,0:T(16,128)} parameter(1)
  %w = bf16[4,32]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %row = bf16[1,64]{1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%row_of
  %f = bf16[128]{0} fusion(%w), kind=kLoop, calls=%flat
  %s = bf16[1,64]{1,0:T(8,128)} custom-call(%row, %f), custom_call_target="scale"
  %b2 = bf16[10,64]{1,0:T(8,128)} fusion(%b), output_to_operand_aliasing={{}: (0, {})}, calls=%tiled
  ROOT %new = bf16[10,64]{1,0:T(16,128)} dynamic-update-slice(%b2, %s, %i, %zero)
}

ENTRY %main (a: bf16[10,64], b: bf16[10,64], w: bf16[4,32], i: s32[]) -> bf16[10,64] {
  %a = bf16[10,64]{1,0:T(16,128)} parameter(0)
  %b = bf16[10,64]{1,0:T(16,128)} parameter(1)
  %w = bf16[4,32]{1,0} parameter(2)
  %i = s32[]{:S(6)} parameter(3)
  ROOT %r = bf16[10,64]{1,0:T(16,128)} fusion(%a, %b, %w, %i), kind=kLoop, calls=%step
}
"""


def test_an_array_seen_in_another_tiling_is_read_where_its_view_is():
    """As TPU7x programs have it. By hand: a row read and a row written, and all of w read."""
    assert program_cost(RETILED).bytes_accessed == 2 * (64 + 64 + 4 * 32)


def test_what_runs_beside_the_program_counts_in_both_forms_of_libtpu():
    """Before machine code a computation in a computation, after it a call."""
    text = """HloModule test
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
%called (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %sum = f32[8,16]{1,0} all-reduce(%a), replica_groups=[1,4]<=[4], to_apply=%add
}
%wrapped (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %c = f32[8,16]{1,0} call(%a), to_apply=%called
}
ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %go = ((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]{:S(8)}) START, async_execution_thread="sparsecore"
  ROOT %done = f32[8,16]{1,0} async-done(%go)
}
"""
    for start in ("async-start(%a), calls=%wrapped", "call-start(%a), to_apply=%called"):
        found = program_cost(text.replace("START", start))
        assert found.collective_bytes == 8 * 16 * 4
        assert found.bytes_accessed == 2 * 8 * 16 * 4


SCATTERED = """HloModule test

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%all-reduce-scatter (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %sum = f32[8,16]{1,0} all-reduce(%a), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[2,16]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={2,16}
}

%piece (b: f32[2,16]) -> f32[8,16] {
  %b = f32[2,16]{1,0} parameter(0)
  ROOT %all = f32[8,16]{1,0} all-gather(%b), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %mine = f32[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %first = f32[8,16]{1,0} fusion(%mine), kind=kCustom, calls=%piece
  ROOT %second = f32[8,16]{1,0} fusion(%mine), kind=kCustom, calls=%piece
}
"""


def test_a_fused_reduce_scatter_and_the_pieces_of_one_gather():
    """As TPU programs have them: XLA fuses a gather in pieces with computations it overlaps."""
    found = [(each.kind, n, each.num_bytes, each.sent_bytes) for each, n in
             program_cost(SCATTERED).collectives]  # fmt: skip
    assert found == [
        ("reduce-scatter", 1, 2 * 16 * 4, 3 * 2 * 16 * 4),
        ("all-gather", 1, 8 * 16 * 4, 3 / 4 * 8 * 16 * 4),
    ]


@pytest.mark.parametrize(
    ("dtype", "precision", "passes"),
    [("f32", "", 1), ("f32", "highest", 6), ("bf16", "highest", 1)],
)
def test_float32_products_at_highest_precision_take_six_passes(dtype, precision, passes):
    found = program_cost(
        f"""HloModule test
ENTRY %main (x: {dtype}[8,8]) -> {dtype}[8,8] {{
  %x = {dtype}[8,8] parameter(0)
  ROOT %p = {dtype}[8,8] dot(%x, %x), lhs_contracting_dims={{1}}, operand_precision={{{precision}}}
}}
"""
    )
    assert found.matmul_flops == 2 * 8**3
    assert found.mxu_flops == passes * found.matmul_flops


def test_kernels_count_their_stated_flops_and_are_named_without():
    def call(config):
        return program_cost(
            f"""HloModule test
ENTRY %main (x: f32[8,4]) -> f32[8,8] {{
  %x = f32[8,4] parameter(0)
  ROOT %k = f32[8,8] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={config}
}}
"""
        )

    assert call('{"cost_estimate":{"flops":"512"}}').matmul_flops == 512
    assert call("{}").unknown_calls == {"tpu_custom_call": 1}


@pytest.mark.parametrize(("kernel", "products"), [("fmhaSoftmax", 2), ("fmhaSoftmaxBackward", 5)])
def test_the_fused_attention_of_gpus_counts_its_products(kernel, products):
    found = program_cost(
        f"""HloModule test
ENTRY %main (q: bf16[2,16,3,8]) -> bf16[2,16,3,8] {{
  %q = bf16[2,16,3,8] parameter(0)
  ROOT %a = bf16[2,16,3,8] custom-call(%q, %q, %q), custom_call_target="__cudnn${kernel}"
}}
"""
    )
    assert found.matmul_flops == products * 2 * (2 * 3) * 16 * 16 * 8
    assert not found.unknown_calls


def test_a_branch_is_called_in_the_words_of_gpus_too():
    text = """HloModule test
%yes (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  ROOT %p = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}
}
%no (y: f32[8,8]) -> f32[8,8] {
  ROOT %y = f32[8,8] parameter(0)
}
ENTRY %main (c: pred[], z: f32[8,8]) -> f32[8,8] {
  %c = pred[] parameter(0)
  %z = f32[8,8] parameter(1)
  ROOT %r = f32[8,8] conditional(%c, %z, %z), true_computation=%yes, false_computation=%no
}
"""
    assert program_cost(text).matmul_flops == 2 * 8**3
