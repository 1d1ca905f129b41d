import ast
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repulsor_jax.flows import sampler
from repulsor_jax.models import dit, torch_weights

TINY = pathlib.Path(__file__).parents[1] / "data" / "sit_tiny.npz"
RULES = [("batch", ("data", "fsdp")), ("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor")]


class Reference(NamedTuple):
    values: Any
    fields: dict[str, Any]
    params: dit.Params
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]


def read_reference(path: pathlib.Path, extra: str | None = None) -> Reference:
    values = np.load(path)
    config = ast.literal_eval(str(values["config"]))
    prefixes = ["state/"] + ([extra] if extra else [])
    state = {
        key.removeprefix(prefix): values[key]
        for prefix in prefixes
        for key in values.files
        if key.startswith(prefix)
    }
    fields = {key: value for key, value in config.items() if key != "class_dropout_prob"}
    fields["latent_size"] = fields.pop("input_size")
    sizes = {key: fields[key] for key in ("num_heads", "patch_size", "in_channels")}
    params = torch_weights.from_torch_state_dict(state, **sizes)
    inputs = (values["x"].transpose(0, 2, 3, 1), values["t"], values["y"].astype(np.int32))
    return Reference(values, fields, params, inputs)


@pytest.fixture(scope="module")
def tiny() -> Reference:
    return read_reference(TINY)


def relative_error(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def channels_first(x: jax.Array) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def layout(reference: Reference, scan: bool, **fields: Any) -> tuple[dit.DiT, Any]:
    model = dit.DiT(**{**reference.fields, "scan_blocks": scan, **fields})
    params = torch_weights.stack_blocks(reference.params) if scan else reference.params
    return model, {"params": params}


def check_against_reference(reference: Reference, scan: bool, remat: str) -> None:
    values, depth = reference.values, reference.fields["depth"]
    model, variables = layout(reference, scan, remat=remat)
    x, t, labels = reference.inputs

    @jax.jit
    def run(variables: Any, x: Any, t: Any, labels: Any) -> Any:
        pairs = [model.apply(variables, x, t, labels, taps=(i,)) for i in range(depth)]
        predict = functools.partial(model.apply, variables)
        guided = sampler.guided_prediction(
            predict, x, t, labels, null_label=model.num_classes, scale=3.0, channels=3
        )
        return pairs, predict(x, t, labels), guided

    pairs, out, guided = run(variables, x, t, labels)
    for i, (tapped_out, (tokens,)) in enumerate(pairs):
        assert relative_error(tokens, values[f"block/{i}"]) < 2e-5
        np.testing.assert_allclose(tapped_out, out, rtol=1e-5, atol=1e-5)
    assert relative_error(channels_first(out), values["out"]) < 2e-5
    assert relative_error(channels_first(guided), values["cfg3"]) < 2e-5
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "dots")])
def test_agrees_with_an_independent_evaluation(tiny: Reference, scan: bool, remat: str) -> None:
    check_against_reference(tiny, scan, remat)


@pytest.mark.parametrize(("scan", "remat"), [(False, "full"), (True, "none")])
def test_agrees_with_the_published_code(
    reference_fixtures: pathlib.Path, scan: bool, remat: str
) -> None:
    check_against_reference(read_reference(reference_fixtures / "sit_small.npz"), scan, remat)


def test_qk_norm_agrees_with_an_independent_evaluation(tiny: Reference) -> None:
    normed = read_reference(TINY, extra="qk_norm/state/")
    model, variables = layout(normed, scan=True, qk_norm=True)
    out = channels_first(jax.jit(model.apply)(variables, *normed.inputs))
    assert relative_error(out, tiny.values["qk_norm/out"]) < 2e-5
    assert relative_error(out, tiny.values["out"]) > 1e-2


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_names_each_of_its_axes(tiny: Reference, scan: bool, qk_norm: bool) -> None:
    model, _ = layout(tiny, scan, qk_norm=qk_norm)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *tiny.inputs)["params"]
    known = {"embed", "mlp", "heads", "layers", "patch", "classes", "modulation", "frequency", None}
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    for path, leaf in leaves:
        assert is_box(leaf), path
        assert len(leaf.names) == leaf.value.ndim, path
        assert set(leaf.names) <= known, path
        assert ("layers" in leaf.names) == (path[0].key == "blocks"), path
    names = {"/".join(key.key for key in path): leaf.names for path, leaf in leaves}
    block, layers = ("blocks", ("layers",)) if scan else ("block_0", ())
    assert names["patch_embed/kernel"] == ("patch", "embed")
    assert names["label_embed/embedding"] == ("classes", "embed")
    assert names[f"{block}/qkv/kernel"] == (*layers, "embed", "heads")
    assert names[f"{block}/proj/kernel"] == (*layers, "heads", "embed")
    assert names[f"{block}/modulation/bias"] == (*layers, "modulation")


