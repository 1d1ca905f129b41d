"""Ordinary differential equations from t = 0 (noise) to t = 1 (data): fixed steps and dopri5.

Every row of a batch is solved as if it were alone, so a sample never depends on its neighbours.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.flows.paths import check_choice

Array = jax.Array
VelocityFn = Callable[[Array, Array], Array]


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
FIXED_STEP: dict[str, Callable[[VelocityFn, Array, Array, Array], Array]] = {
    "euler": _euler,  # order 1, one evaluation
    "midpoint": _midpoint,  # order 2, two evaluations
    "heun": _heun,  # order 2, two evaluations
    "rk4": _rk4,  # order 4, four evaluations
}
ADAPTIVE = ("dopri5",)


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """When `dopri5` accepts a step: local error below atol + rtol |x|, in root mean square.

    Attributes:
      rtol: relative tolerance; SiT's default. Float32 gives little below 1e-5.
      atol: absolute tolerance; SiT's default.
      max_steps: accepted and rejected steps together; a sample that needs more becomes NaN.
    """

    rtol: float = 1e-3
    atol: float = 1e-6
    max_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "max_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")


def time_grid(
    num_steps: int, t_start: float = 0.0, t_end: float = 1.0, shift: float = 1.0
) -> np.ndarray:
    """The `num_steps` + 1 times of a fixed-step solver, from `t_start` to `t_end`.

    Shifting gathers the steps at the noise end, for latents of more pixels: it is equation 23 of
    Esser et al. (arXiv 2403.03206), s' = shift s / (1 + (shift - 1) s) of the noise level
    s = 1 - t, which in t reads t' = t / (t + shift (1 - t)). It acts on the unit interval before
    that is mapped to [t_start, t_end], so the ends stay.

    Args:
      num_steps: at least 1.
      t_start: the first time.
      t_end: the last time.
      shift: above 0; 1 is equal steps, more is finer at the noise end (Stable Diffusion 3 has 3).

    Returns:
      [num_steps + 1] float64, ascending.

    Raises:
      ValueError: `num_steps` below 1, or `shift` not above 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; expected more than 0")
    t = np.arange(num_steps + 1) / num_steps
    return t_start + (t_end - t_start) * t / (t + shift * (1.0 - t))


def starts_and_lengths(times: np.ndarray, x: Array) -> tuple[Array, Array]:
    """The start and the length of every step of a grid, in the type of `x`, ready for a scan.

    The differences are taken in float64 and then rounded, so that no error adds up.
    """
    return jnp.asarray(times[:-1], x.dtype), jnp.asarray(np.diff(times), x.dtype)


def as_float(x: Array) -> Array:
    """x in float32, or in float64 if it is that already."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def integrate(
    velocity_fn: VelocityFn, noise: Array, times: np.ndarray, solver: str = "euler"
) -> Array:
    """Solves dx/dt = velocity_fn(x, t) from x(times[0]) = noise, one step from time to time.

    Args:
      velocity_fn: (x [B, ...], t []) -> [B, ...]; "heun" and "rk4" also evaluate it at the last
        time. A step evaluates it once ("euler"), twice ("midpoint", "heun") or four times ("rk4").
      noise: [B, ...].
      times: [steps + 1], of `time_grid`.
      solver: a key of `FIXED_STEP`.

    Returns:
      x(times[-1]) [B, ...], float32.

    Raises:
      ValueError: unknown solver.
    """
    check_choice("solver", solver, tuple(FIXED_STEP))
    x = as_float(noise)

    def step(x: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
        return FIXED_STEP[solver](velocity_fn, x, *now), None

    return jax.lax.scan(step, x, starts_and_lengths(times, x))[0]


def dopri5(
    velocity_fn: VelocityFn,
    noise: Array,
    t_start: float = 0.0,
    t_end: float = 1.0,
    tolerance: Tolerance = Tolerance(),
) -> tuple[Array, Array]:
    """Solves dx/dt = velocity_fn(x, t) with the Dormand-Prince pair of orders 5 and 4 (diffrax).

    The step size is controlled for each sample by its own error. One step size for the batch, as
    torchdiffeq has it, would let a sample depend on its neighbours. The batch runs until its
    slowest sample is done, and a row that is done costs as much as any other. Step sizes amplify
    rounding: where another batch size or mesh rounds differently, samples agree to the tolerance,
    not, as with fixed steps, to rounding.

    Args:
      velocity_fn: (x [B, ...], t [B]) -> [B, ...]; the rows are at different times. It is called
        on the whole batch, six times a step.
      noise: [B, ...].
      t_start: where to start.
      t_end: where to stop.
      tolerance: the tolerances and the most steps.

    Returns:
      x(t_end) [B, ...], float32, NaN in a row that did not arrive within `tolerance.max_steps`;
      and how many steps each row took, rejected ones included, [B] int32.
    """
    import diffrax  # a second of imports that no other solver needs
    import equinox

    x = as_float(noise)
    batch = x.shape[0]
    # A loop body that is batched may not close over traced values: they travel as arguments.
    hoisted = equinox.filter_closure_convert(velocity_fn, x, jnp.full(batch, t_start, x.dtype))
    values, rest = equinox.partition(hoisted, equinox.is_array)

    # diffrax solves one system, and vmap makes one system per row of it; this calls the network
    # on the batch itself instead of on a vmapped batch of one.
    @jax.custom_batching.custom_vmap
    def row_velocity(values: Any, x: Array, t: Array) -> Array:
        return x  # stands for the shape and type: only the rule below is ever run

    @row_velocity.def_vmap
    def _batch_velocity(
        axis_size: int, in_batched: list, values: Any, x: Array, t: Array
    ) -> tuple[Array, bool]:
        t = jnp.broadcast_to(t, (axis_size,)).astype(x.dtype)
        return equinox.combine(values, rest)(x, t), True

    controller = diffrax.PIDController(rtol=tolerance.rtol, atol=tolerance.atol)

    def solve_row(x: Array) -> tuple[Array, Array]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, values: row_velocity(values, x, t)),
            diffrax.Dopri5(),
            t0=t_start,
            t1=t_end,
            dt0=0.05 * (t_end - t_start),  # measuring a first step would amplify rounding most
            y0=x,
            args=values,
            stepsize_controller=controller,
            max_steps=tolerance.max_steps,
            adjoint=diffrax.ForwardMode(),  # a plain loop, which stores nothing
            throw=False,  # raising inside a compiled program takes a host callback
        )
        assert solution.ys is not None  # saved at t1, by default
        arrived = solution.result == diffrax.RESULTS.successful
        return jnp.where(arrived, solution.ys[0], jnp.nan), solution.stats["num_steps"]

    return jax.vmap(solve_row)(x)
