"""Stochastic differential equations from noise to data, as SiT solves them.

dx = (velocity + D score) dt + sqrt(2 D) dW, with D(t) of `flow.diffusion`; then one last step
without noise. The increments of W for a sample depend on its own key and the step alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.flows import paths
from repulsor_jax.flows.solvers import as_float, starts_and_lengths

Array = jax.Array
DriftFn = Callable[[Array, Array], Array]
DiffusionFn = Callable[[Array], Array]

LAST_STEPS = ("mean", "tweedie", "euler", "none")


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """How much noise an SDE sampler adds and how it ends; the defaults are those of SiT's scripts.

    Attributes:
      form: one of `flow.DIFFUSION_FORMS`.
      norm: the factor of the form.
      last_step: how to go from t = 1 - last_step_size to the sample, without noise: "mean" takes
        an Euler step of the SDE's drift, "euler" one of the ODE's velocity, "tweedie" the data
        predicted, E[data | x_t]; "none" stays at t = 1 - 0.001.
      last_step_size: SiT has 0.04, ten steps of 250; no meaning for "none".

    Raises:
      ValueError: unknown form or last step, or a size not between 0 and 1.
    """

    form: str = "sigma"
    norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        paths.check_choice("diffusion form", self.form, paths.DIFFUSION_FORMS)
        paths.check_choice("last step", self.last_step, LAST_STEPS)
        if not 0 < self.last_step_size < 1:
            raise ValueError(f"last_step_size is {self.last_step_size}; expected between 0 and 1")
        if self.norm < 0:
            raise ValueError(f"diffusion norm is {self.norm}; expected 0 or more")


def _euler_maruyama(
    drift_fn: DriftFn, diffusion_fn: DiffusionFn, x: Array, t: Array, dt: Array, normal: Array
) -> Array:
    return x + dt * drift_fn(x, t) + jnp.sqrt(2.0 * diffusion_fn(t) * dt) * normal


def _stochastic_heun(
    drift_fn: DriftFn, diffusion_fn: DiffusionFn, x: Array, t: Array, dt: Array, normal: Array
) -> Array:
    x = x + jnp.sqrt(2.0 * diffusion_fn(t) * dt) * normal
    start = drift_fn(x, t)
    end = drift_fn(x + dt * start, t + dt)
    return x + 0.5 * dt * (start + end)


# One step of each: (drift_fn, diffusion_fn, x [B, ...], t [], dt [], normal [B, ...]) -> x.
STEPS: dict[str, Callable[..., Array]] = {
    "euler_maruyama": _euler_maruyama,  # weak order 1, one evaluation
    "stochastic_heun": _stochastic_heun,  # weak order 1, two; SiT's: noise first, then Heun
}


def integrate(
    drift_fn: DriftFn,
    diffusion_fn: DiffusionFn,
    noise: Array,
    keys: Array,
    times: np.ndarray,
    solver: str = "euler_maruyama",
) -> Array:
    """Solves dx = drift_fn(x, t) dt + sqrt(2 diffusion_fn(t)) dW from x(times[0]) = noise.

    Args:
      drift_fn: (x [B, ...], t []) -> [B, ...]; a step evaluates it once ("euler_maruyama") or
        twice ("stochastic_heun").
      diffusion_fn: t [] -> [], not negative.
      noise: [B, ...].
      keys: [B] PRNG keys; in row b, step k draws from `fold_in(keys[b], k)`.
      times: [steps + 1], of `solvers.time_grid`.
      solver: a key of `STEPS`.

    Returns:
      x(times[-1]) [B, ...], float32.

    Raises:
      ValueError: unknown solver.
    """
    paths.check_choice("solver", solver, tuple(STEPS))
    x = as_float(noise)

    def step(x: Array, now: tuple[Array, tuple[Array, Array]]) -> tuple[Array, None]:
        k, (t, dt) = now
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, k), x.shape[1:], x.dtype)
        return STEPS[solver](drift_fn, diffusion_fn, x, t, dt, jax.vmap(draw)(keys)), None

    numbers = jnp.arange(len(times) - 1, dtype=jnp.int32)
    return jax.lax.scan(step, x, (numbers, starts_and_lengths(times, x)))[0]
