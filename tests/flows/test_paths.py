"""Paths, conversions, losses and times against NumPy in float64 and SiT's PyTorch values."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.flows import paths
from tests.oracles.closed_form import DIFFUSIONS, exact_alpha_sigma, exact_coefficients

PATHS = ("linear", "gvp", "vp")
QUANTITIES = ("velocity", "score", "noise", "data")
TIMES = np.array([0.02, 0.2, 0.5, 0.77, 0.98])


def exact_quantities(name, data, noise, t):
    """x_t and the four quantities, from both ends, in float64; t broadcasts against data."""
    alpha, d_alpha, sigma, d_sigma = exact_coefficients(name, t)
    return alpha * data + sigma * noise, {
        "velocity": d_alpha * data + d_sigma * noise,
        "score": -noise / sigma,
        "noise": noise,
        "data": data,
    }


@pytest.fixture(scope="module")
def ends():
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(TIMES), 3, 2)), rng.normal(size=(len(TIMES), 3, 2))


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest entry of each sample."""
    assert actual.dtype == jnp.float32
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    axes = tuple(range(1, expected.ndim))
    error = np.abs(actual - expected).max(axis=axes)
    assert np.all(error <= tolerance * np.abs(expected).max(axis=axes)), error


@pytest.mark.parametrize("name", PATHS)
def test_coefficients(name):
    found = paths.get_path(name).coefficients(jnp.asarray(TIMES, jnp.float32))
    for value, expected in zip(found, exact_coefficients(name, TIMES), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-5)
    ends = exact_alpha_sigma(name, np.array([0.0, 1.0]))
    found = paths.get_path(name).coefficients(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose((found.alpha, found.sigma), ends, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_interpolate_and_regression_target_at_any_rank(name, rank):
    rng = np.random.default_rng(rank)
    shape = (len(TIMES), 2, 3, 4)[:rank]
    data, noise = rng.normal(size=shape), rng.normal(size=shape)
    t = TIMES.reshape(-1, *(1,) * (rank - 1))
    x, expected = exact_quantities(name, data, noise, t)
    path = paths.get_path(name)
    assert_close(paths.interpolate(path, data, noise, TIMES), x)
    assert_close(velocity_target(path, data, noise, TIMES), expected["velocity"], 3e-5)


def velocity_target(path, data, noise, t):
    """What the loss pulls a velocity to: its gradient at 0 is -2 target / size of a sample."""

    def loss(output):
        return paths.flow_loss(path, "velocity", output, data, noise, t).sum()

    return -jax.grad(loss)(jnp.zeros(data.shape)) * (data.size / len(data) / 2)


def test_half_precision_inputs_are_computed_in_float32():
    data, noise = jnp.full((2, 3), 1.0, jnp.bfloat16), jnp.full((2, 3), 2.0, jnp.bfloat16)
    t = jnp.array([0.1234, 0.9876], jnp.float32)
    path = paths.get_path("linear")
    expected = np.repeat((2 - np.asarray(t, np.float64))[:, None], 3, axis=1)
    assert_close(paths.interpolate(path, data, noise, t), expected, 1e-7)
    assert paths.flow_loss(path, "velocity", data, data, noise, t).dtype == jnp.float32


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("source", QUANTITIES)
@pytest.mark.parametrize("to", QUANTITIES)
def test_convert(name, source, to, ends):
    data, noise = ends
    x, expected = exact_quantities(name, data, noise, TIMES[:, None, None])
    path = paths.get_path(name)
    found = paths.convert(path, expected[source], x, TIMES, source=source, to=to)
    # At t = 0.02 a noise must be told from x to a few per cent of itself: some digits go.
    assert_close(found, expected[to], 1e-3 if name == "vp" else 1e-4)


@pytest.mark.parametrize("name", ["linear", "gvp"])
def test_a_velocity_converts_at_both_ends(name, ends):
    data, noise = (end[:2].astype(np.float32) for end in ends)
    t = np.array([0.0, 1.0])
    path = paths.get_path(name)
    x = paths.interpolate(path, data, noise, t)
    velocity = velocity_target(path, data, noise, t)
    for to, expected in (("data", data), ("noise", noise)):
        assert_close(paths.convert(path, velocity, x, t, source="velocity", to=to), expected)
    found = paths.convert(path, data[:1], x[:1], t[:1], source="data", to="velocity")
    assert_close(found, velocity[:1])


@pytest.mark.parametrize("name", PATHS)
def test_values_of_the_published_code(name, reference_fixtures):
    values = np.load(reference_fixtures / "paths.npz")
    data, noise, t = values["data"], values["noise"], values["t"]
    path = paths.get_path(name)
    coefficients = path.coefficients(jnp.asarray(t))
    for key, found in coefficients._asdict().items():
        np.testing.assert_allclose(found, values[f"{name}/{key}"], rtol=2e-6)
    x = paths.interpolate(path, data, noise, t)
    assert_close(x, values[f"{name}/xt"], 2e-6)
    assert_close(velocity_target(path, data, noise, t), values[f"{name}/ut"], 2e-6)
    for to in ("score", "noise"):
        found = paths.convert(path, values["velocity"], x, t, source="velocity", to=to)
        assert_close(found, values[f"{name}/{to}_from_velocity"], 5e-6)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("prediction", "weighting"),
    [("velocity", "none")]
    + [(p, w) for p in ("score", "noise") for w in ("none", "velocity", "likelihood")],
)
def test_flow_loss(name, prediction, weighting, ends):
    data, noise = ends
    output = np.random.default_rng(1).normal(size=data.shape)
    alpha, d_alpha, sigma, d_sigma = exact_coefficients(name, TIMES)
    g = d_alpha / alpha * sigma**2 - sigma * d_sigma
    weight = {"none": 1.0, "velocity": (g / sigma) ** 2, "likelihood": g / sigma**2}[weighting]
    _, expected = exact_quantities(name, data, noise, TIMES[:, None, None])
    error = output - expected[prediction]
    if prediction == "score":
        error *= sigma[:, None, None]
    path = paths.get_path(name)
    found = paths.flow_loss(path, prediction, output, data, noise, TIMES, weighting)
    assert found.shape == TIMES.shape
    np.testing.assert_allclose(found, weight * np.mean(error**2, axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_velocity_weighting_is_the_error_of_the_velocity(name, prediction, ends):
    data, noise = ends
    output = np.random.default_rng(2).normal(size=data.shape)
    path = paths.get_path(name)
    x = paths.interpolate(path, data, noise, TIMES)
    velocity = paths.convert(path, output, x, TIMES, source=prediction, to="velocity")
    expected = paths.flow_loss(path, "velocity", velocity, data, noise, TIMES)
    found = paths.flow_loss(path, prediction, output, data, noise, TIMES, "velocity")
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_losses_and_gradients_are_finite_at_the_ends_of_the_interval(name, prediction):
    path = paths.get_path(name)
    t = jnp.array(paths.time_interval(path, prediction))
    data, noise, output = jax.random.normal(jax.random.key(0), (3, 2, 8))
    for weighting in ("none",) if prediction == "velocity" else paths.WEIGHTINGS:
        loss = lambda o, w=weighting: paths.flow_loss(path, prediction, o, data, noise, t, w).sum()
        value, gradient = jax.jit(jax.value_and_grad(loss))(output)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_time_interval():
    linear, vp = paths.get_path("linear"), paths.get_path("vp")
    assert paths.time_interval(linear, "velocity") == (0.0, 1.0)
    assert paths.time_interval(linear, "velocity", sampling=True) == (0.0, 1.0)
    assert paths.time_interval(linear, "noise") == (1e-3, 1 - 1e-3)
    assert paths.time_interval(vp, "velocity") == (0.0, 1 - 1e-5)
    assert paths.time_interval(vp, "score", sampling=True) == (0.0, 1 - 1e-3)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("form", paths.DIFFUSION_FORMS)
def test_diffusion(name, form):
    path = paths.get_path(name)
    alpha, d_alpha, sigma, d_sigma = exact_coefficients(name, TIMES)
    for norm in (1.0, 0.6):
        found = paths.diffusion(path, form, jnp.asarray(TIMES, jnp.float32), norm)
        assert found.dtype == jnp.float32
        expected = DIFFUSIONS[form](TIMES, d_alpha / alpha, sigma, d_sigma, norm)
        np.testing.assert_allclose(found, expected, rtol=5e-5, atol=1e-7)
    scalar = paths.diffusion(path, form, jnp.float32(TIMES[1]), 0.6)
    assert scalar.shape == ()
    np.testing.assert_allclose(scalar, expected[1], rtol=5e-5)


@pytest.mark.parametrize("name", PATHS)
def test_diffusion_of_the_published_code(name, reference_fixtures):
    values = np.load(reference_fixtures / "paths.npz")
    # The published keys, one of them misspelt.
    renamed = {"sbdm": "SBDM", "increasing_decreasing": "inccreasing-decreasing"}
    for form in paths.DIFFUSION_FORMS:
        found = paths.diffusion(paths.get_path(name), form, jnp.asarray(values["t"]))
        expected = values[f"{name}/diffusion/{renamed.get(form, form)}"]
        np.testing.assert_allclose(found, expected, rtol=5e-6, atol=1e-8)


@pytest.mark.parametrize("form", paths.DIFFUSION_FORMS)
def test_sde_time_interval(form):
    linear, vp = paths.get_path("linear"), paths.get_path("vp")
    singular = form == "sbdm"
    assert paths.sde_time_interval(linear, "velocity", form, 0.04) == (
        1e-3 if singular else 0,
        0.96,
    )
    assert paths.sde_time_interval(linear, "velocity", form, 0.0)[1] == 1 - 1e-3
    assert paths.sde_time_interval(linear, "noise", form, 0.04) == (1e-3, 0.96)
    assert paths.sde_time_interval(vp, "score", form, 0.04) == (0.0, 0.96)
    assert paths.sde_time_interval(vp, "velocity", form, 0.0) == (0.0, 1 - 1e-3)
    for path in (linear, paths.get_path("gvp"), vp):
        for prediction in paths.PREDICTIONS:
            ends = jnp.array(paths.sde_time_interval(path, prediction, form, 0.0), jnp.float32)
            assert np.all(np.isfinite(paths.diffusion(path, form, ends)))


def test_uniform_times():
    t = np.sort(paths.sample_timesteps(jax.random.key(0), 100_000, t0=0.25, t1=0.75))
    assert t[0] >= 0.25
    assert t[-1] <= 0.75
    cdf = (np.arange(t.size) + 0.5) / t.size
    assert np.abs((t - 0.25) / 0.5 - cdf).max() < 1.95 / t.size**0.5  # Kolmogorov, p = 0.001


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (-0.8, 0.6), (1.0, 2.0)])
def test_logit_normal_times(location, scale):
    t = paths.sample_timesteps(
        jax.random.key(1), 100_000, "logit_normal", location=location, scale=scale
    )
    assert t.dtype == jnp.float32
    t = np.sort(np.asarray(t, np.float64))
    assert t[0] > 0
    assert t[-1] < 1
    normal = statistics.NormalDist(location, scale)
    cdf = np.array([normal.cdf(z) for z in np.log(t / (1 - t))])
    assert np.abs(cdf - (np.arange(t.size) + 0.5) / t.size).max() < 1.95 / t.size**0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    mean = np.sum(weights / (1 + np.exp(-location - scale * nodes))) / np.sum(weights)
    np.testing.assert_allclose(t.mean(), mean, atol=4 * t.std() / t.size**0.5)


def test_errors_name_what_is_allowed():
    path, x, t = paths.get_path("linear"), jnp.ones((2, 3)), jnp.full(2, 0.5)
    with pytest.raises(ValueError, match="'cosine'; expected one of linear, gvp, vp"):
        paths.get_path("cosine")
    with pytest.raises(ValueError, match="'x0'; expected one of velocity, score, noise"):
        paths.flow_loss(path, "x0", x, x, x, t)
    with pytest.raises(ValueError, match=r"source 'x0'; expected one of .*data"):
        paths.convert(path, x, x, t, source="x0", to="data")
    with pytest.raises(ValueError, match=r"to 'x0'; expected one of .*data"):
        paths.convert(path, x, x, t, source="data", to="x0")
    with pytest.raises(ValueError, match="'snr'; expected one of none, velocity, likelihood"):
        paths.flow_loss(path, "noise", x, x, x, t, "snr")
    with pytest.raises(ValueError, match="defined for score and noise"):
        paths.flow_loss(path, "velocity", x, x, x, t, "likelihood")
    with pytest.raises(ValueError, match="diffusion form 'SBDM'; expected one of constant, sbdm"):
        paths.diffusion(path, "SBDM", t)
    with pytest.raises(ValueError, match="last_step_size is 1.0; expected 0 or more and less"):
        paths.sde_time_interval(path, "velocity", "sigma", 1.0)
    with pytest.raises(ValueError, match="'beta'; expected one of uniform, logit_normal"):
        paths.sample_timesteps(jax.random.key(0), 4, "beta")
