"""The invariants of the design, one section each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import sharding
from repulsor_jax.method import memory_bank, repulsion
from repulsor_jax.method.head import ProjectionHead
from repulsor_jax.planning import hlo
from repulsor_jax.train_state import abstract_train_state
from repulsor_jax.train_step import draw_inputs
from tests.oracles import tiny, traffic

# Data alone, fsdp alone, and all three at once.
MESHES = [(8, 1, 1), (1, 4, 1), (2, 2, 2)]


# 1. The mesh changes speed, never results.


@pytest.fixture(scope="module")
def on_one_device():
    state, history = tiny.build(tiny.config(), tiny.mesh()).run(tiny.batches(5))
    return jax.device_get(state), history


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_any_mesh_gives_the_same_losses_and_bank(on_one_device, shape):
    expected_state, expected = on_one_device
    state, history = tiny.build(tiny.config(), tiny.mesh(*shape)).run(tiny.batches(5))
    for name in expected[0]:
        found = [m[name] for m in history]
        np.testing.assert_allclose(found, [m[name] for m in expected], rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(state.bank.features, expected_state.bank.features, atol=1e-4)
    assert int(state.bank.cursor) == int(expected_state.bank.cursor)
    # The very first loss has no rounding of earlier updates in it.
    np.testing.assert_allclose(history[0]["loss"], expected[0]["loss"], rtol=1e-6)


# 2. The bank never travels.


# Rows of a bank for a batch of 64 on 8 devices: the loss takes the first two whole, and goes
# through the last two in chunks of its slots.
ROWS = (4096, 262_144, 1_048_576, 4_194_304)


def step_text(rows, **overrides):
    c = tiny.config(
        batch_size=64, regularizer__bank_rows=rows, regularizer__projection_dim=16, **overrides
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
    without = collectives(64, regularizer__name="none")
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
    assert totals[2] == totals[3] <= totals[0] + 2 * 4 * batch_size


# 3. FIFO, exactly.


def test_the_bank_holds_the_last_batches_row_by_row():
    c = tiny.config()
    step = tiny.build(c, tiny.mesh(data=4, fsdp=2))
    state, expected = step.state, []

    @jax.jit
    def features(params, key, batch):
        inputs = draw_inputs(key, batch, tiny.trainer(c), tiny.FORMAT)
        t = inputs.t[:, None, None, None]
        _, tokens = step.model.apply(
            {"params": params["model"]},
            t * inputs.data + (1 - t) * inputs.noise,
            inputs.t,
            inputs.labels,
            tap=c.model.depth // 4,
        )
        head = ProjectionHead(tiny.DIM, c.model.hidden_size)
        return head.apply({"params": params["regularizer"]}, tokens.mean(1))

    for number, batch in enumerate(tiny.batches(2 * tiny.SLOTS + 1)):
        key = jax.random.fold_in(state.rng, number)
        expected.append(features(jax.device_get(state.params), key, batch))
        state, _ = step._replace(state=state).run([batch])

        cursor, filled = int(state.bank.cursor), int(state.bank.filled)
        assert filled == min(number + 1, tiny.SLOTS)
        newest_first = [(cursor - 1 - k) % tiny.SLOTS for k in range(filled)]
        kept = np.asarray(state.bank.features)[newest_first]
        np.testing.assert_allclose(kept, expected[: -filled - 1 : -1], atol=1e-5)


# 4. Resume is invisible: tests/program/test_train.py, which runs the whole program.


# 5. Inference knows nothing of training: tests/checkpoints/test_checkpointer.py, and test_main.py.


# 6. A sample depends on (seed, its index) only: tests/inference/test_generator.py.


# 7. Off means off.


def test_weight_zero_compiles_to_the_program_without_a_regulariser():
    def program(**overrides):
        compiled = tiny.compile_only(tiny.config(**overrides), tiny.mesh(data=2))
        text = re.sub(r"metadata={[^}]*}", "", compiled.as_text())
        # Only names of the tables of source lines differ; the instructions must not.
        return compiled, [line for line in text.splitlines() if " = " in line]

    zero, zero_lines = program(regularizer__weight=0.0)
    none, none_lines = program(regularizer__name="none")
    on, _ = program()
    assert zero_lines == none_lines
    assert zero.cost_analysis()["flops"] == none.cost_analysis()["flops"]
    assert on.cost_analysis()["flops"] > none.cost_analysis()["flops"]
    c = tiny.config(regularizer__weight=0.0)
    state = abstract_train_state(tiny.trainer(c), tiny.mesh())
    assert state.bank is None
    assert state.params["regularizer"] == {}
