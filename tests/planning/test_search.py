"""The search among meshes, rematerialisation and batches, with a compiler of closed form."""

import dataclasses
import json
import pathlib

import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import plan as plan_lib
from repulsor_jax.config import ConfigError
from repulsor_jax.main import training_arguments
from repulsor_jax.models import dit
from repulsor_jax.plan import Options
from repulsor_jax.planning import programs, search
from repulsor_jax.planning.cost import Cost
from repulsor_jax.planning.topology import open_topology
from repulsor_jax.runtime import chips
from tests.oracles import tiny

CHIP = dataclasses.replace(chips.find("TPU v5e"), name="one of these", device_kinds=("cpu",))


@pytest.fixture
def topology(monkeypatch):
    """The devices here, with the rates of a TPU and 1 GiB."""
    monkeypatch.setattr(chips, "CHIPS", (CHIP,))
    return dataclasses.replace(open_topology("local"), known_bytes=2.0**30)


def found(topology, batches=(), **changes):
    values = config_lib.plain_values(tiny.config_dict(**changes))
    config = config_lib.parse(values)
    experiment = programs.abstract_experiment(config, pathlib.Path(), topology)
    return search.candidates(values, experiment, topology, batches)


def step_of(seconds, size, available, images):
    """A described train step."""
    return {
        "fits": size <= available,
        "total_bytes_per_chip": size,
        "available_bytes_per_chip": available,
        "images": images,
        "estimate": {"seconds": seconds, "serial_seconds": seconds},
    }


def test_settings_are_those_that_the_devices_allow(topology):
    all_of = found(topology, model__hidden_size=64, mesh__split_update=False)
    first, *others = all_of.settings
    assert first.changes == {}
    meshes = {tuple(s.config.mesh.__dict__[k] for k in ("data", "fsdp")) for s in others}
    assert {(-1, 2), (-1, 4), (-1, 8)} <= meshes
    assert {s.config.model.remat for s in others} == {"none", "dots", "full"}  # no cuDNN here
    assert {*search.REMATS} == {"none", *dit.REMAT_POLICIES}
    flags = [" ".join(s.flags) for s in all_of.settings]
    assert len(set(flags)) == len(flags)
    assert "--config.mesh.fsdp=4 --config.model.remat=full" in flags
    # The more devices share the state, the less each holds; remat leaves the state alone.
    sizes = {f: s.state_bytes for s, f in zip(all_of.settings, flags, strict=True)}
    assert sizes["--config.mesh.fsdp=8"] < sizes["--config.mesh.fsdp=2"] < sizes[""]
    assert sizes["--config.model.remat=full"] == sizes[""]


def test_state_that_does_not_fit_is_not_compiled(topology):
    sizes = {tuple(s.flags): s.state_bytes for s in found(topology).settings}
    small = dataclasses.replace(topology, known_bytes=sizes["--config.mesh.fsdp=2",] - 1)
    all_of = found(small)
    missing = {tuple(setting.flags): size for setting, size in all_of.too_large}
    assert missing["--config.mesh.fsdp=2",] == 1
    assert not {tuple(s.flags) for s in all_of.settings[1:]} & missing.keys()
    assert all_of.settings[0].changes == {}  # compiled all the same: the plan tells why


def test_batches_keep_the_bank_in_whole_slots(topology):
    settings = found(topology, batches=(64,)).settings
    assert {s.config.batch_size for s in settings} == {16, 64}
    assert settings[0].changes == {}  # the configured one, whatever else is asked for
    assert any("--config.repulsor.bank_rows=64" in s.flags for s in settings)
    with pytest.raises(ConfigError, match="--search_batches: 12 does not divide"):
        found(topology, batches=(16, 12))


def explored(settings, sizes, available, limit=99):
    """Explores with seconds and sizes of each setting; returns flags in order, and the rest."""
    order = []

    def compile_step(setting):
        order.append(" ".join(setting.flags))
        seconds, size = sizes(setting)
        return step_of(seconds, size, available, setting.config.batch_size)

    tried, useless, untried = search.explore(settings, limit, compile_step, describe=lambda _: "")
    return order, tried, useless, untried


def test_the_frontier_is_that_of_brute_force(topology, capsys):
    settings = found(topology).settings
    numbers = {
        (*s.place, s.state_bytes): (k * 7 % 11 + 1, k * 5 % 13) for k, s in enumerate(settings)
    }
    sizes = lambda s: numbers[(*s.place, s.state_bytes)]
    order, tried, useless, untried = explored(settings, sizes, available=99)
    assert order[0] == ""
    assert len(order) == len(settings)
    assert (useless, untried) == ([], [])
    assert f"{len(settings)} of at most {len(settings)}" in capsys.readouterr().out
    best = {tuple(each.setting.flags) for each in search.frontier(tried)}
    points = [(tuple(s.flags), sizes(s)) for s in settings]
    dominated = {
        a for a, (t, m) in points for _, (u, n) in points if u <= t and n <= m and (u, n) != (t, m)
    }
    assert best == {flags for flags, _ in points} - dominated
    seconds = [each.seconds for each in search.frontier(tried)]
    assert seconds == sorted(seconds)


