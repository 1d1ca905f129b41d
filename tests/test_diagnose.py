"""The diagnostics of a state against NumPy, on tokens that the model gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import objectives
from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.diagnose import HeldOut, make_measure, watched_blocks
from repulsor_jax.loss import draw_inputs
from repulsor_jax.method import diagnostics, memory_bank
from repulsor_jax.train_state import abstract_train_state, create_train_state
from tests.oracles import tiny, traffic

IMAGES, TAP, DEPTH = 20, 0, 2
TEMPERATURE, WEIGHT, STEP = 0.4, 0.1, 7
SLOTS, NEWEST, OLDEST = 4, 1, 0  # two of them are written
CLASSES = 2  # of the probe


def config(**overrides):
    values = tiny.config_dict(
        model__depth=DEPTH,
        repulsor__block=TAP,
        repulsor__bank_rows=SLOTS * tiny.BATCH,
        **overrides,
    )
    objectives.use(values, "repulsor_positives")
    return config_lib.parse(values)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def read(ids):
    """The records of these images; label and pixels are functions of the image's number."""
    latents = np.random.default_rng(9).standard_normal((IMAGES, *tiny.SHAPE)).astype(np.float16)
    return {"latents": latents[ids], "labels": (ids % 3).astype(np.int32), "ids": ids}


def made_state(c, on):
    """A state as training leaves it, its bank half full; the parameters of no initialisation."""
    rng = np.random.default_rng(1)
    state = create_train_state(tiny.trainer(c), on)

    def shaken(tree):
        return jax.tree.map(
            lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32),
            jax.device_get(tree),
        )

    params = shaken(state.params)
    features = np.zeros((SLOTS, tiny.BATCH, tiny.DIM), np.float32)
    features[:2] = unit(rng.standard_normal((2, tiny.BATCH, tiny.DIM)) + 0.3)
    ids = np.full((SLOTS, tiny.BATCH), memory_bank.EMPTY, np.int32)
    ids[:2] = rng.integers(0, IMAGES, (2, tiny.BATCH))
    times = rng.random((SLOTS, tiny.BATCH)).astype(np.float32)
    bank = memory_bank.MemoryBank(
        features, memory_bank.Tags(ids, ids % 3, times), np.int32(2), np.int32(2)
    )
    made = state.replace(
        step=np.int32(STEP),
        params=params,
        ema_params=shaken(params["model"]),
        ema_terms={"repulsor": shaken(params["terms"]["repulsor"])},
        bank=bank,
    )
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), made, state)


def inputs_of_a_look(bank):
    """The batch, of which the newest slot is, the images of the oldest slot, and held-out ones."""
    rng = np.random.default_rng(2)
    oldest = read(np.where(np.arange(tiny.BATCH) == 3, 0, bank.tags.ids[OLDEST]))  # row 3: another
    count = 2 * tiny.BATCH
    held_out = HeldOut(
        rng.standard_normal((count, *tiny.SHAPE)).astype(np.float16),
        rng.integers(0, CLASSES, count).astype(np.int32),
        np.arange(count) % 2 == 0,
        (np.arange(count) % 2 == 1) & (np.arange(count) < 27),
    )
    return read(bank.tags.ids[NEWEST]), oldest, held_out


@functools.cache
def look(c, on):
    state = made_state(c, on)
    measure = make_measure(tiny.trainer(c), tiny.FORMAT, IMAGES, CLASSES)
    shown = sharding.to_global(inputs_of_a_look(jax.device_get(state.bank)), on)
    with sharding.use_mesh(on):
        found = jax.jit(measure, out_shardings=sharding.replicated(on))(state, *shown)
    return {name: float(value) for name, value in found.items()}


