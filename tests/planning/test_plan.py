"""The plan mode: for the devices here, and for TPU slices where libtpu is installed."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from configs import imagenet256
from repulsor_jax import config as config_lib
from repulsor_jax import plan as plan_lib
from repulsor_jax import sharding
from repulsor_jax.config import ConfigError
from repulsor_jax.models.build import build_model, init_model_params
from repulsor_jax.plan import Options
from repulsor_jax.planning import compiler, gpus, programs
from repulsor_jax.planning import topology as topology_lib
from repulsor_jax.planning.cost import Cost
from repulsor_jax.planning.hlo import Array, Collective
from repulsor_jax.planning.summary import describe_collectives, training_advice
from tests.oracles import tiny

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[plan]'",
)

needs_plugin = pytest.mark.skipif(
    not gpus.is_installed(),
    reason="JAX's CUDA plugin is not installed: pip install -e '.[plan-gpu]'",
)

open_topology = functools.cache(topology_lib.open_topology)  # a second or two each


def plan(tmp_path, capsys, values=None, **options):
    """Plans, and returns what was written and what was printed."""
    options = Options(**{"topology": "local"} | options)
    page = plan_lib.plan(values or tiny.config_dict(), tmp_path, options)
    return json.loads(page.with_suffix(".json").read_text()), capsys.readouterr().out, page


def program(name, topology, config):
    experiment = programs.abstract_experiment(config, pathlib.Path(), topology)
    return programs.compile_program(name, experiment, topology)


def build_train(topology, config):
    """The train step of a configuration, not compiled."""
    experiment = programs.abstract_experiment(config, pathlib.Path(), topology)
    return programs.build("train", experiment, topology)


def memory_by_kind(topology, config):
    kinds = build_train(topology, config).kinds
    return {kind: programs.shard_bytes(tree) for kind, tree in kinds.items()}


# Memory by kind, against counts by hand.


def num_params(c):
    """Numbers in the transformer, counted by hand."""
    d, hidden = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
    patch = c.in_channels * c.patch_size**2
    block = (6 * d * d + 6 * d) + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * hidden + hidden + d)
    ends = (patch * d + d) + (256 * d + d) + (d * d + d) + (c.num_classes + 1) * d
    out = patch * (2 if c.learn_sigma else 1)
    return c.depth * block + ends + (d * 2 * d + 2 * d) + (d * out + out)


def test_memory_by_kind_is_that_of_the_shards():
    c = tiny.config(mesh__split_update=False)
    memory = memory_by_kind(open_topology("local"), c)
    head = 32 * 32 + 32 + 32 * tiny.DIM + tiny.DIM
    model = num_params(c.model)
    assert memory["EMA"] == 4 * model
    assert memory["parameters"] == 4 * (model + head)
    assert memory["optimizer"] == 2 * 4 * (model + head) + 2 * 4  # two moments, two counts
    # 12 bytes of tags a row, cursor and count; a label and an id a sample.
    assert memory["bank"] == tiny.SLOTS * (tiny.BATCH // 8) * (tiny.DIM * 4 + 12) + 2 * 4
    assert memory["batch"] == (tiny.BATCH // 8) * (4 * 4 * 2 * 2 + 8)
    assert memory["other"] == 4 + 2 * 4  # the step and the key


def test_fsdp_divides_the_state_of_the_largest_model():
    """SiT-XL/2, published as 675M parameters; nothing is compiled."""
    c = config_lib.parse(imagenet256.get_config("xl_2,none"))
    model = num_params(c.model)
    assert model == pytest.approx(675e6, rel=2e-3)
    sizes = {}
    for fsdp in (1, 8):
        mesh = dataclasses.replace(c.mesh, fsdp=fsdp, split_update=False)
        config = dataclasses.replace(c, mesh=mesh)
        sizes[fsdp] = memory_by_kind(open_topology("local"), config)
    assert sizes[1]["EMA"] == 4 * model
    # Every kernel is divided; biases and other small arrays are whole.
    assert 4 * model / 8 <= sizes[8]["EMA"] < 1.01 * 4 * model / 8
    assert sizes[1]["batch"] == sizes[8]["batch"] == (256 // 8) * (32 * 32 * 8 * 2 + 8)


def test_a_sampler_gathers_the_parameters_once():
    topology = open_topology("local")

    def sampler(num_steps, gather):
        return program(
            "sample",
            topology,
            tiny.config(
                model__hidden_size=64,
                mesh__fsdp=8,
                sampling__num_steps=num_steps,
                sampling__gather_params=gather,
            ),
        )

    few, many, in_shards = sampler(3, True), sampler(12, True), sampler(12, False)
    whole = 4 * num_params(tiny.config(model__hidden_size=64).model)
    split = (whole - few.memory["EMA"]) * 8 / 7  # of 8 parts, each device holds one
    assert few.cost.collective_bytes == pytest.approx(split, rel=0.02)
    assert many.cost.collective_bytes == few.cost.collective_bytes
    assert in_shards.cost.collective_bytes > 1.5 * few.cost.collective_bytes


def test_shapes_of_a_travelling_bank_are_known():
    """What a gather over all or a part of the 8 devices would yield, and nothing else."""
    c = tiny.config(batch_size=64, repulsor__bank_rows=64 * 16, model__hidden_size=512)
    built = build_train(open_topology("local"), c)
    assert {(16, 64, tiny.DIM), (16, 16, tiny.DIM), (16 * 64, tiny.DIM)} <= built.bank_shapes
    others = {
        "one device's rows": (16, 8, tiny.DIM),
        "the queries": (64, tiny.DIM),
        "the head's last layer, as long as the rows of 4 devices": (512, tiny.DIM),
    }
    assert not built.bank_shapes & set(others.values())

    def carries(shape):
        cost = Cost(collectives=[(Collective("all-gather", (Array("f32", shape),)), 1)])
        return programs.Program(**vars(built), memory={}, cost=cost, seconds=0.0).carries_the_bank

    assert carries((16, 64, tiny.DIM))
    assert not carries((64, tiny.DIM))


# The mode, for the devices here.


def test_a_local_plan_is_written_and_names_the_unknown(tmp_path, capsys):
    c = tiny.config_dict(mesh__fsdp=2)
    record, text, page = plan(tmp_path, capsys, c)
    [variant] = record["variants"]
    assert variant["topology"]["num_devices"] == 8
    assert variant["mesh"] == {"data": 4, "fsdp": 2}
    train = variant["programs"]["train"]
    assert train["fits"]
    assert not train["carries_the_bank"]
    assert {row["axis"] for row in train["collectives"]} <= {"data", "fsdp", "data,fsdp"}
    assert train["collective_bytes_per_device"] == sum(r["bytes"] for r in train["collectives"])
    assert train["estimate"] is None
    assert variant["run"] == {}
    assert set(variant["programs"]) == {"train", "sample"}  # pixels need no encoder
    assert "no peak rates are published" in text
    assert "the bank stays where it is" in text
    html = page.read_text()
    assert html.count("<svg") == 1
    assert "as configured, train step" in html

    # The sum of the kinds is XLA's.
    stats = tiny.compile_only(config_lib.parse(c), sharding.create_mesh(4, 2)).memory_analysis()
    memory = train["memory_bytes_per_chip"]
    assert memory["temporaries"] == stats.temp_size_in_bytes
    made = ("temporaries", "results", "program")
    arguments = sum(size for kind, size in memory.items() if kind not in made)
    assert arguments == stats.argument_size_in_bytes


def test_variants_stand_side_by_side(tmp_path, capsys):
    label = "terms=none,mesh.data=2,config.mesh.fsdp=4"
    record, text, page = plan(tmp_path, capsys, compare=label)
    base, none = record["variants"]
    assert none["label"] == label
    assert "bank" in base["programs"]["train"]["memory_bytes_per_chip"]
    assert "bank" not in none["programs"]["train"]["memory_bytes_per_chip"]
    assert none["programs"]["train"]["flops"] < base["programs"]["train"]["flops"]
    assert none["mesh"] == {"data": 2, "fsdp": 4}
    assert text.count("\n| ") == 3  # a row of headings, and one each
    assert page.read_text().count("<tr>") == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"price_per_chip_hour": -1.0}, "--price_per_chip_hour=-1 must be at least 0"),
        ({"topology": "v5e-256"}, "--topology='v5e-256': expected 'local'"),
        ({"num_slices": 2}, "--num_slices=2 has no meaning"),
        ({"num_slices": 0}, "--num_slices=0 must be at least 1"),
        ({"search": True, "compare": "mesh.fsdp=2"}, "--search and --compare: found both"),
        ({"search": True, "search_limit": 0}, "--search_limit=0 must be at least 1"),
        ({"search": True}, "no peak rates are published of the devices of --topology=local"),
        ({"compare": "mesh.fsdp"}, "--compare: found 'mesh.fsdp', expected key=value"),
        ({"compare": "mush.fsdp=2"}, "config.mush.fsdp: unknown key"),
        ({"compare": "mesh.fsdq=2"}, "config.mesh.fsdq: unknown key"),
        ({"compare": "mesh.fsdp=two"}, "config.mesh.fsdp: expected "),
        ({"compare": "model.remat=some"}, "--compare='model.remat=some': config.model.remat"),
        ({"compare": "mesh.fsdp=3"}, "config.mesh.data=-1, mesh.fsdp=3"),
        ({"compare": "num_slices=two"}, "--compare: num_slices='two'"),
        ({"compare": "batch_size=12,repulsor.bank_rows=48"}, "config.batch_size=12 must be a"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_compiled(tmp_path, options, expected):
    with pytest.raises(ConfigError) as found:
        plan_lib.plan(tiny.config_dict(), tmp_path, Options(**{"topology": "local"} | options))
    assert expected in str(found.value)
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_absent_libtpu_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs libtpu.*pip install -e '.\[plan\]'"):
        topology_lib.open_topology("v5e:2x2")


def test_devices_are_those_here():
    topology = open_topology("local")
    assert topology.devices == tuple(jax.devices())
    assert (topology.chip, topology.device_bytes, topology.note) == (None, None, "")


# Batches.


def test_advice_for_segments_keeps_their_rows():
    changes = {"architecture": "blockwise", "segments": 2, "segment_depth": 1, "adaln_rank": 4}
    c = tiny.config(
        batch_size=128,
        sampling__num_steps=4,
        terms="none",
        **{f"model__{name}": value for name, value in changes.items()},
    )
    topology = open_topology("local")
    step = programs.Program(
        **vars(build_train(topology, c)), memory={"temporaries": 8.0}, cost=None, seconds=0.0
    )
    device = dataclasses.replace(topology, known_bytes=0.8)  # a tenth of what is needed
    advice = "".join(training_advice(step, c, device))
    assert "accumulation_steps=8: about 1/8" in advice  # of 16 rows on a device, two at a time
    assert "batch_size=16: about 1/8" in advice
    assert "--config.mesh.fsdp=8: " in advice
    with_data = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, data=8))
    advice = "".join(training_advice(step, with_data, device))
    assert "--config.mesh.fsdp=8 --config.mesh.data=-1: " in advice


def test_another_batch_keeps_the_bank():
    c = programs.with_batch(tiny.config(), 64)
    assert (c.batch_size, c.repulsor.bank_rows) == (64, 64)
    assert programs.with_batch(tiny.config(), 24).repulsor.bank_rows == 48


# Before machine code.


def test_buffers_are_counted_by_kind():
    """The file of XLA's buffer assignment, with a line of each kind."""
    buffers = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 sum @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, output shape is |(f32[1024], f32[])|, maybe-live-out:
