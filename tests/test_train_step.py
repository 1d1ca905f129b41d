import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repulsor_jax import sharding
from repulsor_jax.data.latents import LatentFormat
from repulsor_jax.method import memory_bank, registry
from repulsor_jax.optimizer import learning_rate
from repulsor_jax.train_state import abstract_train_state, create_train_state
from repulsor_jax.train_step import make_train_step
from tests.oracles import tiny


def test_one_step_is_what_its_parts_say():
    """Inputs, loss, gradient, AdamW, EMA and bank by hand, with nothing at its default.

    The third step of a run: two of the bank's three slots are written, lambda is warming up.
    """
    c = tiny.config(
        seed=3,
        model__depth=3,
        model__label_dropout=0.5,
        flow__time_distribution="logit_normal",
        flow__logit_normal_location=0.5,
        flow__logit_normal_scale=0.7,
        repulsor__block=1,
        repulsor__weight=0.3,
        repulsor__warmup_steps=4,
        repulsor__temperature=0.2,
        repulsor__distance="cosine",
        optimizer__clip_norm=0.5,
        optimizer__weight_decay=0.1,
    )
    latent_format = LatentFormat(True, np.float32([0.5, -0.3]), np.float32([2.0, 0.5]))
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((tiny.SLOTS, tiny.BATCH, tiny.DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    fresh = create_train_state(tiny.trainer(c), tiny.mesh())
    # As trained: the zero-initialised output layers would hide most of the gradient.
    shaken = jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32),
        jax.device_get(fresh.params),
    )
    ids = rng.integers(0, 20, (3, tiny.BATCH)).astype(np.int32)  # some are those of the batch
    ids[2] = memory_bank.EMPTY
    before = fresh.replace(
        step=jnp.int32(2),
        params=shaken,
        bank=memory_bank.MemoryBank(
            jnp.asarray(rows), memory_bank.tag(jnp.asarray(ids)), jnp.int32(2), jnp.int32(2)
        ),
    )
    own = np.arange(tiny.BATCH, dtype=np.int32) // 2  # each image is twice in the batch
    moments = rng.standard_normal((tiny.BATCH, 4, 4, 4)).astype(np.float16)
    labels = rng.integers(0, 3, tiny.BATCH).astype(np.int32)
    train_step = jax.jit(make_train_step(tiny.trainer(c), latent_format))
    after, metrics = train_step(before, {"latents": moments, "labels": labels, "ids": own})

    keys = jax.random.split(jax.random.fold_in(before.rng, 2), 4)
    mean, log_variance = np.split(moments.astype(np.float32), 2, axis=-1)
    latents = mean + np.exp(0.5 * log_variance) * jax.random.normal(keys[0], mean.shape)
    data = (latents - np.float32([0.5, -0.3])) * np.float32([2.0, 0.5])
    noise = jax.random.normal(keys[1], data.shape)
    t = jax.nn.sigmoid(0.5 + 0.7 * jax.random.normal(keys[2], (tiny.BATCH,)))
    labels = jnp.where(jax.random.bernoulli(keys[3], 0.5, labels.shape), 3, labels)

    def loss_fn(params):
        ts = t[:, None, None, None]
        out, (tokens,) = tiny.trainer(c).model.apply(
            {"params": params["model"]}, ts * data + (1 - ts) * noise, t, labels, taps=(1,)
        )
        flow_loss = jnp.mean((out - (data - noise)) ** 2)
        head = params["terms"]["repulsor"]["head"]
        h = tokens.mean(1) @ head["hidden"]["kernel"] + head["hidden"]["bias"]
        z = jax.nn.silu(h) @ head["out"]["kernel"] + head["out"]["bias"]
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        others, banked = own[:, None] != own, own[:, None] != ids[:2].reshape(-1)
        sums = (jnp.exp(-(1 - z @ z.T) / 0.2) * others).sum(1)
        sums += (jnp.exp(-(1 - z @ rows[:2].reshape(-1, tiny.DIM).T) / 0.2) * banked).sum(1)
        penalty = jnp.log(sums / (others.sum(1) + banked.sum(1))).mean()
        return flow_loss + 0.3 * 3 / 4 * penalty, (flow_loss, penalty, z)

    found = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(shaken)
    (loss, (flow_loss, penalty, z)), grads = jax.device_get(found)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["flow_loss"], flow_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["repulsor_loss"], penalty, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["repulsor_weight"], 0.225, rtol=1e-6)
    np.testing.assert_allclose(after.bank.features[2], z, atol=1e-5)
    np.testing.assert_array_equal(after.bank.features[:2], rows[:2])
    np.testing.assert_array_equal(after.bank.tags.ids, [*ids[:2], own])
    assert (int(after.bank.cursor), int(after.bank.filled), int(after.step)) == (0, 3, 3)

    for name in ("patch_embed", "final"):  # Adam's first step, from Kingma and Ba
        p = np.asarray(shaken["model"][name]["kernel"], np.float64)
        g = np.asarray(grads["model"][name]["kernel"], np.float64) * min(1.0, 0.5 / norm)
        expected = p - 1e-2 * (g / (np.abs(g) + 1e-8) + 0.1 * p)
        clear = np.abs(g) > 1e-4  # elsewhere the sign of the gradient is rounding
        assert clear.mean() > 0.5
        found = np.asarray(after.params["model"][name]["kernel"])
        np.testing.assert_allclose(found[clear], expected[clear], atol=1e-5)
        ema = 0.9 * np.asarray(before.ema_params[name]["kernel"]) + 0.1 * found
        np.testing.assert_allclose(after.ema_params[name]["kernel"], ema, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_the_state_is_donated():
    step = tiny.build(tiny.config(), tiny.mesh(data=4, fsdp=2))
    good, bad, other = tiny.batches(3)
    bad["latents"][3] = np.nan
    old = step.state
    state, _ = step.run([good])
    assert all(
        leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.ema_params, old.bank))
    )
    before = jax.device_get(state)
    after, [metrics] = step._replace(state=state).run([bad])
    assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, *map(tiny.raw, (before, jax.device_get(after))))
    after, [metrics] = step._replace(state=after).run([other])
    assert np.isfinite(metrics["loss"])
    assert int(after.step) == 2


