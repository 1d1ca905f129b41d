"""Solvers from t = 0 (noise) to t = 1 (data): ODEs by fixed steps or by dopri5, and SDEs.

Every row of a batch is solved as if it were alone, so a sample never depends on its neighbours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.flows import paths
from repulsor_jax.flows.paths import check_choice

Array = jax.Array
VelocityFn = Callable[[Array, Array], Array]
DiffusionFn = Callable[[Array], Array]

LAST_STEPS = ("mean", "tweedie", "euler", "none")


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """When `dopri5` accepts a step: local error below atol + rtol |x|, in root mean square.

    The tolerances are SiT's; float32 gives little below rtol = 1e-5. `max_steps` counts accepted
    and rejected steps together; a sample that needs more becomes NaN.
    """

    rtol: float = 1e-3
    atol: float = 1e-6
    max_steps: int = 1000


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """How much noise an SDE sampler adds and how it ends; the defaults are those of SiT's scripts.

    `last_step` goes from t = 1 - last_step_size to the sample, without noise: "mean" takes an Euler
    step of the SDE's drift, "euler" one of the ODE's velocity, "tweedie" predicts the data,
    E[data | x_t]; "none" stays at t = 1 - 0.001.

    Raises:
      ValueError: unknown form or last step.
    """

    form: str = "sigma"  # one of `paths.DIFFUSION_FORMS`
    norm: float = 1.0  # the factor of the form
    last_step: str = "mean"
    last_step_size: float = 0.04  # SiT's, ten steps of 250; no meaning for "none"

    def __post_init__(self) -> None:
        check_choice("diffusion form", self.form, paths.DIFFUSION_FORMS)
        check_choice("last step", self.last_step, LAST_STEPS)


def _euler(velocity_fn: VelocityFn, x: Array, t: Array, dt: Array) -> Array:
    return x + dt * velocity_fn(x, t)


def _midpoint(velocity_fn: VelocityFn, x: Array, t: Array, dt: Array) -> Array:
    return x + dt * velocity_fn(x + 0.5 * dt * velocity_fn(x, t), t + 0.5 * dt)


def _heun(velocity_fn: VelocityFn, x: Array, t: Array, dt: Array) -> Array:
    start = velocity_fn(x, t)
    end = velocity_fn(x + dt * start, t + dt)
    return x + 0.5 * dt * (start + end)


def _rk4(velocity_fn: VelocityFn, x: Array, t: Array, dt: Array) -> Array:
    half = 0.5 * dt
    k1 = velocity_fn(x, t)
    k2 = velocity_fn(x + half * k1, t + half)
    k3 = velocity_fn(x + half * k2, t + half)
    k4 = velocity_fn(x + dt * k3, t + dt)
    return x + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


# One step of each: (velocity_fn, x [B, ...], t [], dt []) -> x at t + dt.
ODE_STEPS: dict[str, Callable[[VelocityFn, Array, Array, Array], Array]] = {
    "euler": _euler,  # order 1, one evaluation
    "midpoint": _midpoint,  # order 2, two evaluations
    "heun": _heun,  # order 2, two evaluations
    "rk4": _rk4,  # order 4, four evaluations
}
ADAPTIVE = ("dopri5",)


def _euler_maruyama(
    drift_fn: VelocityFn, diffusion_fn: DiffusionFn, x: Array, t: Array, dt: Array, normal: Array
) -> Array:
    return x + dt * drift_fn(x, t) + jnp.sqrt(2.0 * diffusion_fn(t) * dt) * normal


def _stochastic_heun(
    drift_fn: VelocityFn, diffusion_fn: DiffusionFn, x: Array, t: Array, dt: Array, normal: Array
) -> Array:
    return _heun(drift_fn, x + jnp.sqrt(2.0 * diffusion_fn(t) * dt) * normal, t, dt)


# One step of each: (drift_fn, diffusion_fn, x [B, ...], t [], dt [], normal [B, ...]) -> x.
SDE_STEPS: dict[str, Callable[..., Array]] = {
    "euler_maruyama": _euler_maruyama,  # weak order 1, one evaluation
    "stochastic_heun": _stochastic_heun,  # weak order 1, two; SiT's: noise first, then Heun
}


def time_grid(
    num_steps: int, t_start: float = 0.0, t_end: float = 1.0, shift: float = 1.0
) -> np.ndarray:
    """The `num_steps` + 1 times of a fixed-step solver, from `t_start` to `t_end`.

    Shifting (`paths.shift_time`) gathers the steps at the noise end. It acts on the unit interval
    before that is mapped to [t_start, t_end], so the ends stay.

    Args:
      num_steps: at least 1; else ValueError.
      t_start: the first time.
      t_end: the last time.
      shift: above 0; 1 is equal steps, more is finer at the noise end (Stable Diffusion 3 has 3).

    Returns:
      [num_steps + 1] float64, ascending.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    t = np.arange(num_steps + 1) / num_steps
    times: np.ndarray = t_start + (t_end - t_start) * paths.shift_time(t, shift)
    return times


