"""From noise to samples: where the noise comes from, guidance, and the sampler that joins them.

A sample depends on the seed and its own index, never on the batch, position or device that
computed it. Nothing here knows of training: a sampler takes parameters and a model function.
`solvers` and `sde` step through time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from repulsor_jax.flows import paths, sde, solvers

Array = jax.Array
ModelFn = Callable[[Array, Array, Array], Array]
Interval = tuple[float | Array, float | Array]

LABEL_MODES = ("balanced", "random")
SOLVERS = (*solvers.FIXED_STEP, *solvers.ADAPTIVE, *sde.STEPS)

# Folded into the key of the noise; no index of a sample is as large.
_LABELS, _BROWNIAN = 0x7FFFFFFF, 0x7FFFFFFE


def _as_key(seed: int | Array) -> Array:
    return seed if isinstance(seed, jax.Array) else jax.random.key(seed)


def initial_noise(seed: int | Array, indices: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise in which row b depends on `seed` and `indices[b]` only.

    Args:
      seed: an integer or a PRNG key (of the default, counter-based, kind).
      indices: [B] integers, the numbers of the samples.
      shape: of one sample.

    Returns:
      [B, *shape] float32.
    """
    key = _as_key(seed)
    draw = lambda index: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
    return jax.vmap(draw)(indices)


def sample_labels(
    seed: int | Array, indices: Array, num_classes: int, mode: str = "balanced"
) -> Array:
    """Class labels in which row b depends on `seed` and `indices[b]` only.

    Args:
      seed: an integer or a PRNG key; the one of `initial_noise` may be used again.
      indices: [B] integers, the numbers of the samples.
      num_classes: labels are 0 to num_classes - 1.
      mode: "balanced" goes round the classes, index % num_classes; "random" draws uniformly.

    Returns:
      [B] int32.

    Raises:
      ValueError: unknown mode.
    """
    paths.check_choice("label mode", mode, LABEL_MODES)
    indices = jnp.asarray(indices, jnp.int32)
    if mode == "balanced":
        return indices % num_classes
    key = jax.random.fold_in(_as_key(seed), _LABELS)
    draw = lambda index: jax.random.randint(jax.random.fold_in(key, index), (), 0, num_classes)
    return jax.vmap(draw)(indices)


def brownian_keys(seed: int | Array, indices: Array) -> Array:
    """The keys of an SDE sampler, in which row b depends on `seed` and `indices[b]` only.

    Args:
      seed: an integer or a PRNG key; the one of `initial_noise` may be used again.
      indices: [B] integers, the numbers of the samples.

    Returns:
      [B] PRNG keys.
    """
    key = jax.random.fold_in(_as_key(seed), _BROWNIAN)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices))


def guided_velocity(
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
) -> Array:
    """Guidance away from a weaker model: weak + scale * (strong - weak).

    Strong is the model with its labels. Weak is the same model without a class, which is
    classifier-free guidance (arXiv 2207.12598, eq. 6), or `guiding_fn` with the same labels, which
    is autoguidance (arXiv 2406.02507). 1 is the strong model, more is guidance; in the
    first paper's notation scale = 1 + w. The output may be a velocity, score or noise alike: at a
    given (x, t) each is an affine function of the others, and guidance takes a weighted mean.

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
        and t = 1 for data (arXiv 2404.07724, which counts in noise levels sigma / alpha: on the
        linear path one of s is t = 1 / (1 + s)). Where t is a scalar the weak model is not
        evaluated outside the interval, nor at scale 1. None guides everywhere.
      guiding_fn: the weak model of autoguidance, called as `model_fn` on B rows.

    Returns:
      [B, H, W, C], float32.
    """
    t = jnp.asarray(t)
    times = jnp.broadcast_to(t, x.shape[:1])

    def plain() -> Array:
        return solvers.as_float(model_fn(x, times, labels))

    if scale is None:
        return plain()

    # Rows 2b and 2b + 1 belong to sample b: unlike two halves laid end to end, they stay on the
    # device that holds sample b.
    def twice(first: Array, second: Array) -> Array:
        return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    def strong_and_weak() -> tuple[Array, Array]:
        if guiding_fn is not None:
            strong, weak = model_fn(x, times, labels), guiding_fn(x, times, labels)
            return solvers.as_float(strong), solvers.as_float(weak)
        nulls = jnp.full_like(labels, null_label)
        output = model_fn(twice(x, x), twice(times, times), twice(labels, nulls))
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


