"""The projection head: hidden tokens to the low-dimensional unit vectors that the bank holds."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from repulsor_jax.method.alignment import clean_latent_patches
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
        """Maps features `[..., F]` of any size F to `[..., d]`, float32, unit length."""
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


class LatentEncoder(nn.Module):
    """Clean latents to the vectors that the bank holds, without a forward of the network.

    Patches through two dense layers, position by position, then pooled as hidden tokens are, and a
    `ProjectionHead`. Ours: SRA 2 (arXiv 2601.17830) finds that VAE latents are a good target.

    Attributes:
      dim: d, the length of the projections.
      hidden_size: width of all layers.
      patch_size: side of a patch, that of the network.
      pooling: as in `pool`.
      pool_grid: as in `pool`.
    """

    dim: int
    hidden_size: int
    patch_size: int
    pooling: str
    pool_grid: int

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, d]`, or `[B, G, d]` by "token"; float32, unit length."""
        x = clean_latent_patches(latents.astype(jnp.float32), self.patch_size)
        x = nn.silu(_dense(self.hidden_size, (None, "embed"), "patches")(x))
        x = nn.silu(_dense(self.hidden_size, ("embed", "mlp"), "mixed")(x))
        head = ProjectionHead(self.dim, self.hidden_size, name="head")
        return head(pool(x, self.pooling, self.pool_grid))


def pool(tokens: jax.Array, how: str, pool_grid: int = 1) -> jax.Array:
    """Hidden tokens `[B, N, D]` on a square grid to the features that are compared; float32.

    Args:
      tokens: in row-major order.
      how: "mean" to `[B, D]`, "flatten" to `[B, N * D]`, or "token" to `[B, G, D]`: the means over
        the G = pool_grid^2 squares that the grid is cut into.
      pool_grid: squares along a side; must divide the grid's side.
    """
    tokens = tokens.astype(jnp.float32)
    batch, count, width = tokens.shape
    if how == "mean":
        return tokens.mean(axis=1)
    if how == "flatten":
        return tokens.reshape(batch, -1)
    if how != "token":
        raise ValueError(f"pooling must be 'mean', 'flatten' or 'token', got {how!r}")
    side = round(count**0.5)
    square = side // pool_grid
    x = tokens.reshape(batch, pool_grid, square, pool_grid, square, width)
    return x.mean(axis=(2, 4)).reshape(batch, pool_grid**2, width)
