"""A learned source against published values, closed forms and exact fields."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repulsor_jax.flows import paths, sampler, source
from repulsor_jax.flows.source import Source
from tests.oracles import fixtures
from tests.oracles.closed_form import exact_coefficients

LINEAR = paths.get_path("linear")
PATHS = ("linear", "gvp", "vp")  # those with coefficients in closed form


@pytest.fixture(scope="module")
def published():
    path = fixtures.FOLDER / "csfm_visible.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path) as file:
        return dict(file)


def close(found, expected):
    """Losses and outputs; and gradients, relative to their norm."""
    error = np.linalg.norm(np.asarray(found, np.float64) - expected)
    assert error <= 1e-5 * np.linalg.norm(expected) + 1e-9


def image(tokens):
    """[B, H * W, C] of the fixtures -> [B, H, W, C]."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.reshape(len(tokens), side, side, -1)


def tokens(images):
    return np.asarray(images).reshape(len(images), -1, images.shape[-1])


def last(x):
    return np.moveaxis(x, 1, -1)


def test_published_samples(published):
    found = source.sample(
        Source(published["source/mean"], published["source/log_variance"]), published["source/eps"]
    )
    close(found, published["source/sample"])


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_published_variance_penalty(published, std):
    name = f"variance/var_kld/mean/std{std}"
    penalty = functools.partial(source.variance_penalty, target_std=std)
    value, grad = jax.value_and_grad(penalty)(published["source/log_variance"])
    close(value, published[name])
    close(grad, published[f"{name}/grad_log_variance"])
    assert penalty(jnp.full((2, 3), 2 * np.log(std))) == pytest.approx(0, abs=1e-7)
    for away in (-0.5, 0.5):
        assert penalty(jnp.full((2, 3), 2 * np.log(std) + away)) > 0.05


@pytest.mark.parametrize(
    ("axis", "name"),
    [
        ("width", "normalized_l2_published_last_axis"),
        ("channels", "normalized_l2_over_channels"),
    ],
)
def test_published_alignment(published, axis, name):
    mean, data = image(published["source/mean"]), last(published["align/data"])
    value, grad = jax.value_and_grad(source.direction_penalty)(mean, data, axis)
    close(value, published[f"align/{name}"])
    close(tokens(grad), published[f"align/{name}/grad_mean"])
    grad_data = jax.grad(source.direction_penalty, argnums=1)(mean, data, axis)
    assert not np.any(grad_data)
    # 2 (1 - cosine) / n
    over = -1 if axis == "channels" else -2
    norms = np.linalg.norm(mean, axis=over) * np.linalg.norm(data, axis=over)
    cosine = (mean * data).sum(over) / norms
    close(value, 2 * np.mean(1 - cosine) / mean.shape[over])


def test_the_pull_on_a_zero_mean_is_bounded_and_points_to_the_data():
    data = np.float32([3.0, 4.0]).reshape(1, 1, 1, 2)
    grad = jax.grad(source.direction_penalty)(jnp.zeros((1, 1, 1, 2)), data)
    np.testing.assert_allclose(grad.ravel(), -np.array([0.6, 0.8]) / 0.1, rtol=1e-5)
    # A vector without direction in the data pulls nowhere.
    nowhere = jax.grad(source.direction_penalty)(jnp.ones((1, 1, 1, 2)), np.zeros_like(data))
    np.testing.assert_allclose(nowhere, 0, atol=1e-6)
    with pytest.raises(ValueError, match="axis must be one of"):
        source.direction_penalty(data, data, "height")


def published_flow_loss(published, mean, log_variance, *, detach):
    """The published velocity is K x, with the other sign."""
    x_0 = source.sample(Source(image(mean), image(log_variance)), image(published["source/eps"]))
    data, t = last(published["align/data"]), published["flow/t_ours"]
    x = paths.interpolate(LINEAR, data, x_0, t)
    end = jax.lax.stop_gradient(x_0) if detach else x_0
    output = -jnp.einsum("ij,bhwj->bhwi", published["flow/matrix"], x)
    return paths.flow_loss(LINEAR, "velocity", output, data, end, t).mean()


@pytest.mark.parametrize("name", ["attached", "detached"])
def test_published_flow_loss(published, name):
    mean, log_variance = published["source/mean"], published["source/log_variance"]
    loss = functools.partial(published_flow_loss, published, detach=name == "detached")
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(mean, log_variance)
    close(value, published[f"flow/target_{name}"])
    for grad, of in zip(grads, ("mean", "log_variance"), strict=True):
        close(grad, published[f"flow/target_{name}/grad_{of}"])


def test_published_total(published):
    def total(mean, log_variance):
        flow = published_flow_loss(published, mean, log_variance, detach=False)
        align = source.direction_penalty(image(mean), last(published["align/data"]), "width")
        return flow + 5 * source.variance_penalty(log_variance) + align

    value, grads = jax.value_and_grad(total, argnums=(0, 1))(
        published["source/mean"], published["source/log_variance"]
    )
    close(value, published["total/loss"])
    for grad, of in zip(grads, ("mean", "log_variance"), strict=True):
        close(grad, published[f"total/grad_{of}"])


