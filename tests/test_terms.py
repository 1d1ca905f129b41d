"""Terms in the step: published values of whole networks, every mesh, micro-batches, their cost."""

import ast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import objectives
from repulsor_jax import config as config_lib
from repulsor_jax.flows.paths import interpolate
from repulsor_jax.loss import Inputs, Shown, Teacher, draw_inputs, make_forward, make_loss
from repulsor_jax.method import registry
from repulsor_jax.method.alignment import sra_loss, teacher_time
from repulsor_jax.method.memory_bank import tag
from repulsor_jax.method.term import View
from repulsor_jax.method.token_heads import TokenHead
from repulsor_jax.models import dit
from repulsor_jax.models.token_groups import of_tokens, pixel_times, teacher_group_times
from repulsor_jax.models.torch_weights import from_torch_state_dict
from repulsor_jax.planning.cost import program_cost
from tests.oracles import fixtures, tiny


def published(name):
    path = fixtures.FOLDER / f"{name}_visible.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path) as file:
        return dict(file)


def params_of(values, prefix, fields):
    state = {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and "ap_head" not in name
    }
    return from_torch_state_dict(
        state,
        num_heads=fields["num_heads"],
        patch_size=fields["patch_size"],
        in_channels=fields["in_channels"],
    )


def trainer_for(fields, **overrides):
    c = tiny.config(
        batch_size=4,
        model__latent_size=fields["input_size"],
        model__in_channels=fields["in_channels"],
        model__hidden_size=fields["hidden_size"],
        model__depth=fields["depth"],
        model__num_heads=fields["num_heads"],
        model__num_classes=fields["num_classes"],
        model__learn_sigma=fields.get("learn_sigma", False),
        repulsor__bank_rows=0,
        **overrides,
    )
    return tiny.trainer(c)


def last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def check_gradients(found, values, prefix, fields):
    """Gradients of single tensors of the published network, relative to their norm."""
    names = {
        "x_embedder.proj.weight": ("patch_embed", "kernel"),
        "blocks.0.attn.qkv.weight": ("block_0", "qkv", "kernel"),
        "blocks.0.mlp.fc1.weight": ("block_0", "mlp_in", "kernel"),
        "blocks.2.mlp.fc1.weight": ("block_2", "mlp_in", "kernel"),
        "final_layer.linear.weight": ("final", "kernel"),
        "y_embedder.embedding_table.weight": ("label_embed", "embedding"),
    }
    checked = 0
    for name, path in names.items():
        expected = values.get(prefix + name)
        if expected is None:
            continue
        leaf = found
        for key in path:
            leaf = leaf[key]
        if name.startswith("x_embedder"):  # [D, C, p, p] -> [p * p * C, D]
            expected = expected.transpose(2, 3, 1, 0).reshape(-1, len(expected))
        elif "qkv" in name:  # [3 H hd, D] -> [D, H 3 hd]
            parts = expected.reshape(3, fields["num_heads"], -1, expected.shape[-1])
            expected = parts.transpose(3, 1, 0, 2).reshape(expected.shape[::-1])
        elif path[-1] == "kernel":
            expected = expected.T
        error = np.linalg.norm(leaf - expected) / np.linalg.norm(expected)
        assert error < 1e-4, name
        checked += 1
    assert checked >= 2


def test_layersync_in_sit_is_the_published_program():
    values = published("layersync")
    fields = ast.literal_eval(str(values["sit/config"]))
    student, teacher = values["sit/pair_1based"] - 1
    trainer = trainer_for(
        fields,
        terms="layersync",
        layersync__student_block=int(student),
        layersync__teacher_block=int(teacher),
    )
    params = {"model": params_of(values, "state/", fields), "terms": {}}
    t = jnp.asarray(values["sit/t"])
    labels = jnp.asarray(values["sit/labels"])
    inputs = Inputs(
        last(values["sit/data"]), last(values["sit/noise"]), t, labels, tag(labels), {}, {}, {}
    )
    loss_fn = make_loss(trainer)
    teacher_of = Teacher(params["model"], {})

    def loss(params, flow_weight, weight):
        value, (metrics, _) = loss_fn(params, teacher_of, inputs, None, {"layersync": weight})
        return value - (1 - flow_weight) * metrics["flow_loss"], metrics

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, metrics = gradient(params, 1.0, values["sit/weight"])
    np.testing.assert_allclose(metrics["flow_loss"], values["sit/flow"], rtol=1e-5)
    np.testing.assert_allclose(metrics["layersync_loss"], values["sit/reg"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], values["sit/total"], rtol=1e-5)
    check_gradients(grads["model"], values, "sit/grad_total/", fields)

    of_term, _ = gradient(params, 0.0, 1.0)
    norms = [
        np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(of_term["model"][f"block_{i}"])))
        for i in range(fields["depth"])
    ]
    np.testing.assert_allclose(norms, values["sit/reg_grad_norm_per_block"], rtol=1e-4)
    assert norms[student] > 0
    assert not any(norms[student + 1 :])  # exactly: nothing after the student learns from it


