"""Solvers of ODEs against exact flows, dopri5's control, and SDEs as chains and distributions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import RK45

from repulsor_jax.flows import paths, sampler, solvers
from tests.oracles.closed_form import MEAN, STD, exact, exact_alpha_sigma, exact_point

QUANTILE = np.linspace(-2.0, 2.0, 5)[:, None]
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("solver", "name", "shift"),
    [
        ("euler", "gvp", 1.0),
        ("midpoint", "vp", 1.0),
        ("heun", "vp", 1.0),
        ("rk4", "gvp", 1.0),
        ("euler", "linear", 3.0),
    ],
)
def test_order_of_convergence(float64, solver, name, shift):
    path = paths.get_path(name)
    t_end = paths.time_interval(path, "velocity", sampling=True)[1]

    @functools.partial(jax.jit, static_argnums=1)
    def solve(quantile, num_steps):
        x = solvers.solve_ode(
            lambda x, t: exact(path, x, t)["velocity"],
            exact_point(path, quantile, 0.0),
            solvers.time_grid(num_steps, 0.0, t_end, shift),
            solver,
        )
        return x, x - exact_point(path, quantile, t_end)

    errors = []
    for num_steps in (80, 160):
        x, error = solve(QUANTILE, num_steps)
        assert x.dtype == jnp.float64
        errors.append(np.abs(error).max())
    order = ORDERS[solver]
    assert errors[1] < {1: 0.03, 2: 5e-4, 4: 1e-6}[order]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("solver", "stages"),
    [("euler", [0]), ("midpoint", [0, 0.5]), ("heun", [0, 1]), ("rk4", [0, 0.5, 0.5, 1])],
)
def test_times_and_number_of_evaluations(solver, stages):
    times = []

    def velocity_fn(x, t):
        assert t.shape == ()
        times.append(float(t))
        return jnp.ones_like(x)

    grid = np.array([0.5, 0.6, 0.9, 1.0])
    with jax.disable_jit():
        x = solvers.solve_ode(velocity_fn, jnp.zeros((2, 3), jnp.bfloat16), grid, solver)
    expected = [a + stage * (b - a) for a, b in itertools.pairwise(grid) for stage in stages]
    np.testing.assert_allclose(times, expected, rtol=1e-6)
    np.testing.assert_allclose(x, np.full((2, 3), 0.5), rtol=1e-6)
    assert x.dtype == jnp.float32


def test_time_grid():
    np.testing.assert_allclose(solvers.time_grid(4, 0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5])
    shifted = solvers.time_grid(20, shift=3.0)
    # As published, of noise levels that fall from 1: s -> 3 s / (1 + 2 s).
    level = np.linspace(1.0, 0.0, 21)
    np.testing.assert_allclose(1 - shifted, 3 * level / (1 + 2 * level), atol=1e-15)
    assert shifted[1] < 0.02  # finer at the noise end
    part = solvers.time_grid(20, 0.001, 0.999, 3.0)
    np.testing.assert_allclose(part, 0.001 + 0.998 * shifted)
    assert (part[0], part[-1]) == (0.001, 0.999)


def test_dopri5_keeps_its_tolerance_on_an_exact_flow(float64):
    path = paths.get_path("vp")

    @jax.jit
    def solve(quantile, tolerance):
        x, count = solvers.dopri5(
            lambda x, t: exact(path, x, t)["velocity"],
            exact_point(path, quantile, 0.0),
            0.0,
            0.999,
            # Traced tolerances, so that one program serves both.
            type("Tolerance", (), {"rtol": tolerance, "atol": tolerance, "max_steps": 1000}),
        )
        return x - exact_point(path, quantile, 0.999), count

    errors, steps = [], []
    for tolerance in (1e-5, 1e-7):
        error, count = solve(QUANTILE, tolerance)
        errors.append(np.abs(error).max() / tolerance)
        steps.append(int(count.max()))
    assert max(errors) < 50  # the tolerance is of each step, and the flow carries errors on
    # A method of order 5 needs 100^(1/5) = 2.5 times the steps for an error 100 times smaller.
    assert steps[0] < steps[1] < 3.5 * steps[0]


def dormand_prince(velocity, x, tolerance):
    """One row from t = 0 to 1 in NumPy, with SciPy's coefficients: x(1) and the number of steps."""
    t, dt, steps = 0.0, 0.05, 0
    while t < 1:
        dt, steps = min(dt, 1 - t), steps + 1
        k = [velocity(x, t)]
        for a, c in zip(RK45.A[1:], RK45.C[1:], strict=True):
            k.append(velocity(x + dt * np.tensordot(a[: len(k)], k, 1), t + c * dt))
        end = x + dt * np.tensordot(RK45.B, k, 1)
        k.append(velocity(end, t + dt))
        # torchdiffeq, and SiT with it, measures two thirds of the error that SciPy does.
        allowed = tolerance * (1 + np.maximum(np.abs(x), np.abs(end)))
        error = np.sqrt(np.mean((dt * np.tensordot(RK45.E, k, 1) / 1.5 / allowed) ** 2))
        grown = 0.9 * error**-0.2
        if error < 1:
            t, x = t + dt, end
        dt *= np.clip(grown, 1, 10) if error < 1 else np.clip(grown, 0.2, 0.9)
    return x, steps


