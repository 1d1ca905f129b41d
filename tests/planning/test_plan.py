"""The plan mode: for the devices here, and for TPU slices where libtpu is installed."""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import imagenet256
from repulsor_jax import config as config_lib
from repulsor_jax import plan as plan_lib
from repulsor_jax import sharding
from repulsor_jax.config import ConfigError
from repulsor_jax.plan import Options
from repulsor_jax.planning import programs
from repulsor_jax.planning import topology as topology_lib
from repulsor_jax.planning.cost import Cost
from repulsor_jax.planning.hlo import Array, Collective
from repulsor_jax.planning.largest_batch import largest_batch, next_guess, with_batch
from repulsor_jax.planning.summary import carries_the_bank, describe_collectives
from tests.oracles import tiny

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[plan]'",
)


open_topology = functools.cache(topology_lib.open_topology)  # a second or two each


def plan(tmp_path, capsys, values=None, **options):
    """Plans, and returns what was written and what was printed."""
    options = Options(**{"topology": "local"} | options)
    page = plan_lib.plan(values or tiny.config_dict(), tmp_path, options)
    return json.loads(page.with_suffix(".json").read_text()), capsys.readouterr().out, page


# Memory by kind, against counts by hand.


def program(name, topology, config):
    experiment = programs.abstract_experiment(config, pathlib.Path(), topology)
    return programs.compile_program(name, experiment, topology)


def memory_by_kind(name, topology, config):
    """Bytes of what a program is given; nothing is compiled."""
    experiment = programs.abstract_experiment(config, pathlib.Path(), topology)
    kinds = programs.build(name, experiment, topology).kinds
    return {kind: programs.shard_bytes(tree) for kind, tree in kinds.items()}


def num_params(c):
    """Numbers in the transformer, counted by hand."""
    d, hidden = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
    patch = c.in_channels * c.patch_size**2
    block = (6 * d * d + 6 * d) + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * hidden + hidden + d)
    ends = (patch * d + d) + (256 * d + d) + (d * d + d) + (c.num_classes + 1) * d
    out = patch * (2 if c.learn_sigma else 1)
    return c.depth * block + ends + (d * 2 * d + 2 * d) + (d * out + out)


