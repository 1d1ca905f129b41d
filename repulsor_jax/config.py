"""Turns the ConfigDict into checked, typed values; every complaint names its key.

The dataclasses are the schema, `configs/default.py` holds the defaults and explains each knob.
"""

import dataclasses
import importlib.util
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import ml_collections

from repulsor_jax.files.untrusted import has_secret
from repulsor_jax.flows import paths, solvers

# docs.cloud.google.com/storage/docs/buckets#naming; 222 characters where it has dots.
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_BUCKET_NAME = rf"(?=[a-z0-9][^/]{{1,220}}[a-z0-9]/){_LABEL}(?:\.{_LABEL})*"

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and says what to do."""


def _one_of(*values: str) -> Any:
    return dataclasses.field(metadata={"one_of": values})


def _at_least(low: float) -> Any:
    return dataclasses.field(metadata={"min": low})


def _above(low: float) -> Any:
    return dataclasses.field(metadata={"above": low})


def _fraction() -> Any:
    return dataclasses.field(metadata={"min": 0.0, "max": 1.0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """See `configs/default.py`, section model."""

    latent_size: int = _at_least(1)
    in_channels: int = _at_least(1)
    patch_size: int = _at_least(1)
    hidden_size: int = _at_least(4)
    depth: int = _at_least(1)
    num_heads: int = _at_least(1)
    mlp_ratio: float = _above(0)
    num_classes: int = _at_least(1)
    label_dropout: float = _fraction()
    learn_sigma: bool
    qk_norm: bool
    scan_blocks: bool
    remat: str = _one_of("none", "dots", "full")
    dtype: str = _one_of("float32", "bfloat16")
    attention: str = _one_of("auto", "xla", "cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """See `configs/default.py`, section flow."""

    path: str = _one_of("linear", "gvp", "vp")
    prediction: str = _one_of("velocity", "score", "noise")
    weighting: str = _one_of("none", "velocity", "likelihood")
    time_distribution: str = _one_of("uniform", "logit_normal")
    logit_normal_location: float
    logit_normal_scale: float = _above(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    """See `configs/default.py`, section regularizer."""

    name: str
    weight: float = _at_least(0)
    warmup_steps: int = _at_least(0)
    block: int = _at_least(-1)
    temperature: float = _above(0)
    distance: str = _one_of("squared_l2", "cosine")
    pooling: str = _one_of("mean", "flatten")
    projection_dim: int = _at_least(1)
    bank_rows: int = _at_least(0)
    bank_dtype: str = _one_of("float32", "bfloat16")
    variant: str = _one_of("l2", "cosine", "hinge", "covariance")
    margin: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """See `configs/default.py`, section optimizer."""

    learning_rate: float = _above(0)
    warmup_steps: int = _at_least(0)
    schedule: str = _one_of("constant", "cosine")
    b1: float = _fraction()
    b2: float = _fraction()
    eps: float = _above(0)
    weight_decay: float = _at_least(0)
    clip_norm: float = _at_least(0)
    accumulation_steps: int = _at_least(1)
    ema_decay: float = _fraction()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """See `configs/default.py`, section data."""

    dir: str
    source: str
    source_path: str
    train_split: str
    test_split: str
    image_size: int = _at_least(0)
    flips: bool
    autoencoder: str
    autoencoder_weights: str
    autoencoder_dtype: str = _one_of("float32", "bfloat16")
    encode_if_missing: bool
    encode_batch_per_device: int = _at_least(1)
    encode_workers: int = _at_least(-1)
    on_bad_image: str = _one_of("fail", "skip")
    images_per_shard: int = _at_least(1)
    preview_images: int = _at_least(0)
    dtype: str = _one_of("float16", "float32")
    verify: bool
    normalization: str = _one_of("scale", "statistics")
    read_threads: int = _at_least(1)
    prefetch_batches: int = _at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """See `configs/default.py`, section mesh."""

    data: int = _at_least(-1)
    fsdp: int = _at_least(-1)
    tensor: int = _at_least(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """See `configs/default.py`, section checkpoint."""

    directory: str
    every_steps: int = _at_least(1)
    keep_last: int = _at_least(1)
    keep_every: int = _at_least(0)
    max_lost_steps: int = _at_least(0)
    patience_seconds: float = _at_least(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """See `configs/default.py`, section divergence."""

    policy: str = _one_of("stop", "skip", "rollback")
    max_events: int = _at_least(1)
    max_loss: float = _at_least(0)
    max_grad_norm: float = _at_least(0)
    keep_batches: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """See `configs/default.py`, section log."""

    every_steps: int = _at_least(1)
    profile_steps: tuple[int, ...] = _at_least(1)
    watchdog_minutes: float = _at_least(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """See `configs/default.py`, section sampling."""

    solver: str
    num_steps: int = _at_least(1)
    time_shift: float = _above(0)
    rtol: float = _above(0)
    atol: float = _above(0)
    max_steps: int = _at_least(1)
    diffusion_form: str = _one_of(*paths.DIFFUSION_FORMS)
    diffusion_norm: float = _at_least(0)
    last_step: str = _one_of(*solvers.LAST_STEPS)
    last_step_size: float = dataclasses.field(metadata={"above": 0.0, "max": 0.5})
    cfg_scale: float = _at_least(0)
    cfg_interval_low: float = _fraction()
    cfg_interval_high: float = _fraction()
    cfg_channels: int = _at_least(0)
    guiding_run: str
    guiding_step: int = _at_least(-1)
    labels: str = _one_of("balanced", "random")
    num_samples: int = _at_least(1)
    batch_size: int = _at_least(1)
    images_per_shard: int = _at_least(1)
    rounding: str = _one_of("dit", "adm")
    save_png: bool
    gather_params: bool
    decode_slice: int = _at_least(0)
    seed: int = _at_least(0)
    grid_every_steps: int = _at_least(0)
    grid_samples: int = _at_least(1)
    grid_columns: int = _at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """See `configs/default.py`, section evaluation."""

    every_steps: int = _at_least(0)
    training_samples: int = _at_least(2)
    num_samples: int = _at_least(2)
    features: str = _one_of("inception", "pixels", "autoencoder")
    inception_weights: str
    reference: str
    reference_split: str
    reference_features: int = _at_least(2)
    batch_size: int = _at_least(1)
    samples: str
    cfg_scales: tuple[float, ...]
    cfg_intervals: tuple[tuple[float, float], ...]
    poll_seconds: int = _at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration; see `configs/default.py`."""

    seed: int = _at_least(0)
    total_steps: int = _at_least(1)
    batch_size: int = _at_least(1)
    model: ModelConfig
    flow: FlowConfig
    regularizer: RegularizerConfig
    optimizer: OptimizerConfig
    data: DataConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    divergence: DivergenceConfig
    log: LogConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Checks keys, types, ranges and contradictions, and returns the typed configuration.

    Nothing here needs a device; `check_devices` does the rest once their number is known.

    Raises:
      ConfigError: names the key, what was found, what is expected.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    parsed = parse_section(Config, config, "config")
    _check_consistency(parsed)
    return parsed


