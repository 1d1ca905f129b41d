"""The projection head: hidden tokens to the low-dimensional unit vectors that the bank holds."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from repulsor_jax.method.repulsion import l2_normalize


class ProjectionHead(nn.Module):
    """Pooled hidden representation -> unit vector: Dense, SiLU, Dense d, L2 normalisation.

    Always float32: the vectors are compared at the scale of the temperature. Part of the training
    state only, never of the exported model.

    Attributes:
      dim: d, the length of the projections.
      hidden_size: width of the first layer; the model's own width D.
    """

    dim: int
    hidden_size: int

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """Maps pooled features `[B, D or N * D]` to `[B, d]`, float32, unit length."""
        x = pooled.astype(jnp.float32)
        x = nn.silu(_dense(self.hidden_size, ("embed", "mlp"), "hidden")(x))
        return l2_normalize(_dense(self.dim, ("mlp", None), "out")(x))


def _dense(features: int, axes: tuple[str | None, ...], name: str) -> nn.Dense:
    return nn.Dense(
        features,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=nn.with_logical_partitioning(nn.initializers.xavier_uniform(), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]),
        name=name,
    )


def pool(tokens: jax.Array, how: str) -> jax.Array:
    """Hidden tokens `[B, N, D]` -> `[B, D]` ("mean") or `[B, N * D]` ("flatten"), float32."""
    tokens = tokens.astype(jnp.float32)
    if how == "mean":
        return tokens.mean(axis=1)
    if how == "flatten":
        return tokens.reshape(tokens.shape[0], -1)
    raise ValueError(f"pooling must be 'mean' or 'flatten', got {how!r}")