def test_memory_by_kind_is_what_the_shards_hold():
    c = tiny.config()
    topology = open_topology("local")
    c = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, data=8))
    memory = memory_by_kind("train", topology, c)
    head = 32 * 32 + 32 + 32 * tiny.DIM + tiny.DIM
    model = num_params(c.model)
    assert memory["EMA"] == 4 * model
    assert memory["parameters"] == 4 * (model + head)
    assert memory["optimizer"] == 2 * 4 * (model + head) + 2 * 4  # two moments, two counts
    assert memory["bank"] == tiny.SLOTS * (tiny.BATCH // 8) * tiny.DIM * 4 + 2 * 4
    assert memory["batch"] == (tiny.BATCH // 8) * (4 * 4 * 2 * 2 + 4)


def test_the_sum_is_what_xla_says():
    c = tiny.config(mesh__data=2, mesh__fsdp=4)
    topology = open_topology("local")
    found = program("train", topology, c)
    compiled = tiny.compile_only(c, sharding.create_mesh(2, 4))
    stats = compiled.memory_analysis()
    arguments = sum(found.memory.get(k, 0) for k in ("parameters", "optimizer", "EMA"))
    arguments += sum(found.memory.get(k, 0) for k in ("bank", "batch", "other", "padding"))
    assert arguments == stats.argument_size_in_bytes
    assert found.memory["temporaries"] == stats.temp_size_in_bytes


def test_fsdp_divides_the_state_of_the_largest_model():
    """SiT-XL/2, published as 675M parameters; nothing is compiled."""
    c = config_lib.parse(imagenet256.get_config("xl_2,none"))
    model = num_params(c.model)
    assert model == pytest.approx(675e6, rel=2e-3)
    sizes = {}
    for fsdp in (1, 8):
        config = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, fsdp=fsdp))
        sizes[fsdp] = memory_by_kind("train", open_topology("local"), config)
    assert sizes[1]["EMA"] == 4 * model
    # Every kernel is divided; biases and what is small are whole.
    assert 4 * model / 8 <= sizes[8]["EMA"] < 1.01 * 4 * model / 8
    assert sizes[1]["batch"] == sizes[8]["batch"] == (256 // 8) * (32 * 32 * 8 * 2 + 4)


def test_a_sampler_gathers_the_parameters_once():
    topology = open_topology("local")

    def sampler(**overrides):
        return program("sample", topology, tiny.config(model__hidden_size=64, **overrides))

    whole, shards = sampler(), sampler(mesh__fsdp=8)
    in_shards = (whole.memory["EMA"] - shards.memory["EMA"]) * 8 / 7
    assert whole.cost.collective_bytes == 0
    assert shards.cost.collective_bytes == pytest.approx(in_shards, rel=0.02)
    again = sampler(mesh__fsdp=8, sampling__num_steps=12)  # not 3
    assert again.cost.collective_bytes == shards.cost.collective_bytes
    each, more = (
        sampler(mesh__fsdp=8, sampling__num_steps=n, sampling__gather_params=False) for n in (3, 12)
    )
    assert more.cost.collective_bytes > 1.5 * each.cost.collective_bytes


def test_a_travelling_bank_is_noticed():
    """Made up: what a gather over all or a part of 8 devices would yield, and what is no bank."""
    c = tiny.config(batch_size=64, regularizer__bank_rows=64 * 16, model__hidden_size=384)

    def carries(shape, dtype="f32", kind="all-gather"):
        cost = Cost(collectives=[(Collective(kind, (Array(dtype, shape),)), 1)])
        made = programs.Program("train", 64, tiny.mesh(8), {}, cost, (16, 8, tiny.DIM), 0.0)
        return carries_the_bank(made, c)

    assert carries((16, 64, tiny.DIM))
    assert carries((16, 16, tiny.DIM), kind="all-reduce")  # of two devices
    assert carries((16 * 64, tiny.DIM))
    assert not carries((64, tiny.DIM))  # the queries
    assert not carries((384, tiny.DIM))  # the head's last layer
    assert not carries((16, 64, 2 * tiny.DIM))
    assert not carries((16, 64, tiny.DIM), "bf16")


# The mode, for the devices here.


def test_a_local_plan_is_written_and_says_what_is_not_known(tmp_path, capsys):
    record, text, page = plan(tmp_path, capsys, tiny.config_dict(mesh__fsdp=2))
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
    assert set(variant["programs"]) == {"train", "sample"}  # of pixels there is nothing to encode
    assert "no peak rates are published" in text
    assert "the bank stays where it is" in text
    html = page.read_text()
    assert "data:image/png;base64," in html
    assert "train step" in html
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_variants_stand_side_by_side(tmp_path, capsys):
    record, text, _ = plan(
        tmp_path, capsys, compare="regularizer.name=none,mesh.data=2,config.mesh.fsdp=4"
    )
    base, none = record["variants"]
    assert none["label"] == "regularizer.name=none,mesh.data=2,config.mesh.fsdp=4"
    assert "bank" in base["programs"]["train"]["memory_bytes_per_chip"]
    assert "bank" not in none["programs"]["train"]["memory_bytes_per_chip"]
    assert none["programs"]["train"]["flops"] < base["programs"]["train"]["flops"]
    assert none["mesh"] == {"data": 2, "fsdp": 4}
    assert text.count("\n| ") == 3  # a row of headings, and one each


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"price_per_chip_hour": -1.0}, "--price_per_chip_hour=-1 must be at least 0"),
        ({"topology": "v5e-256"}, "--topology='v5e-256': expected 'local'"),
        ({"num_slices": 2}, "--num_slices=2 has no meaning"),
        ({"num_slices": 0}, "--num_slices=0 must be at least 1"),
        ({"compare": "mesh.fsdp"}, "--compare: found 'mesh.fsdp', expected key=value"),
        ({"compare": "mesh.fsdq=2"}, "config.mesh.fsdq: unknown key"),
        ({"compare": "mesh.fsdp=two"}, "config.mesh.fsdp: expected int, found 'two'"),
        ({"compare": "model.remat=some"}, "--compare='model.remat=some': config.model.remat"),
        ({"compare": "mesh.fsdp=3"}, "config.mesh.data=-1, mesh.fsdp=3"),
        ({"compare": "num_slices=two"}, "--compare: num_slices='two'"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_compiled(tmp_path, options, expected):
    with pytest.raises(ConfigError) as found:
        plan_lib.plan(tiny.config_dict(), tmp_path, Options(**{"topology": "local"} | options))
    assert str(found.value).startswith(expected) or expected in str(found.value)
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_mesh_does_not_divide_is_named(tmp_path):
    values = tiny.config_dict(batch_size=12, regularizer__bank_rows=48)
    with pytest.raises(ConfigError, match="config.batch_size=12 must be a multiple of"):
        plan_lib.plan(values, tmp_path, Options("local"))


def test_absent_libtpu_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs libtpu.*pip install -e '.\[plan\]'"):
        topology_lib.open_topology("v5e:2x2")


# The largest batch.


def test_the_next_batch_to_try_lies_on_the_line():
    assert next_guess({8: 100.0, 16: 180.0}, available=500, unit=8) == 48  # 20 + 10 b
    assert next_guess({8: 100.0, 16: 180.0}, available=105, unit=8) is None
    assert next_guess({8: 900.0, 16: 1000.0}, available=500, unit=8) is None  # none fits
    # 48 was too much after all, by what does not grow with the batch.
    assert next_guess({8: 100.0, 16: 180.0, 48: 520.0}, available=500, unit=8) == 40


def test_the_largest_batch_of_a_linear_program():
    topology = dataclasses.replace(open_topology("local"), device_bytes=1000.0)
    c = tiny.config()
    tried = []

    def compile_train(c):
        tried.append(c.batch_size)
        size = 100.0 + 7 * c.batch_size
        return programs.Program(
            "train", c.batch_size, tiny.mesh(8), {"temporaries": size}, None, (), 0.0,
            refusal="too large" if size > 1000 else "",
        )  # fmt: skip

    found = largest_batch(c, topology, compile_train(c), compile_train)
    assert found["batch_size"] == 128  # the largest multiple of 8 under 900 / 7
    assert found["compilations"] == len(tried) <= 4
    assert largest_batch(c, open_topology("local"), None, compile_train) is None


def test_another_batch_keeps_the_bank():
    c = with_batch(tiny.config(), 64)
    assert (c.batch_size, c.regularizer.bank_rows) == (64, 64)
    assert with_batch(tiny.config(), 24).regularizer.bank_rows == 48


# TPU slices.


@needs_libtpu
def test_topologies_are_what_they_are_called():
    v5e, v5p = open_topology("v5e:2x2"), open_topology("v5p:2x2x1")
    assert (v5e.num_chips, v5e.num_hosts, v5e.chip.name) == (4, 1, "v5e")
    assert 0.9 * v5e.chip.hbm_bytes < v5e.device_bytes < v5e.chip.hbm_bytes
    assert (v5p.num_chips, v5p.chip.name, v5p.note) == (4, "v5p", "")
    v4 = open_topology("v4:2x2x1")
    assert (v4.num_chips, v4.devices_per_chip) == (4, 2)
    assert "cores" in v4.note
    for topology in (v4, open_topology("tpu7x:2x2x1"), v5p):
        mesh = sharding.create_mesh(-1, 2, 1, topology.devices)
        assert set(mesh.devices.flat) == set(topology.devices)
    two = open_topology("v5e:2x2", 2)
    assert (two.num_chips, two.num_slices, two.num_hosts) == (8, 2, 2)


@needs_libtpu
@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3"])
def test_a_topology_that_libtpu_does_not_know_is_named(name):
    with pytest.raises(ConfigError, match=f"--topology={name}: .*; known are v4:2x2x1"):
        open_topology(name)


@needs_libtpu
@pytest.mark.slow
def test_a_slice_is_planned_without_it(tmp_path, capsys):
    values = tiny.config_dict(mesh__fsdp=2, model__depth=2, model__scan_blocks=True)
    record, text, _ = plan(tmp_path, capsys, values, topology="v5e:2x2", price_per_chip_hour=2.0)
    [variant] = record["variants"]
    train = variant["programs"]["train"]
    assert train["fits"]
    assert train["unknown_loops"] == 0
    assert not train["carries_the_bank"]
    # The program is another than on a CPU, the products are the same, rounds of the scan included.
    topology = open_topology("local")
    here = program(
        "train", topology, tiny.config(mesh__data=8, model__depth=2, model__scan_blocks=True)
    )
    np.testing.assert_allclose(train["flops"], 8 * here.cost.matmul_flops, rtol=0.1)
    run, time = variant["run"], train["estimate"]
    assert run["hours"] == pytest.approx(10 * time["seconds"] / 3600)
    assert run["cost"] == pytest.approx(2.0 * 4 * run["hours"])
    assert 0 < time["mfu"] < 1
    assert "estimate from published rates, not a measurement" in text


@needs_libtpu
def test_what_does_not_fit_is_an_answer(tmp_path, capsys):
    values = tiny.config_dict(
        regularizer__projection_dim=4096, regularizer__bank_rows=2**22, data__autoencoder="none"
    )
    record, text, _ = plan(tmp_path, capsys, values, topology="v5e:2x2")
    train = record["variants"][0]["programs"]["train"]
    assert not train["fits"]
    bank = 2**22 * 4096 * 4 / 4  # of each of 4 chips
    assert train["memory_bytes_per_chip"]["bank"] == pytest.approx(bank, rel=1e-6)
    assert train["total_bytes_per_chip"] > train["available_bytes_per_chip"]
    assert any("bank_rows" in line for line in train["advice"])
    assert "DOES NOT FIT" in text


@needs_libtpu
@pytest.mark.slow
def test_every_size_of_bank_stays_where_it_is():
    topology = open_topology("v5e:2x2")
    sizes = []
    for rows in (2**14, 2**20):
        c = tiny.config(batch_size=64, regularizer__bank_rows=rows)
        found = program("train", topology, c)
        sizes.append(found.cost.collective_bytes)
        assert max(each.largest for each, _ in found.cost.collectives) < rows * tiny.DIM / 4
    # The compiler may choose otherwise for a scalar or two, but a bank of 64 times the rows, which
    # is 32 MiB, does not show.
    assert abs(sizes[1] - sizes[0]) < 64 * tiny.DIM * 4


def test_devices_are_those_here():
    topology = open_topology("local")
    assert topology.devices == tuple(jax.devices())
    assert (topology.chip, topology.device_bytes) == (None, None)


@needs_libtpu
@pytest.mark.slow
def test_between_slices_go_the_gradients_once(tmp_path):
    topology = open_topology("v5e:2x2", 2)
    c = tiny.config(mesh__data=2, mesh__fsdp=4, regularizer__name="none")
    found = program("train", topology, c)
    rows = describe_collectives(found)
    between = [row for row in rows if row["over"] == "network"]
    assert {row["axis"] for row in between} == {"data"}
    assert "data" not in {row["axis"] for row in rows if row["over"] == "links"}
    # Each device sends the gradients of its part of the parameters, in float32 or half of it.
    share = memory_by_kind("train", topology, c)["parameters"]
    assert 0.4 * share < sum(row["bytes"] for row in between) < 1.1 * share
    with pytest.raises(ConfigError, match=r"mesh.data=1.*2 slices"):
        programs.abstract_experiment(
            tiny.config(mesh__data=1, mesh__fsdp=8), pathlib.Path(), topology
        )


@needs_libtpu
def test_an_encoder_is_planned_for_one_of_several_hosts():
    topology = open_topology("v5e:4x4")
    c = tiny.config(
        data__autoencoder="taesd", model__in_channels=4, data__encode_batch_per_device=2,
        sampling__batch_size=16,
    )  # fmt: skip
    found = program("encode", topology, c)
    assert not found.refusal
    assert (found.mesh.size, found.images) == (4, 8)
    assert found.cost.collectives == []
    assert found.memory["batch"] == 2 * 32 * 32 * 3  # 4 latents of 8 pixels each way