class Segments(NamedTuple):
    """Parts of time with a velocity of their own; no step crosses from one to the next."""

    numbers: np.ndarray  # [steps] int, ascending: the segment of each step
    # (x, t [], segment []) at the first step of a segment -> arrays that all its steps are given;
    # None gives them none.
    begin: Callable[[Array, Array, Array], Any] | None = None


class Within(NamedTuple):
    """Where in `Segments` a velocity is evaluated."""

    segment: Array | int
    begun: Any = None  # the result of `Segments.begin`


def as_float(x: Array) -> Array:
    """x in float32, or in float64 if it is that already."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _starts_and_lengths(times: np.ndarray, x: Array) -> tuple[Array, Array]:
    """Start and length of each step; subtracted in float64, so rounding does not accumulate."""
    return jnp.asarray(times[:-1], x.dtype), jnp.asarray(np.diff(times), x.dtype)


def _march(
    step: Callable[..., Array],
    x: Array,
    per_step: tuple,
    t: Array,
    segments: Segments | None,
    keeps: bool = False,
) -> Array:
    """Runs x = step(x, of this step) over `per_step`; in segments, step(x, of this step, within).

    `t` [steps] are the times at which the steps start. With `keeps` all x, from the first on.
    """
    start = x

    def result(last: Array, states: Array | None) -> Array:
        return last if states is None else jnp.concatenate([start[None], states])

    if segments is None:

        def plain(x: Array, now: tuple) -> tuple[Array, Array | None]:
            x = step(x, now)
            return x, x if keeps else None

        return result(*jax.lax.scan(plain, x, per_step))
    begin = segments.begin

    def advance(carry: tuple[Array, Any], now: Any) -> tuple[tuple[Array, Any], Array | None]:
        (x, begun), (of_step, t, segment, is_first) = carry, now
        if begin is not None:
            begun = jax.lax.cond(is_first, lambda: begin(x, t, segment), lambda: begun)
        x = step(x, of_step, Within(segment, begun))
        return (x, begun), x if keeps else None

    numbers = jnp.asarray(segments.numbers, jnp.int32)
    is_first = jnp.asarray(np.diff(segments.numbers, prepend=-1) > 0)
    shapes = jax.eval_shape(begin, x, t[0], numbers[0]) if begin else None
    begun = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (x, _), states = jax.lax.scan(advance, (x, begun), (per_step, t, numbers, is_first))
    return result(x, states)


def solve_ode(
    velocity_fn: Callable[..., Array],
    noise: Array,
    times: np.ndarray,
    solver: str = "euler",
    after: Callable[[Array, Array], Array] | None = None,
    segments: Segments | None = None,
    keeps: bool = False,
) -> Array:
    """Solves dx/dt = velocity_fn(x, t) from x(times[0]) = noise, one step from time to time.

    Args:
      velocity_fn: (x, t []) -> [B, ...]; "heun" and "rk4" also evaluate it at the last time.
      noise: [B, ...]; x(times[-1]), the result, has the same shape, in float32.
      times: [steps + 1], of `time_grid`.
      solver: a key of `ODE_STEPS`; else ValueError.
      after: (x, t []) -> x, what is changed after each step, which ended at t.
      segments: gives the velocity a third argument, where in them this step is: also where "heun"
        and "rk4" evaluate it at the end of the step.
      keeps: return x at all times, [steps + 1, B, ...].
    """
    check_choice("solver", solver, tuple(ODE_STEPS))
    x = as_float(noise)

    def step(x: Array, now: tuple[Array, ...], *within: Within) -> Array:
        t, dt, *end = now
        x = ODE_STEPS[solver](lambda x, t: velocity_fn(x, t, *within), x, t, dt)
        return after(x, *end) if after else x

    ends = (jnp.asarray(times[1:], x.dtype),) if after else ()
    steps = _starts_and_lengths(times, x)
    return _march(step, x, (*steps, *ends), steps[0], segments, keeps)


def solve_sde(
    drift_fn: Callable[..., Array],
    diffusion_fn: DiffusionFn,
    noise: Array,
    keys: Array,
    times: np.ndarray,
    solver: str = "euler_maruyama",
    segments: Segments | None = None,
) -> Array:
    """Solves dx = drift_fn(x, t) dt + sqrt(2 diffusion_fn(t)) dW from x(times[0]) = noise.

    Args:
      drift_fn: (x, t []) -> [B, ...].
      diffusion_fn: t [] -> [], not negative.
      noise: [B, ...]; x(times[-1]), the result, has the same shape, in float32.
      keys: [B] PRNG keys; in row b, step k draws from `fold_in(keys[b], k)`.
      times: [steps + 1], of `time_grid`.
      solver: a key of `SDE_STEPS`; else ValueError.
      segments: as of `solve_ode`, for the drift.
    """
    check_choice("solver", solver, tuple(SDE_STEPS))
    x = as_float(noise)

    def step(x: Array, now: tuple[Array, tuple[Array, Array]], *within: Within) -> Array:
        k, (t, dt) = now
        drift = lambda x, t: drift_fn(x, t, *within)
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, k), x.shape[1:], x.dtype)
        return SDE_STEPS[solver](drift, diffusion_fn, x, t, dt, jax.vmap(draw)(keys))

    numbers = jnp.arange(len(times) - 1, dtype=jnp.int32)
    steps = _starts_and_lengths(times, x)
    return _march(step, x, (numbers, steps), steps[0], segments)


# Dormand and Prince (1980), RK5(4)7M: the time of each stage after the first, as a share of the
# step, and the weights of the velocities before it. The last stage is the solution of order 5.
_STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
# The solution of order 4 that the error is measured against: torchdiffeq's, as SiT samples with.
_ORDER_4 = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
_ERROR = tuple(np.subtract((*_STAGES[-1][1], 0.0), _ORDER_4).tolist())


class _Rows(NamedTuple):
    """Where each row stands in `dopri5`."""

    x: Array  # [B, ...]
    velocity: Array  # [B, ...], at (x, t)
    t: Array  # [B]
    dt: Array  # [B], of the next step
    steps: Array  # [B] int32, tried so far


def dopri5(
    velocity_fn: VelocityFn,
    noise: Array,
    t_start: float | Array = 0.0,
    t_end: float | Array = 1.0,
    tolerance: Tolerance = Tolerance(),
) -> tuple[Array, Array]:
    """Solves dx/dt = velocity_fn(x, t) with the Dormand-Prince pair of orders 5 and 4.

    Each sample's own error controls its step size. One step size for the batch, as torchdiffeq
    has it, would let a sample depend on its neighbours. The batch runs until its slowest sample
    arrives, and a row that has arrived costs as much as any other. Step sizes amplify rounding:
    where another batch size or mesh rounds differently, samples agree to the tolerance, and not
    to rounding as with fixed steps.

    Args:
      velocity_fn: (x, t [B]) -> [B, ...], the rows at different times; six evaluations a step.
      noise: [B, ...].
      t_start: the first time.
      t_end: the last time.
      tolerance: the tolerances and the most steps.

    Returns:
      x(t_end) [B, ...], float32, NaN in a row that did not arrive within `tolerance.max_steps`;
      and how many steps each row took, rejected ones included, [B] int32.
    """
    x = as_float(noise)
    count = len(x)

    def by_row(values: Array) -> Array:  # [B] against [B, ...]
        return values.reshape(count, *(1,) * (x.ndim - 1))

    def weighted(weights: Sequence[float], velocities: list[Array]) -> Any:
        pairs = zip(weights, velocities, strict=True)
        return sum(weight * velocity for weight, velocity in pairs if weight)

    def runs(rows: _Rows) -> Array:
        return (rows.t < t_end) & (rows.steps < tolerance.max_steps)

    def step(rows: _Rows) -> _Rows:
        remaining = t_end - rows.t
        dt = jnp.minimum(rows.dt, remaining)
        velocities, end = [rows.velocity], rows.x
        for share, weights in _STAGES:
            end = rows.x + by_row(dt) * weighted(weights, velocities)
            velocities.append(velocity_fn(end, rows.t + share * dt))
        allowed = tolerance.atol + tolerance.rtol * jnp.maximum(jnp.abs(rows.x), jnp.abs(end))
        error = by_row(dt) * weighted(_ERROR, velocities) / allowed
        error = jnp.sqrt(jnp.mean(jnp.square(error).reshape(count, -1), axis=1))
        error = jnp.where(jnp.isnan(error), jnp.inf, error)  # a shorter step may be finite
        accepted = error < 1.0
        factor = 0.9 * error**-0.2
        factor = jnp.where(accepted, jnp.clip(factor, 1.0, 10.0), jnp.clip(factor, 0.2, 0.9))
        moves = runs(rows) & accepted
        after = jnp.where(dt < remaining, rows.t + dt, t_end)
        return _Rows(
            x=jnp.where(by_row(moves), end, rows.x),
            velocity=jnp.where(by_row(moves), velocities[-1], rows.velocity),
            t=jnp.where(moves, after, rows.t),
            dt=dt * factor,
            steps=rows.steps + runs(rows),
        )

    t = jnp.full(count, t_start, x.dtype)
    # A fixed first step: a measured one would amplify rounding most.
    dt = jnp.full(count, 0.05 * (t_end - t_start), x.dtype)
    start = _Rows(x, velocity_fn(x, t), t, dt, jnp.zeros(count, jnp.int32))
    rows = jax.lax.while_loop(lambda rows: runs(rows).any(), step, start)
    return jnp.where(by_row(rows.t < t_end), jnp.nan, rows.x), rows.steps
