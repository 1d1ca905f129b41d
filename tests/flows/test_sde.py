"""SDE solvers against the very samples of a chain in NumPy and whole distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.flows import paths, sampler, sde, solvers
from tests.oracles.closed_form import (
    DIFFUSIONS,
    GAUSSIAN,
    MEAN,
    STD,
    Mixture,
    distance_to_cdf,
    exact,
    exact_alpha_sigma,
    exact_coefficients,
    exact_model,
)

MIXTURE = Mixture((0.3, 0.7), (-1.0, 2.0), (0.4, 0.5))


@pytest.mark.parametrize(
    ("name", "form", "solver"),
    [
        ("linear", "constant", "euler_maruyama"),
        ("linear", "increasing_decreasing", "stochastic_heun"),
        ("gvp", "sigma", "euler_maruyama"),
        ("gvp", "decreasing", "stochastic_heun"),
        ("vp", "linear", "euler_maruyama"),
        ("vp", "sbdm", "stochastic_heun"),
    ],
)
def test_weak_order(name, form, solver):
    """The moments of the chain approach those of x_t in proportion to the step.

    The drift for Gaussian data is affine, so a step is x -> x' + a (x - mean) + c normal, and
    three rows show it all: no sampling error hides the order.
    """
    path, t_end = paths.get_path(name), 0.9

    def drift_fn(x, t):
        at = exact(path, x, t)
        return at["velocity"] + paths.diffusion(path, form, t) * at["score"]

    def advance(moments, now):
        mean, variance = moments
        x = sde.STEPS[solver](
            drift_fn,
            lambda t: paths.diffusion(path, form, t),
            mean + jnp.array([0.0, 1.0, 0.0]),
            *now,
            jnp.array([0.0, 0.0, 1.0]),
        )
        return (x[0], (x[1] - x[0]) ** 2 * variance + (x[2] - x[0]) ** 2), None

    @jax.jit
    def moments(start, times):
        return jax.lax.scan(advance, start, (times[:-1], jnp.diff(times)))[0]

    def marginal(t):
        alpha, sigma = exact_alpha_sigma(name, t)
        return alpha * MEAN, alpha**2 * STD**2 + sigma**2

    errors = []
    with jax.enable_x64(True):
        for num_steps in (200, 400):
            times = np.full(401, t_end)  # after the grid come steps of no length
            times[: num_steps + 1] = solvers.time_grid(num_steps, 0.0, t_end)
            found = moments(marginal(0.0), times)
            errors.append(np.abs(np.array(found) - marginal(t_end)))
    assert np.all(errors[1] < 0.02)
    orders = np.log2(errors[0] / errors[1])
    assert orders[1] == pytest.approx(1, abs=0.2)
    if name == "linear":  # the mean moves in a straight line
        assert errors[1][0] < 1e-12
    else:  # noise does not move the mean of a linear equation, so Heun keeps its order 2 there
        assert orders[0] == pytest.approx(2 if solver == "stochastic_heun" else 1, abs=0.2)


NUM_STEPS, LAST_STEP_SIZE = 250, 0.04  # SiT's


def exact_diffusion(name, form, t):
    alpha, d_alpha, sigma, d_sigma = exact_coefficients(name, t)
    with np.errstate(divide="ignore"):  # alpha is 0 at t = 0; only "sbdm" cannot start there
        rate = d_alpha / alpha
    return DIFFUSIONS[form](t, rate, sigma, d_sigma, 1.0)


def affine_steps(name, form, last_step, solver):
    """SiT's way to samples of `GAUSSIAN`, in NumPy: steps x -> factor x + offset + scale normal."""

    def drift(t, with_score=True):
        """(slope, offset) of the drift, affine in x."""
        alpha, d_alpha, sigma, d_sigma = exact_coefficients(name, t)
        variance = alpha**2 * STD**2 + sigma**2
        slope = (alpha * d_alpha * STD**2 + sigma * d_sigma) / variance
        if with_score:
            slope = slope - exact_diffusion(name, form, t) / variance
        return slope, d_alpha * MEAN - slope * alpha * MEAN

    t0 = 1e-3 if form == "sbdm" and name != "vp" else 0.0
    t1 = 1 - (1e-3 if last_step == "none" else LAST_STEP_SIZE)
    times = np.linspace(t0, t1, NUM_STEPS + (last_step == "none"))
    t, h = times[:-1], np.diff(times)
    slope, offset = drift(t)
    scale = np.sqrt(2 * exact_diffusion(name, form, t) * h)
    if solver == "euler_maruyama":
        factor, offset = 1 + h * slope, h * offset
    else:
        slope2, offset2 = drift(t + h)
        factor = 1 + h / 2 * (slope + slope2 * (1 + h * slope))
        offset = h / 2 * (offset + slope2 * h * offset + offset2)
        scale = factor * scale
    steps = np.stack([factor, offset, scale], axis=1)
    if last_step == "none":
        return steps
    if last_step == "tweedie":
        alpha, sigma = exact_alpha_sigma(name, t1)
        factor = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        offset = MEAN - factor * alpha * MEAN
    else:
        slope, offset = drift(t1, last_step == "mean")
        factor, offset = 1 + LAST_STEP_SIZE * slope, LAST_STEP_SIZE * offset
    return np.concatenate([steps, [[factor, offset, 0.0]]])


