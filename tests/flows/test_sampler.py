"""Noise and labels by index, guidance, the sampler as a whole, independence of batch and mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repulsor_jax.flows import paths, sampler, sde, solvers
from tests.oracles.closed_form import MEAN, STD, exact_model

PATHS = ("linear", "gvp", "vp")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_every_prediction_maps_noise_quantiles_to_data_quantiles(name, prediction):
    path = paths.get_path(name)
    model = exact_model(path, prediction)
    sample = sampler.make_sampler(
        model, path, prediction=prediction, solver="heun", num_steps=200, null_label=0
    )
    noise = np.linspace(-2.0, 2.0, 5, dtype=np.float32)[:, None]
    samples = jax.jit(sample)(None, noise, np.zeros(5, np.int32))
    # vp starts with 0.7 per cent of data in its noise, the others at t = 0.001 for score and noise.
    np.testing.assert_allclose(samples, MEAN + STD * noise, atol=0.007)


def test_a_last_step_leaves_no_noise():
    """With one point as data the flow must end on it, though vp stops before t = 1."""
    path, point = paths.get_path("vp"), 2.0

    def model(params, x, t, labels):
        c = path.coefficients(t[:, None])
        return (x - c.alpha * point) / c.sigma

    sample = sampler.make_sampler(
        model, path, prediction="noise", solver="euler", num_steps=20, null_label=0
    )
    noise = np.linspace(-3.0, 3.0, 16, dtype=np.float32)[:, None]
    samples = jax.jit(sample)(None, noise, np.zeros(16, np.int32))
    np.testing.assert_allclose(samples, np.full((16, 1), point), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "solver"), [("linear", "midpoint"), ("gvp", "rk4"), ("vp", "dopri5")]
)
def test_the_other_solvers_arrive_at_the_data(name, solver):
    path = paths.get_path(name)
    options = {"num_steps": 100, "time_shift": 1.5}
    if solver == "dopri5":
        options = {"tolerance": solvers.Tolerance(rtol=1e-5, atol=1e-5)}
    sample = sampler.make_sampler(
        exact_model(path, "velocity"), path, solver=solver, null_label=0, **options
    )
    noise = np.linspace(-2.0, 2.0, 5, dtype=np.float32)[:, None]
    samples = jax.jit(sample)(None, noise, np.zeros(5, np.int32))
    np.testing.assert_allclose(samples, MEAN + STD * noise, atol=0.007 if name == "vp" else 0.002)


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
    return sampler.make_sampler(model, paths.get_path("linear"), **options)


@pytest.mark.parametrize("channels", [None, 3])
def test_guidance_formula(channels):
    params, (x, labels) = toy_params(), toy_inputs()
    t = np.linspace(0.0, 0.9, 16, dtype=np.float32)
    calls = []

    def model_fn(x, t, labels):
        calls.append(x.shape[0])
        return toy_model(params, x, t, labels)

    @jax.jit
    def guided(scale):
        return sampler.guided_velocity(
            model_fn, x, t, labels, null_label=10, scale=scale, channels=channels
        )

    for scale in (0.0, 1.0, 3.0):
        expected, cond = toy_guided(params, x, t, labels, scale)
        if channels is not None:
            expected[..., channels:] = cond[..., channels:]
        np.testing.assert_allclose(guided(scale), expected, atol=1e-5)
        if scale == 1.0:
            np.testing.assert_allclose(guided(scale), cond, atol=1e-5)
    assert calls == [32]


def test_no_guidance_is_one_call_without_doubling():
    calls = []

    def model_fn(x, t, labels):
        calls.append(x.shape[0])
        return labels[:, None] * x

    labels, x = np.arange(4, dtype=np.int32), np.ones((4, 2), np.float32)
    found = sampler.guided_velocity(model_fn, x, np.zeros(4), labels, null_label=9, scale=None)
    assert calls == [4]
    np.testing.assert_array_equal(found, labels[:, None] * x)


def test_guidance_by_a_weaker_model():
    params, (x, labels) = toy_params(), toy_inputs()
    weak_params = jax.tree.map(lambda p: 0.5 * p, params)
    t = np.float32(0.4)

    @jax.jit
    def guided(x):
        return sampler.guided_velocity(
            lambda *inputs: toy_model(params, *inputs),
            x,
            t,
            labels,
            null_label=10,
            scale=2.5,
            channels=3,
            guiding_fn=lambda *inputs: toy_model(weak_params, *inputs),
        )

    strong, weak = (toy_model(p, x, t[None], labels, np) for p in (params, weak_params))
    expected = weak + 2.5 * (strong - weak)
    expected[..., 3:] = strong[..., 3:]
    np.testing.assert_allclose(guided(x), expected, atol=1e-5)


@pytest.mark.parametrize("batched", [False, True])
def test_guidance_interval(batched):
    params, (x, labels) = toy_params(), toy_inputs()
    times = np.linspace(0.0, 1.0, 16, dtype=np.float32)
    everywhere, nowhere = toy_guided(params, x, times, labels, 3.0)
    low, high = times[4], times[9]  # both ends belong to it
    inside = (np.arange(16) >= 4) & (np.arange(16) <= 9)

    @jax.jit
    def guided(x, t, labels):
        return sampler.guided_velocity(
            lambda *inputs: toy_model(params, *inputs),
            x,
            t,
            labels,
            null_label=10,
            scale=3.0,
            interval=(low, high),
        )

    if batched:
        found = guided(x, times, labels)
    else:
        rows = zip(x[:, None], times, labels[:, None], strict=True)
        found = np.concatenate([guided(*row) for row in rows])
    expected = np.where(inside[:, None, None, None], everywhere, nowhere)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(everywhere - nowhere).reshape(16, -1).max(axis=1).min() > 0.1


def counting_sampler(solver, num_steps=6, guiding=False, traced=False, **options):
    """A function of (scale, interval): how many rows each evaluation had that ran, or was traced.

    Those of the model, and those of the guiding model.
    """
    params, (noise, labels) = toy_params(), toy_inputs()
    rows, guiding_rows = [], []

    def counted(seen):
        def model(params, x, t, labels):
            if traced:
                seen.append(x.shape[0])
            else:
                jax.debug.callback(lambda _: seen.append(x.shape[0]), x[0, 0, 0, 0])
            return toy_model(params, x, t, labels)

        return model

    sample = toy_sampler(
        counted(rows),
        solver=solver,
        num_steps=num_steps,
        guiding_fn=counted(guiding_rows),
        **options,
    )
    guiding_params = params if guiding else None

    @jax.jit
    def run(*arguments):
        keys = sampler.brownian_keys(0, INDICES)
        return sample(params, noise, labels, *arguments, keys=keys, guiding_params=guiding_params)

    def count(*arguments):
        rows.clear()
        guiding_rows.clear()
        if traced:
            jax.eval_shape(run, *arguments)
        else:
            jax.block_until_ready(run(*arguments))
            jax.effects_barrier()
        return rows.copy(), guiding_rows.copy()

    return count


NO_LAST = {"diffusion": sde.Diffusion(last_step="none")}


@pytest.mark.parametrize(
    ("solver", "evaluations", "scale", "options"),
    [
        ("euler", 6, None, {}),
        ("heun", 12, 2.0, {}),
        ("rk4", 24, 2.0, {}),
        ("euler", 7, 2.0, {"prediction": "noise"}),  # the data predicted at the end
        ("euler_maruyama", 6, 2.0, {}),  # five and the last step
        ("stochastic_heun", 11, None, {}),
        ("stochastic_heun", 12, 2.0, NO_LAST),
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
    rows, _ = counting_sampler("dopri5", 10, traced=True)(2.0, (0.25, 0.65))
    assert set(rows) == {32}


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
    other = jax.tree.map(np.zeros_like, params)
    np.testing.assert_allclose(sample(other, noise, labels), noise, atol=1e-6)
    assert np.abs(sample(params, noise, labels) - noise).max() > 0.1
    assert sample._cache_size() == 1


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


def test_errors():
    with pytest.raises(ValueError, match="'rk9'; expected one of euler, midpoint, heun, rk4, dop"):
        toy_sampler(solver="rk9")
    with pytest.raises(ValueError, match="num_steps is 0"):
        toy_sampler(num_steps=0)
    with pytest.raises(ValueError, match="num_steps is 1; expected at least 2, one being the last"):
        toy_sampler(solver="euler_maruyama", num_steps=1)
    with pytest.raises(ValueError, match="shift is -1"):
        toy_sampler(time_shift=-1)
    with pytest.raises(ValueError, match="time_shift is 3.0, but 'dopri5' chooses its steps"):
        toy_sampler(solver="dopri5", time_shift=3.0)
    with pytest.raises(ValueError, match="'stochastic_heun' needs keys=brownian_keys"):
        toy_sampler(solver="stochastic_heun")(toy_params(), *toy_inputs())
    with pytest.raises(ValueError, match="'x0'; expected one of velocity, score, noise"):
        toy_sampler(prediction="x0")
    with pytest.raises(ValueError, match="'cyclic'; expected one of balanced, random"):
        sampler.sample_labels(0, jnp.arange(3), 10, mode="cyclic")