def test_stacking_and_unstacking_are_inverse(tiny: Reference) -> None:
    stacked = torch_weights.stack_blocks(tiny.params)
    qkv = stacked["blocks"]["qkv"]["kernel"]
    np.testing.assert_array_equal(qkv[1], tiny.params["block_1"]["qkv"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, torch_weights.unstack_blocks(stacked), tiny.params)


def test_stacking_refuses_what_it_cannot_convert(tiny: Reference) -> None:
    gap = {name: value for name, value in tiny.params.items() if name != "block_0"}
    with pytest.raises(ValueError, match="block_1"):
        torch_weights.stack_blocks(gap)
    with pytest.raises(ValueError, match="blocks"):
        torch_weights.unstack_blocks(tiny.params)


def evaluate(model: dit.DiT) -> Any:
    """A jitted function of (variables, inputs, weights).

    Gradient of the weighted sum of the mean squares of the output and of the tokens of block 0,
    and these two.
    """

    def loss(variables: Any, inputs: Any, weights: Any) -> Any:
        out, (tokens,) = model.apply(variables, *inputs, taps=(0,))
        found = out, tokens
        return sum(w * jnp.square(x).mean() for w, x in zip(weights, found, strict=True)), found

    return jax.jit(jax.grad(loss, has_aux=True))


OF_OUTPUT, OF_TAP = np.float32([1, 0]), np.float32([0, 1])


@pytest.fixture(scope="module")
def gradient(tiny: Reference) -> Any:
    """A function of (scan, remat, weights); it compiles each layout once."""

    @functools.cache
    def compiled(scan: bool, remat: str) -> Any:
        model, variables = layout(tiny, scan, remat=remat)
        return functools.partial(evaluate(model), variables, tiny.inputs)

    return lambda scan, remat, weights: compiled(scan, remat)(weights)[0]["params"]


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(False, "dots"), (True, "none"), (True, "dots_attention"), (True, "full")],
)
def test_gradients_agree_with_an_independent_evaluation(
    tiny: Reference, gradient: Any, scan: bool, remat: str
) -> None:
    sizes = {"num_heads": tiny.fields["num_heads"], "patch_size": 2, "latent_size": 8}
    found = torch_weights.to_torch_state_dict(gradient(scan, remat, OF_OUTPUT), **sizes)
    names = [key for key in tiny.values.files if key.startswith("grad/")]
    assert len(names) == 6
    for name in names:
        assert relative_error(found[name.removeprefix("grad/")], tiny.values[name]) < 2e-5


def test_remat_leaves_the_gradient_of_a_tap_alone(gradient: Any) -> None:
    expected = gradient(True, "none", OF_TAP)
    for leaf in jax.tree.leaves(expected["blocks"]):
        assert np.any(leaf[0] != 0)
        assert not np.any(leaf[1])
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(check, gradient(True, "full", OF_TAP), expected)


@pytest.mark.parametrize("remat", ["dots", "dots_attention", "full"])
def test_what_remat_saves_changes_no_number(gradient: Any, remat: str) -> None:
    expected, found = gradient(True, "none", OF_OUTPUT), gradient(True, remat, OF_OUTPUT)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-6


def num_products(jaxpr: Any) -> int:
    """Matrix products of a program, those of a loop's body once."""
    inner = (jax.extend.core.jaxprs_in_params(equation.params) for equation in jaxpr.eqns)
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return own + sum(num_products(each) for jaxprs in inner for each in jaxprs)


@pytest.mark.parametrize(("remat", "expected"), [("dots", 2), ("dots_attention", 2), ("full", 7)])
def test_remat_computes_so_many_products_again(tiny: Reference, remat: str, expected: int) -> None:
    """Those of the attention alone or, with "full", those of the four projections and adaLN too."""

    def products(remat: str) -> int:
        model, variables = layout(tiny, True, remat=remat)
        loss = lambda variables: model.apply(variables, *tiny.inputs).sum()
        return num_products(jax.make_jaxpr(jax.grad(loss))(variables).jaxpr)

    assert products(remat) - products("none") == expected


