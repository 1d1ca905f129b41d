"""Losses that turn tokens towards others of the same image: LayerSync, SRA, latents, features.

The targets are always under a stop-gradient, and every loss is a plain mean over a batch, so that
neither the mesh nor the number of micro-batches changes it. Computed in float32. Needs jax alone.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

AXES = ("channels", "tokens")
DISTANCES = ("cosine", "smooth_l1")


def cosine_distance(a: Array, b: Array, axis: str = "channels") -> Array:
    """Mean of 1 - cosine between tokens [B, N, D]; a float32 scalar in [0, 2].

    A vector shorter than 1e-12, where the published codes floor the norm, has no direction: its
    cosine is 0, and so is its gradient.

    Args:
      a: [B, N, D], any float type.
      b: [B, N, D], any float type.
      axis: "channels" compares each token with its partner; "tokens" compares, for each channel,
        the N numbers of that channel, which is what the released code of SRA computes.

    Raises:
      ValueError: unknown axis.
    """
    if axis not in AXES:
        raise ValueError(f"axis must be one of {AXES}, got {axis!r}")
    over = -1 if axis == "channels" else -2
    cosine = jnp.sum(_unit(a, over) * _unit(b, over), axis=over)
    return 1.0 - jnp.mean(cosine)


def smooth_l1(a: Array, b: Array, beta: float = 0.05) -> Array:
    """Mean over entries of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2; d = a - b.

    Args:
      a: any shape and float type.
      b: the same shape.
      beta: where the parabola meets the lines; positive, in units of a.
    """
    d = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))
    return jnp.mean(jnp.where(d < beta, 0.5 * d * d / beta, d - 0.5 * beta))


def layersync_loss(shallow: Array, deep: Array) -> Array:
    """LayerSync (arXiv 2510.12581): minus the mean cosine between tokens of two blocks.

    Args:
      shallow: [B, N, D] tokens after a shallow block, which learns.
      deep: [B, N, D] tokens after a deeper block of the same network, which does not.

    Returns:
      A float32 scalar in [-1, 1].
    """
    return cosine_distance(shallow, jax.lax.stop_gradient(deep)) - 1.0


def sra_loss(
    student: Array,
    teacher: Array,
    *,
    distance: str = "cosine",
    axis: str = "tokens",
    beta: float = 0.05,
) -> Array:
    """SRA (arXiv 2505.02831): distance of the student's tokens to those of the EMA network.

    The paper and its figures have the smooth L1 distance with beta 0.05; the released code has
    had the cosine since 2026, over tokens (see `cosine_distance`), and its authors advise it
    because smooth L1 grows with the norms of the features.

    Args:
      student: [B, N, D] tokens of an early block after a head (`token_heads.TokenHead`).
      teacher: [B, N, D] tokens of a later block of the EMA network at less noise, no head.
      distance: "cosine" or "smooth_l1".
      axis: of the cosine, "channels" or "tokens".
      beta: of smooth L1.

    Raises:
      ValueError: unknown distance or axis.
    """
    teacher = jax.lax.stop_gradient(teacher)
    if distance == "cosine":
        return cosine_distance(student, teacher, axis)
    if distance == "smooth_l1":
        return smooth_l1(student, teacher, beta)
    raise ValueError(f"distance must be one of {DISTANCES}, got {distance!r}")


def teacher_time(t: Array, u: Array, gap: float = 0.2, last: float = 1.0) -> Array:
    """The teacher's time in SRA: min(1, t + gap u), nearer to the data than the student's time t.

    Args:
      t: [B] times of the student in [0, 1], 0 noise and 1 data (SRA counts the other way).
      u: [B] uniform in [0, 1).
      gap: the largest difference of the times; 0.2 in SRA.
      last: the last time that the network is trained at, in place of 1.
    """
    return jnp.minimum(last, t + gap * u)


def decayed_weight(
    weight: float, step: Array | int, decay_start: float, decay_steps: float
) -> Array:
    """SRA's weight for smooth L1: constant, then a tenth after every `decay_steps`; float32.

    weight * 10^(-max(0, step - decay_start) / decay_steps). SRA counts epochs: start 149 and
    length 1000 at 256 pixels, 99 and 800 at 512, with weight 0.2 for SiT and 0.04 for DiT.

    Args:
      weight: before the decay.
      step: now, in the unit of the two below.
      decay_start: the last step of the constant weight.
      decay_steps: 0 for a weight without decay.
    """
    if not decay_steps:
        return jnp.asarray(weight, jnp.float32)
    past = jnp.maximum(jnp.asarray(step, jnp.float32) - decay_start, 0.0)
    return weight * 10.0 ** (-past / decay_steps)


def clean_latent_patches(latents: Array, patch_size: int) -> Array:
    """Cuts latents [B, H, W, C] into [B, N, patch_size^2 C], a row for each token of the network.

    The order is that of the network's own patches: row by row, channels last within a patch. The
    latents stay as the network sees them (about unit variance): statistics of the batch would
    make the loss depend on the number of micro-batches.
    """
    batch, height, width, channels = latents.shape
    rows, columns = height // patch_size, width // patch_size
    patches = latents.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return patches.swapaxes(2, 3).reshape(batch, rows * columns, patch_size**2 * channels)


def clean_latent_loss(prediction: Array, latents: Array, patch_size: int) -> Array:
    """Mean of 1 - cosine between a head's tokens and the patches of the clean latents.

    After SRA 2 (arXiv 2601.17830), which aligns a block's tokens with the autoencoder's features
    through a light projection. Its abstract says no more, and no code is published: the target,
    the distance and the head are ours.

    Args:
      prediction: [B, N, patch_size^2 C], a block's tokens after `token_heads.TokenHead`.
      latents: [B, H, W, C] without noise.
      patch_size: side of a patch, that of the network.
    """
    target = jax.lax.stop_gradient(clean_latent_patches(latents, patch_size))
    return cosine_distance(prediction, target)


def _unit(x: Array, axis: int) -> Array:
    x = x.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    has_direction = squares > 1e-24
    # The inner `where` keeps the gradient of the branch not taken finite, the outer one makes it 0.
    return jnp.where(has_direction, x * jax.lax.rsqrt(jnp.where(has_direction, squares, 1.0)), 0.0)


def feature_loss(projected: Array, features: Array) -> Array:
    """Minus the mean cosine between projected tokens and an encoder's, token by token.

    The alignment of REPA (arXiv 2410.06940) and of BFM's trunk (arXiv 2510.21167).

    Args:
      projected: [B, N, P] tokens of a block after a head.
      features: [B, N, P] of the clean image, stored; no gradient.

    Returns:
      A float32 scalar in [-1, 1].
    """
    return cosine_distance(projected, jax.lax.stop_gradient(features)) - 1.0
