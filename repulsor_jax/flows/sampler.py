"""From noise to samples: where the noise comes from, guidance, and the sampler that joins them.

A sample depends on the seed and its own index, never on the batch, position or device that
computed it. Nothing here knows of training: a sampler takes parameters and a model function.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.flows import paths, solvers
from repulsor_jax.flows import source as source_lib
from repulsor_jax.flows.source import Source

Array = jax.Array
ModelFn = Callable[..., Array]  # (x, t, labels, **extras)
ModelWithParams = Callable[..., Array]  # (params, x, t, labels, **extras)
PredictFn = Callable[..., list[Array]]  # (x, t, *quantities) -> each of them, [B, H, W, C]
Interval = tuple[float | Array, float | Array]

LABEL_MODES = ("balanced", "random")
SOLVERS = (*solvers.ODE_STEPS, *solvers.ADAPTIVE, *solvers.SDE_STEPS)

# Folded into the key of the noise; no index of a sample is as large.
_LABELS, _BROWNIAN = 0x7FFFFFFF, 0x7FFFFFFE


def _as_key(seed: int | Array) -> Array:
    return seed if isinstance(seed, jax.Array) else jax.random.key(seed)


def initial_noise(seed: int | Array, indices: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise in which row b depends on `seed` and `indices[b]` only.

    Args:
      seed: an integer or a PRNG key (of the default, counter-based, kind).
      indices: [B] integers, the numbers of the samples.
      shape: of one sample; the noise is [B, *shape] float32.
    """
    key = _as_key(seed)
    draw = lambda index: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
    return jax.vmap(draw)(indices)


def sample_labels(
    seed: int | Array, indices: Array, num_classes: int, mode: str = "balanced"
) -> Array:
    """Class labels in which row b depends on `seed` and `indices[b]` only.

    Args:
      seed: as of `initial_noise`; the same may be used again.
      indices: [B] integers, the numbers of the samples.
      num_classes: labels are int32, 0 to num_classes - 1.
      mode: "balanced" goes round the classes, index % num_classes; "random" draws uniformly.
    """
    paths.check_choice("label mode", mode, LABEL_MODES)
    indices = jnp.asarray(indices, jnp.int32)
    if mode == "balanced":
        return indices % num_classes
    key = jax.random.fold_in(_as_key(seed), _LABELS)
    draw = lambda index: jax.random.randint(jax.random.fold_in(key, index), (), 0, num_classes)
    return jax.vmap(draw)(indices)


def brownian_keys(seed: int | Array, indices: Array) -> Array:
    """The keys [B] of an SDE sampler, drawn as `initial_noise`; the same seed may be used again."""
    key = jax.random.fold_in(_as_key(seed), _BROWNIAN)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices))


