"""Paths between noise and data, their regression targets, and how times are drawn.

Time runs from t = 0 (noise) to t = 1 (data), the convention of SiT (arXiv 2401.08740), so a
sampler integrates forward in t. A path is x_t = alpha(t) data + sigma(t) noise. Four quantities
describe the same point of it, and `convert` turns any of them into any other:

- velocity: alpha' data + sigma' noise, the drift of the probability-flow ODE;
- score: the gradient of log p(x_t), -noise / sigma;
- noise and data: the two ends, as predicted from x_t.

With a learned source (`flows.source`) the path starts from mean + scale noise, noise still being
N(0, I). So x_t = alpha data + sigma (mean + scale noise), and of the four quantities the score
differs: it is -noise / (sigma scale). On the linear path and from a velocity v that is
(t v + mean - x) / ((1 - t) scale^2). SiT's (t v - x) / (1 - t), which the published sampler of CSFM
keeps, is the score of no distribution there.

Everything is computed in float32. Times have shape [B] (or [], or [B, H, W], one for each pixel)
and broadcast from the left against x of shape [B, ...].
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.flows.source import Source

Array = jax.Array

PREDICTIONS = ("velocity", "score", "noise")
WEIGHTINGS = ("none", "velocity", "likelihood")
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing")

VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0
DDPM_STEPS, DDPM_BETA_MIN, DDPM_BETA_MAX = 1_000, 1e-4, 0.02


class Coefficients(NamedTuple):
    """The coefficients of a path at some times, and their time derivatives."""

    alpha: Array
    d_alpha: Array
    sigma: Array
    d_sigma: Array

    @property
    def wronskian(self) -> Array:
        """The determinant alpha' sigma - alpha sigma' of (x_t, velocity) in (data, noise).

        Both terms are non-negative, so nothing cancels: it is 1 on the linear path and pi / 2 on
        gvp, at all times. It is what makes a velocity convertible without a division by alpha.
        """
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


@dataclasses.dataclass(frozen=True)
class Path:
    """A way from noise to data: x_t = alpha(t) data + sigma(t) noise."""

    name: str  # its key in `PATHS`
    coefficients: Callable[[Array], Coefficients]  # times -> float32 of the same shape
    singular_at_data: bool = False  # whether the velocity diverges as t -> 1
    steps: int = 0  # where it goes through a schedule of so many discrete times; else 0


def _linear(t: Array) -> Coefficients:
    return Coefficients(t, jnp.ones_like(t), 1.0 - t, -jnp.ones_like(t))


def _gvp(t: Array) -> Coefficients:
    rate = math.pi / 2
    alpha, sigma = jnp.sin(rate * t), jnp.cos(rate * t)
    return Coefficients(alpha, rate * sigma, sigma, -rate * alpha)


def _vp(t: Array) -> Coefficients:
    remaining = 1.0 - t
    half_beta = 0.5 * (VP_BETA_MIN + remaining * (VP_BETA_MAX - VP_BETA_MIN))
    log_alpha = -0.5 * remaining * (VP_BETA_MIN + 0.5 * remaining * (VP_BETA_MAX - VP_BETA_MIN))
    alpha = jnp.exp(log_alpha)
    sigma = jnp.sqrt(-jnp.expm1(2.0 * log_alpha))  # 1 - exp() would lose every digit near t = 1
    return Coefficients(alpha, half_beta * alpha, sigma, -half_beta * alpha**2 / sigma)


def _ddpm_polynomial() -> np.ndarray:
    """Coefficients of log(alpha_bar) in 1 - t, from the constant on, [8] float64.

    log(alpha_bar) is the sum of log(1 - beta) = -beta - beta**2 / 2 - ..., and a sum of powers of
    the linear beta is a polynomial of the number of terms: the least squares fit goes through the
    1,000 values to 1e-13. All coefficients that matter have one sign, so nothing cancels.
    """
    betas = np.linspace(DDPM_BETA_MIN, DDPM_BETA_MAX, DDPM_STEPS)
    values = np.cumsum(np.log1p(-betas))
    remaining = np.arange(1, DDPM_STEPS + 1) / DDPM_STEPS
    powers = remaining[:, None] ** np.arange(1, 8)
    return np.concatenate([[0.0], np.linalg.lstsq(powers, values, rcond=None)[0]])


def _ddpm_linear(t: Array) -> Coefficients:
    coefficients = _ddpm_polynomial()
    remaining = 1.0 - t
    log_alpha = 0.5 * jnp.polyval(jnp.asarray(coefficients[::-1], jnp.float32), remaining)
    slopes = coefficients[1:] * np.arange(1, 8)
    half_beta = -0.5 * jnp.polyval(jnp.asarray(slopes[::-1], jnp.float32), remaining)
    alpha = jnp.exp(log_alpha)
    sigma = jnp.sqrt(-jnp.expm1(2.0 * log_alpha))
    return Coefficients(alpha, half_beta * alpha, sigma, -half_beta * alpha**2 / sigma)


PATHS = {
    path.name: path
    for path in (
        Path("linear", _linear),
        Path("gvp", _gvp),
        Path("vp", _vp, singular_at_data=True),
        Path("ddpm_linear", _ddpm_linear, singular_at_data=True, steps=DDPM_STEPS),
    )
}


def check_choice(kind: str, found: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `found` is one of the `allowed` names of this `kind`."""
    if found not in allowed:
        raise ValueError(f"unknown {kind} {found!r}; expected one of {', '.join(allowed)}")


