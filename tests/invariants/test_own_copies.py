"""Invariant 8: a sample is never its own negative, however small the data and large the bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.loss import Teacher, draw_inputs, make_loss
from repulsor_jax.method.memory_bank import EMPTY
from tests.oracles import tiny

IMAGES = 10  # fewer than the 48 rows of the bank, and than the 16 of a batch


def batches(count):
    rng = np.random.default_rng(0)
    data = rng.standard_normal((IMAGES, *tiny.SHAPE)).astype(np.float16)
    for _ in range(count):
        ids = rng.integers(0, IMAGES, tiny.BATCH).astype(np.int32)
        yield {"latents": data[ids], "labels": ids % 3, "ids": ids}


def repulsion(z, keys, ids, key_ids, temperature):
    """The definition in NumPy, sample by sample, over rows of other images."""
    terms = []
    for row, own in zip(z, ids, strict=True):
        squares = ((row - keys[key_ids != own]) ** 2).sum(1)
        terms.append(np.log(np.mean(np.exp(-squares / temperature))))
    return np.array(terms)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_rows_of_the_samples_own_image_do_not_count(microbatches):
    c = tiny.config(optimizer__accumulation_steps=microbatches, optimizer__learning_rate=0.1)
    step = tiny.build(c, tiny.mesh(data=4))
    state, *_ = step.run(list(batches(5)))
    before = jax.device_get(state)
    (batch,) = list(batches(6))[5:]
    after, (metrics,) = step._replace(state=state).run([batch])
    after = jax.device_get(after)

    ids, bank = batch["ids"], before.bank
    z = np.asarray(after.bank.features[int(bank.cursor)], np.float64)  # what this step put there
    np.testing.assert_array_equal(after.bank.tags.ids[int(bank.cursor)], ids)
    np.testing.assert_array_equal(after.bank.tags.labels[int(bank.cursor)], batch["labels"])
    rows, row_ids = np.float64(bank.features).reshape(-1, tiny.DIM), bank.tags.ids.reshape(-1)
    assert all((row_ids == i).any() for i in ids), "every sample has copies of itself in the bank"
    expected = []
    for part in range(microbatches):
        own = slice(part, None, microbatches)
        keys, key_ids = np.concatenate([z[own], rows]), np.concatenate([ids[own], row_ids])
        expected.append(repulsion(z[own], keys, ids[own], key_ids, 0.5).mean())
    np.testing.assert_allclose(metrics["repulsor_loss"], np.mean(expected), rtol=1e-5)
    blind = repulsion(z, rows, ids, np.full(len(rows), -1), 0.5).mean()
    assert abs(blind - np.mean(expected)) > 1e-3, "the copies would have made a difference"


def test_the_gradient_does_not_push_a_sample_from_its_own_image():
    """With only one image there are no negatives, and nothing to learn from."""
    c = tiny.config()
    step = tiny.build(c, tiny.mesh())
    trainer = tiny.trainer(c)
    batch = next(batches(1)) | {"ids": np.full(tiny.BATCH, 7, np.int32)}
    state, (metrics,) = step.run([batch])
    assert metrics["repulsor_loss"] == 0
    state, (metrics,) = step._replace(state=state).run([batch])
    assert metrics["repulsor_loss"] == 0

    inputs = jax.jit(lambda b: draw_inputs(state.rng, b, trainer.objective, tiny.FORMAT))(batch)
    loss = make_loss(trainer)

    def term(params):
        _, (metrics, _) = loss(
            params, Teacher(state.ema_params, {}), inputs, state.bank, {"repulsor": jnp.ones(())}
        )
        return metrics["repulsor_loss"]

    for leaf in jax.tree.leaves(jax.jit(jax.grad(term))(state.params)):
        np.testing.assert_array_equal(leaf, 0)
    assert (np.asarray(state.bank.tags.ids)[2] == EMPTY).all()