def guided_prediction(
    model_fn: ModelFn,
    x: Array,
    t: Array,
    labels: Array,
    *,
    null_label: int,
    scale: float | Array | None,
    channels: int | None = None,
    interval: Interval | None = None,
    guiding_fn: ModelFn | None = None,
    extras: Mapping[str, Array] | None = None,
) -> Array:
    """Guidance away from a weaker model: weak + scale * (strong - weak).

    Strong is the model with its labels. Weak is the same model without a class, which is
    classifier-free guidance (arXiv 2207.12598, eq. 6; scale = 1 + w), or `guiding_fn` with the
    same labels, which is autoguidance (arXiv 2406.02507). At scale 1 the result is the strong
    model's. The output may be a velocity, a score or noise: at a given (x, t) each is an affine
    function of the others, and guidance takes a weighted mean.

    Args:
      model_fn: (x [B, H, W, C], t [B], labels [B]) -> [B, H, W, C]. For classifier-free guidance
        called once, with the conditional and unconditional batches interleaved (2B rows).
      x: [B, H, W, C].
      t: [], or [B] where the rows are at different times.
      labels: [B] integers.
      null_label: the label that stands for no class.
      scale: a number, traced or not; None calls the model once on B rows, without guidance.
      channels: guide this many leading channels and leave the rest conditional; None guides all.
        SiT's and DiT's published samples have 3 (of 4).
      interval: (low, high), traced or not: guide only at low <= t <= high, with t = 0 for noise
        and t = 1 for data (arXiv 2404.07724 counts in noise levels sigma / alpha: on the linear
        path, level s is t = 1 / (1 + s)). Where t is a scalar the weak model is not evaluated
        outside the interval, nor at scale 1. None guides everywhere.
      guiding_fn: the weak model of autoguidance, called as `model_fn` on B rows.
      extras: what else the models read, [B, ...] by the argument's name: the same for both.

    Returns:
      [B, H, W, C], float32.
    """
    t = jnp.asarray(t)
    times = jnp.broadcast_to(t, x.shape[:1])
    extras = extras or {}

    def plain() -> Array:
        return solvers.as_float(model_fn(x, times, labels, **extras))

    if scale is None:
        return plain()

    # Rows 2b and 2b + 1 belong to sample b: unlike two halves laid end to end, they stay on the
    # device that holds sample b.
    def twice(first: Array, second: Array) -> Array:
        return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    def strong_and_weak() -> tuple[Array, Array]:
        if guiding_fn is not None:
            both = (fn(x, times, labels, **extras) for fn in (model_fn, guiding_fn))
            strong, weak = map(solvers.as_float, both)
            return strong, weak
        nulls = jnp.full_like(labels, null_label)
        doubled = {name: twice(each, each) for name, each in extras.items()}
        output = model_fn(twice(x, x), twice(times, times), twice(labels, nulls), **doubled)
        output = solvers.as_float(output).reshape(-1, 2, *output.shape[1:])
        return output[:, 0], output[:, 1]

    def guide(strong: Array, weak: Array) -> Array:
        guided = (weak + scale * (strong - weak)).astype(strong.dtype)
        if channels is None:
            return guided
        return jnp.concatenate([guided[..., :channels], strong[..., channels:]], axis=-1)

    if interval is None:
        return guide(*strong_and_weak())
    active = (interval[0] <= t) & (t <= interval[1])
    if t.ndim == 0:
        active &= jnp.asarray(scale) != 1.0
        return jax.lax.cond(active, lambda: guide(*strong_and_weak()), plain)
    strong, weak = strong_and_weak()
    active = active.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(active, guide(strong, weak), strong)


