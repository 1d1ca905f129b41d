"""Contrastive flow matching (arXiv 2506.05350): away from the velocities of other samples.

The published loss of sample i is |v_i - u_i|^2 - lambda |v_i - u_j|^2, with another row j of the
batch and lambda = 0.05. Its first part is the flow loss, so that only the second is here. Needs
jax alone.

With j at random the best prediction is (u_i - lambda E[u]) / (1 - lambda) instead of u_i: the
field points away from the mean velocity and is longer by 1 / (1 - lambda). `scale_velocity` of
flows/sampler.py takes both back where samples are drawn.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def negative_targets(targets: Array) -> Array:
    """The target of the row before, [B, ...] -> [B, ...]; row 0 has the last row's.

    On the global batch, which is shuffled, the row before is a row at random; from a batch split
    over devices, each receives one row. To be taken before the batch is split into micro-batches.
    A batch of one row has its own target as negative.
    """
    return jnp.roll(targets, 1, axis=0)


def row_weights(labels: Array, null_class: int) -> Array:
    """Leaves out rows without a label: B / count for a row with one, else 0; [B] float32.

    For the global batch, before it is split into micro-batches, so that `contrast` is the mean
    over the rows with a label whatever the split. All are 0 where no row has a label.

    Args:
      labels: [B] integers, after label dropout.
      null_class: the label that means none.
    """
    labelled = (labels != null_class).astype(jnp.float32)
    return labelled * (labels.shape[0] / jnp.maximum(jnp.sum(labelled), 1.0))


def contrast(prediction: Array, negatives: Array, weights: Array | None = None) -> Array:
    """Minus the mean squared distance of velocities to those of other rows; a float32 scalar.

    It is -mean_i w_i mean |v_i - u_j(i)|^2, the inner mean over the entries of a row. It is added
    to the flow loss with the weight lambda.

    Args:
      prediction: [B, ...] velocities v that the network predicts.
      negatives: [B, ...] target velocities of other rows, `negative_targets`; no gradient.
      weights: [B] `row_weights`, or None for 1.
    """
    difference = prediction.astype(jnp.float32) - jax.lax.stop_gradient(negatives)
    rows = jnp.mean(difference**2, axis=tuple(range(1, difference.ndim)))
    return -jnp.mean(rows if weights is None else weights * rows)
