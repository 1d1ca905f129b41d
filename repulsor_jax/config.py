"""Turns the ConfigDict into checked, typed values; every complaint names its key.

The classes are the schema, a class for each section of `configs/default.py`, which holds the
defaults and explains every knob.
"""

import ast
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import ml_collections
import numpy as np
from flax import traverse_util
from pydantic import AfterValidator, BeforeValidator, Field

from repulsor_jax.data.features import open_features
from repulsor_jax.files.untrusted import checked, has_secret
from repulsor_jax.files.untrusted import parse as parse_values
from repulsor_jax.flows import paths, sampler, solvers, source
from repulsor_jax.method import alignment, registry, repulsor
from repulsor_jax.method.dispersive import VARIANTS
from repulsor_jax.method.repulsion import DISTANCES
from repulsor_jax.models import token_groups
from repulsor_jax.models.build import build_model, num_segments


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and says what to do."""


def _text(text: str) -> str:
    if text in ("None", "null"):
        raise ValueError(f"found the word {text!r}; expected a text, which is left empty for none")
    if has_secret(text):
        raise ValueError(
            "found a password or an access token in it (not shown): the configuration is printed "
            "and saved with every checkpoint; keep secrets in the environment or in the files of "
            "the tool that needs them, and give a path or a name here"
        )
    return text


def expand_path(text: str) -> str:
    """A path with ~ or ~user expanded; ValueError where there is no such user, or for "none"."""
    if text.lower() in ("none", "null"):
        raise ValueError(f"found the word {text!r}; expected a path, which is left empty for none")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"found {text!r}, but no such home; a folder of that name is ./{text}")
    return expanded


def _pairs(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if not all(isinstance(pair, list) for pair in value):
        raise ValueError(
            f"expected pairs of times, as ((0.2, 0.9),) or ((0.0, 1.0), (0.2, 0.9)), found "
            f"{tuple(value)}"
        )
    return tuple(map(tuple, value))  # lists are tuples in JSON alone, which this is no longer


def _one_of(choices: Iterable[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in choices:
            known = ", ".join(sorted(choices))
            raise ValueError(f"expected one of {known}, found {name!r}")
        return name

    return AfterValidator(check)


Text = Annotated[str, AfterValidator(_text)]
Path = Annotated[Text, AfterValidator(expand_path)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrFill = Annotated[int, Field(ge=-1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average, which with 1 would never move


@checked
class ModelConfig:
    latent_size: Count
    in_channels: Count
    patch_size: Count
    hidden_size: Annotated[int, Field(ge=4)]
    depth: Count
    num_heads: Count
    mlp_ratio: Positive
    num_classes: Count
    label_dropout: Fraction
    learn_sigma: bool
    qk_norm: bool
    scan_blocks: bool
    remat: Literal["none", "dots", "dots_attention", "full"]
    dtype: Literal["float32", "bfloat16"]
    attention: Literal["auto", "xla", "cudnn"]
    attention_separation: bool = False  # which runs of before this key do not say
    time_steps: Natural = 0  # defaults, for the records of older versions
    init_from: Path = ""
    init_convention: Literal["auto", "sit", "reversed", "dit"] = "auto"
    # Runs of versions without these, which may be asked for guidance, have the defaults.
    architecture: Literal["dit", "blockwise"] = "dit"
    segments: Count = 6
    segment_depth: Count = 5
    adaln_rank: Natural = 288
    residual_depth: Natural = 0


@checked
class ResidualConfig:
    base_run: Path
    base_step: CountOrFill


@checked
class FlowConfig:
    path: Annotated[str, _one_of(paths.PATHS)]
    prediction: Annotated[str, _one_of(paths.PREDICTIONS)]
    weighting: Annotated[str, _one_of(paths.WEIGHTINGS)]
    time_distribution: Annotated[str, _one_of(paths.TIME_DISTRIBUTIONS)]
    logit_normal_location: Finite
    logit_normal_scale: Positive
    time_shift: Positive
    time_groups: Annotated[int, Field(ge=1, le=8)]
    group_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...]
    whole_fraction: Annotated[float, Field(ge=0, lt=1)]
    teacher_times: Annotated[str, _one_of(token_groups.TEACHER_TIMES)]


@checked
class SourceConfig:
    name: Literal["gaussian", "class"]
    rank: Count
    learn_variance: bool
    variance_weight: NonNegative
    alignment_weight: NonNegative
    alignment_axis: Annotated[str, _one_of(source.AXES)]
    detach_target: bool
    null: Literal["class", "gaussian"]


@checked
class ConditioningConfig:
    kind: Literal["none", "inpaint", "semantic"]
    masked: Literal["latent", "image"]
    masks_per_image: Count
    classes: Natural
    channels: Count
    maps_path: Path
    images: Path
    filling: Literal["channels", "replace"]


def stored_condition_channels(c: ConditioningConfig, latent_channels: int) -> int:
    """Channels of the condition that the data set holds beside latents of so many as stored."""
    if c.kind == "semantic":
        return c.classes
    return latent_channels + 1 if c.kind == "inpaint" and c.masked == "image" else 0


def stored_features(c: "Config") -> np.ndarray | None:
    """The features that a batch holds rows of, mapped into memory; None where no term reads them.

    Raises:
      FileNotFoundError, ValueError: the file is not one of features for this network.
    """
    if "feature_alignment" not in registry.active_terms(c):
        return None
    num_tokens = (c.model.latent_size // c.model.patch_size) ** 2
    return open_features(c.data.features, num_tokens, c.feature_alignment.dim)


@checked
class TermConfig:
    """What the sections of all terms share; `method.schedule`."""

    weight: NonNegative
    warmup_steps: Natural
    decay_from: Fraction
    stop_step: Natural


@checked
class RepulsorConfig(TermConfig):
    block: CountOrFill
    positives: Annotated[str, _one_of(repulsor.POSITIVES)]
    bank_keys: Annotated[str, _one_of(repulsor.KEYS)]
    negatives: Annotated[str, _one_of(repulsor.NEGATIVES)]
    time_gap: Fraction
    view_noise: Literal["same", "new"]
    view_min_crop: Annotated[float, Field(gt=0, le=1)]
    predictor: bool
    same_class_weight: Fraction
    time_window: Annotated[float, Field(gt=0, le=1)]
    temperature: Positive
    distance: Annotated[str, _one_of(DISTANCES)]
    pooling: Annotated[str, _one_of(repulsor.POOLINGS)]
    pool_grid: Count
    projection_dim: Count
    bank_rows: Natural
    bank_dtype: Literal["float32", "bfloat16"]
    bank_start_step: Natural


@checked
class DispersiveConfig(TermConfig):
    block: CountOrFill
    variant: Annotated[str, _one_of(VARIANTS)]
    temperature: Positive
    margin: Finite


@checked
class LayerSyncConfig(TermConfig):
    student_block: CountOrFill
    teacher_block: CountOrFill


@checked
class SRAConfig(TermConfig):
    student_block: CountOrFill
    teacher_block: CountOrFill
    time_gap: Fraction
    teacher_labels: Literal["dropped", "true"]
    distance: Annotated[str, _one_of(alignment.DISTANCES)]
    axis: Annotated[str, _one_of(alignment.AXES)]
    beta: Positive
    decay_start: Natural
    decay_steps: Natural


@checked
class LatentAlignmentConfig(TermConfig):
    block: CountOrFill


@checked
class FeatureAlignmentConfig(TermConfig):
    block: CountOrFill
    dim: Count
    head_size: Count


@checked
class ContrastiveFlowConfig(TermConfig):
    weight: Annotated[float, Field(ge=0, lt=1)]  # from 1 on the loss has no minimum
    labelled_only: bool


def _sum_of_terms(text: str) -> str:
    registry.parse_terms(text)
    return text


@checked
class OptimizerConfig:
    learning_rate: Positive
    warmup_steps: Natural
    schedule: Literal["constant", "cosine"]
    b1: Decay
    b2: Decay
    eps: Positive
    weight_decay: NonNegative
    clip_norm: NonNegative
    accumulation_steps: Count
    ema_decay: Decay


@checked
class DataConfig:
    dir: Path
    source: Text
    source_path: Path
    train_split: Text
    test_split: Text
    image_size: Natural
    flips: bool
    autoencoder: Text
    autoencoder_weights: Path
    autoencoder_dtype: Literal["float32", "bfloat16"]
    encode_if_missing: bool
    encode_batch_per_device: Count
    encode_workers: CountOrFill
    on_bad_image: Literal["fail", "skip"]
    images_per_shard: Count
    preview_images: Natural
    dtype: Literal["float16", "float32"]
    verify: bool
    normalization: Literal["scale", "statistics"]
    features: Path
    read_threads: Count
    prefetch_batches: Count


@checked
class MeshConfig:
    data: CountOrFill
    fsdp: CountOrFill
    tensor: CountOrFill
    split_update: bool
    reduce_dtype: Literal["model", "float32", "bfloat16"]


@checked
class CheckpointConfig:
    directory: Path
    every_steps: Count
    keep_last: Count
    keep_every: Natural
    max_lost_steps: Natural
    patience_seconds: NonNegative


@checked
class DivergenceConfig:
    policy: Literal["stop", "skip", "rollback"]
    max_events: Count
    max_loss: NonNegative
    max_grad_norm: NonNegative


@checked
class LogConfig:
    every_steps: Count
    diagnostics_every_steps: Natural
    profile_steps: tuple[Count, ...]
    watchdog_minutes: NonNegative
    page: bool
    wandb: Text


@checked
class SamplingConfig:
    solver: Annotated[str, _one_of(sampler.SOLVERS)]
    num_steps: Count
    time_shift: Positive
    velocity_scale: Positive
    rtol: Positive
    atol: Positive
    max_steps: Count
    diffusion_form: Annotated[str, _one_of(paths.DIFFUSION_FORMS)]
    diffusion_norm: NonNegative
    last_step: Annotated[str, _one_of(solvers.LAST_STEPS)]
    last_step_size: Annotated[float, Field(gt=0, le=0.5)]
    cfg_scale: NonNegative
    cfg_interval_low: Fraction
    cfg_interval_high: Fraction
    cfg_channels: Natural
    guiding_run: Path
    guiding_step: CountOrFill
    classes: tuple[int | Text, ...]
    labels: Annotated[str, _one_of(sampler.LABEL_MODES)]
    num_samples: Count
    batch_size: Count
    images_per_shard: Count
    rounding: Literal["dit", "adm"]
    save_png: bool
    gather_params: bool
    decode_slice: Natural
    seed: Natural
    grid_every_steps: Natural
    grid_samples: Count
    grid_columns: Count


@checked
class EvaluationConfig:
    every_steps: Natural
    training_samples: Annotated[int, Field(ge=2)]
    num_samples: Annotated[int, Field(ge=2)]
    features: Literal["inception", "pixels", "autoencoder"]
    inception_weights: Path
    reference: Path
    reference_split: Text
    reference_features: Annotated[int, Field(ge=2)]
    batch_size: Count
    samples: Path
    cfg_scales: tuple[NonNegative, ...]
    cfg_intervals: Annotated[tuple[tuple[float, float], ...], BeforeValidator(_pairs)]
    poll_seconds: Count


@checked
class Config:
    """The whole configuration; see `configs/default.py`."""

    seed: Natural
    total_steps: Count
    batch_size: Count
    model: ModelConfig
    residual: ResidualConfig
    flow: FlowConfig
    conditioning: ConditioningConfig
    source: SourceConfig
    terms: Annotated[str, AfterValidator(_sum_of_terms)]
    repulsor: RepulsorConfig
    dispersive: DispersiveConfig
    layersync: LayerSyncConfig
    sra: SRAConfig
    latent_alignment: LatentAlignmentConfig
    feature_alignment: FeatureAlignmentConfig
    contrastive_flow: ContrastiveFlowConfig
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
      ConfigError: names the key, the value found and the values expected.
    """
    try:
        parsed = parse_values(Config, plain_values(config), "config")
    except ValueError as error:
        raise ConfigError(f"{error}; configs/default.py explains every key") from error
    _check_consistency(parsed)
    return parsed


