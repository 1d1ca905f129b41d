"""Inception Score (Salimans et al. 2016), by the two protocols in use; NumPy, float64.

Both take the exponential of the mean divergence KL(p(y|x) || p(y)) within each of several parts,
with p(y) the mean of the part, and average over the parts. Both leave out the bias of Inception's
last layer (`logits_unbiased`). They differ in the parts:

- torch-fidelity shuffles with seed 2020 and cuts into 10 equal parts, however many samples;
- the ADM suite keeps the order and cuts into parts of 5,000, however many parts, of which the last
  may be short.

The score grows with the size of a part: the two are comparable at 50,000 samples only, and there
differ by which samples come together. Samples in the order of their labels make ADM's much too
small.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from repulsor_jax.evaluation.frechet import check_finite

SPLITS, SEED = 10, 2020
ADM_SPLIT_SIZE = 5000


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    """Mean of the parts' scores and their standard deviation (the population's)."""

    mean: float
    std: float


def inception_score(
    logits: np.ndarray, *, splits: int = SPLITS, seed: int | None = SEED
) -> InceptionScore:
    """Inception Score as torch-fidelity computes it.

    Args:
      logits: `logits_unbiased` of `inception.features`, `[N, 1008]`.
      splits: number of parts, of equal size within one.
      seed: of the shuffle before; None keeps the order.

    Raises:
      ValueError: fewer samples than parts, or logits that are not finite.
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"found {count} samples for {splits} splits, expected one for each")
    if seed is not None:
        # The legacy generator is torch-fidelity's, and its stream is frozen.
        logits = np.asarray(logits)[np.random.RandomState(seed).permutation(count)]
    return _score(logits, [i * count // splits for i in range(splits + 1)])


def adm_inception_score(logits: np.ndarray, *, split_size: int = ADM_SPLIT_SIZE) -> InceptionScore:
    """Inception Score as the ADM suite's evaluator computes it; it reports the mean alone.

    Args:
      logits: `logits_unbiased` of `inception.features`, `[N, 1008]`, in the samples' order.
      split_size: samples in each part but the last.

    Raises:
      ValueError: no samples, or logits that are not finite.
    """
    if not len(logits) or split_size < 1:
        raise ValueError(f"found {len(logits)} samples and {split_size=}, expected 1 or more")
    return _score(logits, [*range(0, len(logits), split_size), len(logits)])


def _score(logits: np.ndarray, bounds: Sequence[int]) -> InceptionScore:
    check_finite(logits)
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
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
