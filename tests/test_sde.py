"""SDE solvers against exact moments and whole distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import flow, sampling, sde, solvers
from tests.closed_form import (
    GAUSSIAN,
    MEAN,
    STD,
    Mixture,
    distance_to_cdf,
    exact,
    exact_model,
)

PATHS = ("linear", "gvp", "vp")
MIXTURE = Mixture((0.3, 0.7), (-1.0, 2.0), (0.4, 0.5))


def marginal(path, t):
    """Mean and variance of x_t, in float64."""
    c = path.coefficients(jnp.asarray(t, jnp.float64))
    return float(c.alpha * MEAN), float(c.alpha**2 * STD**2 + c.sigma**2)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("linear", "constant"),
        ("linear", "increasing_decreasing"),
        ("gvp", "sigma"),
        ("gvp", "decreasing"),
        ("vp", "linear"),
        ("vp", "sbdm"),
    ],
)
@pytest.mark.parametrize("solver", sde.STEPS)
def test_weak_order(name, form, solver):
    """The moments of the chain approach those of x_t in proportion to the step.

    The drift for Gaussian data is affine, so a step is x -> x' + a (x - mean) + c normal, and
    three rows show it all: no sampling error hides the order.
    """
    path, t_end = flow.get_path(name), 0.9

    def drift_fn(x, t):
        at = exact(path, x, t)
        return at["velocity"] + flow.diffusion(path, form, t) * at["score"]

    def advance(moments, now):
        mean, variance = moments
        x = sde.STEPS[solver](
            drift_fn,
            lambda t: flow.diffusion(path, form, t),
            mean + jnp.array([0.0, 1.0, 0.0]),
            *now,
            jnp.array([0.0, 0.0, 1.0]),
        )
        return (x[0], (x[1] - x[0]) ** 2 * variance + (x[2] - x[0]) ** 2), None

    errors = []
    with jax.enable_x64(True):
        for num_steps in (200, 400):
            start = tuple(map(jnp.float64, marginal(path, 0.0)))
            times = solvers.time_grid(num_steps, 0.0, t_end)
            found = jax.lax.scan(advance, start, solvers.starts_and_lengths(times, start[0]))[0]
            errors.append(np.abs(np.array(found) - marginal(path, t_end)))
    assert np.all(errors[1] < 0.02)
    orders = np.log2(errors[0] / errors[1])
    assert orders[1] == pytest.approx(1, abs=0.2)
    if name == "linear":  # the mean moves in a straight line
        assert errors[1][0] < 1e-12
    else:  # noise does not move the mean of a linear equation, so Heun keeps its order 2 there
        assert orders[0] == pytest.approx(2 if solver == "stochastic_heun" else 1, abs=0.2)


def chain_moments(path, form, solver, last_step, size, num_steps):
    """Mean and variance of SiT's samples of `GAUSSIAN`, by recursion in NumPy."""

    def drift(t, with_score=True):
        """(slope, offset) of the drift, affine in x."""
        c = path.coefficients(jnp.float32(t))
        alpha, d_alpha, sigma, d_sigma = (float(value) for value in c)
        variance = alpha**2 * STD**2 + sigma**2
        slope = (alpha * d_alpha * STD**2 + sigma * d_sigma) / variance
        if with_score:
            slope -= float(flow.diffusion(path, form, jnp.float32(t))) / variance
        return slope, d_alpha * MEAN - slope * alpha * MEAN

    t0 = 1e-3 if form == "sbdm" and path.name != "vp" else 0.0
    steps = num_steps if last_step == "none" else num_steps - 1
    t1 = 1 - (1e-3 if last_step == "none" else size)
    h = (t1 - t0) / steps
    mean, variance = 0.0, 1.0
    for k in range(steps):
        t = t0 + k * h
        added = 2 * float(flow.diffusion(path, form, jnp.float32(t))) * h
        slope, offset = drift(t)
        if solver == "euler_maruyama":
            mean += h * (slope * mean + offset)
            variance = variance * (1 + h * slope) ** 2 + added
        else:
            slope2, offset2 = drift(t + h)
            factor = 1 + h / 2 * (slope + slope2 * (1 + h * slope))
            mean = factor * mean + h / 2 * (offset + slope2 * h * offset + offset2)
            variance = factor**2 * (variance + added)
    if last_step in ("mean", "euler"):
        slope, offset = drift(t1, last_step == "mean")
        mean, factor = mean + size * (slope * mean + offset), 1 + size * slope
    elif last_step == "tweedie":
        alpha, _, sigma, _ = (float(value) for value in path.coefficients(jnp.float32(t1)))
        factor = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        mean = MEAN + factor * (mean - alpha * MEAN)
    else:
        factor = 1.0
    return mean, variance * factor**2


