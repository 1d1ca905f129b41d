"""Noise and labels by index, guidance, the sampler as a whole, independence of batch and mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repulsor_jax.flows import paths, sampler, solvers
from repulsor_jax.flows.solvers import Diffusion
from tests.oracles.closed_form import (
    DIFFUSIONS,
    GAUSSIAN,
    MEAN,
    STD,
    Mixture,
    distance_to_cdf,
    exact_alpha_sigma,
    exact_coefficients,
    exact_model,
)

EULER, HEUN = "euler_maruyama", "stochastic_heun"
MIXTURE = Mixture((0.3, 0.7), (-1.0, 2.0), (0.4, 0.5))


def exact_sampler(name, prediction="velocity", data=GAUSSIAN, **options):
    """The sampler of a perfect model."""
    path = paths.get_path(name)
    spec = sampler.SamplerSpec(path, null_label=0, prediction=prediction, **options)
    return sampler.make_sampler(exact_model(path, prediction, data), spec)


@pytest.mark.parametrize(
    ("name", "prediction", "options"),
    [
        ("linear", "score", {"solver": "heun", "num_steps": 200}),
        ("linear", "velocity", {"solver": "midpoint", "num_steps": 100, "time_shift": 1.5}),
        ("gvp", "noise", {"solver": "heun", "num_steps": 200}),
        ("gvp", "velocity", {"solver": "rk4", "num_steps": 100, "time_shift": 1.5}),
        ("vp", "score", {"solver": "heun", "num_steps": 200}),
        ("vp", "velocity", {"solver": "dopri5", "tolerance": solvers.Tolerance(1e-5, 1e-5)}),
    ],
)
def test_noise_quantiles_become_data_quantiles(name, prediction, options):
    noise = np.linspace(-2.0, 2.0, 5, dtype=np.float32)[:, None]
    sample = exact_sampler(name, prediction, **options)
    samples = jax.jit(sample)(None, noise, np.zeros(5, np.int32))
    # vp starts with 0.7 per cent of data in its noise, the others at t = 0.001 for score and noise.
    atol = 0.002 if (name, prediction) in (("linear", "velocity"), ("gvp", "velocity")) else 0.007
    np.testing.assert_allclose(samples, MEAN + STD * noise, atol=atol)


def test_a_last_step_leaves_no_noise():
    """With one point as data the flow must end on it, though vp stops before t = 1."""
    path, point = paths.get_path("vp"), 2.0

    def model(params, x, t, labels):
        c = path.coefficients(t[:, None])
        return (x - c.alpha * point) / c.sigma

    spec = sampler.SamplerSpec(path, null_label=0, prediction="noise", num_steps=20)
    noise = np.linspace(-3.0, 3.0, 16, dtype=np.float32)[:, None]
    samples = jax.jit(sampler.make_sampler(model, spec))(None, noise, np.zeros(16, np.int32))
    np.testing.assert_allclose(samples, np.full((16, 1), point), atol=1e-5)


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
    """Start and increments of 4 x 8 samples, drawn from the keys that `solve_sde` names."""
    keys = sampler.brownian_keys(0, jnp.arange(4))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (8,))))
    normals = jax.jit(lambda keys: draw(fold(keys, jnp.arange(NUM_STEPS))))(keys)
    noise = sampler.initial_noise(0, jnp.arange(4), (8,))
    return keys, noise, np.asarray(normals, np.float64).swapaxes(0, 1)


@pytest.mark.parametrize(
    ("name", "form", "last_step", "solver", "prediction"),
    [
        ("linear", "sigma", "mean", EULER, "velocity"),
        ("linear", "sbdm", "euler", EULER, "velocity"),
        ("linear", "decreasing", "tweedie", EULER, "velocity"),
        ("gvp", "sbdm", "none", EULER, "score"),
        ("gvp", "increasing_decreasing", "mean", HEUN, "velocity"),
        ("vp", "constant", "tweedie", HEUN, "noise"),
        ("vp", "linear", "none", HEUN, "velocity"),
    ],
)
def test_samples_are_those_of_the_chain(draws, name, form, last_step, solver, prediction):
    """Every step of the very samples, and the moments that the chain gives them."""
    diffusion = Diffusion(form, last_step=last_step, last_step_size=LAST_STEP_SIZE)
    sample = exact_sampler(
        name, prediction, solver=solver, num_steps=NUM_STEPS, diffusion=diffusion
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
    sample = exact_sampler(
        name,
        data=MIXTURE,
        solver=solver,
        num_steps=60 if solver == "rk4" else 400,
        diffusion=Diffusion(last_step="tweedie", last_step_size=0.004),
    )

    @jax.jit
    def draw(indices):
        noise = sampler.initial_noise(1, indices, (rows,))
        return sample(None, noise, indices, keys=sampler.brownian_keys(1, indices))

    samples = draw(np.arange(10))
    # Kolmogorov, p = 0.001, is 1.95; the rest is for the discretisation.
    assert distance_to_cdf(samples, MIXTURE) < 2.1 / samples.size**0.5
    assert distance_to_cdf(samples, GAUSSIAN) > 0.2


@pytest.mark.parametrize("solver", ["heun", "euler_maruyama"])
def test_a_velocity_scale_undoes_contrastive_flow_matching(solver):
    """Its best prediction is (v - w E[v]) / (1 - w): here for Gaussian data, channel by channel."""
    mean, std, weight = np.float32([1.0, -2.0]), 0.5, 0.05

    def plain(params, x, t, labels):
        t = t[:, None, None, None]
        spread = t**2 * std**2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / spread * (x - t * mean)

    def contrastive(params, x, t, labels):
        return (plain(params, x, t, labels) - weight * mean) / (1 - weight)

    noise = jax.random.normal(jax.random.key(0), (64, 2, 2, 2))
    inputs = {}, noise, jnp.zeros(64, jnp.int32)
    keys = sampler.brownian_keys(0, jnp.arange(64))
    spec = sampler.SamplerSpec(paths.get_path("linear"), null_label=1, solver=solver, num_steps=20)
    scaled = dataclasses.replace(spec, velocity_scale=1 - weight, mean_velocity=tuple(mean))
    expected = jax.jit(sampler.make_sampler(plain, spec))(*inputs, keys=keys)
    found = jax.jit(sampler.make_sampler(contrastive, scaled))(*inputs, keys=keys)
    longer = jax.jit(sampler.make_sampler(contrastive, spec))(*inputs, keys=keys)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(longer - expected).max() > 0.02


def test_initial_noise_depends_on_seed_and_index_only():
    draw = jax.jit(sampler.initial_noise, static_argnums=2)
    key, indices, shape = jax.random.key(3), np.arange(64), (4, 5, 2)
    noise = np.asarray(draw(key, indices, shape))
    assert noise.shape == (64, *shape)
    assert noise.dtype == np.float32
    subset = np.array([63, 0, 7])
    part = jax.jit(lambda indices: sampler.initial_noise(3, indices, shape))(subset)
    np.testing.assert_array_equal(part, noise[subset])
    assert np.abs(draw(jax.random.key(4), indices, shape) - noise).max() > 1
    assert np.unique(noise).size > 0.999 * noise.size
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.size) ** 0.5

    compiled = draw.lower(key, shard(indices), shape).compile()
    np.testing.assert_array_equal(compiled(key, shard(indices)), noise)
    assert not COLLECTIVE.search(compiled.as_text())


def test_labels():
    indices = np.arange(1000, 5000)
    balanced = sampler.sample_labels(0, indices, 10)
    assert balanced.dtype == jnp.int32
    np.testing.assert_array_equal(balanced, np.arange(1000, 5000) % 10)
    draw = jax.jit(lambda key, indices: sampler.sample_labels(key, indices, 10, mode="random"))
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
        "mix": (0.2 * rng.normal(size=(48, 48))).astype(np.float32),
        "labels": rng.normal(size=(11, 48)).astype(np.float32),
    }


def toy_model(params, x, t, labels, xp=jnp):
    """Mixes every value of a sample with every other, and its time and label."""
    h = x.reshape(x.shape[0], -1) @ params["mix"] + xp.asarray(params["labels"])[labels]
    return (xp.tanh(h) * (1 + t[:, None])).reshape(x.shape)


def toy_guided(params, x, t, labels, scale):
    """What guidance makes of the model, in NumPy; and the model by its labels alone."""
    cond = toy_model(params, x, t, labels, np)
    uncond = toy_model(params, x, t, np.full_like(labels, 10), np)
    return (1 - scale) * uncond + scale * cond, cond


def toy_inputs():
    noise = np.random.default_rng(1).normal(size=(16, 3, 4, 4))
    return noise.astype(np.float32), np.arange(16, dtype=np.int32) % 10


INDICES = np.arange(16, dtype=np.int32)
ROWS = np.array([15, 2, 9, 4])  # some of them


def toy_sampler(model=toy_model, **options):
    options = {"solver": "heun", "num_steps": 6, "null_label": 10} | options
    guiding_fn = options.pop("guiding_fn", None)
    spec = sampler.SamplerSpec(paths.get_path("linear"), **options)
    return sampler.make_sampler(model, spec, guiding_fn)


def test_guidance_formula():
    """In NumPy, of all channels and of three, by the model without a class and by a weaker one."""
    params, (x, labels) = toy_params(), toy_inputs()
    weak_params = jax.tree.map(lambda p: 0.5 * p, params)
    t = np.linspace(0.0, 0.9, 16, dtype=np.float32)
    calls = []

    @jax.jit
    def guided(x, scale):
        calls.clear()

        def model_fn(params, x, t, labels):
            calls.append(x.shape[0])
            return toy_model(params, x, t, labels)

        strong_fn, weak_fn = (functools.partial(model_fn, p) for p in (params, weak_params))
        guide = functools.partial(
            sampler.guided_prediction, strong_fn, x, t, labels, null_label=10, scale=scale
        )
        return guide(), guide(channels=3), guide(guiding_fn=weak_fn)

    for scale in (0.0, 1.0, 3.0):
        every, some, auto = guided(x, scale)
        expected, strong = toy_guided(params, x, t, labels, scale)
        np.testing.assert_allclose(every, expected, atol=1e-5)
        expected[..., 3:] = strong[..., 3:]
        np.testing.assert_allclose(some, expected, atol=1e-5)
        weak = toy_model(weak_params, x, t, labels, np)
        np.testing.assert_allclose(auto, weak + scale * (strong - weak), atol=1e-5)
    assert calls == [32, 32, 16, 16]


def test_guidance_interval():
    """Of one time for each row, and of one for the batch, from the lower end to the upper one."""
    params, (x, labels) = toy_params(), toy_inputs()
    times = np.linspace(0.0, 1.0, 16, dtype=np.float32)
    everywhere, nowhere = toy_guided(params, x, times, labels, 3.0)

    @jax.jit
    def guided(t):
        return sampler.guided_prediction(
            functools.partial(toy_model, params),
            x,
            t,
            labels,
            null_label=10,
            scale=3.0,
            interval=(times[4], times[9]),
        )

    inside = (np.arange(16) >= 4) & (np.arange(16) <= 9)
    expected = np.where(inside[:, None, None, None], everywhere, nowhere)
    np.testing.assert_allclose(guided(times), expected, atol=1e-5)
    found = [guided(times[row])[row] for row in (0, 3, 4, 9, 10)]
    np.testing.assert_allclose(found, expected[[0, 3, 4, 9, 10]], atol=1e-5)
    assert np.abs(everywhere - nowhere).reshape(16, -1).max(axis=1).min() > 0.1


def counting_sampler(solver, num_steps=6, guiding=False, **options):
    """A function of (scale, interval): rows of each evaluation of the model and of the guide."""
    params, (noise, labels) = toy_params(), toy_inputs()
    rows, guiding_rows = [], []

    def counted(seen, params, x, *others):
        jax.debug.callback(lambda _: seen.append(x.shape[0]), x[0, 0, 0, 0])
        return toy_model(params, x, *others)

    models = (functools.partial(counted, seen) for seen in (rows, guiding_rows))
    options |= {"solver": solver, "num_steps": num_steps}
    sample = toy_sampler(next(models), guiding_fn=next(models), **options)

    @jax.jit
    def run(*arguments):
        keys = sampler.brownian_keys(0, INDICES)
        guiding_params = params if guiding else None
        return sample(params, noise, labels, *arguments, keys=keys, guiding_params=guiding_params)

    def count(*arguments):
        rows.clear()
        guiding_rows.clear()
        jax.block_until_ready(run(*arguments))
        jax.effects_barrier()
        return rows.copy(), guiding_rows.copy()

    return count


@pytest.mark.parametrize(
    ("solver", "evaluations", "scale", "options"),
    [
        ("rk4", 24, None, {}),
        ("euler", 7, 2.0, {"prediction": "noise"}),  # the data predicted at the end
        ("euler_maruyama", 6, 2.0, {}),  # five and the last step
        ("stochastic_heun", 12, 2.0, {"diffusion": Diffusion(last_step="none")}),
    ],
)
def test_number_of_evaluations(solver, evaluations, scale, options):
    rows = 16 if scale is None else 32
    assert counting_sampler(solver, **options)(scale) == ([rows] * evaluations, [])


def test_number_of_evaluations_of_autoguidance():
    count = counting_sampler("heun", guiding=True)
    assert count(2.0) == ([16] * 12, [16] * 12)
    assert count() == ([16] * 12, [])
    rows, guiding_rows = counting_sampler("euler", 10, guiding=True)(2.0, (0.25, 0.65))
    assert (len(rows), len(guiding_rows)) == (10, 4)


def test_no_second_evaluation_outside_the_interval():
    count = counting_sampler("euler", 10)
    rows, _ = count(2.0, (0.25, 0.65))
    assert sorted(rows) == [16] * 6 + [32] * 4  # at 0.3, 0.4, 0.5 and 0.6
    assert count(1.0, (0.25, 0.65))[0] == [16] * 10
    rows, _ = counting_sampler("dopri5")(2.0, (0.25, 0.65))  # where rows are at different times
    assert set(rows) == {32}


def test_one_program_for_every_scale_and_for_other_parameters():
    params, (noise, labels) = toy_params(), toy_inputs()
    sample = jax.jit(toy_sampler())
    weak, strong = (sample(params, noise, labels, scale) for scale in (1.0, 4.0))
    still = sample(jax.tree.map(np.zeros_like, params), noise, labels, 1.5)
    assert sample._cache_size() == 1
    plain = sample(params, noise, labels)
    assert sample._cache_size() == 2
    np.testing.assert_allclose(weak, plain, atol=1e-5)
    np.testing.assert_allclose(still, noise, atol=1e-6)
    assert np.abs(strong - weak).max() > 0.1


FAMILIES = [  # solver, scale, interval, guiding model
    ("heun", None, None, False),
    ("heun", 2.0, None, False),
    ("rk4", 2.0, (0.3, 0.7), False),
    ("heun", 2.0, None, True),
    ("euler_maruyama", 2.0, (0.3, 0.7), False),
    ("dopri5", 2.0, (0.3, 0.7), False),
]


@functools.lru_cache
def family(solver, guiding, num_steps=6):
    """A sampler of (noise, labels, indices, scale, interval), and its inputs for 16 samples."""
    params, (noise, labels) = toy_params(), toy_inputs()
    weak = jax.tree.map(lambda p: 0.5 * p, params) if guiding else None
    sample = toy_sampler(solver=solver, channels=3, num_steps=num_steps)

    @jax.jit
    def run(noise, labels, indices, scale, interval):
        keys = sampler.brownian_keys(3, indices)
        return sample(params, noise, labels, scale, interval, keys=keys, guiding_params=weak)

    return run, (noise, labels, INDICES)


COLLECTIVE = re.compile(
    r"= (\S+) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-sc)"
)


def shard(x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize(("solver", "scale", "interval", "guiding"), FAMILIES)
def test_samples_depend_on_neither_batch_nor_mesh(solver, scale, interval, guiding):
    run, inputs = family(solver, guiding)
    part = run(*(x[ROWS] for x in inputs), scale, interval)
    sharded = (*map(shard, inputs), scale, interval)
    compiled = run.lower(*sharded).compile()
    samples = compiled(*sharded)
    assert samples.sharding.is_equivalent_to(sharded[0].sharding, samples.ndim)
    atol = 5e-3 if solver == "dopri5" else 1e-5
    np.testing.assert_allclose(part, np.asarray(samples)[ROWS], atol=atol)
    # Samples share nothing, so with replicated parameters nothing travels, but for dopri5's
    # question whether all are done.
    travels = set(COLLECTIVE.findall(compiled.as_text()))
    assert travels == ({"pred[]"} if solver == "dopri5" else set())


@pytest.mark.parametrize("solver", ["heun", "euler_maruyama", "dopri5"])
def test_one_program_for_every_scale_and_interval(solver):
    run, inputs = family(solver, False)
    inputs = [x[ROWS] for x in inputs]
    sweep = [(1.5, (0.0, 1.0)), (4.0, (0.0, 1.0)), (4.0, (0.3, 0.8)), (1.0, (0.3, 0.8))]
    results = [run(*inputs, *sweep[0])]
    programs = run._cache_size()
    results += [run(*inputs, *setting) for setting in sweep[1:]]
    assert run._cache_size() == programs
    for i, first in enumerate(results):
        for second in results[:i]:
            assert np.abs(first - second).max() > 0.2
    other, atols = run, (1e-4, 1e-4)
    if solver == "dopri5":  # fine steps of another, which compiles sooner, to dopri5's tolerance
        other, atols = family("rk4", False, 100)[0], (5e-3, 0.1)
    plain, everywhere = other(*inputs, None, None), other(*inputs, 4.0, None)
    np.testing.assert_allclose(results[3], plain, atol=atols[0])
    np.testing.assert_allclose(results[1], everywhere, atol=atols[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk9"}, "'rk9'; expected one of euler, midpoint, heun, rk4, dop"),
        ({"solver": EULER, "num_steps": 1}, "num_steps is 1; expected at least 2, one being the"),
        ({"solver": "dopri5", "time_shift": 3.0}, "time_shift is 3.0, but 'dopri5' chooses"),
        ({"prediction": "x0"}, "'x0'; expected one of velocity, score, noise"),
        ({"solver": HEUN}, "'stochastic_heun' needs keys=brownian_keys"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        toy_sampler(**options)(toy_params(), *toy_inputs())


def test_an_unknown_way_to_draw_labels_is_refused():
    with pytest.raises(ValueError, match="'cyclic'; expected one of balanced, random"):
        sampler.sample_labels(0, jnp.arange(3), 10, mode="cyclic")


def test_what_is_known_stands_where_the_path_has_it():
    """With a velocity to a fixed point the rest arrives there, and what is known at the data."""
    data = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 1)), jnp.float32)
    noise = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 4, 1)), jnp.float32)
    unknown = jnp.zeros((2, 4, 4, 1), bool).at[:, :2].set(True)
    seen = []

    def model_fn(params, x, t, labels):
        seen.append((x, t))
        return 5.0 - noise

    spec = sampler.SamplerSpec(paths.get_path("linear"), null_label=3, num_steps=4)
    draw = sampler.make_sampler(model_fn, spec)
    with jax.disable_jit():
        found = draw(None, noise, jnp.zeros(2, jnp.int32), known=(data, unknown))
    np.testing.assert_array_equal(found[:, 2:], data[:, 2:])
    np.testing.assert_allclose(found[:, :2], 5.0, rtol=1e-5)
    for k, (x, t) in enumerate(seen):
        np.testing.assert_allclose(t, k / 4)
        np.testing.assert_allclose(x[:, 2:], (t[0] * data + (1 - t[0]) * noise)[:, 2:], rtol=1e-5)
