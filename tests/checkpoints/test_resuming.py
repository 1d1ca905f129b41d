"""What may change when a run goes on."""

import dataclasses
import json

import pytest

from repulsor_jax.checkpoints import resuming
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.files import atomic
from tests.oracles import tiny

LATENTS = {"shift": [0.0], "dataset": {"images": 100, "shards_sha256": "abc"}}


def check(latents=LATENTS, *, force=False, **overrides):
    """From the default configuration, read back from JSON, to one with overrides."""
    saved = json.loads(json.dumps(tiny.config_dict().to_dict()))
    present = tiny.config_dict(**overrides).to_dict()
    return resuming.check(present, latents, saved, LATENTS, force=force)


def test_every_section_of_the_configuration_is_in_the_table():
    assert {field.name for field in dataclasses.fields(Config)} <= resuming.CHANGES.keys()


def test_the_longest_name_counts():
    assert resuming.kind_of_change("model.hidden_size") == resuming.FIXED
    assert resuming.kind_of_change("model.dtype") == resuming.NOTED
    assert resuming.kind_of_change("flow.path") == resuming.FORCED
    assert resuming.kind_of_change("checkpoint.keep_last") == resuming.FREE


def test_the_same_and_what_does_not_matter_say_nothing():
    assert check() == []
    changed = {
        "data.dir": "/elsewhere",
        "mesh.fsdp": 4,
        "checkpoint.every_steps": 7,
        "log.profile_steps": (1, 2),
        "evaluation.cfg_scales": (1.0, 2.0),
        "model.remat": "full",
    }
    assert check(**changed) == []


def test_what_may_change_is_noted():
    changed = {
        "optimizer.learning_rate": 3e-4,
        "optimizer.clip_norm": 1.0,
        "repulsor.weight": 0.25,
        "batch_size": 8,
        "total_steps": 20,
    }
    assert check(**changed) == [
        "config.batch_size: 16 -> 8",
        "config.optimizer.clip_norm: 0.0 -> 1.0",
        "config.optimizer.learning_rate: 0.01 -> 0.0003",
        "config.repulsor.weight: 0.5 -> 0.25",
        "config.total_steps: 10 -> 20",
    ]


@pytest.mark.parametrize("force", [False, True])
def test_another_model_is_refused_naming_all_that_differs(force):
    message = r"model.depth: 1 -> 3; config.model.num_heads: 2 -> 4.*--workdir"
    with pytest.raises(ConfigError, match=message):
        check(force=force, **{"model.depth": 3, "model.num_heads": 4})


@pytest.mark.parametrize(
    ("overrides", "dataset", "line"),
    [
        ({"flow.path": "gvp"}, {}, "config.flow.path: 'linear' -> 'gvp'"),
        ({"repulsor.weight": 0.0}, {}, "config.repulsor.weight: 0.5 -> 0.0"),
        ({"terms": "none"}, {}, "config.terms: 'repulsor' -> 'none'"),
        ({"data.normalization": "statistics"}, {}, "normalization: 'scale' -> 'statistics'"),
        ({}, {"images": 90}, "data set: images: 100 -> 90"),
        ({}, {"shards_sha256": "def"}, "data set: shards_sha256: 'abc' -> 'def'"),
    ],
)
def test_another_task_or_other_data_need_force(overrides, dataset, line):
    latents = LATENTS | {"dataset": LATENTS["dataset"] | dataset}
    with pytest.raises(ConfigError, match=f"{line}.*--force"):
        check(latents, **overrides)
    (note,) = check(latents, force=True, **overrides)
    assert note.startswith("forced: ")
    assert line in note


def test_keys_of_another_version_are_noted():
    present = tiny.config_dict().to_dict()
    saved = tiny.config_dict().to_dict()
    del saved["model"]["qk_norm"]
    saved["gone"] = {"key": 1}
    assert resuming.check(present, LATENTS, saved, LATENTS) == [
        "config.gone.key: 1 -> 'absent'",
        "config.model.qk_norm: 'absent' -> False",
    ]


def test_changes_are_written_down(tmp_path):
    with atomic.Appender(tmp_path / "resumes.jsonl") as file:
        resuming.write_down(file, 5, [])
    assert not (tmp_path / "resumes.jsonl").exists()
    with atomic.Appender(tmp_path / "resumes.jsonl") as file:
        resuming.write_down(file, 5, ["one"])
        resuming.write_down(file, 9, ["two", "three"])
    lines = [json.loads(line) for line in (tmp_path / "resumes.jsonl").read_text().splitlines()]
    assert [(line["step"], line["notes"]) for line in lines] == [
        (5, ["one"]),
        (9, ["two", "three"]),
    ]


def test_a_run_goes_on_with_a_condition_where_it_is_forced_to_and_with_no_other():
    shown = {"conditioning.kind": "semantic", "conditioning.classes": 5}
    with pytest.raises(ConfigError, match=r"config.conditioning.kind: 'none' -> 'semantic'\. Use"):
        check(**shown)
    forced = ["forced: config.conditioning.kind: 'none' -> 'semantic'"]
    assert check(force=True, **shown) == forced
    before_it = tiny.config_dict().to_dict()
    del before_it["conditioning"]
    present = tiny.config_dict(**shown).to_dict()
    assert resuming.check(present, LATENTS, before_it, LATENTS, force=True) == forced
    assert resuming.check(tiny.config_dict().to_dict(), LATENTS, before_it, LATENTS) == []
    for other in ({"conditioning.kind": "inpaint"}, shown | {"conditioning.classes": 6}):
        with pytest.raises(ConfigError, match="does not fit another model"):
            resuming.check(
                tiny.config_dict(**other).to_dict(), LATENTS, present, LATENTS, force=True
            )


def test_a_run_of_before_the_neighbouring_systems_was_plain():
    present = json.loads(json.dumps(tiny.config_dict().to_dict()))
    saved = json.loads(json.dumps(present))
    for key in resuming._BEFORE:
        section, _, name = key.partition(".")
        del saved[section][name]
    del saved["residual"], saved["source"], saved["conditioning"], saved["feature_alignment"]
    assert resuming.check(present, LATENTS, saved, LATENTS) == []
    for section, name, value, message in (
        ("model", "architecture", "blockwise", "config.model.architecture: 'dit' -> 'blockwise'"),
        ("source", "name", "class", "config.source.name: 'gaussian' -> 'class'"),
    ):
        other = present | {section: present[section] | {name: value}}
        with pytest.raises(ConfigError, match=message):
            resuming.check(other, LATENTS, saved, LATENTS, force=True)
    grouped = present | {"flow": present["flow"] | {"time_groups": 2}}
    notes = resuming.check(grouped, LATENTS, saved, LATENTS)
    assert notes == ["config.flow.time_groups: 1 -> 2"]