def scale_velocity(velocity: Array, scale: float, mean: Array) -> Array:
    """The velocity made longer or shorter about its mean: scale * v + (1 - scale) * mean.

    With scale = 1 - lambda it is what plain flow matching would have learned, where training was
    contrastive with weight lambda (arXiv 2506.05350). The published sampler computes
    0.95 v - 0.05 w with a stored vector w, which is this with mean = -w.

    Args:
      velocity: [B, ...].
      scale: s.
      mean: E[v], broadcast against `velocity`; on the linear path with centred noise the mean
        latent.
    """
    return scale * velocity + (1.0 - scale) * mean


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """The choices that make a sampler, apart from the model.

    Raises:
      ValueError: unknown prediction or solver, too few steps, or a time shift with "dopri5".
    """

    path: paths.Path
    null_label: int  # the label that stands for no class
    prediction: str = "velocity"  # what the model outputs: "velocity", "score" or "noise"
    solver: str = "euler"  # one of `SOLVERS`
    num_steps: int = 250  # with that of `diffusion.last_step`; "dopri5" chooses its own
    channels: int | None = None  # how many leading channels to guide, see `guided_prediction`
    velocity_scale: float = 1.0  # s of s v + (1 - s) E[v]: a velocity longer or shorter by s
    mean_velocity: tuple[float, ...] = ()  # E[v] by channel: on the linear path the mean latent
    time_shift: float = 1.0  # of the fixed steps, see `solvers.time_grid`
    tolerance: solvers.Tolerance = dataclasses.field(default_factory=solvers.Tolerance)
    diffusion: solvers.Diffusion = dataclasses.field(default_factory=solvers.Diffusion)
    num_segments: int = 1  # equal parts of time with a model of their own
    trajectory: bool = False  # return x at all times of the grid, [steps + 1, B, H, W, C]

    def __post_init__(self) -> None:
        paths.check_choice("solver", self.solver, SOLVERS)
        shift, num_steps = self.time_shift, self.num_steps
        if self.solver in solvers.ADAPTIVE and shift != 1.0:
            raise ValueError(
                f"time_shift is {shift}, but {self.solver!r} chooses its steps; expected 1"
            )
        if self.trajectory and self.solver not in solvers.ODE_STEPS:
            raise ValueError(
                f"trajectory: found solver {self.solver!r}, expected one of "
                f"{', '.join(solvers.ODE_STEPS)}"
            )
        if self.last_step_size and num_steps < 2:
            raise ValueError(
                f"num_steps is {num_steps}; expected at least 2, one being the last step"
            )
        if self.num_segments > 1:
            self._check_segments()
        self.times()

    def _check_segments(self) -> None:
        count, steps, size = self.num_segments, self.num_steps, self.last_step_size
        ends = paths.time_interval(self.path, self.prediction, sampling=True)
        if ends != (0.0, 1.0):
            raise ValueError(
                f"prediction {self.prediction!r} on path {self.path.name!r} leaves out an end of "
                f"time, which {count} segments cover whole; use 'velocity' on 'linear' or 'gvp'"
            )
        if self.time_shift != 1.0:
            raise ValueError(
                f"time_shift is {self.time_shift}; expected 1 with {count} segments, whose steps "
                "are even"
            )
        if self.solver not in solvers.ADAPTIVE and steps % count:
            raise ValueError(f"num_steps is {steps}; expected a multiple of the {count} segments")
        if size and (steps == count or size * count >= 1):
            raise ValueError(
                f"num_steps is {steps} and the last step {size} long: the last of {count} segments "
                "has no place for another step; raise num_steps or shorten the last step"
            )

    @property
    def is_stochastic(self) -> bool:
        """Whether the solver is one of an SDE, and needs keys."""
        return self.solver in solvers.SDE_STEPS

    @property
    def last_step_size(self) -> float:
        """Length of the noiseless step after the grid of an SDE; 0 without one."""
        has_one = self.is_stochastic and self.diffusion.last_step != "none"
        return self.diffusion.last_step_size if has_one else 0.0

    def times(self) -> np.ndarray:
        """The grid of the fixed steps; "dopri5" goes from its first to its last time."""
        size = self.last_step_size
        if self.is_stochastic:
            ends = paths.sde_time_interval(self.path, self.prediction, self.diffusion.form, size)
        else:
            ends = paths.time_interval(self.path, self.prediction, sampling=True)
        if self.num_segments == 1 or self.solver in solvers.ADAPTIVE:
            return solvers.time_grid(self.num_steps - bool(size), *ends, self.time_shift)
        bounds = [ends[0], *self.boundaries()[1:-1], ends[1]]
        counts = np.bincount(self.segment_numbers())
        parts = [
            solvers.time_grid(int(count), bounds[s], bounds[s + 1])
            for s, count in enumerate(counts)
        ]
        return np.concatenate([*(part[:-1] for part in parts), parts[-1][-1:]])

    def boundaries(self) -> np.ndarray:
        """The ends of the segments, [num_segments + 1] float64 from 0 to 1."""
        return np.arange(self.num_segments + 1) / self.num_segments

    def segment_numbers(self) -> np.ndarray:
        """The segment of each step of the grid; the last step of an SDE is in the last one."""
        numbers = np.repeat(np.arange(self.num_segments), self.num_steps // self.num_segments)
        return numbers[: self.num_steps - bool(self.last_step_size)]


def make_sampler(
    model_fn: ModelWithParams,
    spec: SamplerSpec,
    guiding_fn: ModelWithParams | None = None,
    source_fn: Callable[[Any, Array], Source] | None = None,
    start_fn: ModelWithParams | None = None,
) -> Callable[..., Array]:
    """A pure function sample(params, noise, labels, scale, ...) -> samples, to be jitted.

    ODE solvers follow the probability-flow ODE over `paths.time_interval`. Where that stops short
    of t = 1 ("vp", and any score or noise prediction) a last evaluation replaces the point reached
    by the data predicted from it, so no noise is left in the samples. SDE solvers go over
    `paths.sde_time_interval` and end as `spec.diffusion.last_step` says.

    With a learned source all starts from mean + scale noise of the labels' source, whatever guides:
    both branches of classifier-free guidance, and the guiding model of autoguidance, go on from
    that one point. The score, which an SDE needs, is that of this source; of guided velocities it
    is the same weighted mean as of the velocities.
    With `spec.num_segments` above 1 the models are called with `segment=`, a scalar, for all
    evaluations of a step, those at its end included: no step crosses from one to the next.

    Args:
      model_fn: (params, x [B, H, W, C], t [B], labels [B]) -> [B, H, W, C].
      spec: everything but the models.
      guiding_fn: the weak model of autoguidance, where it is not `model_fn` with other parameters.
      source_fn: (params, labels [B]) -> the distribution of x at t = 0; None is N(0, I).
      start_fn: called as `model_fn` at the first step of each segment. Its results are passed to
        `model_fn` as `start=` in all steps of that segment, [B, 1, ...], or [B, 2, ...] with those
        for no class behind, where samples are guided by no class.

    Returns:
      sample: (params, noise [B, H, W, C], labels [B], scale=None, interval=None, *, keys=None,
      guiding_params=None, extras=None, known=None) -> samples [B, H, W, C], float32. For scale and
      interval see `guided_prediction`: under jit they are traced, so all their values share one
      program; None is another program, without guidance or without an interval. SDE solvers need
      `keys` [B] of `brownian_keys`, or raise ValueError. With `guiding_params` guidance is
      autoguidance.
      `known`, for ODE solvers with fixed steps, are data [B, H, W, C] and where they are unknown,
      bool [B, H, W, 1]: after each step what is known stands where the path has it.
    """

    def sample(
        params: Any,
        noise: Array,
        labels: Array,
        scale: float | Array | None = None,
        interval: Interval | None = None,
        *,
        keys: Array | None = None,
        guiding_params: Any = None,
        extras: Mapping[str, Array] | None = None,
        known: tuple[Array, Array] | None = None,
    ) -> Array:
        start = None if source_fn is None else source_fn(params, labels)
        x_0 = noise if start is None else source_lib.sample(start, noise)
        weak_fn = None
        if guiding_params is not None:
            weak_fn = functools.partial(guiding_fn or model_fn, guiding_params)

        def predict(
            x: Array, t: Array, *quantities: str, within: solvers.Within | None = None
        ) -> list[Array]:
            strong, weak, given = functools.partial(model_fn, params), weak_fn, dict(extras or {})
            if within is not None:
                strong = functools.partial(strong, segment=within.segment)
                weak = weak and functools.partial(weak, segment=within.segment)
                given |= {} if within.begun is None else {"start": within.begun}
            found = guided_prediction(
                strong,
                x,
                t,
                labels,
                null_label=spec.null_label,
                scale=scale,
                channels=spec.channels,
                interval=interval,
                guiding_fn=weak,
                extras=given,
            )
            if spec.velocity_scale != 1.0:
                mean = jnp.asarray(spec.mean_velocity, found.dtype)
                found = scale_velocity(found, spec.velocity_scale, mean)
            convert = functools.partial(paths.convert, spec.path, found, x, t, start=start)
            return [convert(source=spec.prediction, to=quantity) for quantity in quantities]

        def begin(x: Array, t: Array, segment: Array) -> Array:
            assert start_fn is not None
            times = jnp.broadcast_to(t, x.shape[:1])
            by_no_class = scale is not None and weak_fn is None
            classes = [labels, jnp.full_like(labels, spec.null_label)][: 1 + by_no_class]
            found = [start_fn(params, x, times, each, **(extras or {})) for each in classes]
            return jnp.stack(found, axis=1)

        segments = None
        if spec.num_segments > 1 or start_fn is not None:
            segments = solvers.Segments(spec.segment_numbers(), begin if start_fn else None)
        if spec.is_stochastic:
            return _solve_sde(spec, predict, x_0, keys, segments)
        return _solve_ode(spec, predict, x_0, known, segments)

    return sample


def _solve_ode(
    spec: SamplerSpec,
    predict: PredictFn,
    x_0: Array,
    known: tuple[Array, Array] | None,
    segments: solvers.Segments | None,
) -> Array:
    def velocity_fn(x: Array, t: Array, within: solvers.Within | None = None) -> Array:
        return predict(x, t, "velocity", within=within)[0]

    times = spec.times()
    t_start, t_end = times[[0, -1]].tolist()
    if spec.solver in solvers.ADAPTIVE and segments is not None:
        x = _dopri5_by_segment(spec, velocity_fn, x_0, segments)
    elif spec.solver in solvers.ADAPTIVE:
        x, _ = solvers.dopri5(velocity_fn, x_0, t_start, t_end, spec.tolerance)
    else:
        after = None
        if known is not None:
            data, is_unknown = known

            def after(x: Array, t: Array) -> Array:
                return jnp.where(is_unknown, x, paths.interpolate(spec.path, data, x_0, t))

        x = solvers.solve_ode(
            velocity_fn, x_0, times, spec.solver, after, segments, spec.trajectory
        )
    if t_end == 1.0:
        return x
    if spec.trajectory:
        return x.at[-1].set(predict(x[-1], jnp.float32(t_end), "data")[0])
    return predict(x, jnp.float32(t_end), "data")[0]


def _dopri5_by_segment(
    spec: SamplerSpec,
    velocity_fn: Callable[..., Array],
    x_0: Array,
    segments: solvers.Segments,
) -> Array:
    """`solvers.dopri5` from boundary to boundary, begun anew at each."""

    def cross(x: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        segment, start, end = now
        begun = segments.begin(x, start, segment) if segments.begin else None
        own = lambda x, t: velocity_fn(x, t, solvers.Within(segment, begun))
        return solvers.dopri5(own, x, start, end, spec.tolerance)[0], None

    bounds = jnp.asarray(spec.boundaries(), jnp.float32)
    parts = jnp.arange(spec.num_segments), bounds[:-1], bounds[1:]
    return jax.lax.scan(cross, solvers.as_float(x_0), parts)[0]


def _solve_sde(
    spec: SamplerSpec,
    predict: PredictFn,
    x_0: Array,
    keys: Array | None,
    segments: solvers.Segments | None,
) -> Array:
    if keys is None:
        raise ValueError(f"solver {spec.solver!r} needs keys=brownian_keys(seed, indices)")
    diffusion, times = spec.diffusion, spec.times()

    def diffusion_fn(t: Array) -> Array:
        return paths.diffusion(spec.path, diffusion.form, t, diffusion.norm)

    def drift_fn(x: Array, t: Array, within: solvers.Within | None = None) -> Array:
        velocity, score = predict(x, t, "velocity", "score", within=within)
        return velocity + diffusion_fn(t) * score

    x = solvers.solve_sde(drift_fn, diffusion_fn, x_0, keys, times, spec.solver, segments)
    end = jnp.float32(times[-1])
    last = None if segments is None else solvers.Within(spec.num_segments - 1)
    if diffusion.last_step == "none":
        return x
    if diffusion.last_step == "tweedie":
        return predict(x, end, "data", within=last)[0]
    if diffusion.last_step == "mean":
        velocity = drift_fn(x, end, last)
    else:
        velocity = predict(x, end, "velocity", within=last)[0]
    return x + spec.last_step_size * velocity