def tap_block(config: Config) -> int:
    """Index of the block whose output the regulariser sees (default: depth // 4)."""
    block = config.regularizer.block
    return config.model.depth // 4 if block == -1 else block


def regularizer_is_on(config: Config) -> bool:
    """Whether the step holds a regulariser at all."""
    return config.regularizer.name != "none" and config.regularizer.weight > 0


def check_devices(config: Config, batch_shards: int, *, trains: bool = True) -> None:
    """Checks the batch sizes against the mesh.

    Args:
      config: the configuration.
      batch_shards: number of pieces that the mesh cuts a batch into (data x fsdp).
      trains: whether the batch of training counts too.

    Raises:
      ConfigError: names the key.
    """
    accumulation = config.optimizer.accumulation_steps
    shards = batch_shards * accumulation
    if trains and config.batch_size % shards:
        raise ConfigError(
            f"config.batch_size={config.batch_size} must be a multiple of mesh.data x mesh.fsdp x "
            f"optimizer.accumulation_steps = {batch_shards} x {accumulation} = {shards}; "
            f"the nearest are {_multiples(config.batch_size, shards)}"
        )
    if config.sampling.batch_size % batch_shards:
        raise ConfigError(
            f"config.sampling.batch_size={config.sampling.batch_size} must be a multiple of "
            f"mesh.data x mesh.fsdp = {batch_shards}; the nearest are "
            f"{_multiples(config.sampling.batch_size, batch_shards)}"
        )


