"""A learned source in the step, in checkpoints and in samples."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import learned_source
from repulsor_jax import config as config_lib
from repulsor_jax.checkpoints import resuming
from repulsor_jax.checkpoints.checkpointer import CheckpointError
from repulsor_jax.config import ConfigError
from repulsor_jax.inference import exported, pretrained
from repulsor_jax.inference import run as run_lib
from repulsor_jax.loss import Teacher, draw_inputs, make_forward, source_losses
from repulsor_jax.method.crops import random_crops
from repulsor_jax.models import torch_weights
from repulsor_jax.models.build import build_source
from repulsor_jax.models.dit import tokens_after
from repulsor_jax.train_state import create_train_state
from tests.oracles import tiny

SOURCE = {"source__name": "class", "source__rank": 8}
BOTH = SOURCE | {"source__learn_variance": True}


def shaken(tree, seed=0):
    """Parameters of no initialisation, where a zero would hide a gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.2 * rng.standard_normal(x.shape).astype(np.float32), tree
    )


def run_steps(shape=(1, 1, 1), **options):
    """States and metrics of three steps, each state on the host."""
    step = tiny.build(tiny.config(terms="none", **options), tiny.mesh(*shape))
    state, first = step.run(tiny.batches(3)[:1])
    kept = jax.device_get((state.opt_state, state.ema_params))
    state, others = step._replace(state=state).run(tiny.batches(3)[1:])
    return kept, state, first + others


LARGE = BOTH | {"source__rank": 128, "source__null": "gaussian"}  # large enough to be sharded


@pytest.fixture(scope="module")
def learned():
    return run_steps(**LARGE)


def test_the_first_step_is_that_of_the_plain_trainer(learned):
    (opt_state, ema_params), _, metrics = learned
    (plain_opt_state, _), _, plain_metrics = run_steps()
    assert metrics[0]["flow_loss"] == plain_metrics[0]["flow_loss"]
    assert metrics[0]["source_variance_loss"] == 0
    assert metrics[1]["flow_loss"] != plain_metrics[1]["flow_loss"]
    found, expected = (optax.tree.get(s, "mu")["model"] for s in (opt_state, plain_opt_state))
    of_source = found.pop("source")
    # XLA fuses the backward passes of two programs in two ways: rounding differs.
    errors = jax.tree.map(
        lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-9), found, expected
    )
    assert max(jax.tree.leaves(errors)) < 1e-5
    for head in ("mean", "log_variance"):
        assert np.abs(of_source[head]["bias"]).max() > 0
    # The average that samples are drawn from has the source too, after Adam's first step.
    moved = np.abs(ema_params["source"]["mean"]["bias"]).max()
    np.testing.assert_allclose(moved, 0.1 * 1e-2, rtol=1e-3)


