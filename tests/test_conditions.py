"""Conditions in the step: every mesh, micro-batches, and a run that goes on with one."""

import functools

import jax
import numpy as np

from repulsor_jax.checkpoints.checkpointer import Checkpointer
from repulsor_jax.loss import draw_inputs
from repulsor_jax.train_state import create_train_state
from repulsor_jax.train_step import compile_training
from tests.oracles import tiny

INPAINT = {"conditioning__kind": "inpaint"}
SEMANTIC = {"conditioning__kind": "semantic", "conditioning__classes": 5}


def test_losses_are_those_of_one_device_on_eight_and_by_micro_batches():
    options = INPAINT | {"terms": "none", "optimizer__learning_rate": 1e-3}
    feed = tiny.batches(3)
    one = tiny.build(tiny.config(**options), tiny.mesh())
    state, history = one.run(feed)
    kernel = np.asarray(state.params["model"]["condition_embed"]["kernel"])
    assert np.abs(kernel).max() > 0, "the condition must be learned from"
    split = tiny.config(**options, optimizer__accumulation_steps=2)
    _, other = tiny.build(split, tiny.mesh(data=4, fsdp=2)).run(feed)
    for a, b in zip(history, other, strict=True):
        np.testing.assert_allclose(a["flow_loss"], b["flow_loss"], rtol=1e-5)


def test_the_network_is_shown_the_data_where_the_mask_says_so():
    trainer = tiny.trainer(tiny.config(**INPAINT))
    rng = jax.random.key(0)
    inputs = draw_inputs(rng, tiny.batches(1)[0], trainer.objective, tiny.FORMAT)
    shown, sign = inputs.extras["condition"][..., :2], inputs.extras["condition"][..., 2:]
    np.testing.assert_array_equal(shown, np.where(sign < 0, inputs.data, 0))
    assert set(np.unique(sign)) == {-1, 1}
    plain = draw_inputs(rng, tiny.batches(1)[0], tiny.trainer(tiny.config()).objective, tiny.FORMAT)
    assert plain.extras == {}
    np.testing.assert_array_equal(plain.noise, inputs.noise)  # a mask changes no other number


def test_a_class_conditional_run_goes_on_with_a_condition_and_the_same_output(tmp_path):
    plain = tiny.build(tiny.config(terms="none"), tiny.mesh())
    state, _ = plain.run(tiny.batches(3))
    c = tiny.config(**SEMANTIC, terms="none")
    mesh = tiny.mesh(data=2, fsdp=2)
    grown = compile_training(tiny.trainer(c), tiny.FORMAT, tiny.SHAPE, "float16", mesh)
    with Checkpointer(tmp_path) as checkpointer:
        record = {"config": tiny.config_dict(terms="none").to_dict(), "latents": {}}
        checkpointer.save(3, state, {"next_index": 3}, **record, patience=0.0)
        found, _, notes = checkpointer.restore(
            grown.abstract_state, tiny.BATCH, create=grown.create_state
        )
    assert notes == ["the saved network had no condition: its kernel begins at zero"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), grown.abstract_state
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, *tiny.SHAPE)).astype(np.float32)
    rest = x, np.full(4, 0.3, np.float32), np.arange(4)
    shown = rng.standard_normal((4, 4, 4, 5)).astype(np.float32)
    for was, now in (
        (state.params["model"], found.params["model"]),
        (state.ema_params, found.ema_params),
    ):
        before, after = jax.device_get((was, now))
        expected = plain.model.apply({"params": before}, *rest)
        assert np.abs(expected).max() > 0
        output = functools.partial(tiny.trainer(c).model.apply, {"params": after})
        np.testing.assert_array_equal(output(*rest, condition=shown), expected)
    stored = rng.standard_normal((tiny.BATCH, 4, 4, 5)).astype(np.float16)
    step = tiny.Step(c, tiny.trainer(c).model, found, grown.step, mesh)
    after, _ = step.run([tiny.batches(1)[0] | {"condition": stored}])
    assert np.abs(after.params["model"]["condition_embed"]["kernel"]).max() > 0


def test_only_the_new_part_of_a_state_is_made():
    from repulsor_jax.checkpoints import grown

    trainer = tiny.trainer(tiny.config(**INPAINT))
    found = create_train_state(trainer, tiny.mesh(), grown.only_new)
    names = {tuple(str(k) for k in path)[-2:] for path, _ in jax.tree.leaves_with_path(found)}
    assert names == {("['condition_embed']", "['kernel']")}
    assert len(jax.tree.leaves(found)) == 4  # itself, its average and two moments