def _check_consistency(c: Config) -> None:
    m, r = c.model, c.regularizer
    if m.latent_size % m.patch_size:
        raise ConfigError(
            f"config.model.patch_size={m.patch_size} must divide "
            f"config.model.latent_size={m.latent_size}"
        )
    if m.hidden_size % m.num_heads:
        raise ConfigError(
            f"config.model.num_heads={m.num_heads} must divide "
            f"config.model.hidden_size={m.hidden_size}"
        )
    if m.hidden_size % 4:
        raise ConfigError(
            f"config.model.hidden_size={m.hidden_size} must be a multiple of 4: sines and cosines "
            "of two coordinates make the position embedding"
        )
    if r.block >= m.depth:
        raise ConfigError(
            f"config.regularizer.block={r.block} is past the last block, {m.depth - 1} "
            f"(config.model.depth={m.depth})"
        )
    if regularizer_is_on(c) and r.name == "repulsor" and r.bank_rows % c.batch_size:
        raise ConfigError(
            f"config.regularizer.bank_rows={r.bank_rows} must be a multiple of "
            f"config.batch_size={c.batch_size}: the bank holds whole batches; the nearest are "
            f"{_multiples(r.bank_rows, c.batch_size)}"
        )
    if c.flow.prediction == "velocity" and c.flow.weighting != "none":
        raise ConfigError(
            f"config.flow.weighting={c.flow.weighting!r} has no meaning for "
            "config.flow.prediction='velocity'; set it to 'none'"
        )
    if c.optimizer.schedule == "cosine" and c.optimizer.warmup_steps >= c.total_steps:
        raise ConfigError(
            f"config.optimizer.warmup_steps={c.optimizer.warmup_steps} leaves no step of "
            f"config.total_steps={c.total_steps} to the cosine schedule"
        )
    if 0 < c.checkpoint.max_lost_steps < c.checkpoint.every_steps:
        raise ConfigError(
            f"config.checkpoint.max_lost_steps={c.checkpoint.max_lost_steps} must be at least "
            f"config.checkpoint.every_steps={c.checkpoint.every_steps}, or 0"
        )
    for key, where in (
        ("checkpoint.directory", c.checkpoint.directory),
        ("sampling.guiding_run", c.sampling.guiding_run),
    ):
        if "://" not in where:
            continue
        if not re.fullmatch(rf"gs://{_BUCKET_NAME}/[^/].*", where):
            raise ConfigError(
                f"config.{key}={where!r}: expected a folder, or gs://bucket/path, the bucket's "
                "name of 3 to 63 lower case letters, digits, '-', '_' and '.'"
            )
        if importlib.util.find_spec("gcsfs") is None:
            raise ConfigError(
                f"config.{key}={where!r} needs gcsfs: install the extra `gcs`, or mount the bucket"
            )
    profiled = c.log.profile_steps
    if profiled and (len(profiled) != 2 or profiled[0] > profiled[1]):
        raise ConfigError(
            f"config.log.profile_steps={profiled}: expected the first and the last step, as "
            "(100, 104), or ()"
        )
    s = c.sampling
    if s.cfg_interval_low > s.cfg_interval_high:
        raise ConfigError(
            f"config.sampling.cfg_interval_low={s.cfg_interval_low} is above "
            f"config.sampling.cfg_interval_high={s.cfg_interval_high}"
        )
    if s.solver in solvers.ADAPTIVE and s.time_shift != 1:
        raise ConfigError(
            f"config.sampling.time_shift={s.time_shift} has no meaning for {s.solver!r}, which "
            "chooses its steps; set it to 1"
        )
    if s.solver in solvers.SDE_STEPS and s.last_step != "none" and s.num_steps < 2:
        raise ConfigError(
            f"config.sampling.num_steps={s.num_steps} must be at least 2 for {s.solver!r}: one of "
            "them is config.sampling.last_step"
        )
    for low, high in c.evaluation.cfg_intervals:
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                f"config.evaluation.cfg_intervals: found ({low}, {high}), expected pairs (low, "
                "high) of times with 0 <= low <= high <= 1; 0 is noise, 1 is data"
            )
    if any(scale < 0 for scale in c.evaluation.cfg_scales):
        raise ConfigError(
            f"config.evaluation.cfg_scales={c.evaluation.cfg_scales} must be at least 0"
        )
    if c.evaluation.cfg_intervals and not c.evaluation.cfg_scales and s.cfg_scale == 1:
        raise ConfigError(
            "config.evaluation.cfg_intervals has no meaning without guidance: set "
            "config.evaluation.cfg_scales, or config.sampling.cfg_scale"
        )
    if s.guiding_run and {s.cfg_scale, *c.evaluation.cfg_scales} == {1.0}:
        raise ConfigError(
            f"config.sampling.guiding_run={s.guiding_run!r} has no effect at "
            "config.sampling.cfg_scale=1: raise the scale, or leave it empty"
        )
    if c.sampling.cfg_channels > m.in_channels:
        raise ConfigError(
            f"config.sampling.cfg_channels={c.sampling.cfg_channels} exceeds "
            f"config.model.in_channels={m.in_channels}; 0 guides all"
        )


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of `choices`, the names of a registry."""
    choices = sorted(choices)
    if value not in choices:
        raise ConfigError(f"config.{key}={value!r} must be one of {', '.join(map(repr, choices))}")


def _multiples(value: int, factor: int) -> str:
    low = value // factor * factor
    return f"{low} and {low + factor}" if low else f"{factor}"


def parse_section(schema: type[T], values: Any, path: str) -> T:
    """Checks keys, types and ranges of one section; `path` is what it is called in errors.

    Raises:
      ConfigError: names the key, what was found, what is expected.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a section of keys, found {values!r}")
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{path}.{key}: unknown key; the keys of {path} are {', '.join(sorted(fields))}"
            )
    parsed = {}
    for name, field in fields.items():
        key = f"{path}.{name}"
        if name not in values:
            raise ConfigError(f"{key}: missing; configs/default.py has all keys: start from it")
        if dataclasses.is_dataclass(hints[name]):
            parsed[name] = parse_section(hints[name], values[name], key)
        else:
            parsed[name] = _check_value(key, values[name], hints[name], field.metadata)
    return schema(**parsed)


