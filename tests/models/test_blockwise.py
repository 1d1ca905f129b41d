"""The blockwise network against the published one, and what its segments must keep."""

import ast
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import blockwise as blockwise_config
from repulsor_jax import config as config_lib
from repulsor_jax.experiment import make_trainer
from repulsor_jax.flows import paths, sampler, solvers
from repulsor_jax.loss import Inputs, Teacher, make_residual_loss
from repulsor_jax.method import memory_bank
from repulsor_jax.method.alignment import feature_loss
from repulsor_jax.method.token_heads import TokenHead
from repulsor_jax.models import blockwise
from repulsor_jax.models.build import build_model, init_model_params
from repulsor_jax.models.dit import tokens_after
from repulsor_jax.runtime.metrics import read_jsonl
from repulsor_jax.runtime.preemption import Preempted
from repulsor_jax.sample import sample
from tests.oracles import blockwise as published
from tests.oracles import fixtures, tiny
from tests.oracles.runs import acting, told_to_stop

LINEAR = paths.get_path("linear")
SMALL = {
    "model__architecture": "blockwise",
    "model__depth": 2,
    "model__segments": 3,
    "model__segment_depth": 1,
    "model__adaln_rank": 4,
    "model__num_heads": 2,
    "sampling__num_steps": 6,
    "batch_size": 24,
    "terms": "none",
}


RESIDUAL = {
    "model__residual_depth": 1,
    "residual__base_run": "base",
    "log__diagnostics_every_steps": 0,
}