def test_what_cannot_fit_or_be_better_is_not_compiled(topology):
    settings = found(topology, batches=(16, 32), model__remat="full").settings
    # Nothing but full recomputation fits, whatever the mesh: one of each other says so.
    sizes = lambda s: (1.0, 1.0 if s.config.model.remat == "full" else 1e9)
    order, tried, useless, _ = explored(settings, sizes, available=10)
    assert len(order) + len(useless) == len(settings)
    refused = [t.setting for t in tried if not t.step["fits"]]
    assert {s.config.model.remat for s in useless} == {"none", "dots"}
    assert len(refused) <= 4  # with two batches
    # Where it is the state that does not fit, another mesh may help, and one with less does not.
    base = max(s.state_bytes for s in settings)
    sizes = lambda s: (1.0, 1e9 if s.state_bytes == base else 1.0)
    order, _, useless, _ = explored(settings[:1] + settings[:0:-1], sizes, available=1e9 - 1)
    assert {s.state_bytes for s in useless} <= {base}
    assert any("fsdp=8" in flags for flags in order)
    # As quick as the peak rates allow, and smaller than any state.
    least = min(s.least_seconds for s in settings)
    order, *_ = explored(settings, lambda s: (least / 2, 1.0), available=10)
    assert order == [""]


def test_half_of_the_compilations_find_all_of_the_frontier(topology):
    """Without remat a step is slower and larger here, as it is where memory bounds it."""
    settings = found(topology, model__remat="dots", model__hidden_size=64).settings

    def sizes(s):
        rank = search.REMATS.index(s.config.model.remat)
        mesh = 10.0 - s.config.mesh.fsdp - 0.5 * s.config.mesh.split_update
        return mesh + (2.0, 0.0, 0.0, 0.25)[rank], mesh + (20.0, 2.0, 2.0, 1.0)[rank]

    order, tried, *_ = explored(settings, sizes, available=999, limit=len(settings) // 2)
    got = {tuple(each.setting.flags) for each in search.frontier(tried)}
    every, everything, *_ = explored(settings, sizes, available=999)
    assert got == {tuple(each.setting.flags) for each in search.frontier(everything)}
    assert len(every) == len(settings)
    assert len(got) == 2  # of the quickest mesh
    assert sum("remat=none" in flags for flags in order) == 1


def test_the_limit_counts_compilations(topology):
    settings = found(topology).settings
    order, _, _, untried = explored(settings, lambda s: (1.0, 1e12), available=1e13, limit=3)
    assert len(order) == 3
    assert len(untried) == len(settings) - 3


def test_a_search_prints_commands_and_writes_them(topology, tmp_path, capsys, monkeypatch):
    def compile_program(name, experiment, topology, makes_sure):
        """4 seconds of compute on a device without fsdp, less with it; a tenth of the memory."""
        built = programs.build(name, experiment, topology)
        flops = 4 * CHIP.peak_flops / built.mesh.shape["fsdp"]
        size = 2.0**31 if experiment.config.model.remat == "none" else 2.0**27
        return programs.Program(
            **vars(built),
            memory={"temporaries": size},
            cost=Cost(flops, flops),
            seconds=1.0,
            refusal="too large" if size > topology.device_bytes else "",
        )

    monkeypatch.setattr(programs, "compile_program", compile_program)
    monkeypatch.setattr(plan_lib, "open_topology", lambda *unused: topology)
    argv = ["--config=digits", "--config.mesh.fsdp=2", "--workdir", "my run"]
    options = Options(topology="local", search=True, search_limit=40, command=("main", *argv))
    page = plan_lib.plan(tiny.config_dict(mesh__fsdp=2), tmp_path, options)
    text = capsys.readouterr().out
    [best] = [
        row
        for row in json.loads(page.with_suffix(".json").read_text())["variants"][0]["search"][
            "compiled"
        ]
        if row["on_frontier"]
    ]
    # The user's own flag of the key gives way.
    assert best["command"].startswith("main --config=digits --workdir 'my run' --config.mesh.")
    assert best["step"]["mesh"] == {"fsdp": 8}
    assert f"1: {best['command']}" in text
    assert "these do not fit" in text
    assert "1.00 GiB  as configured" in text
    assert page.name == "plan.html"
    assert best["remat"] in page.read_text()


def test_a_command_is_that_of_training():
    argv = "--config=digits --mode plan --topology=v5e:2x2 --search --workdir w --search_limit 4"
    assert training_arguments(argv.split()) == ["--config=digits", "--workdir", "w"]