def _check_value(key: str, value: Any, kind: Any, bounds: types.MappingProxyType[str, Any]) -> Any:
    if typing.get_origin(kind) is tuple:
        return _check_tuple(key, value, kind, bounds)
    if isinstance(value, str) and has_secret(value):
        raise ConfigError(
            f"{key}: found a password or an access token in it (not shown): the configuration is "
            "printed and saved with every checkpoint; keep secrets in the environment or in the "
            "files of the tool that needs them, and give a path or a name here"
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key}: expected {kind.__name__}, found {value!r}")
    if "one_of" in bounds and value not in bounds["one_of"]:
        choices = ", ".join(map(repr, bounds["one_of"]))
        raise ConfigError(f"{key}={value!r} must be one of {choices}")
    if "min" in bounds and not value >= bounds["min"]:
        raise ConfigError(f"{key}={value!r} must be at least {bounds['min']}")
    if "max" in bounds and not value <= bounds["max"]:
        raise ConfigError(f"{key}={value!r} must be at most {bounds['max']}")
    if "above" in bounds and not value > bounds["above"]:
        raise ConfigError(f"{key}={value!r} must be greater than {bounds['above']}")
    return value


def _check_tuple(key: str, value: Any, kind: Any, bounds: types.MappingProxyType[str, Any]) -> Any:
    kinds = typing.get_args(kind)
    if not isinstance(value, tuple | list):
        raise ConfigError(f"{key}: expected a tuple, as (1.0, 1.5), found {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ConfigError(f"{key}: expected {len(kinds)} values, found {value!r}")
    return tuple(_check_value(key, v, k, bounds) for v, k in zip(value, kinds, strict=True))
