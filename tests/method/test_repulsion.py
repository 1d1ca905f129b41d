import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import sharding
from repulsor_jax.method import head as head_lib
from repulsor_jax.method import memory_bank, repulsion
from repulsor_jax.method.dispersive import dispersive_loss
from repulsor_jax.planning import hlo
from tests.oracles import tiny


def reference(z, rows, temperature, distance):
    """The definition, pair by pair, in float64."""
    z, rows = z.astype(np.float64), rows.astype(np.float64)
    terms = []
    for i, anchor in enumerate(z):
        others = [z[j] for j in range(len(z)) if j != i] + list(rows)
        repulsions = []
        for other in others:
            if distance == "squared_l2":
                dist = ((anchor - other) ** 2).sum()
            else:
                dist = 1 - anchor @ other / np.linalg.norm(anchor) / np.linalg.norm(other)
            repulsions.append(np.exp(-dist / temperature))
        terms.append(np.log(np.mean(repulsions)))
    return np.array(terms)


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def empty_bank(slots, batch_size, dim, dtype=np.float32):
    return memory_bank.create(slots, batch_size, dim, dtype)


enqueue = jax.jit(memory_bank.enqueue)


def filled_bank(rng, slots, written, batch_size, dim, dtype=np.float32):
    bank = empty_bank(slots, batch_size, dim, dtype)
    kept = []
    for _ in range(written):
        kept.append(unit(rng, batch_size, dim))
        bank = enqueue(bank, kept[-1])
    return bank, np.concatenate(kept[-slots:]) if kept else np.zeros((0, dim))


def evaluate(
    z, bank=None, weights=None, *, temperature=0.5, distance="squared_l2", chunk_slots=None
):
    """The terms, the loss, and the gradient of the loss or of the terms by weight.

    Most tests here take 5 samples of length 4 and 3 slots, so that they share a program.
    """
    weights = np.full(len(z), 1 / len(z), np.float32) if weights is None else weights
    return _evaluate(z, bank, weights, np.float32(temperature), distance, chunk_slots)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _evaluate(z, bank, weights, temperature, distance, chunk_slots):
    choices = {"temperature": temperature, "distance": distance, "chunk_slots": chunk_slots}
    terms, pull_back = jax.vjp(lambda x: repulsion.repulsion_per_sample(x, bank, **choices), z)
    return terms, repulsion.repulsion_loss(z, bank, **choices), pull_back(weights)[0]


def differences(function, z):
    """The gradient of a function in float64, by central differences."""
    numeric = np.zeros(z.shape)
    for index in np.ndindex(*z.shape):
        step = np.zeros(z.shape)
        step[index] = 1e-5
        numeric[index] = (function(z + step) - function(z - step)) / 2e-5
    return numeric