def last(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


class Published:
    """The fixture with its network, which was told the time from data to noise."""

    def __init__(self):
        path = fixtures.FOLDER / "bfm_visible.npz"
        if not path.is_file():
            pytest.skip(f"{path} is absent")
        with np.load(path) as file:
            self.values = dict(file)
        c = ast.literal_eval(str(self["train/config"]))
        self.segments = c["segments"]
        depth, residual = c["feature_alignment_depth"], int(self["frn/depth"])
        self.sizes = depth, self.segments, c["segment_depth"], residual
        self.fields = {
            "latent_size": c["context_size"],
            "in_channels": c["in_channels"],
            "patch_size": c["patch_size"],
            "hidden_size": c["hidden_size"],
            "depth": depth,
            "num_heads": c["num_heads"],
            "num_classes": c["num_classes"],
            "segments": c["segments"],
            "segment_depth": c["segment_depth"],
            "adaln_rank": c["adaln_lora_dim"],
            "residual_depth": residual,
        }
        self.model = published.Reversed(**self.fields)
        state = {
            name.removeprefix("state/"): value
            for name, value in self.values.items()
            if name.startswith("state/")
        }
        self.params = published.params_of(state, self.sizes)
        self.head = {name: state[name] for name in state if name.startswith("linear_projection")}

    def __getitem__(self, name):
        return self.values[name]

    def apply(self, params, *inputs, **options):
        return self.model.apply({"params": params}, *inputs, **options)

    @functools.cached_property
    def velocity(self):  # compiled once for all stacks
        return jax.jit(self.apply)

    def arranged(self):
        """Their seven rows in their places, b % S, some twice; and which of them count."""
        of_segment = [np.flatnonzero(self["train/segment"] == s) for s in range(self.segments)]
        most = max(map(len, of_segment))
        rows = np.stack([np.resize(each, most) for each in of_segment], axis=1).ravel()
        counts = np.stack([np.arange(most) < len(each) for each in of_segment], axis=1).ravel()
        assert sorted(rows[counts]) == list(range(7))
        return rows, counts

    def check_gradients(self, found, prefix):
        names = [name for name in self.values if name.startswith(prefix)]
        assert names
        for name in names:
            theirs, expected = name.removeprefix(prefix), self[name]
            own = published.leaf(found, theirs, self.sizes)
            expected = published.to_jax(theirs, expected)
            error = np.linalg.norm(own - expected) / np.linalg.norm(expected)
            assert error < 1e-4, (name, error)


@pytest.fixture(scope="module")
def paper():
    return Published()


def test_boundaries_and_rotary_positions_are_the_published_ones(paper):
    spec = sampler.SamplerSpec(LINEAR, 0, num_steps=6, num_segments=3)
    np.testing.assert_allclose(spec.boundaries(), paper["segments/boundaries_ours"], atol=1e-7)
    table = blockwise.rotary_table(4, paper["rope/cos"].shape[-1])
    for found, name in zip(table, ("cos", "sin"), strict=True):
        np.testing.assert_allclose(found, paper[f"rope/{name}"], atol=2e-7)


def test_every_stack_predicts_what_the_published_one_does(paper):
    inputs = last(paper["eval/x"]), 1 - paper["eval/t_theirs"], paper["eval/labels"]
    trunk = paper.model.depth - 1
    tokens = functools.partial(paper.apply, taps=(trunk,), has_output=False)
    (feature,) = jax.jit(tokens)(paper.params, *inputs)
    np.testing.assert_allclose(feature, paper["eval/feature"], atol=2e-5, rtol=2e-5)
    for segment, expected in enumerate(paper["eval/out_theirs_per_segment"]):
        found = paper.velocity(paper.params, *inputs, segment=segment)
        np.testing.assert_allclose(found, last(expected), atol=2e-5, rtol=2e-5)
    start = jnp.asarray(paper["frn/eval_start_feature"])[:, None]
    segment = int(paper["frn/eval_segment"])

    class Told(published.Reversed):  # the published function takes any coefficient
        def _behind(self, t, segment):
            return jnp.asarray(paper["frn/eval_coefficient"])

    apply = jax.jit(Told(**paper.fields).apply)
    found = apply({"params": paper.params}, *inputs, segment=segment, start=start)
    np.testing.assert_allclose(found, last(paper["frn/eval_out_theirs"]), atol=2e-5, rtol=2e-5)


def test_the_loss_of_a_batch_and_its_gradients_are_the_published_ones(paper):
    rows, counts = paper.arranged()
    t, labels = 1 - paper["train/t_theirs"][rows], paper["train/labels"][rows]
    x_t = last(paper["train/x_t"])[rows]
    target = last(paper["train/target_theirs"])[rows]
    own_x = paths.interpolate(
        LINEAR, last(paper["train/data"]), last(paper["train/noise"]), 1 - paper["train/t_theirs"]
    )
    np.testing.assert_allclose(own_x, last(paper["train/x_t"]), atol=2e-6)

    weights = {name.split(".", 1)[1]: value for name, value in paper.head.items()}
    layers = {
        name: {"kernel": weights[f"{i}.weight"].T, "bias": weights[f"{i}.bias"]}
        for name, i in (("hidden", 0), ("hidden_1", 2), ("out", 4))
    }
    hidden, dim = layers["out"]["kernel"].shape
    head = TokenHead(hidden, dim, num_hidden=2)

    def loss(params):
        trunk = paper.model.depth - 1
        out, (feature,) = paper.apply(params, x_t, t, labels, taps=(trunk,))
        feature = head.apply({"params": layers}, feature)
        flow = jnp.square(out - target)[counts].mean()
        encoder = jnp.asarray(paper["train/encoder_features"])[rows]
        align = feature_loss(feature[counts], encoder[counts])
        return flow + paper["train/align_weight"] * align, (out, feature, flow, align)

    grads, (out, projected, flow, align) = jax.jit(jax.grad(loss, has_aux=True))(paper.params)
    expected = last(paper["train/out_theirs"])[rows]
    np.testing.assert_allclose(out[counts], expected[counts], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(projected, paper["train/projected"][rows], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(flow, paper["train/flow"], rtol=1e-5)
    np.testing.assert_allclose(align, paper["train/align"], rtol=1e-5, atol=1e-7)
    paper.check_gradients(grads, "train/grad_total/")


def test_the_loss_of_the_residual_network_and_its_gradients_are_the_published_ones(paper):
    rows, counts = paper.arranged()
    data, noise = (last(paper[f"frn/{name}"])[rows] for name in ("data", "noise"))
    t, start = (1 - paper[f"frn/{name}"][rows] for name in ("t_theirs", "t_start_theirs"))
    labels = jnp.asarray(paper["frn/labels"][rows])
    trunk = (paper.model.depth - 1,)

    def loss(residual):
        params = paper.params | {"residual": residual}
        tokens = functools.partial(tokens_after, paper.model, paper.params, taps=trunk)
        (begun,), (target,) = (
            tokens(x=paths.interpolate(LINEAR, data, noise, at), t=at, labels=labels)
            for at in (start, t)
        )
        x = paths.interpolate(LINEAR, data, noise, t)
        options = {"start": begun[:, None], "has_output": False}
        found = paper.apply(params, x, t, labels, **options)
        return jnp.square(found - target)[counts].mean(), (found, target)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (found, target)), grads = gradient(paper.params["residual"])
    np.testing.assert_allclose(found, paper["frn/approximation"][rows], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(target, paper["frn/target"][rows], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(value, paper["frn/loss"], rtol=1e-5)
    paper.check_gradients({"residual": grads}, "frn/grad/")

    # The step's loss, with a row of each segment twice.
    trainer = make_trainer(tiny.config(**SMALL), tiny.mesh())._replace(model=paper.model)
    tags, no_view = memory_bank.tag(labels), {}
    inputs = Inputs(data, noise, jnp.asarray(t), labels, tags, no_view, {}, {})
    of_step = jax.jit(make_residual_loss(trainer))
    params = {"model": {"residual": paper.params["residual"]}, "terms": {}}
    found, _ = of_step(params, Teacher(paper.params, {}), inputs, None, {})
    errors = np.square(paper["frn/approximation"] - paper["frn/target"])[rows]
    np.testing.assert_allclose(found, errors.mean(), rtol=1e-5)


def test_the_samples_of_the_network_are_the_published_ones(paper):
    steps = int(paper["ode/steps_per_segment"]) * paper.segments
    spec = sampler.SamplerSpec(LINEAR, 5, num_steps=steps, num_segments=paper.segments)

    def backwards(params, *inputs, **options):  # their velocity points to the noise
        return -paper.apply(params, *inputs, **options)

    def feature(params, x, t, labels):
        return tokens_after(paper.model, params, x, t, labels, (paper.model.depth - 1,))[0]

    noise, labels = last(paper["ode/noise"]), jnp.asarray(paper["ode/labels"])
    for start_fn, name in ((None, "ode/samples"), (feature, "frn/ode_samples")):
        sample = jax.jit(sampler.make_sampler(backwards, spec, start_fn=start_fn))
        found = sample(paper.params, noise, labels)
        scale = np.abs(paper[name]).max()
        np.testing.assert_allclose(found, last(paper[name]), atol=2e-5 * max(1, scale))


def small(**options):
    """A model with random parameters, three rows of each segment, and their times."""
    c = tiny.config(**SMALL | options)
    model, rng = build_model(c.model), np.random.default_rng(0)
    x = rng.standard_normal((9, *tiny.SHAPE)).astype(np.float32)
    t = np.asarray(blockwise.stratified_times(rng.random(9, np.float32), model.segments))
    return model, tiny.random_params(c), x, t, rng.integers(0, 4, 9)


def test_times_are_stratified_and_cover_the_unit_interval_once():
    ends = np.float32([0.0, 1 - 2**-24])
    times = blockwise.stratified_times(np.repeat(ends, 5), 5).reshape(2, 5)
    np.testing.assert_allclose(times[0], np.arange(5) / 5, atol=1e-7)
    np.testing.assert_allclose(times[1], np.arange(1, 6) / 5, atol=1e-7)
    inside = np.linspace(0.01, 0.99, 20)[:, None].repeat(5, 1).ravel()
    times = blockwise.stratified_times(inside, 5)
    assert blockwise.segment_of(times, 5).tolist() == blockwise.segment_of_rows(100, 5).tolist()
    assert blockwise.segment_of(jnp.float32([0.0, 1.0]), 5).tolist() == [0, 4]


def test_one_segment_has_the_times_of_the_plain_transformer():
    draw = lambda **options: make_trainer(
        tiny.config(**SMALL | options), tiny.mesh()
    ).objective.sample_times(jax.random.key(3), 24)
    plain = draw(model__architecture="dit")
    np.testing.assert_array_equal(draw(model__segments=1), plain)
    rows = np.arange(24) % 3
    np.testing.assert_allclose(draw(), (rows + plain) / 3, rtol=1e-6)


def test_a_row_goes_through_the_stack_of_its_number_in_either_layout():
    model, params, x, t, labels = small(model__remat="dots")
    found = jax.jit(model.apply)({"params": params}, x, t, labels)
    alone = jax.jit(model.apply)
    for segment in range(3):
        rows = slice(segment, None, 3)
        expected = alone({"params": params}, x[rows], t[rows], labels[rows], segment=segment)
        np.testing.assert_allclose(found[rows], expected, atol=1e-5)

    def scanned(blocks, axis):
        kept = {name: value for name, value in blocks.items() if not name.startswith("block_")}
        own = [blocks[name] for name in sorted(blocks.keys() - kept.keys())]
        return kept | {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves, axis), *own)}

    in_loop = scanned(params, 0) | {"stacks": scanned(params["stacks"], 1)}
    looped = jax.jit(model.clone(scan_blocks=True).apply)
    np.testing.assert_allclose(looped({"params": in_loop}, x, t, labels), found, atol=1e-5)
    rows = slice(2, None, 3)
    expected = looped({"params": in_loop}, x[rows], t[rows], labels[rows], segment=2)
    np.testing.assert_allclose(expected, found[rows], atol=1e-5)


def test_a_stack_learns_from_the_rows_of_its_segment_alone():
    model, params, x, t, labels = small()

    @jax.jit
    def gradient(x):
        loss = lambda params: jnp.square(model.apply({"params": params}, x, t, labels)).sum()
        return jax.grad(loss)(params)

    other = x + (np.arange(9) % 3 != 1)[:, None, None, None]  # all rows but those of segment 1
    before, after = gradient(x), gradient(other)
    of_stack = lambda grads, s: [leaf[s] for leaf in jax.tree.leaves(grads["stacks"])]
    own, others = ([of_stack(each, s) for each in (before, after)] for s in (1, 0))
    for a, b in zip(*own, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.abs(a).max() > 0
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(*others, strict=True))
    assert np.abs(before["patch_embed"]["kernel"] - after["patch_embed"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_each_stack_takes_its_own_steps_and_no_others(solver):
    """Velocity 1 in the channel of the stack: what a channel holds is how long its stack moved."""
    spec = sampler.SamplerSpec(
        LINEAR,
        0,
        solver=solver,
        num_steps=12,
        num_segments=3,
        diffusion=solvers.Diffusion("constant", 0.0),
    )

    def model_fn(params, x, t, labels, segment):
        return jnp.broadcast_to(jax.nn.one_hot(segment, 4), x.shape)

    times, numbers = spec.times(), spec.segment_numbers()
    is_stochastic = solver in solvers.SDE_STEPS
    assert len(numbers) == len(times) - 1 == (11 if is_stochastic else 12) or solver == "dopri5"
    if solver != "dopri5":
        assert (times[:-1] >= numbers / 3 - 1e-9).all()
        assert (times[1:] <= (numbers + 1) / 3 + 1e-9).all()
        assert np.bincount(numbers).tolist() == [4, 4, 3 if is_stochastic else 4]
    sample = jax.jit(sampler.make_sampler(model_fn, spec))
    x = sample(
        None,
        jnp.zeros((2, 1, 1, 4)),
        jnp.zeros(2, jnp.int32),
        keys=sampler.brownian_keys(0, [0, 1]),
    )
    np.testing.assert_allclose(x[:, 0, 0], [[1 / 3, 1 / 3, 1 / 3, 0]] * 2, atol=1e-5)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_the_same_field_in_every_stack_gives_its_ode(solver):
    """dx/dt = x - t from x(0): x(1) = x(0) e - (e - 2)."""
    spec = functools.partial(sampler.SamplerSpec, LINEAR, 0, solver=solver, num_steps=120)

    def model_fn(params, x, t, labels, segment=None):
        return x - t[:, None, None, None]

    noise, labels = jnp.linspace(-1, 1, 4).reshape(4, 1, 1, 1), jnp.zeros(4, jnp.int32)
    found, plain = (
        jax.jit(sampler.make_sampler(model_fn, spec(num_segments=count)))(None, noise, labels)
        for count in (6, 1)
    )
    np.testing.assert_allclose(found, noise * np.e - (np.e - 2), atol=1e-3)
    if solver == "heun":
        np.testing.assert_allclose(found, plain, atol=1e-5)


def test_guidance_carries_the_start_of_both_branches():
    """Velocity is the feature of the own branch, which was taken at the start of the segment."""
    spec = sampler.SamplerSpec(LINEAR, null_label=1, num_steps=4, num_segments=2)

    def start_fn(params, x, t, labels):  # 1 + t for the class, 10 for none
        return jnp.where(labels == 1, 10.0, 1.0 + t)

    def model_fn(params, x, t, labels, segment, start):
        own = jnp.where(labels == 1, start[:, -1], start[:, 0])
        return jnp.broadcast_to(own[:, None, None, None], x.shape)

    sample = jax.jit(sampler.make_sampler(model_fn, spec, start_fn=start_fn))
    zeros = jnp.zeros((2, 1, 1, 1)), jnp.zeros(2, jnp.int32)
    np.testing.assert_allclose(sample(None, *zeros).ravel(), [1.25] * 2, rtol=1e-6)
    guided = sample(None, *zeros, 2.0).ravel()  # 2 x 1.25 - 10
    np.testing.assert_allclose(guided, [-7.5] * 2, rtol=1e-6)


def test_the_residual_network_changes_nothing_at_the_start_and_by_its_output_later():
    model, params, x, _, labels = small(**RESIDUAL)

    @functools.partial(jax.jit, static_argnames="has_output")
    def apply(params, t, start=None, has_output=True):
        taps = (1,) if start is None else ()
        options = {"segment": 1, "start": start, "has_output": has_output, "taps": taps}
        return model.apply({"params": params}, x, t, labels, **options)

    at_start, later = jnp.full(9, 1 / 3, jnp.float32), jnp.full(9, 0.5, jnp.float32)
    exact, (start,) = apply(params, at_start)
    start = start[:, None]
    np.testing.assert_allclose(apply(params, at_start, start), exact, atol=1e-5)
    # Without tokens to begin with and with closed gates the residual network is 0.
    silent = jax.tree.map(np.zeros_like, (params["residual"], params["patch_embed"]))
    silent = params | dict(zip(("residual", "patch_embed"), silent, strict=True))
    found = apply(silent, later, start=start, has_output=False)
    np.testing.assert_array_equal(found, start[:, 0])
    halfway = apply(params, later, start=start, has_output=False) - start[:, 0]
    assert np.abs(halfway).max() > 0.1
    both = jnp.stack([start[:, 0], start[:, 0] + 1], axis=1)  # those without a class have another
    found = apply(silent, later, start=both, has_output=False) - start[:, 0]
    np.testing.assert_allclose(found[:, 0, 0], labels == 3, atol=1e-5)


def test_meshes_and_micro_batches_give_the_same_losses():
    """On the mesh parameters are split; the repulsion is too weak to be felt in fewer negatives."""
    options = SMALL | {"batch_size": 48, "terms": "repulsor+sra", "repulsor__bank_rows": 96}
    options |= {"model__depth": 1, "model__scan_blocks": True, "repulsor__weight": 1e-8}
    found = []
    for shape, parts in (((1, 1, 1), 1), ((4, 2, 1), 2)):
        c = tiny.config(**options, optimizer__accumulation_steps=parts)
        state, history = tiny.build(c, tiny.mesh(*shape)).run(tiny.batches(2, 48))
        names = ("flow_loss", "sra_loss", "grad_norm")
        found.append(([[m[name] for name in names] for m in history], state))
    (expected, one), (losses, other) = found
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    jax.tree.map(np.testing.assert_array_equal, other.bank.tags, one.bank.tags)
    of_first_step = [each.bank.features[0] for each in (other, one)]
    np.testing.assert_allclose(*of_first_step, atol=1e-4)


def test_the_published_size_has_the_published_parameters():
    c = config_lib.parse(blockwise_config.get_config("xl_2"))
    init = functools.partial(init_model_params, build_model(c.model))
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    millions = lambda *names: (
        sum(leaf.size for name in names for leaf in jax.tree.leaves(params[name])) / 1e6
    )
    assert millions("blocks") == pytest.approx(365.3, abs=0.05)
    assert millions("stacks") == pytest.approx(557.9, abs=0.05)
    assert millions("global_modulation", "stack_modulation") == pytest.approx(23.9, abs=0.05)
    head = 1152 * 2048 + 2048**2 + 2048 * 768 + 2 * 2048 + 768
    assert millions(*params) + head / 1e6 == pytest.approx(963.4, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__residual_depth": 1}, "residual.base_run='' and config.model.residual_depth=1: a"),
        (
            {"model__residual_depth": 1, "residual__base_run": "base", "terms": "sra"},
            "terms='sra', config.log.diagnostics_every_steps=10000: a residual network is trained",
        ),
        ({"conditioning__kind": "inpaint"}, "takes neither config.conditioning.kind='inpaint'"),
        ({"flow__path": "vp"}, "model.architecture='blockwise' predicts a velocity at all times"),
        ({"flow__time_distribution": "logit_normal"}, "flow.time_distribution='logit_normal' and"),
        (
            {"sampling__num_steps": 7},
            "sampling.num_steps=7 must be a multiple of config.model.segm",
        ),
        (
            {"sampling__time_shift": 2.0},
            "sampling.time_shift=2.0 has no meaning for config.model.s",
        ),
        (
            {"sampling__solver": "euler_maruyama", "sampling__num_steps": 3},
            "sampling.num_steps=3 leaves the last of config.model.segments=3 no step beside",
        ),
        ({"model__learn_sigma": True}, "model.learn_sigma, qk_norm: found True"),
        ({"model__hidden_size": 36}, "model.num_heads: found 2, expected heads of a multiple of 4"),
    ],
    ids=str,
)
def test_what_segments_cannot_do_is_refused(changes, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        tiny.config(**SMALL | changes)


def test_a_batch_that_segments_do_not_divide_is_refused():
    c = tiny.config(**SMALL | {"batch_size": 32})
    with pytest.raises(config_lib.ConfigError, match="x model.segments = 8 x 1 x 3 = 24"):
        config_lib.check_devices(c, 8)
    model, params, x, t, labels = small()
    with pytest.raises(ValueError, match="found 8 rows, expected a multiple of the 3 segments"):
        model.apply({"params": params}, x[:8], t[:8], labels[:8])


@pytest.mark.slow
def test_a_second_stage_trains_the_residual_network_alone_and_resumes(tmp_path, run, monkeypatch):
    """The rest keeps the bits of the run that it began from, in the average too."""
    options = {
        "batch_size": 16,
        "terms": "none",
        "model.architecture": "blockwise",
        "model.segments": 2,
        "model.segment_depth": 1,
        "model.adaln_rank": 2,
        "checkpoint.every_steps": 4,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0,
    }
    base = run(tmp_path / "base", total_steps=4, **options)
    second = options | {"model.residual_depth": 1, "residual.base_run": str(tmp_path / "base")}
    run_all = functools.partial(run, whole_mesh=True, total_steps=8, **second)  # splits the average
    reference = run_all(tmp_path / "second")
    assert reference.params["model"].keys() == {"residual"}
    kept = {name: reference.ema_params[name] for name in base.ema_params}
    jax.tree.map(np.testing.assert_array_equal, kept, base.ema_params)
    found = [line["residual_loss"] for line in read_jsonl(tmp_path / "second" / "metrics.jsonl")]
    assert np.mean(found[-2:]) < np.mean(found[:2])

    with pytest.raises(Preempted):
        run_all(tmp_path / "stopped", change=acting(_5=told_to_stop))
    monkeypatch.setattr("repulsor_jax.train.with_base_params", None)  # not read again
    resumed = run_all(tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, tiny.raw(resumed), tiny.raw(reference))
    config = config_lib.parse(tiny.digits_dict(**second))
    sample(config, tmp_path / "second")
