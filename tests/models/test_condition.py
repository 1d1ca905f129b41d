"""A condition's channels in the patch embedding, and LFM's DiT."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.flows.sampler import guided_prediction
from repulsor_jax.models.build import build_model
from repulsor_jax.models.dit import DiT
from repulsor_jax.models.torch_weights import from_torch_state_dict
from tests.oracles import fixtures, tiny


def inputs(rng, channels=0):
    x = rng.standard_normal((3, 4, 4, 2)).astype(np.float32)
    condition = rng.standard_normal((3, 4, 4, channels)).astype(np.float32)
    return (x, np.array([0.1, 0.5, 0.9], np.float32), np.array([0, 2, 3])), condition


SHOWN = {
    "inpaint": {"conditioning__kind": "inpaint"},
    "semantic": {"conditioning__kind": "semantic", "conditioning__classes": 5},
}


@pytest.mark.parametrize(("kind", "channels"), [("inpaint", 3), ("semantic", 5)])
def test_a_zero_kernel_gives_the_output_without_a_condition_to_the_bit(kind, channels):
    c = tiny.config(**SHOWN[kind])
    model = build_model(c.model, conditioning=c.conditioning)
    params = tiny.random_params(c)  # of the network without a condition
    rest, condition = inputs(np.random.default_rng(0), channels)
    kernel = np.zeros((model.condition_channels * 4, 32), np.float32)
    grown = params | {"condition_embed": {"kernel": kernel}}
    if kind == "semantic":
        rows = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
        grown |= {"condition_map": {"kernel": rows}}
    plain = build_model(c.model).apply({"params": params}, *rest)
    found = model.apply({"params": grown}, *rest, condition=condition)
    assert np.abs(plain).max() > 0.01
    np.testing.assert_array_equal(found, plain)
    # And with a kernel it does something.
    grown["condition_embed"] = {"kernel": kernel + params["patch_embed"]["kernel"][:1]}
    assert np.abs(model.apply({"params": grown}, *rest, condition=condition) - plain).max() > 1e-3


def test_the_embedding_is_that_of_all_channels_in_one_matrix():
    rng = np.random.default_rng(0)
    fields = {"latent_size": 4, "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2}
    joined = DiT(in_channels=5, num_classes=3, **fields)
    split = DiT(in_channels=2, condition_channels=3, num_classes=3, **fields)
    (x, t, labels), condition = inputs(rng, 3)
    init = jax.eval_shape(joined.init, jax.random.key(0), np.zeros((1, 4, 4, 5)), t[:1], labels[:1])
    params = jax.tree.map(
        lambda p: (0.3 * rng.standard_normal(p.value.shape)).astype(np.float32),
        init["params"],
        is_leaf=lambda p: hasattr(p, "value"),
    )
    own = dict(params)
    kernel = params["patch_embed"]["kernel"].reshape(4, 5, 8)  # [p * p, C, D]
    own["patch_embed"] = params["patch_embed"] | {"kernel": kernel[:, :2].reshape(8, 8)}
    own["condition_embed"] = {"kernel": kernel[:, 2:].reshape(12, 8)}
    tap = {"taps": (0,), "has_output": False}
    expected = joined.apply(
        {"params": params}, np.concatenate([x, condition], axis=-1), t, labels, **tap
    )
    found = split.apply({"params": own}, x, t, labels, condition=condition, **tap)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_condition_of_another_shape_or_where_none_is_taken_is_refused():
    c = tiny.config(**SHOWN["inpaint"])
    rest, condition = inputs(np.random.default_rng(0), 2)
    model = build_model(c.model, conditioning=c.conditioning)
    with pytest.raises(ValueError, match=r"condition: found shape \(3, 4, 4, 2\), expected \(3, 4"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), *rest, condition=condition))
    plain = build_model(c.model)
    with pytest.raises(ValueError, match=r"condition: found shape .* \(3, 4, 4, 0\)"):
        jax.eval_shape(lambda: plain.init(jax.random.key(0), *rest, condition=condition))


def test_the_network_and_its_guidance_are_those_of_latent_flow_matching():
    path = fixtures.FOLDER / "lfm_visible.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path) as file:
        values = dict(file)
    fields = ast.literal_eval(str(values["dit/config"]))
    state = {n.removeprefix("state/"): v for n, v in values.items() if n.startswith("state/")}
    params = from_torch_state_dict(
        state, num_heads=fields["num_heads"], patch_size=2, in_channels=fields["in_channels"]
    )
    model = DiT(
        latent_size=fields["img_resolution"],
        in_channels=fields["in_channels"],
        patch_size=fields["patch_size"],
        hidden_size=fields["hidden_size"],
        depth=fields["depth"],
        num_heads=fields["num_heads"],
        num_classes=fields["num_classes"],
    )
    last = lambda name: np.moveaxis(values[f"dit/{name}"], 1, -1)
    apply = lambda x, t, labels: model.apply({"params": params}, x, t, labels)
    x, t, labels = last("x"), jnp.float32(values["dit/t_theirs"]), values["dit/labels"]
    times = jnp.full(2, t)
    null = fields["num_classes"]
    for name, labels_of in (("out_theirs", labels), ("out_null_theirs", np.full(2, null))):
        np.testing.assert_allclose(apply(x, times, labels_of), last(name), atol=2e-5)
    found = guided_prediction(apply, x, t, labels, null_label=null, scale=1.5)
    np.testing.assert_allclose(found, last("guided_1.5_theirs"), atol=2e-5)