class Expected:
    """The same in NumPy; `part` are the rows of the first micro-batch."""

    def __init__(self, c):
        self.state = jax.device_get(made_state(c, tiny.mesh()))
        self.bank = self.state.bank
        self.trainer = tiny.trainer(c)
        self.part = slice(None, None, c.optimizer.accumulation_steps)
        self.batch, self.oldest, self.held_out = inputs_of_a_look(self.bank)
        key = jax.random.fold_in(self.state.rng, STEP)
        self.keys = jax.random.split(key, 3)
        self.inputs = self.draw(0, self.batch)

    def draw(self, number, batch):
        drawn = draw_inputs(self.keys[number], batch, self.trainer.objective, tiny.FORMAT)
        return jax.tree.map(lambda x: np.asarray(x)[self.part], drawn)

    def tokens(self, params, data, noise, t, labels, taps=range(DEPTH)):
        ts = t[:, None, None, None]
        _, found = self.trainer.model.apply(
            {"params": params}, ts * data + (1 - ts) * noise, t, labels, taps=tuple(taps)
        )
        return np.asarray(found, np.float64)

    def student(self):
        i = self.inputs
        return self.tokens(self.state.params["model"], i.data, i.noise, i.t, i.labels)

    def keys_at(self, inputs, t, labels):
        """The teacher's projections."""
        found = self.tokens(self.state.ema_params, inputs.data, inputs.noise, t, labels, (TAP,))
        return project(self.state.ema_terms["repulsor"]["head"], found[0])

    def queries_and_keys(self):
        ((view_time, _, _),) = self.inputs.views.values()
        z = project(self.state.params["terms"]["repulsor"]["head"], self.student()[TAP])
        return z, self.keys_at(self.inputs, view_time, self.inputs.labels)


def project(head, tokens):
    h = tokens.mean(1) @ head["hidden"]["kernel"] + head["hidden"]["bias"]
    return unit(h / (1 + np.exp(-h)) @ head["out"]["kernel"] + head["out"]["bias"])


def pair_mean(x):
    products = unit(x) @ unit(x).T
    return (products.sum() - np.trace(products)) / (len(x) * (len(x) - 1))


CASES = {
    "one device": (config(), tiny.mesh()),
    "8 devices, loop over blocks, 2 micro-batches": (
        config(model__scan_blocks=True, optimizer__accumulation_steps=2),
        tiny.mesh(data=2, fsdp=2, tensor=2),
    ),
}


@pytest.fixture(
    scope="module",
    params=[
        name if "one" in name else pytest.param(name, marks=pytest.mark.slow) for name in CASES
    ],
)
def case(request):
    c, on = CASES[request.param]
    return look(c, on), Expected(c)


def assert_close(found, name, expected, **tolerance):
    np.testing.assert_allclose(found[name], expected, err_msg=name, **({"rtol": 2e-4} | tolerance))


def test_features_by_depth(case):
    found, expected = case
    for block, tokens in enumerate(expected.student()):
        pooled = tokens.mean(1)
        between_tokens = np.mean([pair_mean(image) for image in tokens])
        p = np.linalg.svd(pooled - pooled.mean(0), compute_uv=False)[: len(pooled) - 1]
        p /= p.sum()
        assert_close(found, f"block_{block}/cosine_tokens", between_tokens)
        assert_close(found, f"block_{block}/isotropy", 1 - between_tokens)
        assert_close(found, f"block_{block}/cosine_samples", pair_mean(pooled))
        rank = np.exp(-np.sum(p * np.log(p)))
        assert_close(found, f"block_{block}/effective_rank", rank, rtol=1e-3)