@pytest.fixture(scope="module")
def draws():
    """Start and increments of 4 x 8 samples, drawn from the keys that `sde` names."""
    keys = sampler.brownian_keys(0, jnp.arange(4))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (8,))))
    normals = jax.jit(lambda keys: draw(fold(keys, jnp.arange(NUM_STEPS))))(keys)
    noise = sampler.initial_noise(0, jnp.arange(4), (8,))
    return keys, noise, np.asarray(normals, np.float64).swapaxes(0, 1)


EULER, HEUN = "euler_maruyama", "stochastic_heun"


@pytest.mark.parametrize(
    ("name", "form", "last_step", "solver", "prediction"),
    [
        ("linear", "constant", "mean", EULER, "velocity"),
        ("linear", "sigma", "mean", EULER, "velocity"),
        ("linear", "sbdm", "mean", EULER, "velocity"),
        ("linear", "sbdm", "tweedie", EULER, "velocity"),
        ("linear", "sbdm", "euler", EULER, "velocity"),
        ("linear", "linear", "none", EULER, "velocity"),
        ("linear", "decreasing", "tweedie", EULER, "velocity"),
        ("linear", "increasing_decreasing", "euler", EULER, "velocity"),
        ("gvp", "sbdm", "none", EULER, "score"),
        ("gvp", "decreasing", "mean", HEUN, "velocity"),
        ("vp", "constant", "tweedie", HEUN, "noise"),
        ("vp", "sigma", "none", HEUN, "velocity"),
        ("vp", "linear", "mean", HEUN, "score"),
        ("vp", "sbdm", "tweedie", HEUN, "velocity"),
    ],
)
def test_samples_are_those_of_the_chain(draws, name, form, last_step, solver, prediction):
    """Every step of the very samples, and the moments that the chain gives them."""
    path = paths.get_path(name)
    sample = sampler.make_sampler(
        exact_model(path, prediction),
        path,
        prediction=prediction,
        solver=solver,
        num_steps=NUM_STEPS,
        null_label=0,
        diffusion=sde.Diffusion(form, last_step=last_step, last_step_size=LAST_STEP_SIZE),
    )
    keys, noise, normals = draws
    samples = jax.jit(sample)(None, noise, np.arange(4), keys=keys)
    x, mean, variance = np.asarray(noise, np.float64), 0.0, 1.0
    steps = affine_steps(name, form, last_step, solver)
    for (factor, offset, scale), normal in zip(steps, normals, strict=True):
        x = factor * x + offset + scale * normal
        mean, variance = factor * mean + offset, factor**2 * variance + scale**2
    np.testing.assert_allclose(samples, x, atol=2e-5)
    assert mean == pytest.approx(MEAN, abs=0.03)
    # Without the noise of the last step its share of the variance is missing: SiT's forms other
    # than "constant" are small there.
    missing = 2 * LAST_STEP_SIZE * exact_diffusion(name, form, 1 - LAST_STEP_SIZE)
    assert variance == pytest.approx(STD**2, abs=0.03 + missing * (last_step == "mean"))