@pytest.mark.parametrize("distance", repulsion.DISTANCES)
@pytest.mark.parametrize("written", [0, 1, 3, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("chunk_slots", [None, 1, 2])
def test_matches_the_definition(distance, written, temperature, chunk_slots):
    rng = np.random.default_rng(written)
    z = unit(rng, 5, 4)
    bank, rows = filled_bank(rng, slots=3, written=written, batch_size=5, dim=4)
    choices = {"temperature": temperature, "distance": distance, "chunk_slots": chunk_slots}
    terms, loss, _ = evaluate(z, bank, **choices)
    expected = reference(z, rows, temperature, distance)
    np.testing.assert_allclose(terms, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(loss, expected.mean(), rtol=2e-5)


def test_matches_the_definition_without_unit_length():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((5, 4)).astype(np.float32)
    terms = evaluate(z, temperature=2.0)[0]
    np.testing.assert_allclose(terms, reference(z, np.zeros((0, 4)), 2.0, "squared_l2"), rtol=1e-5)


@pytest.mark.parametrize("distance", repulsion.DISTANCES)
@pytest.mark.parametrize("written", [0, 2])
@pytest.mark.parametrize("chunk_slots", [None, 2])
def test_gradient_matches_finite_differences(distance, written, chunk_slots):
    rng = np.random.default_rng(1)
    z = unit(rng, 5, 4)
    bank, rows = filled_bank(rng, slots=3, written=written, batch_size=5, dim=4)
    gradient = evaluate(z, bank, distance=distance, chunk_slots=chunk_slots)[2]
    numeric = differences(lambda x: reference(x, rows, 0.5, distance).mean(), z)
    np.testing.assert_allclose(gradient, numeric, atol=2e-5)


def test_an_empty_bank_is_the_batch_alone():
    z = unit(np.random.default_rng(2), 5, 4)
    with_bank, without = evaluate(z, empty_bank(3, 5, 4)), evaluate(z)
    np.testing.assert_allclose(with_bank[1], without[1], rtol=1e-6)
    np.testing.assert_allclose(with_bank[2], without[2], atol=1e-6)


def test_dispersive_loss_is_the_empty_bank_limit():
    """The same pairs; Dispersive adds each sample's pair with itself and takes the log last."""
    tokens = np.random.default_rng(3).standard_normal((6, 4, 5)).astype(np.float32)

    def from_repulsion(tokens):
        z = head_lib.pool(tokens, "flatten")
        z = z / jnp.sqrt(z.shape[1])  # Dispersive divides squared distances by the feature size
        terms = repulsion.repulsion_per_sample(z, empty_bank(2, *z.shape), temperature=0.5)
        batch_size = z.shape[0]
        return jnp.log(jnp.mean((1.0 + (batch_size - 1) * jnp.exp(terms)) / batch_size))

    def direct(tokens):
        return dispersive_loss(tokens, variant="l2", temperature=0.5)

    value, gradient = jax.jit(jax.value_and_grad(from_repulsion))(tokens)
    expected, expected_gradient = jax.jit(jax.value_and_grad(direct))(tokens)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_the_loss_is_continuous_while_the_bank_fills():
    """A bank filled with copies of the batch's own spread changes the mean little at each step."""
    rng = np.random.default_rng(4)
    z = unit(rng, 64, 8)
    bank = empty_bank(4, 64, 8)
    loss_fn = jax.jit(repulsion.repulsion_loss)
    losses = [float(loss_fn(z, bank))]
    for _ in range(4):
        bank = enqueue(bank, unit(rng, 64, 8))
        losses.append(float(loss_fn(z, bank)))
    assert np.abs(np.diff(losses)).max() < 0.1


def test_a_lone_sample_without_negatives_costs_nothing():
    z = np.ones((1, 3), np.float32)
    empty = empty_bank(2, 1, 3)
    for bank, chunk in ((None, None), (empty, 2), (empty, 1)):
        _, value, gradient = evaluate(z, bank, chunk_slots=chunk)
        assert float(value) == 0.0
        assert not np.asarray(gradient).any()


def test_identical_rows_repel_at_zero_distance_with_finite_gradient():
    z = np.full((5, 4), 0.5, np.float32)
    for distance in repulsion.DISTANCES:
        _, value, gradient = evaluate(z, distance=distance)
        np.testing.assert_allclose(value, 0.0, atol=1e-5)
        assert np.isfinite(gradient).all()


def test_a_bfloat16_bank_is_close_to_float32():
    z = unit(np.random.default_rng(5), 16, 32)
    half, rows = filled_bank(np.random.default_rng(6), 4, 4, 16, 32, jnp.bfloat16)
    exact = reference(z, rows, 0.5, "squared_l2").mean()
    np.testing.assert_allclose(jax.jit(repulsion.repulsion_loss)(z, half), exact, rtol=2e-3)


@pytest.mark.parametrize("chunk_slots", [None, 1])
@pytest.mark.parametrize("same_class_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("time_window", [1.0, 0.4])
def test_weights_of_negatives_and_info_nce(chunk_slots, same_class_weight, time_window):
    """Own images, classes and times, sample by sample in float64; two rows an image."""
    rng = np.random.default_rng(11)
    rows_per_sample, images, dim, slots = 2, 4, 6, 3
    size = images * rows_per_sample
    contrast = repulsion.Contrast(0.4, "squared_l2", same_class_weight, time_window)

    def some_tags():
        ids = np.repeat(rng.integers(0, 6, images), rows_per_sample)
        return ids, ids % 3, rng.uniform(size=size)

    def as_tags(ids, labels, times):
        return memory_bank.tag(jnp.asarray(ids), jnp.asarray(labels), jnp.asarray(times))

    bank, stored = empty_bank(slots, size, dim), []
    for _ in range(2):
        stored.append((unit(rng, size, dim), some_tags()))
        bank = enqueue(bank, stored[-1][0], tags=as_tags(*stored[-1][1]))
    z, positives, keys = unit(rng, size, dim), unit(rng, size, dim), unit(rng, size, dim)
    own, key_tags = some_tags(), None
    key_tags = (own[0], own[1], rng.uniform(size=size))

    def reference(z):
        means, losses = [], []
        for i in range(size):
            logits, weights = [], []
            for features, (ids, labels, times) in [(keys, key_tags), *stored]:
                for j in range(size):
                    same_row = features is keys and j // 2 == i // 2
                    weight = same_class_weight if labels[j] == own[1][i] else 1.0
                    weight *= ids[j] != own[0][i] and not same_row
                    weight *= time_window == 1 or abs(times[j] - own[2][i]) <= time_window
                    logits.append(-((features[j] - z[i]) ** 2).sum() / 0.4)
                    weights.append(weight)
            total = np.exp(logits) @ weights
            means.append(np.log(total / np.sum(weights)))
            positive = np.exp(-((positives[i] - z[i]) ** 2).sum() / 0.4)
            losses.append(-np.log(positive / (positive + total)))
        return np.array(means), np.array(losses)

    @jax.jit
    def found(z, positives, bank):
        log_mean, count = repulsion.log_mean_negatives(
            z,
            bank,
            as_tags(*own),
            contrast=contrast,
            keys=repulsion.Keys(jnp.asarray(keys), as_tags(*key_tags)),
            rows_per_sample=rows_per_sample,
            chunk_slots=chunk_slots,
        )
        losses = repulsion.info_nce(contrast.paired_logits(positives, z), log_mean, count)
        return losses.mean(), (log_mean, losses)

    gradient, (means, losses) = jax.grad(found, has_aux=True)(z, positives, bank)
    expected = reference(z.astype(np.float64))
    np.testing.assert_allclose(means, expected[0], rtol=1e-5)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    numeric = differences(lambda x: reference(x)[1].mean(), z)
    np.testing.assert_allclose(gradient, numeric, atol=2e-5)


def test_the_library_s_info_nce_is_the_share_of_the_positive():
    rng = np.random.default_rng(12)
    z, positives = unit(rng, 5, 4), unit(rng, 5, 4)
    bank, rows = filled_bank(rng, 3, 2, 5, 4)
    squares = ((z - positives) ** 2).sum(1)
    count = 4 + len(rows)
    sums = count * np.exp(reference(z, rows, 0.5, "squared_l2"))
    expected = -np.log(np.exp(-squares / 0.5) / (np.exp(-squares / 0.5) + sums))
    found = jax.jit(repulsion.info_nce_loss)(z, positives, bank)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-5)
    assert float(jax.jit(repulsion.info_nce_loss)(z[:1], positives[:1])) == 0.0  # no negatives


def test_unknown_distance_and_pooling_are_refused():
    z = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="squared_l2"):
        evaluate(z, distance="manhattan")
    with pytest.raises(ValueError, match="'mean', 'flatten' or 'token'"):
        head_lib.pool(jnp.ones((2, 2, 2)), "max")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        evaluate(z, empty_bank(3, 2, 2), chunk_slots=0)


# The online form, past `MAX_LOGITS` by itself: the same numbers without their logits.


def exact(z, rows, temperature, distance):
    """Loss and gradient in closed form, in float64."""
    z, rows = np.asarray(z, np.float64), np.asarray(rows, np.float64)
    lengths = np.linalg.norm(z, axis=1, keepdims=True)
    x = z / lengths if distance == "cosine" else z
    y = rows / np.linalg.norm(rows, axis=1, keepdims=True) if distance == "cosine" else rows
    negatives = np.concatenate([x, y])
    # On unit vectors 1 - cos is half the squared distance, and so are their gradients in x.
    factor = 0.5 if distance == "cosine" else 1.0
    squares = (negatives**2).sum(1) + (x**2).sum(1, keepdims=True) - 2 * x @ negatives.T
    logits = -factor * squares / temperature
    np.fill_diagonal(logits, -np.inf)
    largest = logits.max(1, keepdims=True)
    weights = np.exp(logits - largest)
    loss = (largest[:, 0] + np.log(weights.sum(1) / (len(negatives) - 1))).mean()
    shares = weights / weights.sum(1, keepdims=True)
    pull = shares @ negatives - x  # of each sample's own term
    mutual = shares[:, : len(z)]  # and of the terms that it is a negative of
    pull += mutual.T @ x - mutual.sum(0)[:, None] * x
    gradient = 2 * factor / temperature * pull / len(z)
    if distance == "cosine":
        gradient = (gradient - (gradient * x).sum(1, keepdims=True) * x) / lengths
    return loss, gradient


def check_exact(found, z, rows, temperature, distance):
    loss, gradient = exact(z, rows, temperature, distance)
    np.testing.assert_allclose(found[0], loss, rtol=1e-5)
    np.testing.assert_allclose(found[1], gradient, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ("chunk_slots", "dtype", "distance"),
    [
        (1, jnp.float32, "squared_l2"),
        (1, jnp.bfloat16, "cosine"),
        (4, jnp.float32, "cosine"),
        (4, jnp.bfloat16, "squared_l2"),
        (11, jnp.bfloat16, "cosine"),  # the direct form
    ],
)
def test_every_chunk_gives_the_loss_and_gradient_of_float64(distance, dtype, chunk_slots):
    """A prime number of slots, partly or over filled; far rows first, so that maxima grow."""
    slots, batch_size, dim, temperature = 11, 8, 16, 0.05
    loss_fn = functools.partial(
        repulsion.repulsion_loss,
        temperature=temperature,
        distance=distance,
        chunk_slots=chunk_slots,
    )
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    for written in (1, 7, 11, 15):
        rng = np.random.default_rng(written)
        z = unit(rng, batch_size, dim)
        bank = empty_bank(slots, batch_size, dim, dtype)
        for step in range(written):
            near = unit(rng, batch_size, dim) - (1 - 2 * step / written) * z
            bank = enqueue(bank, near / np.linalg.norm(near, axis=-1, keepdims=True))
        rows = np.asarray(bank.features, np.float64)[: int(bank.filled)].reshape(-1, dim)
        check_exact(value_and_grad(z, bank), z, rows, temperature, distance)


@pytest.mark.parametrize(
    ("shape", "num_samples"),  # the batch, or a micro-batch of it
    [((8, 1, 1), 32), ((2, 4, 1), 8), ((2, 2, 2), 32), ((2, 2, 2), 8)],
    ids=str,
)
def test_on_any_mesh_the_online_loss_is_that_of_float64(shape, num_samples):
    mesh = tiny.mesh(*shape)
    bank, rows = filled_bank(np.random.default_rng(8), 5, 4, 32, 16)
    z = unit(np.random.default_rng(9), num_samples, 16)
    bank = jax.device_put(bank, memory_bank.shardings(mesh, sharding.BATCH_AXES))
    queries = jax.device_put(z, sharding.batch_sharding(mesh))
    loss_fn = functools.partial(repulsion.repulsion_loss, chunk_slots=2)
    with sharding.use_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss_fn))(queries, bank)
    check_exact(found, z, rows, 0.5, "squared_l2")