def test_gelu_and_its_derivative_follow_the_formula() -> None:
    x = np.linspace(-30, 30, 2001)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = np.tanh(inner)
    value = 0.5 * x * (1 + tanh)
    derivative = 0.5 * (1 + tanh) + 0.5 * x * slope * (1 - tanh**2)
    x32 = jnp.asarray(x, jnp.float32)
    found, forward = jax.jit(lambda x: jax.jvp(dit.gelu, (x,), (jnp.ones_like(x),)))(x32)
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    reverse = jax.jit(jax.vmap(jax.grad(dit.gelu)))(x32)
    np.testing.assert_allclose(reverse, derivative, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(reverse, forward)


attend = jax.jit(dit.attend, static_argnums=3)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_attention_agrees_with_a_plain_softmax(size: float) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 5, 3, 4))
    logits = size * np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    q, k, v = (a.astype(np.float32) for a in (size * q, k, v))
    np.testing.assert_allclose(attend(q, k, v), expected, atol=5e-5)
    np.testing.assert_allclose(attend(q, k, v, "xla"), expected, atol=5e-5)


def test_attention_in_bfloat16_rounds_no_scale() -> None:
    """72 ** -0.5 is no power of two: rounded, or in a rounded q, it costs half as much again."""
    half = np.random.default_rng(0).standard_normal((3, 1, 128, 4, 72)).astype(jnp.bfloat16)
    q, k, v = half.astype(np.float64)
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(72)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    found = attend(*half)
    assert found.dtype == jnp.bfloat16
    error = np.asarray(found, np.float64) - expected
    assert np.sqrt(np.square(error).mean() / np.square(expected).mean()) < 0.0025


def test_masked_attention_is_that_among_the_keys_that_are_seen() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 6, 3, 4)).astype(np.float32)
    seen = np.array([[0, 3, 4], [1, 2, 5]])  # three tokens of each image, the others apart
    mask = np.zeros((2, 6, 6), bool)
    for image, own in enumerate(seen):
        for group in (own, np.setdiff1d(np.arange(6), own)):
            mask[image, group[:, None], group] = True
    for implementation in (None, "xla"):
        found = attend(q, k, v, implementation, mask)
        for image, own in enumerate(seen):
            part = (each[image : image + 1, own] for each in (q, k, v))
            alone = attend(*part, implementation)[0]
            np.testing.assert_allclose(found[image, own], alone, atol=1e-6)


class Grouped(NamedTuple):
    x: np.ndarray
    t: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def grouped(reference: Reference) -> Grouped:
    x, t, labels = reference.inputs
    num_tokens = (reference.fields["latent_size"] // reference.fields["patch_size"]) ** 2
    groups = np.random.default_rng(0).permuted(
        np.tile(np.arange(num_tokens) % 4 // 3, (len(x), 1)), axis=1
    )
    return Grouped(x, np.stack([t, 1 - t], axis=1), labels, groups.astype(np.int32))


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "dots")])
def test_groups_with_one_time_or_of_all_tokens_are_the_plain_network(
    tiny: Reference, scan: bool, remat: str
) -> None:
    model, variables = layout(tiny, scan, remat=remat)
    separated = model.clone(attention_separation=True)
    x, t, labels, groups = grouped(tiny)
    plain = jax.jit(model.apply)(variables, *tiny.inputs)
    same = np.stack([t[:, 0]] * 2, axis=1)
    found = jax.jit(model.apply)(variables, x, same, labels, groups=groups)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    found = jax.jit(separated.apply)(variables, x, t, labels, groups=np.zeros_like(groups))
    np.testing.assert_allclose(found, plain, atol=1e-5)
    without = jax.jit(separated.apply)(variables, *tiny.inputs)
    np.testing.assert_array_equal(without, plain)  # no groups: as it is sampled


@pytest.mark.parametrize("attention", [None, "xla"])
def test_separated_groups_know_nothing_of_each_other(tiny: Reference, attention: Any) -> None:
    x, t, labels, groups = grouped(tiny)
    t, size = np.broadcast_to(t[:, :1], t.shape), tiny.fields["patch_size"]
    side = tiny.fields["latent_size"] // size
    pixels = groups.reshape(-1, side, side).repeat(size, 1).repeat(size, 2)
    other_x = np.where(pixels[..., None] == 1, -x[::-1], x)
    other_t = np.stack([t[:, 0], 1 - t[:, 1]], axis=1)
    for separation in (True, False):
        model, variables = layout(tiny, False, attention=attention, attention_separation=separation)
        apply = jax.jit(model.apply)
        one = np.asarray(apply(variables, x, t, labels, groups=groups))
        two = np.asarray(apply(variables, other_x, other_t, labels, groups=groups))
        assert np.abs(one - two)[pixels == 1].min() > 0
        assert np.array_equal(one[pixels == 0], two[pixels == 0]) == separation