def check_moments(name, form, last_step, solver="euler_maruyama", prediction="velocity"):
    path, num_steps = flow.get_path(name), 250
    sample = sampling.make_sampler(
        exact_model(path, prediction),
        path,
        prediction=prediction,
        solver=solver,
        num_steps=num_steps,
        null_label=0,
        diffusion=sde.Diffusion(form, last_step=last_step),
    )
    indices = jnp.arange(16)
    noise = sampling.initial_noise(0, indices, (2048,))
    keys = sampling.brownian_keys(0, indices)
    samples = np.asarray(jax.jit(sample)(None, noise, indices, keys=keys), np.float64)
    mean, variance = chain_moments(path, form, solver, last_step, 0.04, num_steps)
    assert mean == pytest.approx(MEAN, abs=0.03)
    # Without the noise of the last step its share of the variance is missing: SiT's forms other
    # than "constant" are small there.
    missing = 2 * 0.04 * float(flow.diffusion(path, form, jnp.float32(0.96)))
    assert variance == pytest.approx(STD**2, abs=0.03 + missing * (last_step == "mean"))
    assert abs(samples.mean() - mean) < 4 * (variance / samples.size) ** 0.5 + 1e-3
    assert abs(samples.var() - variance) < 4 * variance * (2 / samples.size) ** 0.5 + 1e-3


@pytest.mark.parametrize(
    ("name", "form", "last_step", "options"),
    [
        ("linear", "sigma", "mean", {}),
        ("linear", "increasing_decreasing", "euler", {}),
        ("gvp", "sbdm", "none", {"prediction": "score"}),
        ("vp", "constant", "tweedie", {"prediction": "noise", "solver": "stochastic_heun"}),
    ],
)
def test_mean_and_variance_of_the_samples(name, form, last_step, options):
    check_moments(name, form, last_step, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "last_step", "solver"),
    [("linear", f, last, "euler_maruyama") for f in flow.DIFFUSION_FORMS for last in sde.LAST_STEPS]
    + [("vp", form, "tweedie", "stochastic_heun") for form in flow.DIFFUSION_FORMS],
)
def test_mean_and_variance_of_every_form_and_last_step(name, form, last_step, solver):
    check_moments(name, form, last_step, solver)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("gvp", "rk4"),
        ("linear", "euler_maruyama"),
        pytest.param("vp", "stochastic_heun", marks=pytest.mark.slow),
    ],
)
def test_the_distribution_of_a_mixture(name, solver):
    path = flow.get_path(name)
    sample = sampling.make_sampler(
        exact_model(path, "velocity", MIXTURE),
        path,
        solver=solver,
        num_steps=60 if solver == "rk4" else 400,
        null_label=0,
        diffusion=sde.Diffusion(last_step="tweedie", last_step_size=0.004),
    )
    indices = jnp.arange(10)
    noise = sampling.initial_noise(1, indices, (2000,))
    keys = sampling.brownian_keys(1, indices)
    samples = jax.jit(sample)(None, noise, indices, keys=keys)
    # Kolmogorov, p = 0.001, is 1.95; the rest is for the discretisation.
    assert distance_to_cdf(samples, MIXTURE) < 2.1 / samples.size**0.5
    assert distance_to_cdf(samples, GAUSSIAN) > 0.2


