"""Inception Score and Kernel Inception Distance; NumPy, float64."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from repulsor_jax.evaluation.frechet import check_features, check_pair

SEED = 2020  # torch-fidelity's, for its legacy generator, whose stream is frozen
SPLITS, SUBSET_SIZE = 10, 1000


class Score(NamedTuple):
    """Mean over the parts of a set, and their standard deviation (the population's)."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, *, splits: int = SPLITS, seed: int | None = SEED) -> Score:
    """Inception Score (Salimans et al. 2016) as torch-fidelity computes it.

    The exponential of the mean divergence KL(p(y|x) || p(y)) within each of several parts, with
    p(y) the mean of the part. The score grows with the size of a part. torch-fidelity shuffles and
    cuts into 10 equal parts, however many samples; ADM keeps the order and cuts into parts of
    5,000: both are comparable at 50,000 samples only. Samples in the order of their labels make
    ADM's much too small.

    Args:
      logits: without the bias of the last layer, `logits_unbiased` of `inception.features`,
        `[N, 1008]`.
      splits: number of parts, of equal size within one.
      seed: of the shuffle before; None keeps the order.

    Raises:
      ValueError: fewer samples than parts, or logits that are not finite.
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"found {count} samples for {splits} splits, expected one for each")
    if seed is not None:
        logits = np.asarray(logits)[np.random.RandomState(seed).permutation(count)]
    return _inception_score(logits, [i * count // splits for i in range(splits + 1)])


def adm_inception_score(logits: np.ndarray, *, split_size: int = 5000) -> Score:
    """Inception Score as the ADM suite's evaluator computes it; ADM reports the mean alone.

    Takes logits in the samples' order; the last part may hold fewer than `split_size`.

    Raises:
      ValueError: no samples, or logits that are not finite.
    """
    if not len(logits) or split_size < 1:
        raise ValueError(f"found {len(logits)} samples and {split_size=}, expected 1 or more")
    return _inception_score(logits, [*range(0, len(logits), split_size), len(logits)])


def _inception_score(logits: np.ndarray, bounds: Sequence[int]) -> Score:
    check_features(logits)
    scores = []
    for start, end in itertools.pairwise(bounds):
        part = np.asarray(logits[start:end], np.float64)
        part = part - part.max(axis=1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        # A class that underflows to 0 in every sample adds nothing, not 0 times infinity.
        log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        divergence = (p * (log_p - log_mean)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> Score:
    """Kernel Inception Distance (Bińkowski et al. 2018, arXiv 1801.01401).

    The unbiased estimate of the squared maximum mean discrepancy with the kernel
    (x . y / D + 1)^3, averaged over random subsets; around zero it may be negative. Defaults and
    subsets are torch-fidelity's.

    Args:
      samples: features of generated images, `[N, D]`; torch-fidelity's input 1.
      reference: features of real images, `[M, D]`; its input 2.
      subsets: how many random subsets of both to average over.
      subset_size: features in each, drawn without replacement.

    Raises:
      ValueError: features of different dimensions, fewer than a subset, or not finite.
    """
    check_pair(samples, reference)
    if subsets < 1 or not 2 <= subset_size <= min(len(samples), len(reference)):
        raise ValueError(
            f"found {len(samples)} samples and {len(reference)} reference features for {subsets} "
            f"subsets of {subset_size}, expected 2 or more in each subset, and as many features"
        )
    rng = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), subset_size, replace=False)].astype(np.float64)
        within = _kernel_sum(x, x, diagonal=False) + _kernel_sum(y, y, diagonal=False)
        pairs = subset_size * (subset_size - 1)
        distances.append(within / pairs - 2 * _kernel_sum(x, y) / subset_size**2)
    return Score(float(np.mean(distances)), float(np.std(distances)))


def _kernel_sum(x: np.ndarray, y: np.ndarray, *, diagonal: bool = True) -> float:
    base = x @ y.T / x.shape[1] + 1.0
    kernel = base * base * base  # NumPy's power takes six times as long
    return float(kernel.sum() if diagonal else kernel.sum() - np.trace(kernel))
