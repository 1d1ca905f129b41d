"""Solvers against the exact flow of a Gaussian, guidance, and independence of batch and mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repulsor_jax import flow, sampling

PATHS = ("linear", "gvp", "vp")
MEAN, STD = 1.5, 0.5  # of the Gaussian data


def gaussian(path, x, t):
    """The exact score and velocity of x_t for data ~ N(MEAN, STD^2).

    x_t ~ N(alpha m, v) with v = alpha^2 s^2 + sigma^2, and the flow keeps quantiles in place:
    velocity = alpha' m + (v' / 2 v) (x - alpha m).
    """
    c = path.coefficients(t.reshape(t.shape + (1,) * (x.ndim - 1)))
    variance = c.alpha**2 * STD**2 + c.sigma**2
    half_slope = c.alpha * c.d_alpha * STD**2 + c.sigma * c.d_sigma
    score = -(x - c.alpha * MEAN) / variance
    return score, c.d_alpha * MEAN - half_slope * score


def exact_point(path, quantile, t):
    """Where the flow takes the standard-normal `quantile` at time t."""
    c = path.coefficients(jnp.asarray(t, jnp.float32))
    return c.alpha * MEAN + jnp.sqrt(c.alpha**2 * STD**2 + c.sigma**2) * quantile


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(name, solver, order):
    path = flow.get_path(name)
    t_end = flow.time_interval(path, "velocity", sampling=True)[1]
    quantile = jnp.linspace(-2.0, 2.0, 5)[:, None]
    errors = []
    for num_steps in (40, 80):
        x = sampling.integrate(
            lambda x, t: gaussian(path, x, t)[1],
            exact_point(path, quantile, 0.0),
            num_steps=num_steps,
            solver=solver,
            t_end=t_end,
        )
        errors.append(np.abs(x - exact_point(path, quantile, t_end)).max())
    assert errors[1] < (0.05 if solver == "euler" else 0.002)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
def test_every_prediction_maps_noise_quantiles_to_data_quantiles(name, prediction):
    path = flow.get_path(name)

    def model(params, x, t, labels):
        score, velocity = gaussian(path, x, t)
        sigma = path.coefficients(t).sigma[:, None]
        return {"velocity": velocity, "score": score, "noise": -sigma * score}[prediction]

    sample = sampling.make_sampler(
        model, path, prediction=prediction, solver="heun", num_steps=200, null_label=0
    )
    noise = jnp.linspace(-2.0, 2.0, 5)[:, None]
    samples = jax.jit(sample)(None, noise, jnp.zeros(5, jnp.int32))
    # vp starts with 0.7 per cent of data in its noise, the others at t = 0.001 for score and noise.
    np.testing.assert_allclose(samples, MEAN + STD * noise, atol=0.007)


def test_a_last_step_leaves_no_noise():
    """With one point as data the flow must end on it, though vp stops before t = 1."""
    path, point = flow.get_path("vp"), 2.0

    def model(params, x, t, labels):
        c = path.coefficients(t[:, None])
        return (x - c.alpha * point) / c.sigma

    sample = sampling.make_sampler(
        model, path, prediction="noise", solver="euler", num_steps=20, null_label=0
    )
    noise = jnp.linspace(-3.0, 3.0, 16)[:, None]
    samples = jax.jit(sample)(None, noise, jnp.zeros(16, jnp.int32))
    np.testing.assert_allclose(samples, np.full((16, 1), point), atol=1e-5)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("heun", 10)])
def test_times_and_number_of_evaluations(solver, evaluations):
    times = []

    def velocity_fn(x, t):
        assert t.shape == (2,)
        times.append(float(t[0]))
        return jnp.ones_like(x)

    with jax.disable_jit():
        x = sampling.integrate(
            velocity_fn, jnp.zeros((2, 3)), num_steps=5, solver=solver, t_start=0.5, t_end=1.0
        )
    assert len(times) == evaluations
    expected = np.linspace(0.5, 1.0, 6)
    expected = expected[:-1] if solver == "euler" else np.repeat(expected, 2)[1:-1]
    np.testing.assert_allclose(times, expected, rtol=1e-6)
    np.testing.assert_allclose(x, np.full((2, 3), 0.5), rtol=1e-6)


def test_initial_noise_depends_on_seed_and_index_only():
    draw = jax.jit(sampling.initial_noise, static_argnums=2)
    key, indices, shape = jax.random.key(3), jnp.arange(64), (4, 5, 2)
    noise = np.asarray(draw(key, indices, shape))
    assert noise.shape == (64, *shape)
    assert noise.dtype == np.float32
    subset = np.array([63, 0, 7])
    np.testing.assert_array_equal(draw(key, subset, shape), noise[subset])
    part = jax.jit(lambda indices: sampling.initial_noise(3, indices, shape))(subset)
    np.testing.assert_array_equal(part, noise[subset])
    assert np.abs(draw(jax.random.key(4), indices, shape) - noise).max() > 1
    assert np.unique(noise).size > 0.999 * noise.size
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.size) ** 0.5

    compiled = draw.lower(key, shard(indices), shape).compile()
    np.testing.assert_array_equal(compiled(key, shard(indices)), noise)
    assert not COLLECTIVE.search(compiled.as_text())


def test_labels():
    indices = jnp.arange(1000, 5000)
    balanced = sampling.sample_labels(0, indices, 10)
    assert balanced.dtype == jnp.int32
    np.testing.assert_array_equal(balanced, np.arange(1000, 5000) % 10)
    draw = jax.jit(lambda key, indices: sampling.sample_labels(key, indices, 10, mode="random"))
    labels = np.asarray(draw(jax.random.key(0), indices))
    assert labels.dtype == np.int32
    part = draw(jax.random.key(0), np.array([1009, 1003]))
    np.testing.assert_array_equal(part, labels[[9, 3]])
    counts = np.bincount(labels, minlength=10)
    assert counts.size == 10
    assert np.sum((counts - 400) ** 2 / 400) < 27.9  # chi-squared with 9 degrees, p = 0.001


def toy_params():
    rng = np.random.default_rng(0)
    return {
        "mix": jnp.asarray(0.2 * rng.normal(size=(48, 48)), jnp.float32),
        "labels": jnp.asarray(rng.normal(size=(11, 48)), jnp.float32),
    }


def toy_model(params, x, t, labels):
    """Mixes every value of a sample with every other, and its time and label."""
    h = x.reshape(x.shape[0], -1) @ params["mix"] + params["labels"][labels]
    return (jnp.tanh(h) * (1 + t[:, None])).reshape(x.shape)


def toy_inputs():
    noise = np.random.default_rng(1).normal(size=(16, 3, 4, 4))
    return jnp.asarray(noise, jnp.float32), jnp.arange(16) % 10


def toy_sampler(model=toy_model, **options):
    options = {"solver": "heun", "num_steps": 6, "null_label": 10} | options
    return sampling.make_sampler(model, flow.get_path("linear"), **options)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_formula(scale, channels):
    params, (x, labels) = toy_params(), toy_inputs()
    t = jnp.linspace(0.0, 0.9, 16)
    calls = []

    def model_fn(x, t, labels):
        calls.append(x.shape[0])
        return toy_model(params, x, t, labels)

    found = sampling.guided_velocity(
        model_fn, x, t, labels, null_label=10, scale=scale, channels=channels
    )
    assert calls == [32]
    cond = np.asarray(toy_model(params, x, t, labels))
    uncond = np.asarray(toy_model(params, x, t, jnp.full_like(labels, 10)))
    expected = (1 - scale) * uncond + scale * cond
    if channels is not None:
        expected[..., channels:] = cond[..., channels:]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if scale == 1.0:
        np.testing.assert_allclose(found, cond, atol=1e-5)


def test_no_guidance_is_one_call_without_doubling():
    calls = []

    def model_fn(x, t, labels):
        calls.append(x.shape[0])
        return labels[:, None] * x

    labels = jnp.arange(4)
    x = jnp.ones((4, 2))
    found = sampling.guided_velocity(model_fn, x, jnp.zeros(4), labels, null_label=9, scale=None)
    assert calls == [4]
    np.testing.assert_array_equal(found, labels[:, None] * x)


def test_one_program_for_every_scale():
    params, (noise, labels) = toy_params(), toy_inputs()
    traces = []

    def model(*inputs):
        traces.append(inputs[1].shape[0])
        return toy_model(*inputs)

    sample = jax.jit(toy_sampler(model))
    results = [sample(params, noise, labels, scale) for scale in (1.0, 1.5, 4.0)]
    assert sample._cache_size() == 1
    assert set(traces) == {32}
    plain = sample(params, noise, labels)
    assert sample._cache_size() == 2
    assert set(traces) == {16, 32}
    np.testing.assert_allclose(results[0], plain, atol=1e-5)
    assert np.abs(results[2] - results[1]).max() > 0.1


def test_parameters_are_an_argument():
    noise, labels = toy_inputs()
    sample, params = jax.jit(toy_sampler()), toy_params()
    other = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(sample(other, noise, labels), noise, atol=1e-6)
    assert np.abs(sample(params, noise, labels) - noise).max() > 0.1
    assert sample._cache_size() == 1


def test_samples_do_not_depend_on_batch_size_or_position():
    params, (noise, labels) = toy_params(), toy_inputs()
    sample = jax.jit(toy_sampler())
    samples = np.asarray(sample(params, noise, labels, 2.0))
    for subset in (np.array([3]), np.array([15, 2, 9]), np.arange(8)):
        part = sample(params, noise[subset], labels[subset], 2.0)
        np.testing.assert_allclose(part, samples[subset], atol=1e-5)


COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def shard(x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("scale", [None, 2.0])
def test_samples_on_a_mesh(scale):
    params, (noise, labels) = toy_params(), toy_inputs()
    sample = jax.jit(toy_sampler(channels=3))
    expected = sample(params, noise, labels, scale)
    inputs = (params, shard(noise), shard(labels), scale)
    samples = sample(*inputs)
    assert samples.sharding.is_equivalent_to(shard(noise).sharding, samples.ndim)
    np.testing.assert_allclose(samples, expected, atol=1e-5)
    # Samples share nothing, so with replicated parameters nothing travels.
    assert not COLLECTIVE.search(sample.lower(*inputs).compile().as_text())


def test_errors():
    x = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="'rk4'; expected one of euler, heun"):
        sampling.integrate(lambda x, t: x, x, num_steps=2, solver="rk4")
    with pytest.raises(ValueError, match="'rk4'; expected one of euler, heun"):
        toy_sampler(solver="rk4")
    with pytest.raises(ValueError, match="num_steps is 0"):
        sampling.integrate(lambda x, t: x, x, num_steps=0)
    with pytest.raises(ValueError, match="'x0'; expected one of velocity, score, noise"):
        toy_sampler(prediction="x0")
    with pytest.raises(ValueError, match="'cyclic'; expected one of balanced, random"):
        sampling.sample_labels(0, jnp.arange(3), 10, mode="cyclic")
