"""Dispersive Loss (arXiv 2506.09027): repulsion between the samples of one batch, with no bank.

The baseline of this library. The published code holds one variant, "l2", and averages over each
device's own batch; here the batch is the global one, whatever the mesh.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

VARIANTS = ("l2", "cosine", "hinge", "covariance")


def dispersive_loss(
    features: Array, *, variant: str = "l2", temperature: float = 0.5, margin: float = 1.0
) -> Array:
    """How close together the features of a batch lie; minimising it disperses them.

    The rows z_i are the features flattened to F numbers, and averages over (i, j) run over the
    whole B x B matrix, the zero diagonal included (arXiv 2506.09027):

    - "l2": log mean_ij exp(-D_ij / temperature), D_ij = |z_i - z_j|^2 / F. Between 0, for equal
      rows, and about -log B, for rows far apart, where training soon arrives.
    - "cosine": the same with D_ij = 1 - cos(z_i, z_j). The paper writes D_ij = -cos, which adds
      the constant 1 / temperature to the loss and nothing to its gradient.
    - "hinge": mean_ij max(0, margin - D_ij)^2, with D_ij of "l2".
    - "covariance": sum over m != n of C_mn^2, where C [F, F] is the covariance over the batch
      (divided by B) of the rows scaled to unit length. It decorrelates features, and is 0 for
      equal rows.

    Nothing larger than B x B is built from the features, distances and C included.

    Args:
      features: [B, ...], any float type; computed in float32.
      variant: "l2", "cosine", "hinge" or "covariance".
      temperature: tau, positive, in units of D; for "l2" and "cosine".
      margin: the distance beyond which a pair is left alone, in units of D; for "hinge".

    Returns:
      A float32 scalar, with finite gradients for equal rows, zero rows and B = 1 alike.

    Raises:
      ValueError: unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; expected one of {', '.join(VARIANTS)}")
    z = features.reshape(features.shape[0], -1).astype(jnp.float32)
    if variant in ("cosine", "covariance"):
        z *= jax.lax.rsqrt(jnp.maximum(jnp.sum(z**2, axis=1, keepdims=True), 1e-12))
    # Neither distances nor covariances see a shift, but float32 does: a mean much larger than the
    # spread would leave no digits in the differences below.
    z -= jnp.mean(z, axis=0)
    gram = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)  # [B, B]
    batch_size, feature_size = z.shape
    if variant == "covariance":
        # |Z^T Z| = |Z Z^T| in the Frobenius norm, so C itself is not needed.
        variances = jnp.mean(z**2, axis=0)
        return jnp.sum((gram / batch_size) ** 2) - jnp.sum(variances**2)
    norms = jnp.diagonal(gram)
    squared = norms[:, None] + norms[None, :] - 2.0 * gram
    distance = squared / (2.0 if variant == "cosine" else feature_size)
    if variant == "hinge":
        return jnp.mean(jnp.maximum(0.0, margin - distance) ** 2)
    return jax.nn.logsumexp(-distance / temperature) - 2.0 * jnp.log(batch_size)