def test_published_times(published):
    shift = float(published["flow/shift"])
    t = paths.shift_time(1 - 0.999 * jnp.asarray(published["flow/u"]), shift)
    close(t, published["flow/t_ours"])
    key = jax.random.key(0)
    for distribution in paths.TIME_DISTRIBUTIONS:
        draw = functools.partial(paths.sample_timesteps, key, 1000, distribution)
        found, u = (np.asarray(draw(shift=s)) for s in (shift, 1.0))
        np.testing.assert_allclose(found, u / (shift - (shift - 1) * u), rtol=1e-5)


@pytest.mark.parametrize("count", [2, 6])
def test_published_paths_and_their_energy(published, count):
    matrix, theirs = published["flow/matrix"], published[f"sampler/{count}/times_theirs"]
    times = paths.shift_time(1 - np.linspace(1, 0.001, count), 2.5)
    np.testing.assert_allclose(times, 1 - theirs, atol=1e-6)

    def velocity(x, t):
        return -(jnp.einsum("ij,bhwj->bhwi", matrix, x) + (1 - t))

    start = jnp.asarray(image(published["source/sample"]))
    end, energy = source.normalized_path_energy(velocity, start, 1 - theirs.astype(float))
    close(end, last(published[f"sampler/{count}/end"]))
    # A difference of two float32 numbers, relative to one of them.
    np.testing.assert_allclose(energy, published[f"sampler/{count}/npe"], atol=2e-6)


def test_the_path_energy_of_a_straight_path_is_zero():
    start = jnp.ones((3, 4))
    _, straight = source.normalized_path_energy(lambda x, t: 0 * x - 2.0, start, np.arange(9) / 8)
    np.testing.assert_allclose(straight, 0, atol=1e-6)
    # x' = x: int |v|^2 / |x_1 - x_0|^2 = (e^2 - 1) / 2 / (e - 1)^2.
    _, bent = source.normalized_path_energy(lambda x, t: x, start, np.linspace(0, 1, 4001))
    expected = (np.e**2 - 1) / 2 / (np.e - 1) ** 2 - 1
    np.testing.assert_allclose(bent, expected, rtol=2e-3)


@pytest.mark.parametrize("name", PATHS)
def test_every_quantity_converts_into_every_other(name):
    rng = np.random.default_rng(0)
    t = np.array([0.3, 0.5, 0.9])
    data, eps, mean, log_variance = rng.standard_normal((4, 3, 5))
    scale = np.exp(log_variance / 2)
    alpha, d_alpha, sigma, d_sigma = (c[:, None] for c in exact_coefficients(name, t))
    first = mean + scale * eps
    x = alpha * data + sigma * first
    expected = {
        "velocity": d_alpha * data + d_sigma * first,
        "score": -eps / (sigma * scale),
        "noise": eps,
        "data": data,
    }
    start = Source(jnp.float32(mean), jnp.float32(log_variance))
    for given, value in expected.items():
        for to, wanted in expected.items():
            found = paths.convert(
                paths.get_path(name), value, x, t, source=given, to=to, start=start
            )
            np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=5e-3, err_msg=f"{given} {to}")


# Data N(MEAN, STD^2), source N(START, WIDTH^2).
MEAN, STD, START, WIDTH = 1.5, 0.5, -2.0, 0.6


def exact_velocity(path, x, t):
    """E[alpha' data + sigma' x_0 | x_t = x]: all are jointly normal."""
    c = path.coefficients(jnp.asarray(t, jnp.float32))
    residual = x - c.alpha * MEAN - c.sigma * START
    variance = c.alpha**2 * STD**2 + c.sigma**2 * WIDTH**2
    data = MEAN + c.alpha * STD**2 * residual / variance
    first = START + c.sigma * WIDTH**2 * residual / variance
    return c.d_alpha * data + c.d_sigma * first, -residual / variance


def source_like(x):
    return Source(jnp.full_like(x, START), jnp.full_like(x, 2 * np.log(WIDTH)))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_the_score_is_that_of_the_marginal(name, t):
    path, x = paths.get_path(name), jnp.linspace(-4, 4, 9)[:, None]
    velocity, score = exact_velocity(path, x, t)
    convert = functools.partial(
        paths.convert, path, velocity, x, jnp.float32(t), source="velocity", to="score"
    )
    np.testing.assert_allclose(convert(start=source_like(x)), score, rtol=1e-3, atol=1e-3)
    if name == "linear":
        stated = (t * velocity + START - x) / ((1 - t) * WIDTH**2)
        np.testing.assert_allclose(stated, score, rtol=1e-3, atol=1e-3)
    assert np.abs(convert() - score).max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "heun", "num_steps": 40},
        {"solver": "euler_maruyama", "num_steps": 250},
        {"solver": "stochastic_heun", "num_steps": 60, "path": paths.get_path("gvp")},
    ],
    ids=lambda options: options["solver"],
)
def test_samples_have_the_mean_and_width_of_the_data(options):
    spec = sampler.SamplerSpec(**{"path": LINEAR} | options, null_label=10)
    model = lambda params, x, t, labels: exact_velocity(spec.path, x, t[:, None, None, None])[0]
    count = 4000
    noise = sampler.initial_noise(0, jnp.arange(count), (1, 1, 1))
    keys = sampler.brownian_keys(0, jnp.arange(count))
    labels = jnp.zeros(count, jnp.int32)

    def moments(source_fn, noise):
        sample = jax.jit(sampler.make_sampler(model, spec, source_fn=source_fn))
        found = np.asarray(sample(None, noise, labels, keys=keys))
        return found.mean(), found.std()

    mean, std = moments(lambda params, labels: source_like(noise), noise)
    assert mean == pytest.approx(MEAN, abs=0.03)
    assert std == pytest.approx(STD, rel=0.05)
    if spec.is_stochastic:  # from the same points by the score of N(0, I)
        mean, std = moments(None, source.sample(source_like(noise), noise))
        assert abs(mean - MEAN) > 0.1


