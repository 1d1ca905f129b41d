"""Paired comparison of arms: the ratio to plain by seed, with its interval."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Ratio(NamedTuple):
    """How an arm compares with another: the geometric mean of its ratios, and its interval."""

    ratio: float
    low: float
    high: float
    seeds: int


def paired_ratio(arm: Mapping[int, float], base: Mapping[int, float], level: float = 0.95) -> Ratio:
    """Compares positive numbers of an arm and a base by the seeds that both have.

    The logarithms of the ratios are averaged, with Student's t interval of n - 1 degrees of
    freedom: exp(m -+ t s / sqrt(n)). With one seed there is no interval: nan.

    Args:
      arm, base: seed -> a positive number, as a distance.
      level: probability of the interval.

    Raises:
      ValueError: no seed is in both.
    """
    seeds = sorted(set(arm) & set(base))
    if not seeds:
        raise ValueError(f"found seeds {sorted(arm)} and {sorted(base)}: none is in both")
    logs = np.log([arm[s] / base[s] for s in seeds])
    mean, half = float(logs.mean()), math.nan
    if len(seeds) > 1:
        quantile = stats.t.ppf((1 + level) / 2, len(seeds) - 1)
        half = float(quantile * logs.std(ddof=1) / math.sqrt(len(seeds)))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(seeds))


def mean_and_spread(values: Sequence[float]) -> str:
    """As "12.3 ± 0.4", the standard deviation of a sample; "12.3" of one value."""
    mean = f"{np.mean(values):.4g}"
    return f"{mean} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else mean