@pytest.mark.parametrize(
    ("name", "solver", "rows"), [("gvp", "rk4", 2000), ("linear", EULER, 2000), ("vp", HEUN, 500)]
)
def test_the_distribution_of_a_mixture(name, solver, rows):
    path = paths.get_path(name)
    sample = sampler.make_sampler(
        exact_model(path, "velocity", MIXTURE),
        path,
        solver=solver,
        num_steps=60 if solver == "rk4" else 400,
        null_label=0,
        diffusion=sde.Diffusion(last_step="tweedie", last_step_size=0.004),
    )

    @jax.jit
    def draw(indices):
        noise = sampler.initial_noise(1, indices, (rows,))
        return sample(None, noise, indices, keys=sampler.brownian_keys(1, indices))

    samples = draw(np.arange(10))
    # Kolmogorov, p = 0.001, is 1.95; the rest is for the discretisation.
    assert distance_to_cdf(samples, MIXTURE) < 2.1 / samples.size**0.5
    assert distance_to_cdf(samples, GAUSSIAN) > 0.2


@functools.partial(jax.jit, static_argnums=(2, 3))
def brownian(seed, indices, times, rows=2000):
    """W(times[-1]): no drift, and D = 1/2."""
    return sde.integrate(
        lambda x, t: jnp.zeros_like(x),
        lambda t: jnp.full_like(t, 0.5),
        jnp.zeros((len(indices), rows)),
        sampler.brownian_keys(seed, indices),
        np.array(times),
    )


def test_brownian_motion():
    key, indices = jax.random.key(5), np.arange(10)
    noise = jax.jit(sampler.initial_noise, static_argnums=2)(key, indices, (2000,))
    half = np.asarray(brownian(key, indices, (0, 0.5)))
    whole = np.asarray(brownian(key, indices, (0, 0.5, 1)))
    limit = 4 / half.size**0.5
    for increment in (half, whole - half):
        assert abs(increment.mean()) < limit * 0.5**0.5
        assert increment.var() == pytest.approx(0.5, abs=0.5 * limit * 2**0.5)
    columns = [half.ravel(), (whole - half).ravel(), np.ravel(noise)]
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < limit
    assert np.abs(np.corrcoef(half) - np.eye(10)).max() < 5 / 2000**0.5


def test_brownian_motion_depends_on_seed_and_index_only():
    times, rows = (0, 0.25, 0.75, 1), 5
    whole = np.asarray(brownian(jax.random.key(5), np.arange(10), times, rows))
    part = jax.jit(lambda i: brownian.__wrapped__(5, i, times, rows))(np.array([7, 2]))
    np.testing.assert_array_equal(part, whole[[7, 2]])
    assert np.unique(whole).size == whole.size
    other = brownian(jax.random.key(6), np.arange(10), times, rows)
    assert np.abs(other - whole).max() > 1


def test_no_diffusion_is_the_ode():
    """With norm 0 nothing is random: the SDE sampler takes the ODE's Euler and Heun steps."""
    path = paths.get_path("linear")
    noise = np.linspace(-2.0, 2.0, 5, dtype=np.float32)[:, None]
    velocity_fn = lambda x, t: exact(path, x, t)["velocity"]

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def both(noise, solver, ode):
        sample = sampler.make_sampler(
            exact_model(path, "velocity"),
            path,
            solver=solver,
            num_steps=24,
            null_label=0,
            time_shift=2.0,
            diffusion=sde.Diffusion(norm=0.0, last_step="mean", last_step_size=0.1),
        )
        keys = sampler.brownian_keys(0, jnp.arange(5))
        x = solvers.integrate(velocity_fn, noise, solvers.time_grid(23, 0.0, 0.9, 2.0), ode)
        x = x + 0.1 * velocity_fn(x, jnp.float32(0.9))
        return sample(None, noise, jnp.zeros(5, jnp.int32), keys=keys), x

    for solver, ode in ((EULER, "euler"), (HEUN, "heun")):
        found, x = both(noise, solver, ode)
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
    x, keys = jnp.zeros((2, 2)), sampler.brownian_keys(0, np.arange(2))
    with pytest.raises(ValueError, match="'heun'; expected one of euler_maruyama, stochastic_heun"):
        sde.integrate(lambda x, t: x, lambda t: t, x, keys, solvers.time_grid(2), "heun")
