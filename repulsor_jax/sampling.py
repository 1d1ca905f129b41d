"""From noise to samples: where the noise comes from, ODE solvers, and guidance.

A sample depends on the seed and its own index, never on the batch, position or device that
computed it. Nothing here knows of training: a sampler takes parameters and a model function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax import flow

Array = jax.Array
VelocityFn = Callable[[Array, Array], Array]
ModelFn = Callable[[Array, Array, Array], Array]

LABEL_MODES = ("balanced", "random")


def _euler(velocity_fn: VelocityFn, x: Array, t: Array, dt: Array) -> Array:
    return x + dt * velocity_fn(x, t)


def _heun(velocity_fn: VelocityFn, x: Array, t: Array, dt: Array) -> Array:
    start = velocity_fn(x, t)
    end = velocity_fn(x + dt * start, t + dt)
    return x + 0.5 * dt * (start + end)


# One step of each: (velocity_fn, x [B, ...], t [B], dt []) -> x at t + dt.
SOLVERS: dict[str, Callable[[VelocityFn, Array, Array, Array], Array]] = {
    "euler": _euler,  # order 1, one evaluation
    "heun": _heun,  # order 2, two evaluations
}


def integrate(
    velocity_fn: VelocityFn,
    noise: Array,
    *,
    num_steps: int,
    solver: str = "euler",
    t_start: float = 0.0,
    t_end: float = 1.0,
) -> Array:
    """Solves dx/dt = velocity_fn(x, t) from x(t_start) = noise, in equal steps.

    Args:
      velocity_fn: (x [B, ...], t [B]) -> [B, ...]; "heun" also evaluates it at `t_end`.
      noise: [B, ...].
      num_steps: how many steps; "euler" evaluates `velocity_fn` once in each, "heun" twice.
      solver: a key of `SOLVERS`.
      t_start: where to start.
      t_end: where to stop; see `flow.time_interval` for the ends that are singular.

    Returns:
      x(t_end) [B, ...], float32.

    Raises:
      ValueError: unknown solver, or `num_steps` below 1.
    """
    flow.check_choice("solver", solver, tuple(SOLVERS))
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    times = np.linspace(t_start, t_end, num_steps + 1)  # in float64, so that no error adds up

    def step(x: Array, time: tuple[Array, Array]) -> tuple[Array, None]:
        t, dt = time
        return SOLVERS[solver](velocity_fn, x, jnp.full(x.shape[:1], t), dt), None

    grid = (jnp.asarray(times[:-1], jnp.float32), jnp.asarray(np.diff(times), jnp.float32))
    return jax.lax.scan(step, jnp.asarray(noise, jnp.float32), grid)[0]


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
    flow.check_choice("label mode", mode, LABEL_MODES)
    indices = jnp.asarray(indices, jnp.int32)
    if mode == "balanced":
        return indices % num_classes
    key = jax.random.fold_in(_as_key(seed), 0x7FFFFFFF)  # apart from the keys that draw the noise
    draw = lambda index: jax.random.randint(jax.random.fold_in(key, index), (), 0, num_classes)
    return jax.vmap(draw)(indices)


def guided_velocity(
    model_fn: ModelFn,
    x: Array,
    t: Array,
    labels: Array,
    *,
    null_label: int,
    scale: float | Array | None,
    channels: int | None = None,
) -> Array:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (arXiv 2207.12598, eq. 6).

    In that paper's notation scale = 1 + w: 1 is the conditional model, more is guidance. The
    output may be a velocity, score or noise alike: at a given (x, t) each is an affine function
    of the others, and guidance takes a weighted mean.

    Args:
      model_fn: (x [B, H, W, C], t [B], labels [B]) -> [B, H, W, C]; called once, with the
        conditional and unconditional batches interleaved (2B rows).
      x: [B, H, W, C].
      t: [B].
      labels: [B] integers.
      null_label: the label that stands for no class.
      scale: a number, traced or not; None calls the model once on B rows, without guidance.
      channels: guide this many leading channels and leave the rest conditional; None guides all.
        SiT's and DiT's published samples have 3 (of 4).

    Returns:
      [B, H, W, C].
    """
    if scale is None:
        return model_fn(x, t, labels)

    # Rows 2b and 2b + 1 belong to sample b: unlike two halves laid end to end, they stay on the
    # device that holds sample b.
    def twice(first: Array, second: Array) -> Array:
        return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    output = model_fn(twice(x, x), twice(t, t), twice(labels, jnp.full_like(labels, null_label)))
    output = output.reshape(-1, 2, *output.shape[1:])
    cond, uncond = output[:, 0], output[:, 1]
    guided = uncond + scale * (cond - uncond)
    if channels is None:
        return guided
    return jnp.concatenate([guided[..., :channels], cond[..., channels:]], axis=-1)


def make_sampler(
    model_fn: Callable[[Any, Array, Array, Array], Array],
    path: flow.Path,
    *,
    prediction: str = "velocity",
    solver: str = "euler",
    num_steps: int = 250,
    null_label: int,
    channels: int | None = None,
) -> Callable[..., Array]:
    """A pure function sample(params, noise, labels, scale=None) -> samples, to be jitted.

    It solves the probability-flow ODE over `flow.time_interval`. Where that stops short of t = 1
    ("vp", and any score or noise prediction) a last evaluation replaces the point reached by the
    data predicted from it, so no noise is left in the samples.

    Args:
      model_fn: (params, x [B, H, W, C], t [B], labels [B]) -> [B, H, W, C].
      path: from `flow.get_path`.
      prediction: what the model outputs: "velocity", "score" or "noise".
      solver: a key of `SOLVERS`.
      num_steps: how many steps, see `integrate`.
      null_label: the label that stands for no class.
      channels: how many leading channels to guide, see `guided_velocity`.

    Returns:
      sample: (params, noise [B, H, W, C], labels [B], scale) -> samples [B, H, W, C], float32.
      Under jit the scale is traced, so all its values share one program; None is another
      program, which does not double the batch.

    Raises:
      ValueError: unknown prediction or solver.
    """
    flow.check_choice("solver", solver, tuple(SOLVERS))
    t_start, t_end = flow.time_interval(path, prediction, sampling=True)

    def sample(
        params: Any, noise: Array, labels: Array, scale: float | Array | None = None
    ) -> Array:
        def predict(x: Array, t: Array, to: str) -> Array:
            bound_model = lambda *inputs: model_fn(params, *inputs)
            output = guided_velocity(
                bound_model, x, t, labels, null_label=null_label, scale=scale, channels=channels
            )
            return flow.convert(path, output, x, t, source=prediction, to=to)

        x = integrate(
            lambda x, t: predict(x, t, "velocity"),
            noise,
            num_steps=num_steps,
            solver=solver,
            t_start=t_start,
            t_end=t_end,
        )
        return x if t_end == 1.0 else predict(x, jnp.full(x.shape[:1], t_end), "data")

    return sample
