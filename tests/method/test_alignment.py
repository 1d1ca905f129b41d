"""LayerSync, SRA and clean latents against the published programs' values and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repulsor_jax.method import alignment
from repulsor_jax.method.token_heads import TokenHead
from repulsor_jax.models import dit


def check(loss_fn, arguments, value, gradients):
    """The value to 1e-5, each gradient to 1e-4 of its own norm (exactly, where it is zero)."""
    numbers = tuple(range(len(gradients)))
    found, found_gradients = jax.jit(jax.value_and_grad(loss_fn, numbers))(*arguments)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for gradient, expected in zip(found_gradients, gradients, strict=True):
        assert np.linalg.norm(gradient - expected) <= 1e-4 * np.linalg.norm(expected)


def tokens(seed=0, shape=(2, 3, 4)):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal(shape)


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_layersync_as_published(reference_fixtures):
    values = np.load(reference_fixtures / "layersync_visible.npz")
    shallow, deep = values["loss/shallow"], values["loss/deep"]
    gradients = (values["loss/grad_shallow"], values["loss/grad_deep"])
    check(alignment.layersync_loss, (shallow, deep), values["loss/reg"], gradients)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smooth_l1_beta0.05", {"distance": "smooth_l1"}),
        ("cos_over_channels", {"axis": "channels"}),
        ("cos_published_over_tokens", {}),
    ],
)
def test_sra_as_published(reference_fixtures, name, options):
    values = np.load(reference_fixtures / "sra_visible.npz")
    student, teacher = values["align/student"], values["align/teacher"]
    gradients = (values[f"align/{name}/grad"], np.zeros_like(teacher))

    def loss_fn(student, teacher):
        return alignment.sra_loss(student, teacher, **options)

    check(loss_fn, (student, teacher), values[f"align/{name}"], gradients)


def test_sra_times_weights_and_head_as_published(reference_fixtures):
    values = np.load(reference_fixtures / "sra_visible.npz")
    time = alignment.teacher_time(values["sra/t_ours"], values["sra/u"], float(values["sra/t_max"]))
    np.testing.assert_allclose(time, values["sra/t_teacher_ours"], atol=1e-6)
    for size, start, steps in (("res256", 149, 1000), ("res512", 99, 800)):
        found = alignment.decayed_weight(0.2, values["weight/epoch"], start, steps)
        np.testing.assert_allclose(found, values[f"weight/{size}"], rtol=1e-5)
    params = {
        ours: {
            "kernel": values[f"head/state/{theirs}.weight"].T,
            "bias": values[f"head/state/{theirs}.bias"],
        }
        for ours, theirs in (("hidden", "linear1"), ("out", "linear2"))
    }
    width = values["head/in"].shape[-1]
    found = TokenHead(2 * width, width).apply({"params": params}, values["head/in"])
    np.testing.assert_allclose(found, values["head/out"], rtol=1e-5, atol=2e-6)


def test_sra_on_features_of_dual_times_as_published(reference_fixtures):
    values = np.load(reference_fixtures / "sra_dts_as_visible.npz")
    features = values["dts/student_feature_after_head"], values["dts/teacher_feature"]
    for axis, name in (("tokens", "cos_published_over_tokens"), ("channels", "cos_over_channels")):
        found = alignment.sra_loss(*features, axis=axis)
        np.testing.assert_allclose(found, values[f"dts/align_{name}"], rtol=1e-5)


def test_cosine_distance_over_each_axis():
    a, b = tokens()
    pairs = {
        "channels": [(a[i, n], b[i, n]) for i in range(2) for n in range(3)],
        "tokens": [(a[i, :, c], b[i, :, c]) for i in range(2) for c in range(4)],
    }
    for axis, rows in pairs.items():
        expected = np.mean([1 - cosine(*row) for row in rows])
        np.testing.assert_allclose(alignment.cosine_distance(a, b, axis), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="axis must be one of .*'channels', 'tokens'.*'heads'"):
        alignment.cosine_distance(a, b, "heads")


def test_smooth_l1_is_a_parabola_between_lines():
    a = np.array([0.0, 0.01, -0.04, 0.05, -0.3])
    expected = np.mean([0, 0.5 * 1e-4 / 0.05, 0.5 * 16e-4 / 0.05, 0.025, 0.275])
    np.testing.assert_allclose(alignment.smooth_l1(a, 0 * a, 0.05), expected, rtol=1e-6)


def test_gradient_of_layersync_in_closed_form():
    """-(d - c s) / |h| / (B N), s and d unit vectors of the two sides and c their cosine."""
    shallow, deep = tokens()
    length = np.linalg.norm(shallow, axis=-1, keepdims=True)
    s, d = shallow / length, deep / np.linalg.norm(deep, axis=-1, keepdims=True)
    c = (s * d).sum(-1, keepdims=True)
    gradients = (-(d - c * s) / length / 6, np.zeros_like(deep))
    arguments = (shallow.astype(np.float32), deep.astype(np.float32))
    check(alignment.layersync_loss, arguments, -c.mean(), gradients)


def test_the_teacher_of_sra_learns_nothing_and_unknown_distances_are_refused():
    student, teacher = tokens()
    gradient = jax.grad(lambda b: alignment.sra_loss(student, b, distance="smooth_l1"))(teacher)
    np.testing.assert_array_equal(gradient, np.zeros_like(teacher))
    with pytest.raises(ValueError, match="distance must be one of .*'cosine', 'smooth_l1'.*'l3'"):
        alignment.sra_loss(student, teacher, distance="l3")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_zero_token_counts_as_orthogonal_and_has_no_gradient(dtype):
    a, b = (jnp.asarray(x, dtype) for x in tokens())
    a = a.at[0, 0].set(0)
    value, gradient = jax.value_and_grad(alignment.layersync_loss)(a, b)
    x, y = (np.asarray(v, np.float64) for v in (a, b))
    cosines = [cosine(x[i, n], y[i, n]) for i in range(2) for n in range(3) if (i, n) != (0, 0)]
    np.testing.assert_allclose(value, -np.sum(cosines) / 6, rtol=1e-5)
    assert np.isfinite(gradient.astype(np.float32)).all()
    np.testing.assert_array_equal(gradient[0, 0].astype(np.float32), np.zeros(4))


def test_teacher_time_is_nearer_to_the_data_and_ends_there():
    t, u = np.array([0.0, 0.5, 0.9]), np.array([0.5, 0.0, 0.75])
    np.testing.assert_allclose(alignment.teacher_time(t, u, 0.2), [0.1, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(alignment.teacher_time(t, u, 0.2, 0.95)[2], 0.95, rtol=1e-6)


def test_the_weight_loses_nine_tenths_in_every_length_of_the_decay():
    found = alignment.decayed_weight(0.2, np.array([0, 5, 15, 25]), 5, 10)
    np.testing.assert_allclose(found, [0.2, 0.2, 0.02, 0.002], rtol=1e-5)
    np.testing.assert_allclose(alignment.decayed_weight(0.2, jnp.int32(99), 5, 0), 0.2)


def test_patches_of_the_clean_latent_are_those_of_the_network():
    latents = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    found = alignment.clean_latent_patches(latents, 2)
    np.testing.assert_array_equal(found[1, 4], latents[1, 2:4, 2:4].ravel())  # second row
    np.testing.assert_array_equal(found, dit.patchify(latents, 2))


def test_clean_latent_loss_compares_each_token_with_its_patch():
    rng = np.random.default_rng(0)
    latents, prediction = rng.standard_normal((2, 4, 4, 3)), rng.standard_normal((2, 4, 12))
    expected = [
        1 - cosine(prediction[b, 2 * i + j], latents[b, 2 * i :, 2 * j :][:2, :2].ravel())
        for b in range(2)
        for i in range(2)
        for j in range(2)
    ]
    found = alignment.clean_latent_loss(prediction, latents, 2)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)


def test_a_token_head_maps_every_token_alike():
    head = TokenHead(6, 5, jnp.bfloat16)
    a = tokens()[0].astype(np.float32)
    boxed = jax.eval_shape(head.init, jax.random.key(0), a)["params"]
    assert boxed["hidden"]["kernel"].names == ("embed", "mlp")
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), nn.unbox(boxed))
    x = a @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    x = x / (1 + np.exp(-x))
    expected = x @ params["out"]["kernel"] + params["out"]["bias"]
    found = head.apply({"params": params}, a)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0.05, atol=0.1)