@pytest.mark.parametrize(("null", "detach"), [("class", True), ("gaussian", False)])
def test_the_loss_is_what_its_parts_say(null, detach):
    c = tiny.config(
        terms="sra",
        sra__teacher_block=0,
        model__label_dropout=0.5,
        source__null=null,
        source__detach_target=detach,
        **BOTH,
    )
    trainer = tiny.trainer(c)
    batch = jax.tree.map(jnp.asarray, tiny.batches(1)[0])
    inputs = draw_inputs(jax.random.key(5), batch, trainer.objective, tiny.FORMAT)
    ((view, shown),) = inputs.views.items()
    cropped = shown._replace(data=random_crops(jax.random.key(6), inputs.data, 0.5))
    inputs = inputs._replace(views={view: cropped})
    state = create_train_state(trainer, tiny.mesh())
    params, ema = shaken(state.params["model"]), shaken(state.ema_params, 1)
    head = state.params["terms"]["sra"]
    true, given = batch["labels"], inputs.labels
    assert {3} < {*np.asarray(given).tolist()}  # some labels are dropped
    t = inputs.t[:, None, None, None]

    def heads(params, labels):
        p = params["source"]
        h = p["table"]["embedding"][labels] @ p["hidden"]["kernel"] + p["hidden"]["bias"]
        h = h * jax.nn.sigmoid(h)
        found = (h @ p[k]["kernel"] + p[k]["bias"] for k in ("mean", "log_variance"))
        return [each.reshape(-1, *tiny.SHAPE) for each in found]

    def points(params, noise):
        mean, log_variance = heads(params, true)
        points = mean + jnp.exp(log_variance / 2) * noise
        is_normal = (given == 3) & (null == "gaussian")
        return jnp.where(is_normal[:, None, None, None], noise, points)

    def expected(params):
        x_0 = points(params, inputs.noise)
        end = jax.lax.stop_gradient(x_0) if detach else x_0
        v = trainer.model.apply(
            {"params": params}, t * inputs.data + (1 - t) * x_0, inputs.t, given
        )
        mean, logs = heads(params, true)
        unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 0.1)
        variance = jnp.mean(jnp.exp(logs) - 1 - logs) / 2
        alignment = jnp.mean((unit(mean) - unit(inputs.data)) ** 2)
        flow = jnp.mean((v - (inputs.data - end)) ** 2)
        # The teacher sees points of its own source.
        at, noise, data = cropped
        ts = at[:, None, None, None]
        x = ts * data + (1 - ts) * points(ema, noise)
        shown = tokens_after(trainer.model, ema, x, at, given, (0,))[0]
        return flow + 5 * variance + alignment, (flow, variance, alignment, shown)

    def found(params):
        own = {"model": params, "terms": {"sra": head}}
        flow, seen = make_forward(trainer)(own, Teacher(ema, {}), inputs)
        losses = source_losses(trainer, params, inputs)
        ((_, shown),) = seen.teacher.values()
        values = flow, *(value for _, value in losses.values()), shown[0]
        return flow + sum(weight * value for weight, value in losses.values()), values

    (_, parts), grads = jax.jit(jax.value_and_grad(found, has_aux=True))(params)
    (_, wanted), wanted_grads = jax.jit(jax.value_and_grad(expected, has_aux=True))(params)
    for value, of in zip(parts, wanted, strict=True):
        np.testing.assert_allclose(value, of, rtol=1e-5, atol=1e-5)
    errors = jax.tree.map(
        lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(y),
        grads["source"],
        wanted_grads["source"],
    )
    assert max(jax.tree.leaves(errors)) < 1e-4


def test_meshes_and_micro_batches_agree(learned):
    _, state, found = run_steps((2, 2, 2), optimizer__accumulation_steps=2, **LARGE)
    assert not state.params["model"]["source"]["mean"]["kernel"].sharding.is_fully_replicated
    _, _, expected = learned
    assert expected[-1]["source_variance_loss"] > 0
    for name in expected[0]:
        np.testing.assert_allclose(
            [m[name] for m in found], [m[name] for m in expected], rtol=2e-4, err_msg=name
        )
    for m in expected:
        total = m["flow_loss"] + 5 * m["source_variance_loss"] + m["source_alignment_loss"]
        assert m["loss"] == pytest.approx(total, rel=1e-5)


def test_what_a_run_starts_from_is_in_its_checkpoint(tmp_path):
    values = tiny.config_dict(**SOURCE)
    params = tiny.random_params(config_lib.parse(values))
    tiny.save_run(tmp_path, values, {7: params})
    c = tiny.config(**SOURCE)
    with run_lib.open_checkpoints(c, tmp_path) as checkpointer:
        experiment = run_lib.open_experiment(c, tmp_path, checkpointer, 7)
        found = jax.device_get(run_lib.restore_params(experiment, checkpointer, 7))
        for changes, message in (
            ({}, "config.source.name is 'gaussian', but the run has 'class'"),
            (SOURCE | {"source__rank": 9}, "config.source.rank is 9, but the run has 8"),
            (BOTH, "config.source.learn_variance is True, but the run has False"),
        ):
            with pytest.raises(CheckpointError, match=message):
                run_lib.open_experiment(tiny.config(**changes), tmp_path, checkpointer, 7)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert "source" in found

    # And in its export, which our own sampler reads, and diffusers' pipeline could not start from.
    state = exported.write_weights(tmp_path, experiment, found, "sit")
    assert "starts from N(0, I)" in exported.write_diffusers(tmp_path, experiment, state)
    assert not (tmp_path / "transformer").exists()
    from_file = {"model__init_from": str(tmp_path / exported.EXPORTED)}
    _, read = pretrained.open_published(tiny.config(**SOURCE, **from_file), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), params)
    with pytest.raises(ConfigError, match="it needs --config.source.name=class"):
        pretrained.open_published(tiny.config(**from_file), tmp_path)
    guided = tiny.config(sampling__guiding_run=str(tmp_path), sampling__cfg_scale=2.0)
    plain = tiny.config_dict()
    tiny.save_run(tmp_path / "plain", plain, {7: tiny.random_params(tiny.config())})
    with run_lib.open_checkpoints(guided, tmp_path / "plain") as checkpointer:
        experiment = run_lib.open_experiment(guided, tmp_path / "plain", checkpointer, 7)
    with pytest.raises(ConfigError, match="config.source.name is 'class', and 'gaussian' in the"):
        run_lib.load_guide(experiment)