def test_tapping_costs_nothing_unless_asked(tiny: Reference) -> None:
    def equations(scan: bool, taps: tuple[int, ...]) -> list[Any]:
        model, variables = layout(tiny, scan)
        return jax.make_jaxpr(lambda v: model.apply(v, *tiny.inputs, taps=taps))(variables).eqns

    assert len(equations(scan=False, taps=(0,))) == len(equations(scan=False, taps=()))
    for taps, carried in (((), 1), ((0,), 2), ((0, 1), 2), ((1,), 1)):  # block 1 is the last
        (loop,) = (e for e in equations(scan=True, taps=taps) if e.primitive.name == "scan")
        assert len(loop.outvars) == carried


@pytest.mark.parametrize("scan", [False, True])
def test_several_taps_and_the_first_blocks_alone(tiny: Reference, scan: bool) -> None:
    model, variables = layout(tiny, scan)
    x, t, labels = tiny.inputs
    taps = tuple(range(model.depth))
    runs = [
        jax.jit(lambda params: model.apply({"params": params}, x, t, labels, taps=taps)[1]),
        jax.jit(lambda params: dit.tokens_after(model, params, x, t, labels, taps[:-1])),
    ]
    together, first = (run(variables["params"]) for run in runs)
    for i, tokens in enumerate(together):
        assert relative_error(tokens, tiny.values[f"block/{i}"]) < 2e-5
    assert len(first) == len(taps) - 1
    for tokens, expected in zip(first, together, strict=False):
        np.testing.assert_allclose(tokens, expected, atol=1e-5)
    whole, part = (run.lower(variables["params"]).cost_analysis()["flops"] for run in runs)
    assert scan or part < 0.6 * whole  # XLA counts the body of a loop once