def make_sampler(
    model_fn: Callable[[Any, Array, Array, Array], Array],
    path: paths.Path,
    *,
    prediction: str = "velocity",
    solver: str = "euler",
    num_steps: int = 250,
    null_label: int,
    channels: int | None = None,
    time_shift: float = 1.0,
    tolerance: solvers.Tolerance | None = None,
    diffusion: sde.Diffusion | None = None,
    guiding_fn: Callable[[Any, Array, Array, Array], Array] | None = None,
) -> Callable[..., Array]:
    """A pure function sample(params, noise, labels, scale, ...) -> samples, to be jitted.

    The solvers of `solvers` follow the probability-flow ODE over `flow.time_interval`. Where that
    stops short of t = 1 ("vp", and any score or noise prediction) a last evaluation replaces the
    point reached by the data predicted from it, so no noise is left in the samples. Those of `sde`
    go over `flow.sde_time_interval` and end as `diffusion.last_step` says.

    Args:
      model_fn: (params, x [B, H, W, C], t [B], labels [B]) -> [B, H, W, C].
      path: from `flow.get_path`.
      prediction: what the model outputs: "velocity", "score" or "noise".
      solver: one of `SOLVERS`.
      num_steps: how many steps, that of `diffusion.last_step` included; "dopri5" finds its own.
      null_label: the label that stands for no class.
      channels: how many leading channels to guide, see `guided_velocity`.
      time_shift: of the fixed steps, see `solvers.time_grid`.
      tolerance: of "dopri5"; None is `solvers.Tolerance()`, SiT's.
      diffusion: of the SDE solvers; None is `sde.Diffusion()`, SiT's.
      guiding_fn: the weak model of autoguidance, if it is not `model_fn` with other parameters.

    Returns:
      sample: (params, noise [B, H, W, C], labels [B], scale=None, interval=None, *, keys=None,
      guiding_params=None) -> samples [B, H, W, C], float32. For scale and interval see
      `guided_velocity`: under jit they are traced, so all their values share one program; None
      is another program, without guidance or without a choice. `keys` [B] from `brownian_keys`
      are for the SDE solvers. With `guiding_params` guidance is autoguidance by that model.

    Raises:
      ValueError: unknown prediction or solver, too few steps, or a time shift with "dopri5"; from
        `sample`, an SDE solver without keys.
    """
    paths.check_choice("solver", solver, SOLVERS)
    stochastic = solver in sde.STEPS
    tolerance, diffusion = tolerance or solvers.Tolerance(), diffusion or sde.Diffusion()
    has_last_step = stochastic and diffusion.last_step != "none"
    last_step_size = diffusion.last_step_size if has_last_step else 0.0
    if stochastic:
        t_start, t_end = paths.sde_time_interval(path, prediction, diffusion.form, last_step_size)
    else:
        t_start, t_end = paths.time_interval(path, prediction, sampling=True)
    if solver in solvers.ADAPTIVE and time_shift != 1.0:
        raise ValueError(
            f"time_shift is {time_shift}, but {solver!r} chooses its steps; expected 1"
        )
    if has_last_step and num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; expected at least 2, one being the last step")
    times = solvers.time_grid(num_steps - has_last_step, t_start, t_end, time_shift)

    def sample(
        params: Any,
        noise: Array,
        labels: Array,
        scale: float | Array | None = None,
        interval: Interval | None = None,
        *,
        keys: Array | None = None,
        guiding_params: Any = None,
    ) -> Array:
        weak_fn = None
        if guiding_params is not None:
            weak_fn = lambda *inputs: (guiding_fn or model_fn)(guiding_params, *inputs)

        def predict(x: Array, t: Array, *quantities: str) -> list[Array]:
            output = guided_velocity(
                lambda *inputs: model_fn(params, *inputs),
                x,
                t,
                labels,
                null_label=null_label,
                scale=scale,
                channels=channels,
                interval=interval,
                guiding_fn=weak_fn,
            )
            return [paths.convert(path, output, x, t, source=prediction, to=q) for q in quantities]

        def velocity_fn(x: Array, t: Array) -> Array:
            return predict(x, t, "velocity")[0]

        def diffusion_fn(t: Array) -> Array:
            return paths.diffusion(path, diffusion.form, t, diffusion.norm)

        def drift_fn(x: Array, t: Array) -> Array:
            velocity, score = predict(x, t, "velocity", "score")
            return velocity + diffusion_fn(t) * score

        end = jnp.float32(t_end)
        if not stochastic:
            if solver in solvers.ADAPTIVE:
                x, _ = solvers.dopri5(velocity_fn, noise, t_start, t_end, tolerance)
            else:
                x = solvers.integrate(velocity_fn, noise, times, solver)
            return x if t_end == 1.0 else predict(x, end, "data")[0]

        if keys is None:
            raise ValueError(f"solver {solver!r} needs keys=brownian_keys(seed, indices)")
        x = sde.integrate(drift_fn, diffusion_fn, noise, keys, times, solver)
        if diffusion.last_step == "none":
            return x
        if diffusion.last_step == "tweedie":
            return predict(x, end, "data")[0]
        last_fn = drift_fn if diffusion.last_step == "mean" else velocity_fn
        return x + last_step_size * last_fn(x, end)

    return sample
