"""Kernel Inception Distance (Bińkowski et al. 2018, arXiv 1801.01401); NumPy, float64.

The unbiased estimate of the squared maximum mean discrepancy with the kernel
(x . y / D + 1)^3, averaged over random subsets. Around zero it may be negative.
"""

import dataclasses

import numpy as np

from repulsor_jax.evaluation.frechet import check_finite

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """Mean over the subsets, and their standard deviation (the population's)."""

    mean: float
    std: float


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> KernelDistance:
    """Kernel Inception Distance, with torch-fidelity's defaults and its very subsets.

    Args:
      samples: features of generated images, `[N, D]`; torch-fidelity's input 1.
      reference: features of real images, `[M, D]`; its input 2.
      subsets: how many random subsets of both to average over.
      subset_size: features in each, drawn without replacement.
      seed: of the subsets.

    Raises:
      ValueError: features of different dimensions, fewer than a subset, or not finite.
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"found features {samples.shape} and {reference.shape}, expected [N, D] and [M, D]"
        )
    if subsets < 1 or not 2 <= subset_size <= min(len(samples), len(reference)):
        raise ValueError(
            f"found {len(samples)} samples and {len(reference)} reference features for {subsets} "
            f"subsets of {subset_size}, expected 2 or more in each subset, and as many features"
        )
    check_finite(samples)
    check_finite(reference)
    # The legacy generator is torch-fidelity's, and its stream is frozen.
    rng = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), subset_size, replace=False)].astype(np.float64)
        within = _kernel_sum(x, x, diagonal=False) + _kernel_sum(y, y, diagonal=False)
        pairs = subset_size * (subset_size - 1)
        distances.append(within / pairs - 2 * _kernel_sum(x, y) / subset_size**2)
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def _kernel_sum(x: np.ndarray, y: np.ndarray, *, diagonal: bool = True) -> float:
    base = x @ y.T / x.shape[1] + 1.0
    kernel = base * base * base  # NumPy's power takes six times as long
    return float(kernel.sum() if diagonal else kernel.sum() - np.trace(kernel))