def test_a_checkpoint_without_the_section_starts_from_noise(tmp_path):
    values = tiny.config_dict()
    record = values.to_dict()
    del record["source"], record["flow"]["time_shift"]
    present = json.loads(json.dumps(values.to_dict()))
    assert resuming.check(present, {}, record, {}) == []
    present["source"]["name"] = "class"
    with pytest.raises(ConfigError, match="config.source.name: 'gaussian' -> 'class'"):
        resuming.check(present, {}, record, {}, force=True)
    without = values.copy_and_resolve_references()
    with without.unlocked():
        del without["source"]
    records = run_lib.parse(
        run_lib.RunRecords,
        run_lib._known(run_lib.RunRecords, without.to_dict() | {"latents": LATENTS}),
        "run",
    )
    assert records.source.name == "gaussian"


LATENTS = {
    "autoencoder": "identity",
    "weights_sha256": "",
    "shift": [0.0],
    "factor": [1.0],
    "class_names": ["a"],
}


def test_the_source_goes_to_torch_and_back():
    c = tiny.config(model__latent_size=6, **BOTH)
    params = tiny.random_params(c)
    sizes = {"num_heads": 2, "patch_size": 2}
    state = torch_weights.to_torch_state_dict(params, latent_size=6, **sizes)
    back = torch_weights.from_torch_state_dict(state, in_channels=2, **sizes)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # By the layers of PyTorch: x @ weight.T + bias, then [C, H, W].
    h = state["source.table.weight"][[2, 0]] @ state["source.hidden.weight"].T
    h = np.asarray(jax.nn.silu(h + state["source.hidden.bias"]))
    mean, log_variance = build_source(c.source, c.model).apply(
        {"params": params["source"]}, jnp.array([2, 0])
    )
    for name, expected in (("mean", mean), ("log_variance", log_variance)):
        found = h @ state[f"source.{name}.weight"].T + state[f"source.{name}.bias"]
        found = np.moveaxis(found.reshape(-1, 2, 6, 6), 1, -1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_null_class_is_standard_normal_and_the_parameters_have_names():
    c = tiny.config(**BOTH)
    module = build_source(c.source, c.model)
    params = tiny.random_params(c)["source"]
    mean, log_variance = module.apply({"params": params}, jnp.array([3, 1]))
    for head in (mean, log_variance):
        assert not np.any(head[0])
        assert np.all(head[1] != 0)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.array([0]))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow__prediction": "noise"}, "source.name='class' learns through the velocity's loss"),
        (
            {"source__learn_variance": True, "source__variance_weight": 0.0},
            "source.variance_weight=0 lets the variance .* collapse",
        ),
        ({"model__in_channels": 1}, "source.alignment_axis='channels' has no direction"),
        ({"terms": "contrastive_flow"}, "contrastive_flow draws the targets .* leave one"),
        ({"sampling__velocity_scale": 0.9}, "sampling.velocity_scale=0.9 scales about the mean"),
    ],
    ids=str,
)
def test_contradictions_are_refused(changes, message):
    tiny.config(**{k: v for k, v in changes.items() if not k.startswith("source")})
    with pytest.raises(ConfigError, match=message):
        tiny.config(**SOURCE | changes)


@pytest.mark.parametrize("variant", ["digits", "digits,repulsor", "xl_2", "b_4,layersync"])
def test_the_configurations_are_valid(variant):
    c = config_lib.parse(learned_source.get_config(variant))
    assert c.source.name == "class"
    assert c.terms == (variant.partition(",")[2] or "none")
    source = build_source(c.source, c.model)
    shapes = jax.eval_shape(source.init, jax.random.key(0), jnp.zeros((1,), jnp.int32))
    count = sum(x.size for x in jax.tree.leaves(nn.unbox(shapes)))
    if variant == "xl_2":
        assert count == 1000 * 256 + 257 * 256 + 257 * 4096
