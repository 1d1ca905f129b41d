"""Solvers of ODEs against the exact flow of a Gaussian, in float64, and dopri5's control."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.flows import paths, solvers
from tests.oracles.closed_form import exact, exact_point

QUANTILE = np.linspace(-2.0, 2.0, 5)[:, None]
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("euler", "gvp"),
        ("midpoint", "linear"),
        ("midpoint", "vp"),
        ("heun", "vp"),
        ("rk4", "gvp"),
        ("rk4", "linear"),
    ],
)
def test_order_of_convergence(float64, name, solver):
    path = paths.get_path(name)
    t_end = paths.time_interval(path, "velocity", sampling=True)[1]
    order = ORDERS[solver]
    if (solver, name) == ("midpoint", "linear"):
        # dy/dt = (v' / 2 v) y with v quadratic: the h^3 error, g'' / 24 + g g' / 4 + g^3 / 6 for
        # g = v' / 2 v, is zero.
        order = 3

    @functools.partial(jax.jit, static_argnums=1)
    def solve(quantile, num_steps):
        x = solvers.integrate(
            lambda x, t: exact(path, x, t)["velocity"],
            exact_point(path, quantile, 0.0),
            solvers.time_grid(num_steps, 0.0, t_end),
            solver,
        )
        return x, x - exact_point(path, quantile, t_end)

    errors = []
    for num_steps in (80, 160):
        x, error = solve(QUANTILE, num_steps)
        assert x.dtype == jnp.float64
        errors.append(np.abs(error).max())
    assert errors[1] < {1: 0.03, 2: 5e-4, 4: 1e-6}[ORDERS[solver]]
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
        x = solvers.integrate(velocity_fn, jnp.zeros((2, 3), jnp.bfloat16), grid, solver)
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


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_a_shifted_grid_converges_too(float64, solver):
    path = paths.get_path("linear")

    @functools.partial(jax.jit, static_argnums=1)
    def error(quantile, num_steps):
        times = solvers.time_grid(num_steps, shift=3.0)
        x = solvers.integrate(lambda x, t: exact(path, x, t)["velocity"], quantile, times, solver)
        return x - exact_point(path, quantile, 1.0)

    errors = [np.abs(error(QUANTILE, num_steps)).max() for num_steps in (80, 160)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("name", ["gvp", "vp"])
def test_dopri5_keeps_its_tolerance(float64, name):
    path = paths.get_path(name)
    t_end = paths.time_interval(path, "velocity", sampling=True)[1]

    @functools.partial(jax.jit, static_argnums=1)
    def solve(quantile, tolerance):
        x, count = solvers.dopri5(
            lambda x, t: exact(path, x, t)["velocity"],
            exact_point(path, quantile, 0.0),
            0.0,
            t_end,
            tolerance,
        )
        return x - exact_point(path, quantile, t_end), count

    errors, steps = [], []
    for tolerance in (1e-5, 1e-7):
        error, count = solve(QUANTILE, solvers.Tolerance(rtol=tolerance, atol=tolerance))
        errors.append(np.abs(error).max() / tolerance)
        steps.append(int(count.max()))
    assert max(errors) < 50  # the tolerance is of each step, and the flow carries errors on
    # A method of order 5 needs 100^(1/5) = 2.5 times the steps for an error 100 times smaller.
    assert steps[0] < steps[1] < 3.5 * steps[0]


def stiff(rates):
    """Each row decays at its own rate: x(1) = x(0) exp(-3 rate / 2)."""
    return lambda x, t: -(rates * (1 + t))[:, None] * x


def test_dopri5_controls_every_sample_alone():
    rates = np.float32([0.1, 2.0, 30.0, 5.0])
    noise = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    solve = jax.jit(lambda rates, noise: solvers.dopri5(stiff(rates), noise))
    x, steps = solve(rates, noise)
    np.testing.assert_allclose(x, noise * np.exp(-1.5 * rates)[:, None], atol=1e-3)
    assert np.all(np.diff(np.asarray(steps)[[0, 1, 3, 2]]) > 0)
    rows = np.array([3, 0, 1])
    part, part_steps = solve(rates[rows], noise[rows])
    np.testing.assert_array_equal(part_steps, steps[rows])
    np.testing.assert_allclose(part, x[rows], rtol=1e-6)


def test_dopri5_calls_the_model_on_the_whole_batch_six_times_a_step():
    calls = []

    def velocity_fn(x, t):
        assert x.shape == (4, 6)
        jax.debug.callback(lambda t: calls.append(t.copy()), t)
        return stiff(jnp.array([0.1, 1.0, 9.0, 3.0]))(x, t)

    solve = jax.jit(lambda noise: solvers.dopri5(velocity_fn, noise)[1])
    steps = solve(np.ones((4, 6), np.float32))
    jax.effects_barrier()
    # The last evaluation of a step is the first of the next.
    assert len(calls) == 6 * int(steps.max()) + 1
    assert np.ptp(np.stack(calls), axis=1).max() > 0.1  # rows are at times of their own


def test_dopri5_marks_what_did_not_arrive():
    tolerance = solvers.Tolerance(max_steps=20)
    rates = np.float32([0.5, 300.0])
    solve = jax.jit(lambda noise: solvers.dopri5(stiff(rates), noise, tolerance=tolerance))
    x, steps = solve(np.ones((2, 3), np.float32))
    np.testing.assert_allclose(x[0], np.exp(-0.75), rtol=1e-3)
    assert np.isnan(x[1]).all()
    assert steps[1] == 20


def test_errors():
    x = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="'rk9'; expected one of euler, midpoint, heun, rk4"):
        solvers.integrate(lambda x, t: x, x, solvers.time_grid(2), "rk9")
    with pytest.raises(ValueError, match="num_steps is 0; expected at least 1"):
        solvers.time_grid(0)
    with pytest.raises(ValueError, match="shift is 0; expected more than 0"):
        solvers.time_grid(4, shift=0)
    with pytest.raises(ValueError, match="rtol is 0; expected more than 0"):
        solvers.Tolerance(rtol=0)