def test_the_gradient_carries_the_weight_of_each_sample():
    rng = np.random.default_rng(10)
    z, weights = unit(rng, 5, 4), rng.standard_normal(5).astype(np.float32)
    bank, rows = filled_bank(rng, 3, 3, 5, 4)
    found = evaluate(z, bank, weights, distance="squared_l2", chunk_slots=1)[2]
    numeric = differences(lambda x: weights @ reference(x, rows, 0.5, "squared_l2"), z)
    np.testing.assert_allclose(found, numeric, atol=1e-5)


def lower_loss(num_slots, batch_size, dim, mesh, dtype=jnp.float32, then_enqueue=False, **choices):
    """Loss and gradient for shapes alone, and perhaps the enqueue into the donated bank."""

    def step(z, bank):
        found = jax.value_and_grad(repulsion.repulsion_loss)(z, bank, **choices)
        valid = jnp.isfinite(found[0])
        return found, memory_bank.enqueue(bank, z, valid) if then_enqueue else None

    rows = sharding.batch_sharding(mesh)
    slots = memory_bank.shardings(mesh, sharding.BATCH_AXES)
    abstract = jax.eval_shape(lambda: memory_bank.create(num_slots, batch_size, dim, dtype))
    jitted = jax.jit(
        step,
        in_shardings=(rows, slots),
        out_shardings=((sharding.replicated(mesh), rows), slots if then_enqueue else None),
        donate_argnums=1 if then_enqueue else (),
    )
    with sharding.use_mesh(mesh):
        return jitted.lower(jax.ShapeDtypeStruct((batch_size, dim), jnp.float32), abstract)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 1, 1), jnp.bfloat16), ((4, 2, 1), jnp.float32)])