@pytest.mark.parametrize("scan", [False, True])
def test_a_nudge_is_added_to_the_tokens_of_its_tap(tiny: Reference, scan: bool) -> None:
    """So its gradient is that of the tokens: here against a difference quotient."""
    model, variables = layout(tiny, scan)

    @jax.jit
    def value(scale: Any, direction: Any) -> Any:
        out = model.apply(variables, *tiny.inputs, nudges={0: scale * direction})
        return jnp.square(out).sum()

    _, (tokens, first) = jax.jit(lambda: model.apply(variables, *tiny.inputs, taps=(1, 0)))()
    direction = np.random.default_rng(0).standard_normal(first.shape).astype(np.float32)
    slope = (value(1e-2, direction) - value(-1e-2, direction)) / 2e-2
    np.testing.assert_allclose(jax.grad(value)(0.0, direction), slope, rtol=1e-3)
    nudged = jax.jit(
        lambda: model.apply(variables, *tiny.inputs, taps=(1,), nudges={1: jnp.ones_like(tokens)})
    )()[1][0]
    np.testing.assert_allclose(nudged, tokens + 1, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_stays_close_to_float32(tiny: Reference, scan: bool) -> None:
    model, variables = layout(tiny, scan, dtype=jnp.bfloat16)
    out, (tokens,) = jax.jit(lambda v: model.apply(v, *tiny.inputs, taps=(1,)))(variables)
    assert out.dtype == jnp.float32
    assert tokens.dtype == jnp.bfloat16
    assert relative_error(channels_first(out), tiny.values["out"]) < 3e-2
    assert relative_error(tokens.astype(jnp.float32), tiny.values["block/1"]) < 3e-2
    initial = jax.eval_shape(model.init, jax.random.key(0), *tiny.inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("scan", [False, True])
def test_a_mesh_does_not_change_the_result(tiny: Reference, gradient: Any, scan: bool) -> None:
    model, variables = layout(tiny, scan)
    inputs = tuple(np.concatenate([a] * 4) for a in tiny.inputs)  # the means stay
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        placed = jax.device_put(variables, shardings)
        batch = jax.device_put(inputs, rows)
        found, (out, tokens) = evaluate(model)(placed, batch, OF_OUTPUT)
    assert tokens.sharding.spec[0] == ("data", "fsdp")
    assert relative_error(channels_first(out), np.tile(tiny.values["out"], (4, 1, 1, 1))) < 2e-5
    assert relative_error(tokens, np.tile(tiny.values["block/0"], (4, 1, 1))) < 2e-5
    expected = gradient(True, "none", OF_OUTPUT)
    if not scan:
        expected = torch_weights.unstack_blocks(expected)
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    jax.tree.map(check, found["params"], expected)


def test_initial_values_follow_dit() -> None:
    model = dit.DiT(8, 4, 2, 64, depth=1, num_heads=4, num_classes=100)
    inputs = (np.ones((2, 8, 8, 4), np.float32), np.float32([0.2, 0.9]), np.array([3, 100]))
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))
    params = variables["params"]
    out, (tokens,) = jax.jit(lambda v: model.apply(v, *inputs, taps=(0,)))(variables)
    assert not np.any(out)
    embedded = dit.patchify(inputs[0], 2) @ params["patch_embed"]["kernel"]
    np.testing.assert_allclose(tokens, embedded + dit.position_embedding(4, 64), rtol=1e-6)
    for name in ("time_in", "time_out"):
        assert float(params[name]["kernel"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(params["label_embed"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)
    block = params["block_0"]
    for layer, fans in {"qkv": 64 + 192, "proj": 64 + 64, "mlp_in": 64 + 256}.items():
        bound = (6 / fans) ** 0.5
        kernel = np.abs(block[layer]["kernel"])
        assert 0.99 * bound < kernel.max() <= bound * (1 + 1e-6)
    assert not np.any(block["modulation"]["kernel"])
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "bias"]
    assert not any(np.any(bias) for bias in biases)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_published_ones(size: str, millions: int) -> None:
    fields = {"latent_size": 32, "in_channels": 4, "patch_size": 2, "num_classes": 1000}
    model = dit.DiT(**fields, **dit.DIT_SIZES[size], learn_sigma=True, scan_blocks=True)
    inputs = (np.zeros((1, 32, 32, 4)), np.zeros(1), np.zeros(1, np.int32))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) // 1_000_000 in (
        millions - 1,
        millions,
    )


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_given_rate(rate: float) -> None:
    labels = jnp.arange(20_000, dtype=jnp.int32) % 10
    dropped = dit.drop_labels(jax.random.key(0), labels, 10, rate)
    assert dropped.dtype == labels.dtype
    null = np.asarray(dropped == 10)
    np.testing.assert_array_equal(np.asarray(dropped)[~null], np.asarray(labels)[~null])
    spread = (rate * (1 - rate) / labels.size) ** 0.5
    assert abs(null.mean() - rate) <= 4 * spread


def test_patchify_keeps_patches_together() -> None:
    x = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    tokens = dit.patchify(jnp.asarray(x), 2)
    np.testing.assert_array_equal(tokens[1, 1], x[1, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(dit.unpatchify(tokens, 2), x)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 3),
        ("patch_size", 0),
        ("num_heads", 5),
        ("hidden_size", 18),
        ("depth", 0),
        ("num_classes", 0),
        ("remat", "some"),
        ("attention", "cudnn"),
    ],
)
def test_a_bad_field_is_named(tiny: Reference, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: found {value!r}.*, expected"):
        dit.DiT(**{**tiny.fields, field: value})


def test_bad_inputs_are_named(tiny: Reference) -> None:
    model, variables = layout(tiny, scan=False)
    x, t, labels = tiny.inputs
    for tap in (-1, 2):
        with pytest.raises(ValueError, match=r"taps: found .*, expected blocks in 0 to 1"):
            model.apply(variables, x, t, labels, taps=(0, tap))
    with pytest.raises(ValueError, match="x: found shape"):
        model.apply(variables, x[:, :4], t, labels)
    with pytest.raises(ValueError, match="t: found shape"):
        model.apply(variables, x, t[:1], labels)
    with pytest.raises(ValueError, match="labels: found shape"):
        model.apply(variables, x, t, labels[:, None])
    with pytest.raises(ValueError, match="t: found shape"):
        model.apply(variables, x, t, labels, groups=grouped(tiny).groups)
    with pytest.raises(ValueError, match="groups: found shape"):
        model.apply(variables, x, grouped(tiny).t, labels, groups=labels)