def get_path(name: str) -> Path:
    """The path called `name`: "linear", "gvp" or "vp", as SiT defines them, or "ddpm_linear".

    "gvp" runs along a quarter of a circle, alpha = sin(pi t / 2). "vp" is the variance-preserving
    diffusion of Song et al. (arXiv 2011.13456) with beta from 0.1 to 20, its time reversed.
    "ddpm_linear" is DiT's: the 1,000 steps of Ho et al. (arXiv 2006.11239, section 4), beta from
    1e-4 to 0.02. Index i of them, 999 at noise, is at t = 1 - (i + 1) / 1000, where alpha**2 is
    their alpha_bar; a smooth curve joins them, and ends at the data itself at t = 1.

    Raises:
      ValueError: no such path; the message lists the names.
    """
    check_choice("path", name, tuple(PATHS))
    return PATHS[name]


def _coefficients_like(path: Path, t: Array, x: Array) -> Coefficients:
    """The path's coefficients at `t`, with trailing axes of size 1 to broadcast against `x`."""
    t = jnp.asarray(t, jnp.float32)
    return path.coefficients(t.reshape(t.shape + (1,) * (jnp.ndim(x) - t.ndim)))


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def interpolate(path: Path, data: Array, noise: Array, t: Array) -> Array:
    """The point x_t = alpha(t) data + sigma(t) noise, [B, ...] float32; t [B] in [0, 1]."""
    data, noise = _float32(data, noise)
    c = _coefficients_like(path, t, data)
    return c.alpha * data + c.sigma * noise


def convert(
    path: Path,
    value: Array,
    x: Array,
    t: Array,
    *,
    source: str,
    to: str,
    start: Source | None = None,
) -> Array:
    """Rewrites a prediction at (x_t, t) as another quantity of the same path.

    With x_t known, any one quantity gives both ends (velocity by Cramer's rule on the pair x_t,
    velocity), and the ends give the rest; SiT states the cases velocity <-> score. No answer exists
    at t = 0 for velocity or data from score or noise (alpha = 0; not on "vp"), at t = 1 for a score
    and for anything from data (sigma = 0), and at t = 1 altogether on "vp".

    Args:
      path: from `get_path`.
      value: [B, ...], the prediction, made at the point x of the same shape and time t [B].
      x: the point x_t.
      t: its time.
      source: what `value` is: "velocity", "score", "noise" or "data"; else ValueError.
      to: what to return, [B, ...] float32, of the same choices.
      start: the distribution at t = 0, learned; None is N(0, I).
    """
    quantities = (*PREDICTIONS, "data")
    check_choice("source", source, quantities)
    check_choice("to", to, quantities)
    value, x = _float32(value, x)
    if source == to:
        return value
    c = _coefficients_like(path, t, x)
    if source == "velocity":
        data = (c.sigma * value - c.d_sigma * x) / c.wronskian
        first = (c.d_alpha * x - c.alpha * value) / c.wronskian
    elif source == "data":
        data, first = value, (x - c.alpha * value) / c.sigma
    else:
        first = _first_end(source, value, c, start)
        data = (x - c.sigma * first) / c.alpha
    return _from_ends(to, data, first, c, start)