def test_a_large_bank_makes_no_array_of_its_logits_and_no_copy(shape, dtype):
    """At 1,048,576 rows, by itself; the bound does not know their number."""
    batch_size, dim, rows = 256, 16, 1_048_576
    compiled = lower_loss(rows // batch_size, batch_size, dim, tiny.mesh(*shape), dtype).compile()
    module = hlo.parse(compiled.as_text())
    instructions = [i for c in module.computations.values() for i in c.values()]
    # Inside a fusion values are made one by one, and not kept.
    fused = {name for i in instructions if i.opcode == "fusion" for name in i.called}
    kept = [c for name, c in module.computations.items() if name not in fused]
    arrays = [a for c in kept for i in c.values() for a in i.arrays]
    name = {jnp.float32: "f32", jnp.bfloat16: "bf16"}[dtype]
    bank_shape = (rows // batch_size, batch_size // math.prod(shape), dim)
    others = [a for a in arrays if (a.dtype, a.shape) != (name, bank_shape)]
    assert len(others) < len(arrays)
    assert max(a.size for a in others) <= repulsion.MAX_LOGITS
    bound = 5 * 4 * repulsion.MAX_LOGITS  # five arrays of a chunk's logits
    assert compiled.memory_analysis().temp_size_in_bytes < bound
    assert bound < rows * batch_size * 4 // math.prod(shape) / 3  # one array of all logits


def test_a_large_bank_is_read_and_then_written_in_place():
    batch_size, dim, rows = 64, 64, 1_048_576
    num_slots = rows // batch_size
    compiled = lower_loss(num_slots, batch_size, dim, tiny.mesh(), then_enqueue=True).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= rows * dim * 4
    assert memory.temp_size_in_bytes < 5 * 4 * repulsion.MAX_LOGITS < rows * dim * 4 / 5


def test_a_bank_is_gone_through_in_chunks_past_max_logits():
    batch_size = 64
    slots = repulsion.MAX_LOGITS // batch_size**2  # they make MAX_LOGITS on one device

    def in_chunks(mesh, num_slots, **choices):
        z = jax.ShapeDtypeStruct((batch_size, 4), jnp.float32)
        bank = jax.eval_shape(lambda: memory_bank.create(num_slots, batch_size, 4))
        loss_fn = functools.partial(repulsion.repulsion_loss, **choices)
        with sharding.use_mesh(mesh):
            return "scan[" in str(jax.make_jaxpr(loss_fn)(z, bank))

    assert not in_chunks(tiny.mesh(), slots)
    assert in_chunks(tiny.mesh(), slots + 1)
    assert in_chunks(tiny.mesh(), slots, chunk_slots=slots - 1)
    assert not in_chunks(tiny.mesh(), slots + 1, chunk_slots=slots + 1)
    assert not in_chunks(tiny.mesh(data=4, fsdp=2), 8 * slots)
    assert in_chunks(tiny.mesh(data=4, fsdp=2), 8 * slots + 1)


def test_head_gives_unit_vectors_of_its_dense_silu_dense():
    rng = np.random.default_rng(7)
    pooled = rng.standard_normal((5, 6)).astype(np.float32)
    head = head_lib.ProjectionHead(3, hidden_size=7)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32),
        jax.eval_shape(head.init, jax.random.key(0), pooled)["params"],
    )
    z = jax.jit(head.apply)({"params": params}, pooled.astype(jnp.bfloat16))
    assert z.dtype == jnp.float32
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), _plain(params))
    pooled = np.asarray(pooled.astype(jnp.bfloat16), np.float64)
    hidden = pooled @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    out = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    expected = out / np.linalg.norm(out, axis=-1, keepdims=True)
    np.testing.assert_allclose(z, expected, atol=1e-5)


def test_token_pooling_is_the_mean_over_squares():
    tokens = np.random.default_rng(13).standard_normal((2, 16, 3)).astype(np.float32)
    grid = tokens.reshape(2, 4, 4, 3)
    expected = [grid[:, r : r + 2, c : c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)]
    found = head_lib.pool(tokens, "token", 2)
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5, atol=1e-6)


def _plain(params):
    import flax.linen as nn

    return nn.unbox(params)