def brownian(keys, times, rows=2000):
    """W(times[-1]): no drift, and D = 1/2."""
    return np.asarray(
        sde.integrate(
            lambda x, t: jnp.zeros_like(x),
            lambda t: jnp.full_like(t, 0.5),
            jnp.zeros((len(keys), rows)),
            keys,
            times,
        )
    )


def test_brownian_motion():
    keys = sampling.brownian_keys(5, jnp.arange(10))
    noise = np.asarray(sampling.initial_noise(5, jnp.arange(10), (2000,)))
    half, whole = brownian(keys, np.array([0, 0.5])), brownian(keys, np.array([0, 0.5, 1]))
    limit = 4 / half.size**0.5
    for increment in (half, whole - half):
        assert abs(increment.mean()) < limit * 0.5**0.5
        assert increment.var() == pytest.approx(0.5, abs=0.5 * limit * 2**0.5)
    columns = [half.ravel(), (whole - half).ravel(), noise.ravel()]
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < limit
    assert np.abs(np.corrcoef(half) - np.eye(10)).max() < 5 / 2000**0.5


def test_brownian_motion_depends_on_seed_and_index_only():
    times = np.linspace(0, 1, 4)
    whole = brownian(sampling.brownian_keys(5, jnp.arange(10)), times, 5)
    part = brownian(sampling.brownian_keys(jax.random.key(5), np.array([7, 2])), times, 5)
    np.testing.assert_array_equal(part, whole[[7, 2]])
    assert np.unique(whole).size == whole.size
    assert np.abs(brownian(sampling.brownian_keys(6, jnp.arange(10)), times, 5) - whole).max() > 1


def test_no_diffusion_is_the_ode():
    """With norm 0 nothing is random: the SDE sampler takes the ODE's Euler and Heun steps."""
    path = flow.get_path("linear")
    noise = jnp.linspace(-2.0, 2.0, 5)[:, None]
    keys = sampling.brownian_keys(0, jnp.arange(5))
    velocity_fn = lambda x, t: exact(path, x, t)["velocity"]
    for solver, ode in (("euler_maruyama", "euler"), ("stochastic_heun", "heun")):
        sample = sampling.make_sampler(
            exact_model(path, "velocity"),
            path,
            solver=solver,
            num_steps=24,
            null_label=0,
            time_shift=2.0,
            diffusion=sde.Diffusion(norm=0.0, last_step="mean", last_step_size=0.1),
        )
        found = jax.jit(sample)(None, noise, jnp.zeros(5, jnp.int32), keys=keys)
        x = solvers.integrate(velocity_fn, noise, solvers.time_grid(23, 0.0, 0.9, 2.0), ode)
        x = x + 0.1 * velocity_fn(x, jnp.float32(0.9))
        np.testing.assert_allclose(found, x, rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="diffusion form 'SBDM'; expected one of constant"):
        sde.Diffusion(form="SBDM")
    with pytest.raises(ValueError, match="last step 'Mean'; expected one of mean, tweedie, euler"):
        sde.Diffusion(last_step="Mean")
    with pytest.raises(ValueError, match="last_step_size is 0.0; expected between 0 and 1"):
        sde.Diffusion(last_step_size=0.0)
    with pytest.raises(ValueError, match="norm is -1; expected 0 or more"):
        sde.Diffusion(norm=-1)
    x, keys = jnp.zeros((2, 2)), jax.random.split(jax.random.key(0))
    with pytest.raises(ValueError, match="'heun'; expected one of euler_maruyama, stochastic_heun"):
        sde.integrate(lambda x, t: x, lambda t: t, x, keys, solvers.time_grid(2), "heun")
