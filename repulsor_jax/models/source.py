"""The network of a learned source: a table of classes and two layers.

Ours, for class-conditional models, after CSFM (arXiv 2602.05951: a Perceiver of 77 M parameters
over the tokens of a text) and CAR-Flow (arXiv 2509.19300: a shift by class, under 0.6 % more
parameters).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class ClassSource(nn.Module):
    """Class -> mean and, with `learn_variance`, log variance of x at t = 0.

    Both are zero at the start, which is N(0, I). The null class has no parameters: it stays
    N(0, I).

    Attributes:
      num_classes: real classes; `num_classes` is the null class.
      shape: of the latents, (H, W, C).
      rank: width of the table and of the hidden layer.
      learn_variance: makes a log variance; otherwise the variance is 1.
    """

    num_classes: int
    shape: tuple[int, int, int]
    rank: int
    learn_variance: bool = False

    @nn.compact
    def __call__(self, labels: Array) -> tuple[Array, Array | None]:
        """Labels [B] to the mean [B, H, W, C] and the log variance of the same shape, or None."""
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        table = nn.Embed(
            self.num_classes,
            self.rank,
            embedding_init=nn.with_logical_partitioning(normal, ("classes", "embed")),
            name="table",
        )
        xavier = nn.initializers.xavier_uniform()
        h = table(jnp.minimum(labels, self.num_classes - 1))
        h = nn.silu(_dense(self.rank, ("embed", "mlp"), "hidden", xavier)(h))
        no_class = (labels == self.num_classes)[:, None, None, None]

        def head(name: str) -> Array:
            found = _dense(math.prod(self.shape), ("mlp", "embed"), name, zeros)(h)
            found = jnp.where(no_class, 0.0, found.reshape(-1, *self.shape))
            return nn.with_logical_constraint(found, ("batch", None, None, None))

        return head("mean"), head("log_variance") if self.learn_variance else None


def _dense(features: int, names: tuple[str, str], name: str, kernel_init: Any) -> nn.Dense:
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(kernel_init, names),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, names[1:]),
        name=name,
    )