def test_guidance_goes_on_from_one_point_of_the_labels_source():
    means = jnp.float32([10.0, 20.0, 30.0])
    spec = sampler.SamplerSpec(LINEAR, null_label=2, solver="euler", num_steps=1)

    def source_fn(params, labels):
        return Source((params * means)[labels][:, None, None, None])

    def model(params, x, t, labels):
        return params * x + labels[:, None, None, None]

    noise, labels = jnp.ones((2, 1, 1, 1)), jnp.array([0, 1])
    sample = sampler.make_sampler(model, spec, source_fn=source_fn)
    x = np.float32([11, 21])
    found = sample(1.0, noise, labels, 3.0)
    np.testing.assert_allclose(found.ravel(), x + x + 2 + 3 * (labels - 2))
    found = sample(1.0, noise, labels, 3.0, guiding_params=0.5)  # the weak model's source is unused
    np.testing.assert_allclose(found.ravel(), x + labels + 0.5 * x + 3 * 0.5 * x)


def least_loss(classes, t, bins=None, count=200_000):
    """The loss that no network is below: the part of the target that x_t leaves open.

    Of `classes`, pairs (mean of the source, mean of the data), that the network is not told; by a
    line or, with `bins`, by a step function fitted to samples.
    """
    rng = np.random.default_rng(0)
    starts, ends = np.array(classes)[rng.integers(0, len(classes), count)].T
    eps, spread = rng.standard_normal((2, count))
    scale = 1.0 if bins else WIDTH
    first = source.sample(Source(starts, np.full(count, 2 * np.log(scale))), eps)
    data = ends + STD * spread
    at = jnp.full(count, t)
    x = np.asarray(paths.interpolate(LINEAR, data, first, at), np.float64)
    target = np.asarray(paths.target_velocity(LINEAR, data, first, at), np.float64)
    if bins is None:
        slope, offset = np.polyfit(x, target, 1)
        return np.mean((target - slope * x - offset) ** 2)
    groups = np.argsort(np.argsort(x)) * bins // count
    sizes, sums, squares = (np.bincount(groups, w) for w in (None, target, target**2))
    return (squares - sums**2 / sizes).sum() / count


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("start", [START, 3.0])
def test_the_least_flow_loss_of_one_class_knows_no_mean(t, start):
    expected = STD**2 * WIDTH**2 / (t**2 * STD**2 + (1 - t) ** 2 * WIDTH**2)
    assert least_loss([(start, MEAN)], t) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("start", "expected"), [(0.0, 2.78), (1.0, 1.25), (2.0, 0.84)])
def test_a_source_that_follows_the_classes_lowers_the_loss_of_a_network_that_cannot(
    start, expected
):
    classes = [(-start, -2.0), (start, 2.0)]
    times = (np.arange(16) + 0.5) / 16
    found = np.mean([least_loss(classes, t, bins=400, count=40_000) for t in times])
    assert found == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_a_free_variance_collapses_without_its_penalty(weight):
    """A field of a line for each of 16 times, and the width of the source, learned together."""
    times = (jnp.arange(16) + 0.5) / 16

    def loss_fn(params, key):
        eps, spread = jax.random.normal(key, (2, 16, 128))
        start = Source(jnp.zeros(()), params["log_variance"])
        first, data = source.sample(start, eps), MEAN + spread
        x = paths.interpolate(LINEAR, data, first, times)
        output = params["slope"][:, None] * x + params["offset"][:, None]
        flow = paths.flow_loss(LINEAR, "velocity", output, data, first, times).mean()
        return flow + weight * source.variance_penalty(params["log_variance"])

    optimizer = optax.adam(0.02)
    lines = jnp.zeros(16)
    params = {"slope": lines, "offset": lines, "log_variance": jnp.zeros(())}

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 1500)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    width = float(jnp.exp(params["log_variance"] / 2))
    if weight:  # the minimum of pi q / 2 + weight L_var
        edge = np.pi / 4
        expected = (-edge + np.sqrt(edge**2 + weight**2)) / weight
        assert width == pytest.approx(expected, abs=0.04)
    else:
        assert width < 0.1