class Reversed(dit.DiT):
    """A network that counts time from data to noise, and points the velocity to the noise."""

    def __call__(self, x, t, labels, *, has_output=True, **options):
        found = super().__call__(x, 1.0 - t, labels, has_output=has_output, **options)
        return (-found[0], found[1]) if has_output else found


def reversed_trainer(fields, **overrides):
    trainer = trainer_for(fields, **overrides)
    shown = vars(trainer.model)
    names = [name for name in dit.DiT.__annotations__ if name in shown]
    return trainer._replace(model=Reversed(**{name: shown[name] for name in names}))


def sra_head(values):
    return {
        ours: {
            "kernel": values[f"student/ap_head.{theirs}.weight"].T,
            "bias": values[f"student/ap_head.{theirs}.bias"],
        }
        for ours, theirs in (("hidden", "linear1"), ("out", "linear2"))
    }


def test_sra_in_sit_is_the_published_program():
    values = published("sra")
    fields = ast.literal_eval(str(values["sra/config"]))
    student, teacher = values["sra/blocks_1based"] - 1
    trainer = reversed_trainer(
        fields, terms="sra", sra__student_block=int(student), sra__teacher_block=int(teacher)
    )
    head = sra_head(values)
    params = {"model": params_of(values, "student/", fields), "terms": {"sra": head}}
    averaged = Teacher(params_of(values, "teacher/", fields), {})
    data, noise = last(values["sra/data"]), last(values["sra/noise"])
    labels = jnp.asarray(values["sra/labels_after_dropout"])
    view = View(float(values["sra/t_max"]), new_noise=False)
    (only,) = trainer.objective.views
    np.testing.assert_allclose(only.time_gap, view.time_gap)
    seen = {only: Shown(jnp.asarray(values["sra/t_teacher_ours"]), noise)}
    t = jnp.asarray(values["sra/t_ours"])
    inputs = Inputs(data, noise, t, labels, tag(labels), seen, {}, {})
    loss_fn = make_loss(trainer)
    weights = {"sra": jnp.float32(0.5)}
    loss = lambda params: loss_fn(params, averaged, inputs, None, weights)
    grads, (metrics, _) = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(metrics["flow_loss"], values["sra/flow"], rtol=1e-5)
    np.testing.assert_allclose(metrics["sra_loss"], values["sra/align_cos_published"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], values["sra/total"], rtol=1e-5)
    check_gradients(grads["model"], values, "sra/grad_total/", fields)
    expected = values["sra/grad_total/ap_head.linear1.weight"].T
    error = np.linalg.norm(grads["terms"]["sra"]["hidden"]["kernel"] - expected)
    assert error < 1e-4 * np.linalg.norm(expected)


