"""DiT's discrete schedule: against its definition in float64 NumPy, and against diffusers' DDIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.flows import paths, sampler

PATH = paths.get_path("ddpm_linear")
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
INDEX = np.arange(1000)
TIMES = np.float32(1 - (INDEX + 1) / 1000)


def test_alpha_and_sigma_are_those_of_the_steps():
    found = PATH.coefficients(jnp.asarray(TIMES))
    np.testing.assert_allclose(found.alpha, np.sqrt(ALPHA_BAR), rtol=2e-6)
    # A float32 time near the data is off by 3e-8, of the 1e-3 that are left.
    np.testing.assert_allclose(found.sigma, np.sqrt(1 - ALPHA_BAR), rtol=2e-5)
    end = PATH.coefficients(jnp.float32(1.0))
    assert (float(end.alpha), float(end.sigma)) == (1.0, 0.0)
    assert paths.time_interval(PATH, "noise", sampling=True) == pytest.approx((0.0, 0.999))


def test_the_rates_are_the_derivatives():
    times = jnp.asarray([0.0, 0.1, 0.5, 0.9])
    rates = jax.vmap(jax.jacfwd(lambda t: jnp.stack(PATH.coefficients(t)[::2])))(times)
    found = PATH.coefficients(times)
    np.testing.assert_allclose(rates, np.stack([found.d_alpha, found.d_sigma], 1), rtol=3e-4)


def test_a_noise_converts_at_every_discrete_time():
    rng = np.random.default_rng(0)
    data, noise = rng.normal(size=(2, 1000, 3))
    alpha, sigma = np.sqrt(ALPHA_BAR)[:, None], np.sqrt(1 - ALPHA_BAR)[:, None]
    x = alpha * data + sigma * noise
    found = paths.convert(PATH, noise, x, TIMES, source="noise", to="data")
    # In units of what float32 leaves of x at the noise, where alpha is 0.006.
    assert np.max(np.abs(found - data) * alpha) < 1e-5
    found = paths.convert(PATH, noise, x, TIMES, source="noise", to="score")
    np.testing.assert_allclose(found * sigma, -noise, atol=1e-4)


def exact_noise(alpha, sigma, x):
    """What a perfect model of the data N(0, 0.25) predicts."""
    return sigma * x / (0.25 * alpha**2 + sigma**2)


def test_the_ode_ends_where_many_steps_of_ddim_do():
    """DDIM is Euler's method in x / alpha over sigma / alpha: other steps, one solution."""
    noise = np.array([-1.5, 0.3, 2.0])
    x = noise
    for i in INDEX[::-1]:
        alpha, sigma = np.sqrt(ALPHA_BAR[i]), np.sqrt(1 - ALPHA_BAR[i])
        eps = exact_noise(alpha, sigma, x)
        before = ALPHA_BAR[i - 1] if i else 1.0
        x = np.sqrt(before) * (x - sigma * eps) / alpha + np.sqrt(1 - before) * eps

    def model(params, x, t, labels):
        c = PATH.coefficients(t.reshape(-1, 1, 1, 1))
        return exact_noise(c.alpha, c.sigma, x)

    spec = sampler.SamplerSpec(PATH, 0, prediction="noise", solver="heun", num_steps=125)
    start = jnp.asarray(noise, jnp.float32).reshape(3, 1, 1, 1)
    found = sampler.make_sampler(model, spec)(None, start, jnp.zeros(3, jnp.int32))
    alpha, sigma = np.sqrt(ALPHA_BAR[-1]), np.sqrt(1 - ALPHA_BAR[-1])
    exact = noise * 0.5 / np.sqrt(0.25 * alpha**2 + sigma**2)
    np.testing.assert_allclose(np.ravel(found), exact, rtol=2e-3)
    np.testing.assert_allclose(x, exact, rtol=5e-3)


def test_one_prediction_is_that_of_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02, clip_sample=False)
    scheduler.set_timesteps(1000)
    x, noise = np.random.default_rng(1).normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
    for index in (0, 1, 250, 600):
        step = scheduler.step(torch.from_numpy(noise), index, torch.from_numpy(x))
        t = np.full(3, 1 - (index + 1) / 1000, np.float32)
        found = paths.convert(PATH, noise, x, t, source="noise", to="data")
        expected = step.pred_original_sample.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