def _first_end(quantity: str, value: Array, c: Coefficients, start: Source | None) -> Array:
    """The end at t = 0 from a score or from noise."""
    if start is None:
        return -c.sigma * value if quantity == "score" else value
    noise = -c.sigma * start.scale * value if quantity == "score" else value
    return start.mean + start.scale * noise


def _from_ends(
    quantity: str, data: Array, first: Array, c: Coefficients, start: Source | None = None
) -> Array:
    if quantity == "velocity":
        return c.d_alpha * data + c.d_sigma * first
    if quantity == "data":
        return data
    noise = first if start is None else (first - start.mean) / start.scale
    if quantity == "noise":
        return noise
    return -noise / (c.sigma if start is None else c.sigma * start.scale)


def target_velocity(path: Path, data: Array, noise: Array, t: Array) -> Array:
    """The velocity alpha' data + sigma' noise of a path, [B, ...] float32; t [B] in [0, 1].

    With a learned source `noise` is the point at t = 0, here and in `interpolate` and `flow_loss`.
    """
    data, noise = _float32(data, noise)
    return _from_ends("velocity", data, noise, _coefficients_like(path, t, data))


def flow_loss(
    path: Path,
    prediction: str,
    output: Array,
    data: Array,
    noise: Array,
    t: Array,
    weighting: str = "none",
) -> Array:
    """The weighted squared error of a model's output, one value per sample.

    The error is that of the velocity, or of the noise for both "noise" and "score" (a score is
    compared as sigma * score = -noise, which stays finite at t = 1). The weights are those of
    SiT's code, with g = alpha' sigma^2 / alpha - sigma sigma': "velocity" multiplies by
    (g / sigma)^2, which makes it the error of the implied velocity; "likelihood" by g / sigma^2,
    after Song et al. (arXiv 2101.09258). Both are infinite at t = 0 (not on "vp"), "likelihood"
    at t = 1 too: draw the times inside `time_interval`.

    Args:
      path: from `get_path`.
      prediction: what the model outputs: "velocity", "score" or "noise".
      output: [B, ...], the model's output at (x_t, t); data and noise have its shape.
      data: the end at t = 1.
      noise: the end at t = 0.
      t: [B], or [B, H, W] for pixels at times of their own.
      weighting: "none", "velocity" or "likelihood"; "none" for a velocity prediction.

    Returns:
      [B] float32: the weighted error, averaged over every axis but the first.

    Raises:
      ValueError: unknown prediction or weighting, or a weighted velocity prediction.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("weighting", weighting, WEIGHTINGS)
    if prediction == "velocity" and weighting != "none":
        raise ValueError(
            f"weighting {weighting!r} is defined for score and noise predictions; "
            'use weighting "none" with prediction "velocity"'
        )
    output, data, noise = _float32(output, data, noise)
    c = _coefficients_like(path, t, data)
    if prediction == "velocity":
        error = output - _from_ends("velocity", data, noise, c)
    else:
        error = (-c.sigma * output if prediction == "score" else output) - noise
    # g = sigma * wronskian / alpha
    if weighting == "velocity":
        error *= c.wronskian / c.alpha
    squares = jnp.square(error)
    if weighting == "likelihood":
        squares *= c.wronskian / (c.alpha * c.sigma)
    return jnp.mean(squares.reshape(len(squares), -1), axis=1)


def time_interval(path: Path, prediction: str, *, sampling: bool = False) -> tuple[float, float]:
    """The times (t0, t1) to train or sample in, which avoid the ends that are singular.

    SiT's defaults: all of [0, 1] for velocity on "linear" and "gvp"; [0, 1 - eps] on "vp";
    [eps, 1 - eps] for score and noise on the others. eps is 1e-3, and 1e-5 in training on "vp".
    On "ddpm_linear" the discrete times, from the first to the last.

    `prediction` is what the model outputs: "velocity", "score" or "noise"; else ValueError.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if path.steps:
        return 0.0, 1.0 - 1.0 / path.steps
    if path.singular_at_data:
        return 0.0, 1.0 - (1e-3 if sampling else 1e-5)
    return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1.0 - 1e-3)