def test_dual_times_and_attention_separation_are_the_published_program():
    values = published("sra_dts_as")
    fields = ast.literal_eval(str(values["dts/config"]))
    student, teacher = (int(block) for block in values["dts/blocks_1based"] - 1)
    trainer = reversed_trainer(
        fields,
        terms="sra",
        sra__student_block=student,
        sra__teacher_block=teacher,
        sra__teacher_labels="true",
        flow__time_groups=2,
        flow__group_fractions=(0.25, 0.75),
        model__attention_separation=True,
    )
    params = {"model": params_of(values, "student/", fields), "terms": {"sra": sra_head(values)}}
    averaged = Teacher(params_of(values, "teacher/", fields), {})
    groups, labels = values["dts/group_ids"], jnp.asarray(values["dts/labels"])
    counts = np.stack([np.bincount(row) for row in groups])
    np.testing.assert_array_equal(counts, [trainer.objective.groups.counts] * len(groups))
    data, noise = last(values["dts/data"]), last(values["dts/noise"])

    # The times, and the images at them: each pixel is that of its group's image.
    t = jnp.asarray(1.0 - values["dts/group_t_theirs"].T)
    (view,) = trainer.objective.views
    moved = teacher_time(t, jnp.asarray(values["dts/group_u"].T), view.time_gap)
    view_time = teacher_group_times(moved, t, trainer.objective.groups.teacher_times)
    size = fields["input_size"]
    for name, times in (("", t), ("_teacher", view_time)):
        expected = 1.0 - values[f"dts/token_t{name}_theirs"]
        np.testing.assert_allclose(of_tokens(times, groups), expected, atol=1e-6)
        x = interpolate(trainer.objective.path, data, noise, pixel_times(times, groups, size))
        by_group = values[f"dts/x{name or '_t'}_per_group"]
        for group, each in enumerate(by_group):
            tokens = dit.patchify(last(each), fields["patch_size"])
            found = dit.patchify(x, fields["patch_size"])
            np.testing.assert_allclose(found[groups == group], tokens[groups == group], atol=1e-6)

    tags = tag(labels, labels)  # the teacher reads those before dropout
    views, extras = {view: Shown(view_time, noise)}, {"groups": groups}
    inputs = Inputs(data, noise, t, labels, tags, views, {}, extras)
    _, seen = jax.jit(make_forward(trainer))(params, averaged, inputs)
    out = dit.patchify(-seen.output, fields["patch_size"])
    np.testing.assert_allclose(out, values["dts/out_tokens_theirs"], atol=2e-5)
    width = fields["hidden_size"]
    ours = TokenHead(2 * width, width).apply(
        {"params": params["terms"]["sra"]}, seen.tokens[student]
    )
    theirs = seen.teacher[view][1][teacher]
    np.testing.assert_allclose(ours, values["dts/student_feature_after_head"], atol=2e-5)
    np.testing.assert_allclose(theirs, values["dts/teacher_feature"], atol=2e-5)
    over_channels = sra_loss(ours, theirs, axis="channels")
    np.testing.assert_allclose(over_channels, values["dts/align_cos_over_channels"], rtol=1e-5)
    flow = trainer.objective.flow_loss(seen.output, data, noise, pixel_times(t, groups, size))
    np.testing.assert_allclose(flow, values["dts/flow_per_sample"], rtol=1e-5)

    loss_fn, weights = make_loss(trainer), {"sra": jnp.float32(0.5)}
    loss = lambda params: loss_fn(params, averaged, inputs, None, weights)
    grads, (metrics, _) = jax.jit(jax.grad(loss, has_aux=True))(params)
    for metric, name in (
        ("flow_loss", "flow"),
        ("sra_loss", "align_cos_published_over_tokens"),
        ("loss", "total"),
    ):
        np.testing.assert_allclose(metrics[metric], values[f"dts/{name}"], rtol=1e-5)
    check_gradients(grads["model"], values, "dts/grad_total/", fields)

    # As it is sampled: one time, and all tokens see all.
    t = jnp.asarray(1.0 - values["dts/full_attention_t_theirs"])
    x = last(values["dts/x_t_per_group"][0])
    apply = jax.jit(lambda params: trainer.model.apply({"params": params}, x, t, labels, taps=(0,)))
    np.testing.assert_allclose(
        -apply(params["model"])[0], last(values["dts/full_attention_out_theirs"]), atol=2e-5
    )


# Each term of the registry, and each form of the bank's keys and negatives, in few sums.
SUMS = {
    "repulsor_positives+layersync+dual_times+latent_alignment+contrastive_flow": {
        "flow.whole_fraction": 0.3,
        "flow.path": "gvp",
        "repulsor.view_noise": "new",
        "repulsor.time_gap": 0.7,
        "repulsor.pooling": "token",
        "repulsor.same_class_weight": 0.3,
        "repulsor.time_window": 0.6,
        "repulsor.bank_rows": 4 * 48,
        "repulsor.bank_start_step": 1,
    },
    "repulsor_latent+dispersive+feature_alignment": {
        "feature_alignment.dim": 6,
        "feature_alignment.head_size": 8,
    },
    "byol+sra_smooth_l1": {"contrastive_flow.labelled_only": True},
}
IN_BATCH = {"repulsor", "dispersive"}  # compare samples of a micro-batch with each other