def plain_values(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain values, those of its former section in their present places."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    former = values.pop("regularizer", None)
    given = {name: value for name, value in (former or {}).items() if value is not None}
    if name := given.pop("name", None):
        values["terms"] = name
    for section in ("repulsor", "dispersive") if given else ():
        own = values[section]
        values[section] = own | {key: value for key, value in given.items() if key in own}
    return values


def with_changes(values: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """Plain values with some replaced by others given as text, by keys such as `model.depth`.

    Raises:
      ConfigError: no such key. A value of the wrong type or range is found by `parse`.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(values, sep=".")
    for key, text in changes.items():
        if key not in flat:
            raise ConfigError(f"config.{key}: unknown key; configs/default.py explains every key")
        try:
            flat[key] = text if isinstance(flat[key], str) else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            flat[key] = text
    changed: dict[str, Any] = traverse_util.unflatten_dict(flat, sep=".")
    return changed


def guides_by_no_class(config: Config) -> bool:
    """Whether samples are guided by the model's null class, which label dropout trains."""
    scales = {config.sampling.cfg_scale, *config.evaluation.cfg_scales}
    return scales != {1.0} and not config.sampling.guiding_run


def check_devices(config: Config, batch_shards: int, *, trains: bool = True) -> None:
    """Raises ConfigError unless the mesh can cut the batches into `batch_shards` (data x fsdp).

    The batch of training counts only where the mode `trains`.
    """
    accumulation = config.optimizer.accumulation_steps
    segments = num_segments(config.model)
    shards = batch_shards * accumulation * segments
    factors = f"{batch_shards} x {accumulation}"
    if trains and config.batch_size % shards:
        also = " x model.segments" if segments > 1 else ""
        factors += f" x {segments}" if segments > 1 else ""
        raise ConfigError(
            f"config.batch_size={config.batch_size} must be a multiple of mesh.data x mesh.fsdp x "
            f"optimizer.accumulation_steps{also} = {factors} = {shards}; "
            f"the nearest are {_multiples(config.batch_size, shards)}"
        )
    if config.sampling.batch_size % batch_shards:
        raise ConfigError(
            f"config.sampling.batch_size={config.sampling.batch_size} must be a multiple of "
            f"mesh.data x mesh.fsdp = {batch_shards}; the nearest are "
            f"{_multiples(config.sampling.batch_size, batch_shards)}"
        )


def _check_consistency(c: Config) -> None:
    """Raises ConfigError for the first contradiction among values that are fine by themselves."""
    try:
        build_model(c.model, conditioning=c.conditioning)
    except ValueError as error:
        raise ConfigError(f"config.model.{error}") from error
    for is_wrong, message in _contradictions(c):
        if is_wrong:
            raise ConfigError(f"config.{message}")


def _contradictions(c: Config) -> Iterator[tuple[bool, str]]:
    """Yields each contradiction, whether it is there, and its message after "config."."""
    s, e, profiled = c.sampling, c.evaluation, c.log.profile_steps
    yield from _contradicting_terms(c)
    yield from _contradicting_conditions(c)
    if c.source.name != "gaussian":
        yield from _contradicting_source(c)
    yield from _contradicting_groups(c)
    if c.model.architecture == "blockwise":
        yield from _contradicting_segments(c)
    yield (
        c.mesh.reduce_dtype != "model" and (not c.mesh.split_update or c.mesh.tensor != 1),
        f"mesh.reduce_dtype={c.mesh.reduce_dtype!r} needs mesh.split_update=True and "
        "mesh.tensor=1: else XLA sums gradients in the dtype of each layer; set it to 'model'",
    )
    is_second = c.model.residual_depth > 0
    yield (
        is_second and c.model.architecture != "blockwise",
        f"model.residual_depth={c.model.residual_depth} needs model.architecture='blockwise'; set "
        "it to 0",
    )
    yield (
        is_second != bool(c.residual.base_run),
        f"residual.base_run={c.residual.base_run!r} and config.model.residual_depth="
        f"{c.model.residual_depth}: a residual network is trained for a run, name both or neither",
    )
    yield (
        is_second and (registry.active_terms(c) != () or c.log.diagnostics_every_steps > 0),
        f"terms={c.terms!r}, config.log.diagnostics_every_steps={c.log.diagnostics_every_steps}: "
        "a residual network is trained alone (config.model.residual_depth); set them to 'none' and "
        "0",
    )
    yield (
        c.flow.prediction == "velocity" and c.flow.weighting != "none",
        f"flow.weighting={c.flow.weighting!r} has no meaning for "
        "config.flow.prediction='velocity'; set it to 'none'",
    )
    yield (
        c.model.time_steps not in (0, paths.get_path(c.flow.path).steps),
        f"model.time_steps={c.model.time_steps} is the schedule of a DiT, of {paths.DDPM_STEPS} "
        f"steps, on config.flow.path='ddpm_linear', but the path is {c.flow.path!r}; set it to 0",
    )
    yield (
        c.optimizer.schedule == "cosine" and c.optimizer.warmup_steps >= c.total_steps,
        f"optimizer.warmup_steps={c.optimizer.warmup_steps} leaves no step of "
        f"config.total_steps={c.total_steps} to the cosine schedule",
    )
    yield (
        0 < c.checkpoint.max_lost_steps < c.checkpoint.every_steps,
        f"checkpoint.max_lost_steps={c.checkpoint.max_lost_steps} must be at least "
        f"config.checkpoint.every_steps={c.checkpoint.every_steps}, or 0",
    )
    yield (
        bool(profiled) and (len(profiled) != 2 or profiled[0] > profiled[1]),
        f"log.profile_steps={profiled}: expected the first and the last step, as (100, 104), or ()",
    )
    yield (
        s.cfg_interval_low > s.cfg_interval_high,
        f"sampling.cfg_interval_low={s.cfg_interval_low} is above "
        f"config.sampling.cfg_interval_high={s.cfg_interval_high}",
    )
    yield (
        s.solver in solvers.ADAPTIVE and s.time_shift != 1,
        f"sampling.time_shift={s.time_shift} has no meaning for {s.solver!r}, which chooses its "
        "steps; set it to 1",
    )
    yield (
        s.velocity_scale != 1 and (c.flow.path, c.flow.prediction) != ("linear", "velocity"),
        f"sampling.velocity_scale={s.velocity_scale} scales a velocity on the linear path, but "
        f"config.flow.path={c.flow.path!r} and prediction={c.flow.prediction!r}; set it to 1",
    )
    yield (
        s.solver in solvers.SDE_STEPS and s.last_step != "none" and s.num_steps < 2,
        f"sampling.num_steps={s.num_steps} must be at least 2 for {s.solver!r}: one of the steps "
        "is config.sampling.last_step",
    )
    yield (
        any(not 0 <= low <= high <= 1 for low, high in e.cfg_intervals),
        f"evaluation.cfg_intervals={e.cfg_intervals}: expected pairs (low, high) of times with "
        "0 <= low <= high <= 1; 0 is noise, 1 is data",
    )
    yield (
        bool(e.cfg_intervals) and not e.cfg_scales and s.cfg_scale == 1,
        "evaluation.cfg_intervals has no meaning without guidance: set "
        "config.evaluation.cfg_scales, or config.sampling.cfg_scale",
    )
    yield (
        c.model.label_dropout == 0 and guides_by_no_class(c),
        f"model.label_dropout=0 trains no null class, by which config.sampling.cfg_scale="
        f"{s.cfg_scale} (or config.evaluation.cfg_scales={e.cfg_scales}) guides: train with 0.1, "
        "sample at scale 1, or name a config.sampling.guiding_run",
    )
    yield (
        c.model.label_dropout == 1,
        "model.label_dropout=1 trains the null class alone, and every class that is sampled would "
        "be untrained: set it to 0.1 or so",
    )
    yield (
        s.guiding_run != "" and {s.cfg_scale, *e.cfg_scales} == {1.0},
        f"sampling.guiding_run={s.guiding_run!r} has no effect at config.sampling.cfg_scale=1: "
        "raise the scale, or leave it empty",
    )
    yield (
        s.cfg_channels > c.model.in_channels,
        f"sampling.cfg_channels={s.cfg_channels} exceeds "
        f"config.model.in_channels={c.model.in_channels}; 0 guides all",
    )


def _contradicting_conditions(c: Config) -> Iterator[tuple[bool, str]]:
    """`_contradictions` within the section `conditioning`, and of it with others."""
    k, s = c.conditioning, c.sampling
    yield (
        k.kind == "semantic" and not 0 < k.classes < 256,
        f"conditioning.classes={k.classes}: set it to the number of classes of the label maps, at "
        "most 255, for 255 is no class",
    )
    replaces = k.filling == "replace"
    yield (
        replaces and k.kind != "none",
        f"conditioning.filling='replace' is for a network without a condition, but "
        f"config.conditioning.kind={k.kind!r} shows it one: set filling='channels'",
    )
    yield (
        replaces and s.solver not in solvers.ODE_STEPS,
        f"conditioning.filling='replace' acts between fixed steps of an ODE, but "
        f"config.sampling.solver={s.solver!r}: set it to one of "
        f"{', '.join(solvers.ODE_STEPS)}",
    )
    yield (
        k.images not in ("train", "test") and not k.images.endswith(".npz"),
        f"conditioning.images={k.images!r}: expected 'test', 'train' or the path of an .npz",
    )


def _contradicting_source(c: Config) -> Iterator[tuple[bool, str]]:
    """`_contradictions` of a learned source."""
    s = c.source
    yield (
        c.flow.prediction != "velocity",
        f"source.name={s.name!r} learns through the velocity's loss, but "
        f"config.flow.prediction={c.flow.prediction!r}; set it to 'velocity'",
    )
    yield (
        s.learn_variance and s.variance_weight == 0,
        "source.variance_weight=0 lets the variance of config.source.learn_variance=True collapse "
        "to 0, which the flow loss pays for: raise it (published 5)",
    )
    yield (
        s.alignment_weight > 0 and s.alignment_axis == "channels" and c.model.in_channels == 1,
        "source.alignment_axis='channels' has no direction with config.model.in_channels=1: set it "
        "to 'width', or config.source.alignment_weight=0",
    )
    yield (
        "contrastive_flow" in registry.active_terms(c),
        f"terms={c.terms!r}: contrastive_flow draws the targets of other rows before the loss, and "
        f"config.source.name={s.name!r} makes them in it: leave one of the two out",
    )
    yield (
        c.sampling.velocity_scale != 1,
        f"sampling.velocity_scale={c.sampling.velocity_scale} scales about the mean latent, which "
        f"is not the mean velocity with config.source.name={s.name!r}; set it to 1",
    )


def token_group_counts(c: Config) -> tuple[int, ...]:
    """The tokens of an image in each of `flow.time_groups`."""
    fractions = c.flow.group_fractions or (1 / c.flow.time_groups,) * c.flow.time_groups
    num_tokens = (c.model.latent_size // c.model.patch_size) ** 2
    return token_groups.group_counts(fractions, num_tokens)


def _contradicting_groups(c: Config) -> Iterator[tuple[bool, str]]:
    """`_contradictions` within the groups of tokens, and with what needs them."""
    f, fractions = c.flow, c.flow.group_fractions
    yield (
        bool(fractions) and len(fractions) != f.time_groups,
        f"flow.group_fractions={fractions} has {len(fractions)} fractions for "
        f"config.flow.time_groups={f.time_groups}; give one for each group, or () for equal ones",
    )
    yield (
        bool(fractions) and abs(sum(fractions) - 1) > 1e-6,
        f"flow.group_fractions={fractions} sum to {sum(fractions):g}, expected 1",
    )
    yield (
        0 in token_group_counts(c),
        f"flow.time_groups={f.time_groups} with config.flow.group_fractions={fractions} split the "
        f"tokens of an image into {token_group_counts(c)}: each group needs at least one",
    )
    needs_groups = {
        "flow.whole_fraction": (f.whole_fraction, 0),
        "flow.teacher_times": (f.teacher_times, "sra"),
        "model.attention_separation": (c.model.attention_separation, False),
    }
    for key, (found, unset) in needs_groups.items():
        yield (
            f.time_groups == 1 and found != unset,
            f"{key}={found!r} has no meaning for one group of tokens: set "
            f"config.flow.time_groups=2, or leave it at {unset!r}",
        )


def _contradicting_segments(c: Config) -> Iterator[tuple[bool, str]]:
    """`_contradictions` of a blockwise network."""
    s, segments = c.sampling, c.model.segments
    yield (
        c.flow.prediction != "velocity" or c.flow.path not in ("linear", "gvp"),
        f"model.architecture='blockwise' predicts a velocity at all times from 0 to 1, but "
        f"config.flow.path={c.flow.path!r} and prediction={c.flow.prediction!r}; use 'linear' or "
        "'gvp', and 'velocity'",
    )
    yield (
        c.conditioning.kind != "none" or c.flow.time_groups > 1,
        f"model.architecture='blockwise' takes neither config.conditioning.kind="
        f"{c.conditioning.kind!r} nor config.flow.time_groups={c.flow.time_groups}: use 'dit', or "
        "'none' and 1",
    )
    yield (
        c.model.init_from != "",
        f"model.init_from={c.model.init_from!r} has the weights of a plain transformer, not of "
        "config.model.architecture='blockwise': leave it empty",
    )
    yield (
        segments > 1 and (c.flow.time_distribution != "uniform" or c.flow.time_shift != 1),
        f"flow.time_distribution={c.flow.time_distribution!r} and time_shift={c.flow.time_shift} "
        f"have no meaning for config.model.segments={segments}, of which each gets as many rows; "
        "set them to 'uniform' and 1",
    )
    yield (
        segments > 1 and s.time_shift != 1,
        f"sampling.time_shift={s.time_shift} has no meaning for config.model.segments={segments}, "
        "of which each gets as many even steps; set it to 1",
    )
    yield (
        s.solver not in solvers.ADAPTIVE and s.num_steps % segments != 0,
        f"sampling.num_steps={s.num_steps} must be a multiple of config.model.segments={segments}, "
        f"for no step crosses a boundary; the nearest are {_multiples(s.num_steps, segments)}",
    )
    has_last = s.solver in solvers.SDE_STEPS and s.last_step != "none"
    yield (
        has_last and (s.num_steps <= segments or s.last_step_size * segments >= 1),
        f"sampling.num_steps={s.num_steps} leaves the last of config.model.segments={segments} no "
        f"step beside config.sampling.last_step, of last_step_size={s.last_step_size}",
    )


def _contradicting_terms(c: Config) -> Iterator[tuple[bool, str]]:
    """`_contradictions` within and between the sections of the terms."""
    names = registry.active_terms(c)
    for name in names:
        section: Any = getattr(c, name)
        blocks = {"block": getattr(section, "block", -1)}
        if name in registry.PAIRS:
            blocks = dict(
                zip(("student_block", "teacher_block"), registry.PAIRS[name](c), strict=True)
            )
        for field, block in blocks.items():
            yield (
                block >= c.model.depth,
                f"{name}.{field}={block} is past the last block, {c.model.depth - 1} "
                f"(config.model.depth={c.model.depth})",
            )
    student, teacher = registry.layersync_blocks(c)
    yield (
        "layersync" in names and student >= teacher,
        f"layersync.student_block={student} must be before "
        f"config.layersync.teacher_block={teacher}: a block agrees with itself, and learns nothing",
    )
    student, teacher = registry.sra_blocks(c)
    yield (
        "sra" in names and student > teacher,
        f"sra.student_block={student} must not be after config.sra.teacher_block={teacher}",
    )
    yield (
        "contrastive_flow" in names and c.flow.prediction != "velocity",
        f"contrastive_flow compares velocities, but config.flow.prediction={c.flow.prediction!r}; "
        "set it to 'velocity'",
    )
    flow, dropped = c.contrastive_flow, c.model.label_dropout
    yield (
        "contrastive_flow" in names and flow.labelled_only and flow.weight >= 1 - dropped,
        f"contrastive_flow.weight={flow.weight} must be below {1 - dropped:g}: with "
        f"labelled_only=True and config.model.label_dropout={dropped}, rows that have a label "
        "weigh more in it than in the flow loss, and the loss has no minimum",
    )
    reads_features = "feature_alignment" in names
    yield (
        reads_features and not c.data.features,
        "data.features='' names no file, of which config.terms="
        f"{c.terms!r} needs an .npy: [images, tokens, {c.feature_alignment.dim}]",
    )
    yield (
        reads_features and c.data.flips,
        f"data.flips=True stores mirror images, of which config.data.features={c.data.features!r} "
        "has no rows: set it to False",
    )
    # What each term compares a sample with, where that is the other samples alone.
    micro_batch = c.batch_size // c.optimizer.accumulation_steps
    has_bank = c.repulsor.bank_rows > 0 or c.repulsor.negatives == "none"
    others = {"dispersive": micro_batch, "contrastive_flow": c.batch_size}
    others |= {} if has_bank else {"repulsor": micro_batch}
    for name in names:
        yield (
            others.get(name, 2) < 2,
            f"terms={c.terms!r}: {name} compares the samples of a batch, and "
            f"config.batch_size={c.batch_size} with config.optimizer.accumulation_steps="
            f"{c.optimizer.accumulation_steps} leaves {others.get(name)} at a time, with which its "
            "loss says nothing: 2 or more are needed",
        )
    if "repulsor" in names:
        yield from _contradicting_repulsor(c)


def _contradicting_repulsor(c: Config) -> Iterator[tuple[bool, str]]:
    r, side = c.repulsor, c.model.latent_size // c.model.patch_size
    rows = c.batch_size * repulsor.rows_per_image(r)
    yield (
        r.negatives == "all" and r.bank_rows % rows != 0,
        f"repulsor.bank_rows={r.bank_rows} must be a multiple of {rows}, the rows of a batch of "
        f"config.batch_size={c.batch_size}: the bank holds whole batches; the nearest are "
        f"{_multiples(r.bank_rows, rows)}",
    )
    yield (
        r.pooling == "token" and side % r.pool_grid != 0,
        f"repulsor.pool_grid={r.pool_grid} must divide the {side} tokens along a side",
    )
    yield (
        r.positives == "none" and (r.negatives == "none" or r.predictor or r.bank_keys == "latent"),
        "repulsor.positives='none' leaves nothing to pull towards, which "
        "config.repulsor.negatives='none', predictor=True and bank_keys='latent' need: set it to "
        "'view'",
    )
    yield (
        r.bank_keys == "latent" and r.negatives == "none",
        "repulsor.negatives='none' would let the encoder of config.repulsor.bank_keys='latent' "
        "collapse; set it to 'all'",
    )
    yield (
        r.bank_start_step > 0 and (r.bank_rows == 0 or r.bank_start_step >= c.total_steps),
        f"repulsor.bank_start_step={r.bank_start_step} leaves nothing for the bank: "
        f"config.repulsor.bank_rows={r.bank_rows}, config.total_steps={c.total_steps}",
    )
    keys_are_views = r.positives == "view" and (r.bank_keys == "teacher" or r.negatives == "none")
    yield (
        r.view_min_crop < 1 and not keys_are_views,
        f"repulsor.view_min_crop={r.view_min_crop} needs config.repulsor.positives='view' and "
        "bank_keys='teacher': a crop among whole images is known by being a crop",
    )
    yield (
        r.view_min_crop < 1 and (r.pooling == "token" or c.conditioning.kind != "none"),
        f"repulsor.view_min_crop={r.view_min_crop} moves what is where in the image, and "
        "config.repulsor.pooling='token' and config.conditioning compare by place; set it to 1",
    )
    yield (
        r.bank_keys == "latent" and r.time_window < 1,
        f"repulsor.time_window={r.time_window} has no meaning for "
        "config.repulsor.bank_keys='latent': a clean latent has no noise level; set it to 1",
    )


def _multiples(value: int, factor: int) -> str:
    low = value // factor * factor
    return f"{low} and {low + factor}" if low else f"{factor}"