def diffusion(path: Path, form: str, t: Array, norm: float | Array = 1.0) -> Array:
    """The diffusion coefficient D(t) of the SDE dx = (velocity + D score) dt + sqrt(2 D) dW.

    As t runs from noise to data, every D >= 0 gives x_t the same distribution as the
    probability-flow ODE (D = 0); SiT (arXiv 2401.08740) writes w = 2 D. The forms are
    those of SiT's code: "constant" is norm; "sbdm" norm g with g = alpha' sigma^2 / alpha -
    sigma sigma' (the SDE of Song et al., arXiv 2011.13456), infinite at t = 0 except on "vp";
    "sigma" norm sigma(t); "linear" norm (1 - t); "decreasing" (1 + norm cos(pi t))^2 / 4, with
    norm inside as published; "increasing_decreasing" norm sin^2(pi t).

    `form` is one of `DIFFUSION_FORMS`, else ValueError; t has any shape, and D(t) the same.
    """
    check_choice("diffusion form", form, DIFFUSION_FORMS)
    if form == "constant":
        return jnp.full_like(t, norm)
    if form == "sbdm":
        c = path.coefficients(t)
        return norm * c.sigma * c.wronskian / c.alpha
    if form == "sigma":
        return norm * path.coefficients(t).sigma
    if form == "linear":
        return norm * (1.0 - t)
    if form == "decreasing":
        return jnp.square(1.0 + norm * jnp.cos(math.pi * t)) / 4.0
    return norm * jnp.square(jnp.sin(math.pi * t))


def sde_time_interval(
    path: Path, prediction: str, form: str, last_step_size: float
) -> tuple[float, float]:
    """The times (t0, t1) to integrate an SDE in; a last step of another kind goes from t1 to 1.

    SiT's rules: t1 is 1 - last_step_size, or 1 - eps when that size is 0, since the score is
    infinite at t = 1. t0 is eps where velocity or "sbdm" diffusion is infinite at t = 0 ("linear"
    and "gvp", for score and noise predictions or that form), else 0. eps is 1e-3, also where SiT's
    default for a velocity prediction is 0, which would start "sbdm" from an infinite drift.

    Raises:
      ValueError: unknown prediction or form, or a `last_step_size` outside [0, 1).
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("diffusion form", form, DIFFUSION_FORMS)
    if not 0 <= last_step_size < 1:
        raise ValueError(f"last_step_size is {last_step_size}; expected 0 or more and less than 1")
    infinite_at_noise = form == "sbdm" and not path.singular_at_data
    t0 = 1e-3 if infinite_at_noise else time_interval(path, prediction, sampling=True)[0]
    return t0, 1.0 - (last_step_size or 1e-3)


def shift_time(t: Any, shift: float) -> Any:
    """t / (t + shift (1 - t)): gathers times in [0, 1] at the noise end, for larger latents.

    Equation 23 of Esser et al. (arXiv 2403.03206), s' = shift s / (1 + (shift - 1) s) of the noise
    level s = 1 - t. For float arrays of JAX or NumPy, of any shape.
    """
    return t / (t + shift * (1.0 - t))


def sample_timesteps(
    key: Array,
    batch_size: int,
    distribution: str = "uniform",
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    location: float = 0.0,
    scale: float = 1.0,
    shift: float = 1.0,
) -> Array:
    """Draws training times t = t0 + (t1 - t0) u, u shifted towards noise by `shift_time`.

    Args:
      key: a PRNG key.
      batch_size: B.
      distribution: "uniform", u ~ U[0, 1); or "logit_normal", u = sigmoid(location + scale z)
        with z ~ N(0, 1), of Esser et al. (arXiv 2403.03206, section 3.1). As t = 1 is data here, a
        positive location favours the data end (theirs favours noise).
      t0: the least time, see `time_interval`.
      t1: the largest time.
      location: of the logit-normal; its median is sigmoid(location).
      scale: of the logit-normal, positive.
      shift: of `shift_time`; 1 shifts nothing.

    Returns:
      [B] float32; ValueError for an unknown distribution.
    """
    check_choice("time distribution", distribution, TIME_DISTRIBUTIONS)
    if distribution == "uniform":
        u = jax.random.uniform(key, (batch_size,), jnp.float32)
    else:
        z = jax.random.normal(key, (batch_size,), jnp.float32)
        u = jax.nn.sigmoid(location + scale * z)
    if shift != 1.0:
        u = shift_time(u, shift)
    return t0 + (t1 - t0) * u