def run(folder, name, mesh, microbatches=1):
    values = tiny.config_dict(
        model__depth=4, model__scan_blocks=True, optimizer__accumulation_steps=microbatches
    )
    objectives.use(values, name)
    values.update_from_flattened_dict(SUMS[name])
    batches = tiny.batches(tiny.SLOTS)
    if "feature_alignment" in values.terms:
        features = np.random.default_rng(1).standard_normal((tiny.SLOTS * tiny.BATCH, 4, 6))
        values.data.features = str(folder / "features.npy")
        np.save(values.data.features, features.astype(np.float16))
        batches = [b | {"features": features[b["ids"]].astype(np.float16)} for b in batches]
    step = tiny.build(config_lib.parse(values), mesh)
    rng = np.random.default_rng(0)

    def shake(x):  # at the start all blocks are the identity, and LayerSync has no direction
        noise = 0.1 * rng.standard_normal(x.shape).astype(np.float32)
        return jax.device_put(np.asarray(x) + noise, x.sharding)

    params = jax.tree.map(shake, step.state.params)
    return step._replace(state=step.state.replace(params=params)).run(batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMS)
def test_every_term_on_meshes_and_in_micro_batches(name, tmp_path):
    expected_state, expected = run(tmp_path, name, tiny.mesh())
    for shape, microbatches in (((4, 2, 1), 1), ((2, 1, 1), 2)):
        state, history = run(tmp_path, name, tiny.mesh(*shape), microbatches)
        differ = microbatches > 1 and IN_BATCH & {m.removesuffix("_loss") for m in expected[0]}
        if differ and SUMS[name].get("repulsor.negatives") != "none" and "byol" not in name:
            # The first step has one bank and one network: only negatives within the batch differ.
            means = [m for m in expected[0] if m.removesuffix("_loss") not in IN_BATCH]
            means = [m for m in means if m not in ("loss", "grad_norm")]
            found, wanted = history[:1], expected[:1]
        else:
            means, found, wanted = list(expected[0]), history, expected
        for metric in means:
            np.testing.assert_allclose(
                [m[metric] for m in found], [m[metric] for m in wanted], rtol=5e-4, err_msg=metric
            )
        if expected_state.bank is not None:
            jax.tree.map(np.testing.assert_array_equal, state.bank.tags, expected_state.bank.tags)
            # Rows of the first step come from the first network; those of others have learnt.
            slots = slice(0, 1 if differ else None)
            if not (differ and "repulsor.bank_start_step" in SUMS[name]):
                np.testing.assert_allclose(
                    state.bank.features[slots], expected_state.bank.features[slots], atol=5e-4
                )
    assert all(np.isfinite(list(m.values())).all() for m in expected)


def test_what_a_term_costs_is_what_it_runs():
    """FLOPs of matrix products in the compiled step: a teacher costs its blocks, others little."""

    def flops(name):
        values = tiny.config_dict(
            model__depth=8,
            model__scan_blocks=True,
            model__hidden_size=64,
            model__latent_size=16,
            batch_size=8,
        )
        values.repulsor.bank_rows = 64
        objectives.use(values, name)
        c = config_lib.parse(values)
        compiled = tiny.compile_only(c, tiny.mesh(), shape=(16, 16, 2))
        return program_cost(compiled.as_text()).matmul_flops

    plain = flops("none")
    for name, least, most in (
        ("layersync", 1.0, 1.01),
        ("contrastive_flow", 1.0, 1.01),
        ("sra", 1 + 0.9 * 6 / 8 / 3, 1.4),  # six blocks of eight, forward alone, and a head
        ("dual_times", 1 + 0.9 * 6 / 8 / 3, 1.4),
        ("repulsor", 1.0, 1.02),
        ("repulsor_positives", 1 + 0.9 * 3 / 8 / 3, 1 + 1.2 * 3 / 8 / 3),  # blocks 0 to 2
    ):
        assert least <= flops(name) / plain <= most, name


