import dataclasses
import pathlib

import ml_collections
import pytest

from configs import default, digits, imagenet256
from repulsor_jax import config as config_lib
from tests.oracles import tiny

CONFIGS = pathlib.Path(default.__file__).parent


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.patch_size", 3, "config.model.patch_size=3 must divide config.model.latent_size=4"),
        ("model.num_heads", 5, "config.model.num_heads=5 must divide"),
        ("model.hidden_size", 30, "config.model.num_heads=2|multiple of 4"),
        ("model.remat", "some", "config.model.remat='some' must be one of 'none', 'dots', 'full'"),
        ("model.label_dropout", 1.5, "config.model.label_dropout=1.5 must be at most 1"),
        ("regularizer.block", 1, "config.regularizer.block=1 is past the last block, 0"),
        ("regularizer.bank_rows", 40, r"config.regularizer.bank_rows=40 .* 32 and 48"),
        ("regularizer.temperature", 0.0, "config.regularizer.temperature=0.0 must be greater"),
        ("regularizer.weight", -1.0, "config.regularizer.weight=-1.0 must be at least 0"),
        ("flow.weighting", "velocity", "config.flow.weighting='velocity' has no meaning"),
        ("sampling.cfg_channels", 3, "config.sampling.cfg_channels=3 exceeds"),
        ("sampling.cfg_interval_low", 1.5, "cfg_interval_low=1.5 must be at most 1"),
        ("sampling.last_step_size", 0.9, "last_step_size=0.9 must be at most 0.5"),
        ("batch_size", 0, "config.batch_size=0 must be at least 1"),
    ],
)
def test_contradictions_name_their_key(key, value, expected):
    with pytest.raises(config_lib.ConfigError, match=expected):
        tiny.config(**{key: value})


def test_unknown_missing_and_mistyped_keys_are_named():
    values = tiny.config_dict().to_dict()
    with pytest.raises(config_lib.ConfigError, match=r"config.model.depht: unknown key"):
        config_lib.parse(values | {"model": values["model"] | {"depht": 3}})
    with pytest.raises(config_lib.ConfigError, match=r"config.seed: missing"):
        config_lib.parse({k: v for k, v in values.items() if k != "seed"})
    with pytest.raises(config_lib.ConfigError, match=r"config.seed: expected int, found '1'"):
        config_lib.parse(values | {"seed": "1"})
    with pytest.raises(config_lib.ConfigError, match=r"config.model: expected a section"):
        config_lib.parse(values | {"model": 3})
    with pytest.raises(config_lib.ConfigError, match=r"config.log.every_steps: expected int"):
        config_lib.parse(values | {"log": {"every_steps": True}})


def test_whole_numbers_pass_as_floats():
    assert tiny.config(regularizer__weight=1).regularizer.weight == 1.0


def test_batch_must_divide_over_the_mesh():
    c = tiny.config(batch_size=24, regularizer__bank_rows=48)
    config_lib.check_devices(c, batch_shards=8)
    with pytest.raises(
        config_lib.ConfigError, match=r"config.batch_size=24 .* 16 x 1 = 16.* 16 and 32"
    ):
        config_lib.check_devices(c, batch_shards=16)
    config_lib.check_devices(tiny.config(sampling__batch_size=32), batch_shards=32, trains=False)
    two = tiny.config(optimizer__accumulation_steps=3)
    with pytest.raises(config_lib.ConfigError, match="accumulation_steps = 2 x 3 = 6"):
        config_lib.check_devices(two, batch_shards=2)
    with pytest.raises(config_lib.ConfigError, match=r"config.sampling.batch_size=6"):
        config_lib.check_devices(tiny.config(sampling__batch_size=6), batch_shards=4)


def test_registries_are_checked_by_name():
    with pytest.raises(config_lib.ConfigError, match="config.regularizer.name='x' must be one of"):
        config_lib.check_choice("regularizer.name", "x", ["none", "repulsor"])


def test_tap_defaults_to_a_quarter_of_the_depth():
    assert config_lib.tap_block(tiny.config(model__depth=12)) == 3
    assert config_lib.tap_block(tiny.config(model__depth=12, regularizer__block=1)) == 1


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("regularizer", ["none", "dispersive", "repulsor"])
def test_every_imagenet_variant_is_valid(size, patch, regularizer):
    c = config_lib.parse(imagenet256.get_config(f"{size}_{patch},{regularizer}"))
    assert c.model.patch_size == patch
    assert c.regularizer.name == regularizer


def test_xl_is_the_published_size():
    m = imagenet256.get_config("xl_2,repulsor").model
    assert (m.depth, m.hidden_size, m.num_heads) == (28, 1152, 16)


@pytest.mark.parametrize("variant", ["huge_2,none", "b_3,none", "b,none"])
def test_unknown_imagenet_sizes_are_named(variant):
    with pytest.raises(ValueError, match=variant.split(",")[0]):
        imagenet256.get_config(variant)


def test_default_and_digits_are_valid():
    config_lib.parse(default.get_config())
    config_lib.parse(digits.get_config())


def test_every_knob_of_the_default_has_a_comment():
    """And the schema has no knob that the default does not explain."""
    explained = set()
    for line in (CONFIGS / "default.py").read_text().splitlines():
        code, _, comment = line.strip().partition("  # ")
        name, equals, value = code.partition(" = ")
        if equals and comment and "ConfigDict" not in value:
            explained.add(name.removeprefix("c."))
    size = {"latent_size", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio"}
    plain = {f"model.{name}" for name in size} | {
        f"optimizer.{name}" for name in ("learning_rate", "b1", "b2", "eps", "weight_decay")
    }
    plain |= {"sampling.num_steps", "sampling.grid_samples", "sampling.grid_columns"}
    keys = set()
    for section in dataclasses.fields(config_lib.Config):
        value = default.get_config()[section.name]
        if isinstance(value, ml_collections.ConfigDict):
            keys |= {f"{section.name}.{key}" for key in value}
        else:
            keys.add(section.name)
    assert keys - explained <= plain  # names that are the field's own need no words
    assert explained <= keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cfg_interval_low": 0.6, "cfg_interval_high": 0.4},
            "cfg_interval_low=0.6 is above config.sampling.cfg_interval_high=0.4",
        ),
        ({"solver": "dopri5", "time_shift": 3.0}, "time_shift=3.0 has no meaning for 'dopri5'"),
        ({"solver": "euler_maruyama", "num_steps": 1}, "num_steps=1 must be at least 2"),
    ],
)
def test_sampling_knobs_that_contradict_each_other(changes, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        tiny.config(**{f"sampling.{key}": value for key, value in changes.items()})
