"""Invariant 2: no collective of the step is larger than B x d, and the enqueue has none."""

import jax
import jax.numpy as jnp

from repulsor_jax import sharding
from repulsor_jax.method import memory_bank, repulsion
from repulsor_jax.planning import hlo
from tests.oracles import tiny, traffic

# Rows of a bank for a batch of 64 on 8 devices: the loss takes the first two whole, and goes
# through the last two in chunks of its slots.
ROWS = (4096, 262_144, 1_048_576, 4_194_304)


def step_text(rows, **overrides):
    c = tiny.config(
        batch_size=64, repulsor__bank_rows=rows, repulsor__projection_dim=16, **overrides
    )
    return tiny.compile_only(c, tiny.mesh(data=4, fsdp=2)).as_text()


def collectives(rows, **overrides):
    return traffic.collectives(step_text(rows, **overrides))


def loops_over_chunks(text, rows, num_samples):
    """The collectives of each loop with as many turns as the bank has chunks."""
    module = hlo.parse(text)
    turns = rows * num_samples // 8 // repulsion.MAX_LOGITS
    return [found for loop, found in traffic.loops(module) if module.trip_count(loop) == turns]


def test_no_collective_of_the_step_grows_with_the_bank():
    batch_by_dim = 64 * 16
    without = collectives(64, terms="none")
    small, large = collectives(ROWS[0]), collectives(ROWS[1])
    assert sum(c.num_bytes for c in small) == sum(c.num_bytes for c in large)
    text = step_text(ROWS[-1])
    in_chunks = traffic.collectives(text)
    more = sum(c.num_bytes for c in in_chunks) - sum(c.num_bytes for c in large)
    assert more <= 2 * 4 * 64  # a maximum and a sum for each sample
    assert loops_over_chunks(text, ROWS[-1], 64) == [[]]
    # What the method adds over "none" is at most B x d in each of its collectives; what is larger
    # is there without it: the all-reduce of the gradients.
    biggest_without = max(c.largest for c in without)
    for found in (small, large, in_chunks):
        assert max(c.largest for c in found) <= max(batch_by_dim, biggest_without)
        added = sum(c.num_bytes for c in found) - sum(c.num_bytes for c in without)
        head = 4 * (32 * 32 + 32 + 32 * 16 + 16)  # gradients of the head
        assert added <= head + 4 * (4 * batch_by_dim + 16 * 64)


def test_microbatches_send_nothing_in_the_loop_over_a_large_bank():
    text = step_text(ROWS[-1], optimizer__accumulation_steps=2)
    assert loops_over_chunks(text, ROWS[-1], 64 // 2) == [[]]


def test_the_loss_and_the_enqueue_alone_send_no_more_than_the_queries():
    """The method without a model around it: what it costs anyone's trainer."""
    batch_size, dim = 64, 16
    mesh = tiny.mesh(data=4, fsdp=2)
    by_row, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    bank_sharding = memory_bank.shardings(mesh, sharding.BATCH_AXES)

    def step(z, bank):
        loss, gradient = jax.value_and_grad(repulsion.repulsion_loss)(z, bank)
        return loss, gradient, memory_bank.enqueue(bank, z)

    totals = []
    for rows in ROWS:
        bank = jax.eval_shape(lambda n=rows: memory_bank.create(n // batch_size, batch_size, dim))
        compiled = (
            jax.jit(
                step,
                in_shardings=(by_row, bank_sharding),
                out_shardings=(whole, by_row, bank_sharding),
                donate_argnums=1,
            )
            .lower(jax.ShapeDtypeStruct((batch_size, dim), jnp.float32), bank)
            .compile()
        )
        text = compiled.as_text()
        found = traffic.collectives(text)
        assert found, "a sharded loss without any collective would not be global"
        assert max(c.largest for c in found) <= batch_size * dim
        totals.append(sum(c.num_bytes for c in found))
        loops = traffic.loops(hlo.parse(text))
        assert [inside for _, inside in loops] == ([] if rows <= ROWS[1] else [[]])
    assert totals[0] == totals[1]
    assert totals[2] == totals[3] <= totals[0] + 3 * 4 * batch_size
