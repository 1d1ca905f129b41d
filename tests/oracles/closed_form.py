"""Data whose score, velocity and flow are known: mixtures of Gaussians, every value on its own."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mixture(NamedTuple):
    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def cdf(self, x):
        terms = zip(self.weights, self.means, self.stds, strict=True)
        erf = np.vectorize(math.erf)
        return sum(w * 0.5 * (1 + erf((x - m) / (s * 2**0.5))) for w, m, s in terms)


MEAN, STD = 1.5, 0.5
GAUSSIAN = Mixture((1.0,), (MEAN,), (STD,))


def exact_alpha_sigma(name, t):
    """alpha and sigma of a path in float64, from its definition."""
    if name == "linear":
        return t, 1 - t
    if name == "gvp":
        return np.sin(np.pi * t / 2), np.cos(np.pi * t / 2)
    # beta(s) = 0.1 + 19.9 s at the noising time s = 1 - t, and alpha = exp(-1/2 int_0^s beta)
    s = 1 - t
    alpha = np.exp(-0.5 * (0.1 * s + 19.9 * s**2 / 2))
    return alpha, np.sqrt(1 - alpha**2)


def exact_coefficients(name, t):
    """alpha, alpha', sigma, sigma' in float64, with numeric derivatives."""
    step = 1e-5
    ahead, behind = exact_alpha_sigma(name, t + step), exact_alpha_sigma(name, t - step)
    (alpha, sigma) = exact_alpha_sigma(name, t)
    d_alpha, d_sigma = ((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))
    return alpha, d_alpha, sigma, d_sigma


DIFFUSIONS = {  # of t, alpha'/alpha, sigma, sigma' and the norm, as SiT's code has them
    "constant": lambda t, rate, sigma, d_sigma, norm: norm + 0 * t,
    "sbdm": lambda t, rate, sigma, d_sigma, norm: norm * (rate * sigma**2 - sigma * d_sigma),
    "sigma": lambda t, rate, sigma, d_sigma, norm: norm * sigma,
    "linear": lambda t, rate, sigma, d_sigma, norm: norm * (1 - t),
    "decreasing": lambda t, rate, sigma, d_sigma, norm: (norm * np.cos(np.pi * t) + 1) ** 2 / 4,
    "increasing_decreasing": lambda t, rate, sigma, d_sigma, norm: norm * np.sin(np.pi * t) ** 2,
}


def exact(path, x, t, data=GAUSSIAN):
    """What a perfect model outputs at (x [B, ...], t [] or [B]): velocity, score and noise.

    Given component j, (data, x_t) is jointly normal with Var(x_t) = v = alpha^2 s^2 + sigma^2, so
    E[data | x, j] = m + alpha s^2 r / v and E[noise | x, j] = sigma r / v, r = x - alpha m.
    """
    c = path.coefficients(t.reshape(t.shape + (1,) * (x.ndim - t.ndim)))
    log_joint, ends, unit_noises = [], [], []
    for w, m, s in zip(*data, strict=True):
        residual, variance = x - c.alpha * m, c.alpha**2 * s**2 + c.sigma**2
        log_joint.append(math.log(w) - 0.5 * (residual**2 / variance + jnp.log(variance)))
        ends.append(m + c.alpha * s**2 * residual / variance)
        unit_noises.append(residual / variance)
    share = jax.nn.softmax(jnp.stack(log_joint), axis=0)
    end, unit_noise = ((share * jnp.stack(values)).sum(0) for values in (ends, unit_noises))
    return {
        "velocity": c.d_alpha * end + c.d_sigma * c.sigma * unit_noise,
        "score": -unit_noise,
        "noise": c.sigma * unit_noise,
    }


def exact_model(path, prediction, data=GAUSSIAN):
    """`exact` in the form of a sampler's model."""
    return lambda params, x, t, labels: exact(path, x, t, data)[prediction]


def exact_point(path, quantile, t):
    """Where the flow of `GAUSSIAN` takes the standard-normal `quantile` at time t."""
    c = path.coefficients(jnp.asarray(t, quantile.dtype))
    return c.alpha * MEAN + jnp.sqrt(c.alpha**2 * STD**2 + c.sigma**2) * quantile


def distance_to_cdf(samples, data):
    """The Kolmogorov-Smirnov statistic of the samples."""
    ordered = np.sort(np.asarray(samples, np.float64).ravel())
    cdf, n = data.cdf(ordered), ordered.size
    return max(np.max(cdf - np.arange(n) / n), np.max(np.arange(1, n + 1) / n - cdf))
