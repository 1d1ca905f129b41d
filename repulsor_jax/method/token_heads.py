"""A head on every token, for the losses that compare tokens with a target."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class TokenHead(nn.Module):
    """Token -> Dense, SiLU, Dense; xavier-uniform weights, zero biases.

    Part of the training state only, never of the exported model. SRA's head (arXiv 2505.02831)
    on tokens of width D is `TokenHead(2 * D, D)`; the head towards patches of the clean latent is
    `TokenHead(D, patch_size**2 * C)`; BFM's towards an encoder (arXiv 2510.21167)
    `TokenHead(2048, 768, num_hidden=2)`.

    Attributes:
      hidden_size: width of the hidden layers.
      dim: width of the result.
      dtype: of the computation; the parameters are float32.
      num_hidden: hidden layers, each with SiLU.
    """

    hidden_size: int
    dim: int
    dtype: Any = jnp.float32
    num_hidden: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[B, N, D]` to `[B, N, dim]` in `dtype`."""
        # One matrix product [B N, D]: with three axes XLA on a CPU transposes for the gradient.
        x = tokens.reshape(-1, tokens.shape[-1])
        for i in range(self.num_hidden):
            name = f"hidden_{i}" if i else "hidden"
            x = nn.silu(self._dense(self.hidden_size, ("embed", "mlp"), name)(x))
        x = self._dense(self.dim, ("mlp", None), "out")(x)
        return x.reshape(*tokens.shape[:-1], self.dim)

    def _dense(self, features: int, axes: tuple[str | None, ...], name: str) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(nn.initializers.xavier_uniform(), axes),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]),
            name=name,
        )
