import dataclasses
import pathlib
from contextlib import nullcontext

import ml_collections
import pytest

from configs import default, digits, imagenet256
from repulsor_jax import config as config_lib
from repulsor_jax.method.registry import TERMS
from tests.oracles import tiny

CONFIGS = pathlib.Path(default.__file__).parent


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.patch_size", 3, "model.patch_size: found 3, expected a divisor of latent_size 4"),
        ("model.attention", "cudnn", "model.attention: found 'cudnn' with dtype float32"),
        (
            "model.remat",
            "some",
            "model.remat: expected 'none', 'dots', 'dots_attention' or 'full', found 'some'",
        ),
        ("model.depht", 3, "model.depht: unknown key; expected one of adaln_rank, .*depth"),
        ("repulsor.block", 1, "repulsor.block=1 is past the last block, 0"),
        ("repulsor.bank_rows", 40, r"repulsor.bank_rows=40 .* 32 and 48"),
        ("flow.weighting", "velocity", "flow.weighting='velocity' has no meaning"),
        ("optimizer.schedule", "cosine", "optimizer.warmup_steps=10 leaves no step"),
        ("checkpoint.max_lost_steps", 1, "checkpoint.max_lost_steps=1 must be at least"),
        ("log.profile_steps", (4,), "log.profile_steps=.4,.: expected the first and the last"),
        ("sampling.cfg_interval_low", 1.0, "sampling.cfg_interval_low=1.0 is above"),
        ("sampling.time_shift", 3.0, "sampling.time_shift=3.0 has no meaning for 'dopri5'"),
        ("sampling.num_steps", 1, "sampling.num_steps=1 must be at least 2"),
        ("sampling.guiding_run", "x", "sampling.guiding_run='x' has no effect"),
        ("sampling.cfg_channels", 3, "sampling.cfg_channels=3 exceeds"),
        ("evaluation.cfg_intervals", ((1, 0),), "evaluation.cfg_intervals=.*expected pairs"),
        (
            "evaluation.cfg_intervals",
            ((0, 1),),
            "evaluation.cfg_intervals has no meaning without guidance",
        ),
        (
            "evaluation.cfg_intervals",
            (0.2, 0.9),
            r"evaluation.cfg_intervals: expected pairs .* \(\(0.2, 0.9\),\) .*found \(0.2, 0.9\)",
        ),
        ("evaluation.cfg_intervals", ((0, 1, 2),), r"evaluation.cfg_intervals.0"),
        ("model.label_dropout", 1.0, "model.label_dropout=1 trains the null class alone"),
        ("optimizer.b2", 1.0, "optimizer.b2: expected less than 1"),
        ("optimizer.ema_decay", 1.0, "optimizer.ema_decay: expected less than 1"),
        ("data.dir", "None", "data.dir: found the word 'None'.*left empty for none"),
        ("data.dir", "none", "data.dir: found the word 'none'"),
        ("data.test_split", "None", "data.test_split: found the word 'None'"),
        ("evaluation.reference", "~nobody0/x", "evaluation.reference: .* no such home"),
        ("sampling.guiding_run", "https://me:hunter2@x", "sampling.guiding_run: found a password"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(key, value, expected):
    values = tiny.config_dict(
        optimizer__warmup_steps=10,
        sampling__cfg_interval_high=0.9,
        sampling__solver="dopri5" if key == "sampling.time_shift" else "euler_maruyama",
    ).to_dict()
    section, name = key.split(".")
    values[section][name] = value
    with pytest.raises(config_lib.ConfigError, match=f"config.{expected}") as error:
        config_lib.parse(values)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "name", "left"),
    [
        ({"terms": "dispersive", "batch_size": 1}, "dispersive", 1),
        ({"terms": "dispersive", "optimizer__accumulation_steps": 16}, "dispersive", 1),
        (
            {"repulsor__bank_rows": 0, "optimizer__accumulation_steps": 16},
            "repulsor",
            1,
        ),
        ({"terms": "contrastive_flow", "batch_size": 1}, "contrastive_flow", 1),
    ],
)
def test_terms_that_compare_samples_need_two(values, name, left):
    message = f"terms='.*': {name} compares the samples of a batch.* leaves {left} at a time"
    with pytest.raises(config_lib.ConfigError, match=message):
        tiny.config(**values)
    tiny.config(**values | {f"{name}__weight": 0.0})