def test_the_teacher_is_shown_crops_where_they_are_asked_for():
    for min_crop in (1.0, 0.5):
        c = tiny.config(
            repulsor__positives="view",
            repulsor__bank_keys="teacher",
            repulsor__view_min_crop=min_crop,
        )
        batch = jax.tree.map(jnp.asarray, tiny.batches(1)[0])
        inputs = draw_inputs(jax.random.key(0), batch, tiny.trainer(c).objective, tiny.FORMAT)
        ((view, shown),) = inputs.views.items()
        assert view.min_crop == min_crop
        assert (shown.data is None) == (min_crop == 1)
    crops, images = shown.data, inputs.data
    assert crops.shape == images.shape
    # Weighted means of pixels, each of its own image.
    low, high = (f(images, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    assert jnp.all((low - 1e-5 <= crops) & (crops <= high + 1e-5))
    assert jnp.all(jnp.abs(crops - images).max((1, 2, 3)) > 0.1)


def test_every_term_is_in_a_sum():
    names = {name for total in SUMS for name in total.split("+")}
    assert {objectives.PRESETS[name][0] for name in names} == {*registry.TERMS}


def test_without_terms_nothing_of_them_is_in_the_state():
    state = tiny.build(tiny.config(terms="none"), tiny.mesh()).state
    assert (state.params["terms"], state.ema_terms, state.bank) == ({}, {}, None)


def test_parameters_of_terms_are_boxed_with_names():
    values = tiny.config_dict(model__depth=4)
    objectives.use(values, "repulsor_latent+sra+latent_alignment")
    for term in tiny.trainer(config_lib.parse(values)).objective.terms:
        boxed = jax.eval_shape(term.init, jax.random.key(0))
        leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
        assert leaves
        assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"terms": "layersync", "layersync.student_block": 2, "layersync.teacher_block": 2},
            "layersync.student_block=2 must be before config.layersync.teacher_block=2",
        ),
        (
            {"terms": "contrastive_flow", "flow.prediction": "noise"},
            "contrastive_flow compares velocities, but config.flow.prediction='noise'",
        ),
        ({"terms": "sra", "sra.teacher_block": 4}, "sra.teacher_block=4 is past the last block, 3"),
        ({"repulsor.negatives": "none"}, "repulsor.positives='none' leaves nothing to pull"),
        (
            {"repulsor.pooling": "token", "repulsor.bank_rows": 32},
            "repulsor.bank_rows=32 must be a multiple of 64, the rows of a batch",
        ),
        (
            {"repulsor.pooling": "token", "repulsor.pool_grid": 3, "repulsor.bank_rows": 0},
            "repulsor.pool_grid=3 must divide the 2 tokens along a side",
        ),
        (
            {
                "repulsor.positives": "view",
                "repulsor.bank_keys": "latent",
                "repulsor.negatives": "none",
            },
            "repulsor.negatives='none' would let the encoder of config.repulsor.bank_keys='latent'",
        ),
        (
            {"repulsor.positives": "view", "repulsor.view_min_crop": 0.5},
            "repulsor.view_min_crop=0.5 needs config.repulsor.positives='view' and bank_keys='te",
        ),
        (
            {
                "repulsor.positives": "view",
                "repulsor.bank_keys": "teacher",
                "repulsor.view_min_crop": 0.5,
                "repulsor.pooling": "token",
                "repulsor.bank_rows": 64,
            },
            "repulsor.view_min_crop=0.5 moves what is where in the image",
        ),
        ({"repulsor.bank_start_step": 10}, "repulsor.bank_start_step=10 leaves nothing"),
        (
            {"terms": "sra", "sra.student_block": 3, "sra.teacher_block": 1},
            "sra.student_block=3 must not be after config.sra.teacher_block=1",
        ),
        ({"contrastive_flow.weight": 1.0}, "contrastive_flow.weight: expected .*less than 1"),
        (
            {
                "repulsor.positives": "view",
                "repulsor.bank_keys": "latent",
                "repulsor.time_window": 0.5,
            },
            "repulsor.time_window=0.5 has no meaning for config.repulsor.bank_keys='latent'",
        ),
    ],
    ids=str,
)
def test_terms_that_contradict_themselves_are_refused(changes, message):
    values = tiny.config_dict(model__depth=4)
    values.update_from_flattened_dict(changes)
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.parse(values)


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match="objective 'magnet': expected none, or a sum of"):
        objectives.use(tiny.config_dict(), "repulsor+magnet")