def test_an_update_that_is_selected_is_that_of_the_branch():
    """As the steps of GPUs have it: the same next state, and after a refused step the old one."""
    trainer = tiny.trainer(tiny.config())
    state = create_train_state(trainer, tiny.mesh())
    branch, select = (
        jax.jit(make_train_step(trainer, tiny.FORMAT, in_branch=in_branch))
        for in_branch in (True, False)
    )
    good, bad = tiny.batches(2)
    bad["latents"][3] = np.nan
    expected, _ = jax.device_get(branch(state, good))
    found, metrics = jax.device_get(select(state, good))
    assert metrics["refused"] == 0
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    jax.tree.map(check, tiny.raw(found), tiny.raw(expected))
    kept, metrics = jax.device_get(select(found, bad))
    assert metrics["refused"] == 1
    jax.tree.map(np.testing.assert_array_equal, tiny.raw(kept), tiny.raw(found))


def test_ema_is_float32_under_bfloat16_compute_and_follows():
    step = tiny.build(tiny.config(model__dtype="bfloat16"), tiny.mesh())
    state, history = step.run(tiny.batches(2))
    for leaf in jax.tree.leaves((state.params, state.ema_params)):
        assert leaf.dtype == jnp.float32
    assert all(np.isfinite(m["loss"]) for m in history)


@pytest.mark.parametrize("terms", ["none", "repulsor"])
def test_accumulation_averages_the_gradients_of_strided_microbatches(terms):
    """Without terms it is the whole batch's step; with the bank's, negatives differ."""
    batches = tiny.batches(3)
    kwargs = {"terms": terms}
    whole, history = tiny.build(tiny.config(**kwargs), tiny.mesh()).run(batches)
    split, split_history = tiny.build(
        tiny.config(optimizer__accumulation_steps=2, **kwargs), tiny.mesh(data=4)
    ).run(batches)
    assert int(split.step) == 3
    if terms == "none":
        for name in ("loss", "grad_norm"):
            found = [m[name] for m in split_history]
            np.testing.assert_allclose(found, [m[name] for m in history], rtol=1e-4)
    else:
        # One slot per optimizer step, rows in the order of the global batch.
        assert int(split.bank.filled) == 3
        np.testing.assert_allclose(split.bank.features[0], whole.bank.features[0], atol=1e-5)


def test_lambda_warms_up_linearly():
    (term,) = registry.build(tiny.config(repulsor__weight=0.4, repulsor__warmup_steps=4))
    weights = [float(term.weight(jnp.int32(s))) for s in range(6)]
    np.testing.assert_allclose(weights, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)


def test_learning_rate_warms_up_then_stays_or_falls_to_zero():
    rate = learning_rate(tiny.config(optimizer__warmup_steps=4))
    np.testing.assert_allclose([rate(s) for s in (0, 1, 3, 9)], [0.0025, 0.005, 0.01, 0.01])
    rate = learning_rate(
        tiny.config(total_steps=104, optimizer__warmup_steps=4, optimizer__schedule="cosine")
    )
    found = [rate(0), rate(4), rate(54), rate(104)]
    np.testing.assert_allclose(found, [0.0025, 0.01, 0.005, 0.0], atol=1e-8)


def test_parameters_and_their_mirrors_are_sharded_alike():
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    c = tiny.config(model__hidden_size=64, mesh__split_update=False)
    abstract = abstract_train_state(tiny.trainer(c), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    kernel = shardings.params["model"]["block_0"]["qkv"]["kernel"]
    assert kernel.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    adam = next(s for s in jax.tree.leaves(shardings.opt_state, is_leaf=_is_adam) if _is_adam(s))
    for mirror in (adam.mu["model"], adam.nu["model"], shardings.ema_params):
        assert mirror["block_0"]["qkv"]["kernel"] == kernel
    # Small arrays stay whole, the bank is split by rows of its batch.
    assert shardings.params["model"]["final"]["bias"].is_fully_replicated
    assert shardings.bank.features.spec == jax.sharding.PartitionSpec(None, sharding.BATCH_AXES)
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "terms": "dispersive",
            "dispersive__variant": "hinge",
            "flow__path": "vp",
            "flow__prediction": "noise",
            "flow__time_distribution": "logit_normal",
        },
        {
            "repulsor__pooling": "flatten",
            "repulsor__distance": "cosine",
            "model__depth": 2,
            "model__scan_blocks": True,
            "model__remat": "dots",
            "model__learn_sigma": True,
        },
        {"repulsor__bank_rows": 0},
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_other_choices_of_the_config_train_too(overrides):
    _, history = tiny.build(tiny.config(**overrides), tiny.mesh(data=2)).run(tiny.batches(3))
    assert all(np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]) for m in history)
    assert len({m["loss"] for m in history}) == 3


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)