def test_a_term_of_weight_0_contradicts_nothing():
    for weight, ends in ((0.1, pytest.raises(config_lib.ConfigError)), (0.0, nullcontext())):
        with ends:
            tiny.config(
                terms="contrastive_flow",
                contrastive_flow__weight=weight,
                flow__prediction="noise",
            )
        with ends:
            tiny.config(terms="dispersive", dispersive__block=9, dispersive__weight=weight)


def test_rows_with_a_label_keep_a_minimum():
    values = {"terms": "contrastive_flow", "contrastive_flow__labelled_only": True}
    tiny.config(**values, contrastive_flow__weight=0.45, model__label_dropout=0.5)
    with pytest.raises(config_lib.ConfigError, match=r"weight=0.5 must be below 0\.5"):
        tiny.config(**values, contrastive_flow__weight=0.5, model__label_dropout=0.5)


def test_a_bank_gives_one_sample_others_to_be_compared_with():
    tiny.config(batch_size=1)
    tiny.config(terms="contrastive_flow", optimizer__accumulation_steps=16)
    tiny.config(terms="dispersive", batch_size=2)


PATHS = [
    *("data.dir", "data.source_path", "data.autoencoder_weights", "checkpoint.directory"),
    *("sampling.guiding_run", "evaluation.inception_weights", "evaluation.reference"),
    "evaluation.samples",
]


def test_every_path_may_begin_with_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = tiny.config_dict(sampling__cfg_scale=2.0).to_dict()
    for key in PATHS:
        section, name = key.split(".")
        values[section][name] = f"~/{name}"
    c = config_lib.parse(values)
    for key in PATHS:
        section, name = key.split(".")
        assert getattr(getattr(c, section), name) == f"/home/me/{name}"


@pytest.mark.parametrize(
    "guided", [{"sampling__cfg_scale": 1.5}, {"evaluation__cfg_scales": (1.0, 2.0)}]
)
def test_guidance_needs_a_null_class_that_is_trained(guided):
    tiny.config(**guided)
    tiny.config(model__label_dropout=0.0)
    tiny.config(model__label_dropout=0.0, sampling__guiding_run="runs/weak", **guided)
    with pytest.raises(config_lib.ConfigError, match="label_dropout=0 trains no null class"):
        tiny.config(model__label_dropout=0.0, **guided)


def test_whole_numbers_pass_as_floats():
    assert tiny.config(repulsor__weight=1).repulsor.weight == 1.0


def test_batch_must_divide_over_the_mesh():
    c = tiny.config(batch_size=24, repulsor__bank_rows=48)
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


@pytest.mark.parametrize("variant", ["s_2,none", "b_4,dispersive", "l_8,repulsor", "xl_2,repulsor"])
def test_imagenet_variants_are_valid(variant):
    c = config_lib.parse(imagenet256.get_config(variant))
    size, _, objective = variant.partition(",")
    assert c.model.patch_size == int(size[-1])
    assert c.terms == objective


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
            shared = name.startswith("t.")
            sections = [*TERMS] if shared else [""]
            explained |= {f"{section}{name[1:] if shared else name[2:]}" for section in sections}
    size = {"latent_size", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio"}
    plain = {f"model.{name}" for name in size} | {
        f"optimizer.{name}" for name in ("learning_rate", "b1", "b2", "eps", "weight_decay")
    }
    plain |= {f"{name}.weight" for name in TERMS}
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


def test_no_key_is_a_method_of_the_dictionary_that_holds_it():
    """Such a key cannot be given on the command line."""
    for name, section in default.get_config().items():
        for key in (name, *(section if isinstance(section, ml_collections.ConfigDict) else ())):
            assert not hasattr(ml_collections.ConfigDict, key), key


def test_the_former_section_goes_to_its_present_places():
    c = tiny.config_dict()
    c.regularizer.name, c.regularizer.weight, c.regularizer.bank_rows = "dispersive", 0.25, 64
    c.regularizer.variant = "hinge"
    found = config_lib.parse(c)
    assert (found.terms, found.dispersive.weight, found.dispersive.variant) == (
        "dispersive",
        0.25,
        "hinge",
    )
    assert (found.repulsor.bank_rows, found.repulsor.weight) == (64, 0.25)
    assert "regularizer" not in config_lib.plain_values(c)
    assert config_lib.parse(config_lib.plain_values(tiny.config_dict())) == tiny.config()
