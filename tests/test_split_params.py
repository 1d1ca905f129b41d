"""Parameters that are split over all devices of a batch: the same training, in less memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from repulsor_jax import config as config_lib
from repulsor_jax import sharding, split_params
from repulsor_jax.models.build import build_model
from repulsor_jax.planning import hlo
from repulsor_jax.split_params import Place
from repulsor_jax.train_state import abstract_train_state
from repulsor_jax.train_step import abstract_batch, make_train_step
from tests.oracles import tiny, traffic

SCANNED = {"model__scan_blocks": True, "model__depth": 2, "optimizer__warmup_steps": 1}
SLOWLY = SCANNED | {"optimizer__learning_rate": 1e-3}  # differences do not grow
WITH_ENCODER = {
    "terms": "repulsor+latent_alignment",
    "repulsor__positives": "view",
    "repulsor__bank_keys": "latent",
    "repulsor__predictor": True,
}
SYSTEMS = {
    "scan": SCANNED,
    "teacher, micro-batches": SCANNED
    | {"terms": "repulsor+sra", "repulsor__positives": "view"}
    | {"optimizer__accumulation_steps": 2, "model__remat": "dots"},
    "blockwise": {
        "model__scan_blocks": True,
        "model__architecture": "blockwise",
        "model__segments": 2,
        "model__segment_depth": 1,
        "model__adaln_rank": 4,
        "sampling__num_steps": 4,
    },
    "source, groups": SCANNED | {"source__name": "class", "flow__time_groups": 2},
}


def losses(mesh, steps=4, **overrides):
    step = tiny.build(tiny.config(**overrides), tiny.mesh(*mesh))
    return step.run(tiny.batches(steps))[1]


@pytest.fixture(scope="module")
def on_one_device():
    return losses((1, 1, 1), 20, **SLOWLY)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_twenty_steps_are_those_of_one_device(on_one_device, mesh):
    found = losses(mesh, 20, **SLOWLY)
    for name in ("loss", "grad_norm", "repulsor_loss"):
        values, expected = ([m[name] for m in history] for history in (found, on_one_device))
        np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=name)


# The blockwise network's is in models/test_blockwise.py.
@pytest.mark.parametrize(
    ("system", "mesh"), [("teacher, micro-batches", (8, 1, 1)), ("source, groups", (2, 4, 1))]
)
def test_every_system_trains_on_split_parameters(monkeypatch, system, mesh):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)  # fsdp splits heads and source
    expected, found = losses((1, 1, 1), **SYSTEMS[system]), losses(mesh, **SYSTEMS[system])
    for name in expected[0]:
        values, wanted = ([m[name] for m in history] for history in (found, expected))
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_step_in_bfloat16_runs_and_is_that_of_one_device():
    overrides = SCANNED | {"model__dtype": "bfloat16", "terms": "none"}
    expected, found = losses((1, 1, 1), 1, **overrides), losses((2, 2, 2), 1, **overrides)
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=0.01)


def test_all_large_arrays_of_the_state_are_split_over_all_devices():
    c, mesh = tiny.config(**SCANNED, model__hidden_size=64), tiny.mesh(data=4, fsdp=2)
    state = abstract_train_state(tiny.trainer(c), mesh)
    moments = next(s for s in state.opt_state[1] if hasattr(s, "mu"))
    trees = {
        "params": state.params["model"],
        "moments": [moments.mu["model"], moments.nu["model"]],
        "average": state.ema_params,
    }
    for kind, tree in trees.items():
        total = sum(leaf.size for leaf in jax.tree.leaves(tree))
        held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
        assert total / 8 <= held < 1.3 * total / 8, kind  # biases are whole
    kernel = state.params["model"]["blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == 2  # layers are not split


def test_dimensions_that_the_devices_do_not_divide():
    mesh = jax.sharding.AbstractMesh((16, 16, 1, 1), sharding.AXES)
    minor, major = "data_minor", "data_major"

    def split(*shape):
        names = ("layers", "embed", "mlp")[-len(shape) :]
        whole = jax.sharding.NamedSharding(mesh, PartitionSpec(*[None] * len(shape)))
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        return tuple(sharding.split_over_data(leaf, whole, names).spec)

    assert split(28, 1152, 4608) == (None, None, (minor, major))  # 4608 = 18 x 256
    assert split(28, 1152, 1152) == (None, major, minor)  # each divides by 16 alone
    assert split(256, 1001, 1152) == (None, None, minor)  # layers are not split
    assert split(28, 1001, 1003) == (None, None, None)


def compiled_text(**overrides):
    return tiny.compile_only(tiny.config(**overrides), tiny.mesh(data=8)).as_text()


def test_gradients_are_scattered_and_parameters_gathered_once():
    text = compiled_text(**SCANNED, terms="none")
    module = hlo.parse(text)
    in_loops = [each for loop, found in traffic.loops(module) for each in found]
    assert "all-gather" not in {each.kind for each in in_loops}
    kinds = [each.kind for each in traffic.collectives(text)]
    # Of each block: qkv, proj and the two of the MLP.
    assert [each.kind for each in in_loops].count("reduce-scatter") >= 4
    assert kinds.count("all-gather") > 0
    # The modulation's kernel, [2, 32, 192], stays; the rows and the products travel.
    arrays = [array for each in traffic.collectives(text) for array in each.arrays]
    assert not [array for array in arrays if array.shape[-2:] == (32, 192)]
    assert text.count(" all-to-all(") == 2  # forward and backward


# What sums the gradient of a layer over all 8 devices, and the shape of its kernel.
SUMMED = {
    "blocks": [f"reduce_scatter {shape}" for shape in ("32x96", "32x128", "128x32")],
    # The last layers of head, predictor and encoder; the predictor's first; the head on tokens.
    "heads": [f"all_reduce {shape}" for shape in (*3 * ["32x12"], "12x32", "32x8")],
    # Twice: for the start points, and for what it adds to the loss.
    "source": 2 * [f"all_reduce {shape}" for shape in ("3x20", "20x20", "20x32")],
}


@pytest.mark.parametrize(
    ("reduce_dtype", "of_blocks", "of_others"),
    [("model", "bf16", "f32"), ("bfloat16", "bf16", "bf16"), ("float32", "f32", "f32")],
)
def test_gradients_are_summed_in_the_configured_dtype(reduce_dtype, of_blocks, of_others):
    c = tiny.config(
        **SCANNED,
        **WITH_ENCODER,
        repulsor__projection_dim=12,
        source__name="class",
        source__rank=20,
        model__dtype="bfloat16",
        mesh__reduce_dtype=reduce_dtype,
    )
    mesh = tiny.mesh(data=8)
    trainer = tiny.trainer(c)._replace(optimizer=optax.sgd(1e-3))  # quicker to trace
    arguments = (
        abstract_train_state(trainer, mesh),
        abstract_batch(c.batch_size, tiny.SHAPE, "float16", mesh),
    )
    step = jax.jit(make_train_step(trainer, tiny.FORMAT, mesh))
    with sharding.use_mesh(mesh):
        text = step.lower(*arguments).as_text()
    # The devices are written out up to JAX 0.11, and as axes of the mesh after it.
    over_all = r"(all_reduce|reduce_scatter)\"[^\n]*(?:tensor<1x8xi64>|\"data_minor\")"
    found = re.findall(over_all + r".*?\}\) : \(tensor<([\dx]+)x(\w+)>\)", text, re.DOTALL)
    for part, layers in SUMMED.items():
        dtypes = [dtype for kind, shape, dtype in found if f"{kind} {shape}" in layers]
        assert dtypes == [of_blocks if part == "blocks" else of_others] * len(layers), part


@pytest.mark.parametrize("system", ["scan", "blockwise"])
def test_a_copy_in_the_dtype_of_each_layer_gives_the_same_bits(system):
    c = tiny.config(**SYSTEMS[system], model__dtype="bfloat16", model__qk_norm=system == "scan")
    model, params = build_model(c.model), tiny.random_params(c)
    cast = jax.tree.map(lambda x, dtype: x.astype(dtype), params, model.param_dtypes(params))
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cast))
    x = np.random.default_rng(0).standard_normal((4, *tiny.SHAPE)).astype(np.float32)
    inputs = x, np.linspace(0.1, 0.9, 4, dtype=np.float32), np.arange(4, dtype=np.int32)
    run = jax.jit(lambda params: model.apply({"params": params}, *inputs))
    np.testing.assert_array_equal(run(cast), run(params))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize(
    "axes",
    [
        ((), ("data_minor", "data_major")),
        (("data_minor",), ("data_major",)),
        (("fsdp", "data_minor"), ()),
        ((), ()),
    ],
    ids=str,
)
def test_a_sum_that_is_scattered_and_collected_is_the_sum(monkeypatch, axes, tile, at_once):
    monkeypatch.setattr(sharding, "_MINOR_SIZE", 2)
    place = Place(axes, tile=tile, at_once=at_once)
    x = np.random.default_rng(0).standard_normal((8, 32, 64)).astype(np.float32)
    mesh = tiny.mesh(data=4, fsdp=2)

    def run(rows):
        part = split_params._scatter(rows[0], place)
        used = split_params._all_axes(place)
        rest = tuple(axis for axis in sharding.BATCH_AXES if axis not in used)
        whole = split_params._collect(part, place)
        return whole if not used else jax.lax.psum(whole, rest) if rest else whole

    with sharding.use_mesh(mesh):
        found = jax.shard_map(
            run,
            in_specs=PartitionSpec(sharding.BATCH_AXES),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(x)
    expected = x.sum(0) if any(axes) else x[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [{"mesh__tensor": 2}, {"mesh__split_update": False}])
def test_a_dtype_of_sums_that_xla_makes_is_refused(other):
    with pytest.raises(
        config_lib.ConfigError, match="needs mesh.split_update=True and mesh.tensor=1"
    ):
        tiny.config(mesh__reduce_dtype="float32", **other)