def test_the_contrast_and_its_negatives(case):
    found, expected = case
    z, keys = expected.queries_and_keys()
    bank, own = expected.bank, expected.inputs.tags.ids
    rows = np.concatenate([keys, bank.features[:2].reshape(-1, tiny.DIM)])
    row_ids = np.concatenate([own, bank.tags.ids[:2].ravel()])
    perplexities, shares = [], []
    for i, row in enumerate(z):
        s = np.exp(-((row - rows) ** 2).sum(1) / TEMPERATURE)[row_ids != own[i]]
        p, positive = s / s.sum(), np.exp(-((row - keys[i]) ** 2).sum() / TEMPERATURE)
        perplexities.append(np.exp(-np.sum(p * np.log(p))))
        shares.append(positive / (positive + s.sum()))
    assert_close(found, "repulsor/perplexity", np.mean(perplexities))
    assert_close(found, "repulsor/positive_share", np.mean(shares))
    assert_close(found, "repulsor/alignment", ((z - keys) ** 2).sum(1).mean())
    assert_close(found, "repulsor/cosine_samples", pair_mean(z))
    pairs = np.exp(-2 * ((z[:, None] - z) ** 2).sum(-1))[~np.eye(len(z), dtype=bool)]
    assert_close(found, "repulsor/uniformity", np.log(pairs.mean()))


def test_the_bank(case):
    found, expected = case
    bank, own = expected.bank, expected.inputs.tags.ids
    assert_close(found, "repulsor/filled", 2 * tiny.BATCH)
    assert_close(found, "repulsor/age", 2)
    assert_close(found, "repulsor/cosine_bank", pair_mean(bank.features[:2].reshape(-1, tiny.DIM)))
    # The newest slot is this batch itself.
    copies = [(bank.tags.ids[OLDEST] == i).sum() for i in own]
    assert_close(found, "repulsor/copies_found", np.mean(copies))
    assert_close(found, "repulsor/copies_expected", tiny.BATCH / IMAGES)
    for number, (name, slot, batch) in enumerate(
        [("drift", OLDEST, expected.oldest), ("drift_newest", NEWEST, expected.batch)], start=1
    ):
        stored, times, ids = (
            x[slot][expected.part] for x in (bank.features, bank.tags.times, bank.tags.ids)
        )
        inputs = expected.draw(number, batch)
        today = expected.keys_at(inputs, times, inputs.tags.labels)
        same = ids == batch["ids"][expected.part]
        assert_close(found, f"repulsor/{name}", (today * stored).sum(1)[same].mean(), atol=1e-5)


def test_the_gradients_at_the_tap(case):
    """The flow loss and InfoNCE written out, differentiated with respect to the tokens."""
    found, expected = case
    i, head = expected.inputs, expected.state.params["terms"]["repulsor"]["head"]
    _, keys = expected.queries_and_keys()
    rows = np.concatenate([keys, expected.bank.features[:2].reshape(-1, tiny.DIM)])
    row_ids = np.concatenate([i.tags.ids, expected.bank.tags.ids[:2].ravel()])
    ts = i.t[:, None, None, None]
    x_t = ts * i.data + (1 - ts) * i.noise

    def flow(nudge):
        params = {"params": expected.state.params["model"]}
        out = expected.trainer.model.apply(params, x_t, i.t, i.labels, nudges={TAP: nudge})
        return jnp.mean((out - (i.data - i.noise)) ** 2)

    def term(tokens):
        h = tokens.mean(1) @ head["hidden"]["kernel"] + head["hidden"]["bias"]
        z = jax.nn.silu(h) @ head["out"]["kernel"] + head["out"]["bias"]
        z /= jnp.linalg.norm(z, axis=-1, keepdims=True)
        s = jnp.exp(-((z[:, None] - rows) ** 2).sum(-1) / TEMPERATURE)
        s = (s * (row_ids != i.tags.ids[:, None])).sum(1)
        positive = jnp.exp(-((z - keys) ** 2).sum(-1) / TEMPERATURE)
        return -WEIGHT * jnp.log(positive / (positive + s)).mean()

    tokens = expected.student()[TAP].astype(np.float32)
    a = np.asarray(jax.jit(jax.grad(term))(tokens), np.float64).ravel()
    b = np.asarray(jax.jit(jax.grad(flow))(np.zeros_like(tokens)), np.float64).ravel()
    norms = np.linalg.norm(a), np.linalg.norm(b)
    assert_close(found, "repulsor/gradient_share", norms[0] / sum(norms), rtol=1e-3)
    assert_close(found, "repulsor/gradient_cosine", a @ b / (norms[0] * norms[1]), atol=1e-4)


