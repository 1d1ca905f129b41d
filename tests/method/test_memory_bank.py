import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax import sharding
from repulsor_jax.method import memory_bank
from tests.oracles import tiny, traffic

enqueue = jax.jit(memory_bank.enqueue)


def written(bank):
    """Features, and which slots hold rows that may be negatives."""
    counts = np.asarray(bank.tags.ids) != memory_bank.EMPTY
    assert (counts.all(1) | ~counts.any(1)).all()
    return np.asarray(bank.features), counts.any(1)


reslot = jax.jit(memory_bank.reslot, static_argnums=(1, 2))


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([(1, 1, 1), (2, 3, 2), (3, 1, 3), (5, 4, 2)]),
    valid=st.lists(st.booleans(), max_size=14),
)
def test_behaves_as_a_bounded_queue(size, valid):
    num_slots, batch_size, dim = size
    bank = memory_bank.create(num_slots, batch_size, dim)
    queue = collections.deque(maxlen=num_slots)  # the reference
    rng = np.random.default_rng(0)
    for ok in valid:
        z = rng.standard_normal((batch_size, dim)).astype(np.float32)
        bank = enqueue(bank, z, ok)
        if ok:
            queue.append(z)

    features, mask = written(bank)
    assert int(bank.filled) == mask.sum() == len(queue)
    # Oldest first: from the cursor on, round to it; slots not yet written come before.
    order = [(int(bank.cursor) + k) % num_slots for k in range(num_slots)]
    filled = [s for s in order if mask[s]]
    np.testing.assert_array_equal(features[filled], np.array(queue).reshape(-1, batch_size, dim))
    assert not features[~mask].any()


def test_an_invalid_batch_never_enters_even_as_nan():
    bank = enqueue(memory_bank.create(2, 2, 3), np.ones((2, 3), np.float32), True)
    refused = enqueue(bank, np.full((2, 3), np.nan, np.float32), False)
    jax.tree.map(np.testing.assert_array_equal, refused, bank)


def test_one_bad_row_costs_one_row():
    bank = enqueue(memory_bank.create(3, 4, 2), np.ones((4, 2), np.float32))
    z = np.full((4, 2), 2, np.float32)
    z[1] = np.nan
    ids = jnp.arange(4) + 7
    after = enqueue(bank, z, np.isfinite(z).all(1), tags=memory_bank.tag(ids))
    assert (int(after.cursor), int(after.filled)) == (2, 2)
    np.testing.assert_array_equal(after.tags.ids[1], [7, memory_bank.EMPTY, 9, 10])
    np.testing.assert_array_equal(after.features[1], [[2, 2], [0, 0], [2, 2], [2, 2]])
    refused = enqueue(bank, z, np.zeros(4, bool))
    jax.tree.map(np.testing.assert_array_equal, refused, bank)


def test_rows_carry_no_gradient():
    def total(z):
        bank = memory_bank.enqueue(memory_bank.create(2, 2, 3), z)
        return bank.features.sum()

    assert not np.any(jax.jit(jax.grad(total))(np.ones((2, 3), np.float32)))


def test_casts_to_its_dtype():
    z = np.full((1, 1), 1 + 2**-12, np.float32)
    bank = enqueue(memory_bank.create(1, 1, 1, jnp.bfloat16), z)
    assert bank.features.dtype == jnp.bfloat16
    assert float(bank.features[0, 0, 0]) == 1.0


SIZES = st.sampled_from([(1, 5), (5, 1), (2, 6), (3, 4)])  # slots, rows of a slot


@settings(max_examples=60, deadline=None)
@given(
    old=SIZES,
    new=SIZES,
    before=st.integers(0, 12),
    after=st.integers(0, 7),
)
def test_reslotted_it_keeps_the_newest_rows_and_goes_on_as_a_queue(old, new, before, after):
    dim, rng = 2, np.random.default_rng(0)

    def batch(size):
        return rng.standard_normal((size, dim)).astype(np.float32)

    def row_ids(z):  # a number of its own for each row, and for its tag
        return memory_bank.tag(jnp.asarray(1e6 * z[:, 0], jnp.int32))

    # The reference: a queue of rows, cut to whole new batches from its newest end.
    bank, rows = memory_bank.create(*old, dim), collections.deque(maxlen=old[0] * old[1])
    for _ in range(before):
        rows.extend(z := batch(old[1]))
        bank = enqueue(bank, z, tags=row_ids(z))
    kept = min(len(rows) // new[1], new[0]) * new[1]
    rows = collections.deque(list(rows)[len(rows) - kept :], maxlen=new[0] * new[1])

    bank = reslot(bank, *new)
    for step in range(after + 1):
        features, mask = written(bank)
        assert features.shape == (*new, dim)
        order = [(int(bank.cursor) + k) % new[0] for k in range(new[0])]
        filled = [s for s in order if mask[s]]
        np.testing.assert_array_equal(
            features[filled].reshape(-1, dim), np.array(rows).reshape(-1, dim)
        )
        expected_ids = row_ids(features[filled].reshape(-1, dim)).ids
        np.testing.assert_array_equal(np.asarray(bank.tags.ids)[filled].reshape(-1), expected_ids)
        assert not features[~mask].any()
        if step < after:
            rows.extend(z := batch(new[1]))
            bank = enqueue(bank, z, tags=row_ids(z))


def test_reslotting_split_by_feature_moves_each_row_once():
    """On 8 devices: no device ever holds the whole bank, old or new."""
    mesh, axes = tiny.mesh(data=4, fsdp=2), ("data_minor", "fsdp")
    saved, wanted = (
        jax.eval_shape(lambda sizes=sizes: memory_bank.create(*sizes, 16))
        for sizes in ((64, 24), (32, 48))
    )
    wanted = sharding.abstract_arrays(wanted, memory_bank.shardings(mesh, axes))
    read = memory_bank.saved_layout(saved, wanted)
    assert read.features.shape == (64, 24, 16)
    lay_out = jax.jit(lambda bank: memory_bank.lay_out(bank, wanted))
    compiled = lay_out.lower(read).compile()
    [move] = traffic.collectives(compiled.as_text())
    assert move.kind == "all-to-all"
    assert move.num_bytes == 4 * 32 * 48 * 16 // 8  # a device's share of the new bank
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * move.num_bytes


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="positive sizes"):
        memory_bank.create(*sizes)


def test_a_batch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[4, 3\]"):
        memory_bank.enqueue(memory_bank.create(5, 2, 3), jnp.ones((4, 3)))


@pytest.mark.parametrize("rows", [4096, 262_144])
def test_enqueue_is_in_place_and_without_collectives(rows):
    batch_size, dim = 512, 16
    mesh = tiny.mesh(data=4, fsdp=2)
    axes = ("data_minor", "fsdp")
    shardings = memory_bank.shardings(mesh, axes)
    by_row = NamedSharding(mesh, PartitionSpec(axes))
    abstract = jax.eval_shape(lambda: memory_bank.create(rows // batch_size, batch_size, dim))
    compiled = (
        jax.jit(
            memory_bank.enqueue,
            in_shardings=(shardings, by_row, NamedSharding(mesh, PartitionSpec())),
            out_shardings=shardings,
            donate_argnums=0,
        )
        .lower(
            abstract,
            jax.ShapeDtypeStruct((batch_size, dim), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.bool),
        )
        .compile()
    )
    assert traffic.collectives(compiled.as_text()) == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= rows * dim * 4 // 8  # the donated bank is reused
    assert memory.temp_size_in_bytes < rows * dim * 4 // 8 // 4  # and not copied