def test_dopri5_takes_the_steps_of_scipys_coefficients(float64):
    rates, noise = np.array([1.0, 100.0]), np.random.default_rng(0).standard_normal((2, 5))

    @jax.jit
    def solve(noise):
        velocity_fn = lambda x, t: rates[:, None] * jnp.cos(3 * x + t[:, None])
        return solvers.dopri5(velocity_fn, noise, tolerance=solvers.Tolerance(1e-4, 1e-4))

    x, steps = solve(noise)
    for row, rate in enumerate(rates):
        velocity = lambda x, t, rate=rate: rate * np.cos(3 * x + t)
        expected, expected_steps = dormand_prince(velocity, noise[row], 1e-4)
        assert steps[row] == expected_steps
        np.testing.assert_allclose(x[row], expected, rtol=1e-12)


RATES = np.float32([0.1, 2.0, 30.0, 5.0, 100.0, 5000.0])


def test_dopri5_controls_every_sample_alone_and_marks_what_did_not_arrive():
    """Row b decays at its own rate, x(1) = x(0) exp(-3 rate / 2); far out it has no velocity."""
    calls = []

    def decay(rates, x, t):
        assert x.shape == (6, 6)
        jax.debug.callback(lambda t: calls.append(t.copy()), t)
        return jnp.where(jnp.abs(x) > 3, jnp.nan, -(rates * (1 + t))[:, None] * x)

    @jax.jit
    def solve(rates, noise):
        tolerance = solvers.Tolerance(max_steps=150)
        return solvers.dopri5(functools.partial(decay, rates), noise, tolerance=tolerance)

    noise = np.random.default_rng(0).uniform(0.5, 2, (6, 6)).astype(np.float32)
    x, steps = map(np.asarray, solve(RATES, noise))
    jax.effects_barrier()
    exactly = noise * np.exp(-1.5 * RATES)[:, None]
    np.testing.assert_allclose(x[:5], exactly[:5], atol=1e-3)
    assert np.all(np.diff(steps[[0, 1, 3, 2, 4, 5]]) > 0)
    assert steps[5] == 150
    assert np.isnan(x[5]).all()
    # The whole batch six times a step: the last evaluation of a step is the first of the next.
    assert len(calls) == 6 * steps.max() + 1
    assert np.ptp(np.stack(calls), axis=1).max() > 0.1  # rows are at times of their own

    rows = np.array([3, 0, 1, 1, 2, 4])
    other, other_steps = solve(RATES[rows], noise[rows])
    np.testing.assert_array_equal(other_steps, steps[rows])
    np.testing.assert_allclose(other, x[rows], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "form", "solver"),
    [
        ("linear", "increasing_decreasing", "stochastic_heun"),
        ("gvp", "sigma", "euler_maruyama"),
        ("vp", "sbdm", "stochastic_heun"),
    ],
)
def test_weak_order(float64, name, form, solver):
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
        x = solvers.SDE_STEPS[solver](
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
    for num_steps in (200, 400):
        times = np.full(401, t_end)  # after the grid come steps of no length
        times[: num_steps + 1] = solvers.time_grid(num_steps, 0.0, t_end)
        errors.append(np.abs(np.array(moments(marginal(0.0), times)) - marginal(t_end)))
    assert np.all(errors[1] < 0.02)
    orders = np.log2(errors[0] / errors[1])
    assert orders[1] == pytest.approx(1, abs=0.2)
    if name == "linear":  # the mean moves in a straight line
        assert errors[1][0] < 1e-12
    else:  # noise does not move the mean of a linear equation, so Heun keeps its order 2 there
        assert orders[0] == pytest.approx(2 if solver == "stochastic_heun" else 1, abs=0.2)


@functools.partial(jax.jit, static_argnums=2)
def brownian(seed, indices, times):
    """W(times[-1]): no drift, and D = 1/2."""
    return solvers.solve_sde(
        lambda x, t: jnp.zeros_like(x),
        lambda t: jnp.full_like(t, 0.5),
        jnp.zeros((len(indices), 500)),
        sampler.brownian_keys(seed, indices),
        np.array(times),
    )


def test_brownian_motion_depends_on_seed_and_index_only():
    times = (0, 0.25, 0.75, 1)
    whole = np.asarray(brownian(jax.random.key(5), np.arange(10), times))
    part = jax.jit(lambda i: brownian.__wrapped__(5, i, times))(np.array([7, 2]))
    np.testing.assert_array_equal(part, whole[[7, 2]])
    other = brownian(jax.random.key(6), np.arange(10), times)
    assert np.abs(other - whole).max() > 1
    # 5,000 values of variance 1, which are independent of each other in the rows.
    assert abs(whole.mean()) < 4 / 5000**0.5
    assert whole.var() == pytest.approx(1, abs=4 * (2 / 5000) ** 0.5)
    assert np.abs(np.corrcoef(whole) - np.eye(10)).max() < 5 / 500**0.5


def test_errors():
    x, times = jnp.zeros((2, 2)), solvers.time_grid(2)
    for message, call in {
        "'rk9'; expected one of euler, midpoint, heun, rk4": lambda: solvers.solve_ode(
            lambda x, t: x, x, times, "rk9"
        ),
        "'heun'; expected one of euler_maruyama, stochastic_heun": lambda: solvers.solve_sde(
            lambda x, t: x, lambda t: t, x, sampler.brownian_keys(0, np.arange(2)), times, "heun"
        ),
        "num_steps is 0; expected at least 1": lambda: solvers.time_grid(0),
        "diffusion form 'SBDM'; expected one of constant": lambda: solvers.Diffusion("SBDM"),
        "last step 'Mean'; expected one of mean": lambda: solvers.Diffusion(last_step="Mean"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