def test_the_probe(case):
    """Half noise, no class; the rows of padding are neither fitted to nor tested on."""
    found, expected = case
    latents, labels, fits, tests = expected.held_out
    data = latents.astype(np.float32)
    noise = jax.random.normal(jax.random.split(jax.random.key(0))[0], data.shape)
    half, no_class = np.full(len(data), 0.5, np.float32), np.full(len(data), 3)
    tokens = expected.tokens(expected.state.params["model"], data, noise, half, no_class)
    for block, pooled in enumerate(tokens.mean(2)):
        accuracy = diagnostics.ridge_probe(
            pooled[fits], labels[fits], pooled[tests], labels[tests], CLASSES
        )
        assert_close(found, f"block_{block}/probe_accuracy", accuracy, atol=0.5 / tests.sum())


@pytest.mark.slow
def test_any_mesh_says_the_same():
    c, on = CASES["one device"]
    one, eight = look(c, on), look(c, tiny.mesh(data=4, fsdp=2))
    assert one.keys() == eight.keys()
    for name, value in one.items():
        assert_close(eight, name, value, atol=1e-5)


@pytest.mark.parametrize("preset", [*objectives.PRESETS, "none", "layersync+contrastive_flow"])
def test_every_objective_can_be_looked_at(preset, tmp_path):
    values = tiny.config_dict(model__depth=4)
    objectives.use(values, preset)
    stored = {}
    if preset == "feature_alignment":
        stored["features"] = np.zeros((tiny.BATCH, 4, values.feature_alignment.dim), np.float16)
        values.data.features = str(tmp_path / "features.npy")
        np.save(values.data.features, stored["features"])
    c = config_lib.parse(values)
    trainer = tiny.trainer(c)
    state = abstract_train_state(trainer, tiny.mesh())
    batch = read(np.arange(tiny.BATCH)) | stored
    measure = make_measure(trainer, tiny.FORMAT, IMAGES, CLASSES)
    found = jax.eval_shape(measure, state, batch, None if state.bank is None else batch, None)
    assert all((x.shape, x.dtype) == ((), jnp.float32) for x in found.values())
    places = {name.rpartition("/")[0] for name in found}
    assert places == {f"block_{i}" for i in range(4)} | {t.name for t in trainer.objective.terms}


def test_the_blocks_of_a_deep_model_are_the_taps_and_eight_evenly_spaced():
    assert watched_blocks(28, (7, 8)) == (0, 4, 7, 8, 12, 15, 19, 23, 27)
    assert watched_blocks(3, (1,)) == (0, 1, 2)
    assert watched_blocks(1, ()) == (0,)


@pytest.mark.slow
def test_no_collective_of_a_look_grows_with_the_bank():
    def sent(rows):
        c = config_lib.parse(tiny.config_dict(batch_size=64, repulsor__bank_rows=rows))
        on = tiny.mesh(data=4, fsdp=2)
        state = abstract_train_state(tiny.trainer(c), on)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((64, *x.shape[1:]), x.dtype), read(np.arange(1))
        )
        batch = sharding.abstract_arrays(
            batch, jax.tree.map(lambda x: sharding.batch_sharding(on), batch)
        )
        measure = make_measure(tiny.trainer(c), tiny.FORMAT, IMAGES, CLASSES)
        with sharding.use_mesh(on):
            compiled = jax.jit(measure).lower(state, batch, batch, None).compile()
        return [x.num_bytes for x in traffic.collectives(compiled.as_text())]

    assert sum(sent(1024)) == sum(sent(65_536)) > 0