allocation 2: size 8192, parameter 3, shape |f32[2048]| at ShapeIndex {}:
 value: <7 args @0> (size=8192,offset=0): f32[2048]{0:T(1024)}
allocation 3: size 2048, parameter 0, shape |f32[512]| at ShapeIndex {}, maybe-live-out:
allocation 4: size 16, constant:
allocation 5: size 65536, preallocated-temp:
allocation 6: size 131072, color 1, preallocated-temp:
"""
    answer = compiler.dumped_answer("HloModule m", buffers)
    # A donated argument is no result; color 1 is the vector memory.
    assert answer.memory == {"arguments": 8192 + 2048, "temporaries": 65536, "results": 4096}
    assert (answer.hlo, answer.emitted) == ("HloModule m", False)


def test_a_failed_compiler_is_heard():
    with pytest.raises(RuntimeError, match=r"ended with 1: [\s\S]*TypeError"):
        compiler.ask({"unknown": 1})


# TPU slices.


@needs_libtpu
def test_topologies_are_what_they_are_called():
    v5e, v4, two = open_topology("v5e:2x2"), open_topology("v4:2x2x1"), open_topology("v5e:2x2", 2)
    assert (v5e.num_chips, v5e.num_hosts, v5e.chip.name, v5e.note) == (4, 1, "v5e", "")
    assert 0.9 * v5e.chip.hbm_bytes < v5e.device_bytes < v5e.chip.hbm_bytes
    assert (v4.num_chips, v4.devices_per_chip, v4.shape) == (4, 2, (2, 2, 1))
    assert "cores" in v4.note
    mesh = sharding.create_mesh(-1, 2, 1, v4.devices)
    assert set(mesh.devices.flat) == set(v4.devices)
    assert (two.num_chips, two.num_slices, two.num_hosts) == (8, 2, 2)


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know_is_named():
    with pytest.raises(ConfigError, match="--topology=v5e:3x3: .*; known are v4:2x2x1"):
        open_topology("v5e:3x3")


@needs_libtpu
@pytest.mark.slow
def test_a_slice_is_planned_without_it(tmp_path, capsys):
    changes = {"model__depth": 2, "model__scan_blocks": True}
    values = tiny.config_dict(mesh__fsdp=2, data__autoencoder="none", **changes)
    record, text, _ = plan(tmp_path, capsys, values, topology="v5e:2x2", price_per_chip_hour=2.0)
    [variant] = record["variants"]
    train = variant["programs"]["train"]
    assert train["fits"]
    assert train["unknown_loops"] == 0
    assert not train["carries_the_bank"]
    # Another compiler, the same products, those of every turn of the scan included.
    here = program("train", open_topology("local"), tiny.config(mesh__data=8, **changes))
    np.testing.assert_allclose(train["flops"], 8 * here.cost.matmul_flops, rtol=0.1)
    run, time = variant["run"], train["estimate"]
    assert run["hours"] == pytest.approx(10 * time["seconds"] / 3600)
    assert run["cost"] == pytest.approx(2.0 * 4 * run["hours"])
    assert 0 < time["mfu"] < 1
    assert "estimate from published rates, not a measurement" in text


@needs_libtpu
def test_a_program_that_does_not_fit_is_an_answer(tmp_path, capsys):
    values = tiny.config_dict(
        repulsor__projection_dim=4096, repulsor__bank_rows=2**22, data__autoencoder="none"
    )
    record, text, _ = plan(tmp_path, capsys, values, topology="v5e:2x2")
    train = record["variants"][0]["programs"]["train"]
    assert not train["fits"]
    bank = 2**22 * (4096 * 4 + 12) / 4  # of each of 4 chips
    assert train["memory_bytes_per_chip"]["bank"] == pytest.approx(bank, rel=1e-6)
    assert train["total_bytes_per_chip"] > train["available_bytes_per_chip"]
    assert any("bank_rows" in line for line in train["advice"])
    assert "DOES NOT FIT" in text


@needs_libtpu
@pytest.mark.slow
def test_numbers_are_there_before_machine_code():
    """Those of the whole compilation, but for what machine code adds."""
    topology = open_topology("v5e:2x2")
    c = tiny.config(mesh__data=2, mesh__fsdp=2)
    experiment = programs.abstract_experiment(c, pathlib.Path(), topology)
    early = programs.compile_program("train", experiment, topology)
    whole = programs.compile_program("train", experiment, topology, emits=True)
    assert (early.emitted, whole.emitted) == (False, True)
    assert early.cost == whole.cost
    added = {"temporaries", "program"}
    assert early.memory.keys() - added == whole.memory.keys() - added
    for kind in early.memory.keys() - added:
        assert early.memory[kind] == whole.memory[kind]
    assert early.memory.get("temporaries", 0) <= whole.memory["temporaries"]


@needs_libtpu
@pytest.mark.slow
def test_every_size_of_bank_stays_where_it_is():
    topology = open_topology("v5e:2x2")
    sizes = []
    for rows in (2**14, 2**20):
        c = tiny.config(repulsor__bank_rows=rows)
        found = program("train", topology, c)
        sizes.append(found.cost.collective_bytes)
        assert not found.carries_the_bank
        assert max(each.largest for each, _ in found.cost.collectives) < rows * tiny.DIM / 4
    # The compiler may send a scalar or two more, but a bank of 64 times the rows, which is 32 MiB,
    # adds nothing.
    assert abs(sizes[1] - sizes[0]) < tiny.BATCH * tiny.DIM * 4


@needs_libtpu
@pytest.mark.slow
def test_gradients_go_between_slices_once(tmp_path):
    topology = open_topology("v5e:2x2", 2)
    c = tiny.config(mesh__data=2, mesh__fsdp=4, terms="none")
    rows = describe_collectives(program("train", topology, c))
    between = [row for row in rows if row["over"] == "network"]
    assert {row["axis"] for row in between} == {"data"}
    assert "data" not in {row["axis"] for row in rows if row["over"] == "links"}
    # The gradients of a slice's part of the parameters come in, and the updated parameters.
    share = 2 * memory_by_kind(topology, c)["parameters"]
    assert 0.5 * share < sum(row["bytes"] for row in between) < 2.2 * share
    with pytest.raises(ConfigError, match=r"mesh.data=1.*2 slices"):
        programs.abstract_experiment(
            tiny.config(mesh__data=1, mesh__fsdp=8), pathlib.Path(), topology
        )


@needs_libtpu
def test_an_encoder_is_planned_for_one_of_several_hosts():
    c = tiny.config(
        data__autoencoder="taesd", model__in_channels=4, data__encode_batch_per_device=2,
        sampling__batch_size=16,
    )  # fmt: skip
    found = program("encode", open_topology("v5e:4x4"), c)
    assert not found.refusal
    assert (found.mesh.size, found.images) == (4, 8)
    assert found.cost.collectives == []
    assert found.memory["batch"] == 2 * 32 * 32 * 3  # 4 latents of 8 pixels each way


def test_queries_that_look_like_tags_are_no_bank():
    """With as many slots as samples the queries [B, d] have the shape of d rows of tags."""
    c = tiny.config(batch_size=16, repulsor__bank_rows=16 * 16, repulsor__projection_dim=8)
    found = program("train", open_topology("local"), c)
    assert any((16, 8) in [a.shape for a in each.arrays] for each, _ in found.cost.collectives)
    assert (16, 6) in found.bank_shapes
    assert not found.carries_the_bank


# GPUs.


def test_gpus_are_named_by_hosts_and_cards(monkeypatch):
    for name, message in {
        "h100:9": "expected 1 to 8 GPUs on each of 1 or more hosts, as h100:8 or h100:4x8",
        "h100:0x8": "expected 1 to 8 GPUs",
        "h300:8": "expected .local., or a kind of chip and how many: v4:2x2x1",
    }.items():
        with pytest.raises(ConfigError, match=f"--topology='?{name}'?: .*{message}"):
            topology_lib.open_topology(name)
    with pytest.raises(ConfigError, match="no meaning for GPUs: --topology=h100:4x8 has as many"):
        topology_lib.open_topology("h100:2x8", 2)
    monkeypatch.setattr(gpus, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[plan-gpu\]'; no GPU is needed"):
        topology_lib.open_topology("h100:8")


def test_a_program_larger_than_its_device_does_not_fit(tmp_path, capsys, monkeypatch):
    # As GPUs' compiler, which refuses nothing: the compiler of a CPU.
    topology = dataclasses.replace(open_topology("local"), known_bytes=2.0**20)
    monkeypatch.setattr(plan_lib, "open_topology", lambda *unused: topology)
    record, text, _ = plan(tmp_path, capsys, tiny.config_dict(repulsor__bank_rows=2**18))
    train = record["variants"][0]["programs"]["train"]
    assert not train["fits"]
    assert re.search(r"DOES NOT FIT: it takes \d\.\d\d of 0\.00 GiB of a device", text)
    assert any("bank_rows" in line for line in train["advice"])


@needs_plugin
@pytest.mark.parametrize("kind", list(gpus.GPUS))
def test_the_compiler_knows_every_kind_of_gpu(kind):
    topology = open_topology(f"{kind}:2x4")
    assert (topology.num_chips, topology.num_hosts, topology.num_slices) == (8, 2, 2)
    assert topology.chip.name.startswith(kind)
    # What a card states is within a tenth of what its maker prints.
    gpu = gpus.GPUS[kind]
    assert gpu.memory_bytes == pytest.approx(topology.chip.hbm_bytes, rel=0.1)
    assert gpu.memory_rate == pytest.approx(topology.chip.hbm_bytes_per_second, rel=0.1)
    assert topology.device_bytes == 0.75 * gpu.memory_bytes


@needs_plugin
def test_gpus_are_planned_without_them(tmp_path, capsys):
    values = tiny.config_dict(
        data__autoencoder="none", model__dtype="bfloat16", model__hidden_size=64, mesh__fsdp=2
    )
    record, text, _ = plan(tmp_path, capsys, values, topology="h100:2x4")
    train = record["variants"][0]["programs"]["train"]
    assert train["fits"]
    assert not train["carries_the_bank"]
    assert not train["unknown_kernels"]
    assert {row["over"] for row in train["collectives"]} == {"links", "network"}
    assert "75% of a GPU's memory" in text


@needs_plugin
@pytest.mark.parametrize(("remat", "expected"), [("none", 1), ("dots", 2), ("dots_attention", 1)])
def test_attention_that_is_saved_runs_once_on_gpus(remat, expected):
    c = tiny.config(model__dtype="bfloat16", model__scan_blocks=True, model__remat=remat)
    model = build_model(c.model).clone(attention="cudnn")
    where = SingleDeviceSharding(open_topology("h100:1").devices[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params = nn.unbox(jax.eval_shape(lambda: init_model_params(model, jax.random.key(0))))
    inputs = np.empty((2, *tiny.SHAPE), np.float32), np.empty(2, np.float32), np.empty(2, np.int32)
    loss = lambda params, *inputs: model.apply({"params": params}, *inputs).sum()
    text = jax.jit(jax.grad(loss)).lower(*jax.tree.map(place, (params, *inputs))).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == expected
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1


@needs_plugin
@pytest.mark.slow
def test_the_update_is_no_branch_on_gpus():
    """A branch on GPUs copies what it gives, which is the whole state."""
    built = build_train(open_topology("h100:1"), tiny.config(terms="none"))
    assert "conditional(" not in built.compile().as_text()
