"""What a regulariser does to the representation: measures of features, negatives and gradients.

Pure functions in float32, none of which builds a [B, N, N] or [N, D, D] array. Each is finite for
zeros, equal rows and a single row, because a collapsed run is what they are for. Needs jax alone.
"""

import jax
import jax.numpy as jnp

from repulsor_jax.method.repulsion import l2_normalize

Array = jax.Array

_EXACT = jax.lax.Precision.HIGHEST


def alignment(z: Array, positives: Array) -> Array:
    """Mean squared distance of unit vectors to their positives, in [0, 4].

    Wang and Isola, arXiv 2005.10242, with alpha = 2: 0 where both views agree, 2 for strangers.

    Args:
      z: [B, d]; scaled to unit length here.
      positives: [B, d], row i the other view of sample i.
    """
    difference = _unit(z) - _unit(positives)
    return jnp.mean(jnp.sum(difference**2, axis=-1))


def uniformity(z: Array, t: float = 2.0) -> Array:
    """Log of the mean over pairs i < j of exp(-t |z_i - z_j|^2); lower is more uniform.

    Wang and Isola, arXiv 2005.10242: 0 for equal rows; -2 t + 2 t^2 / d and little more for points
    spread evenly over a sphere of many dimensions d. 0 for a single row.

    Args:
      z: [B, d]; scaled to unit length here.
      t: positive; 2 in the paper.
    """
    z = _unit(z)
    count = z.shape[0]
    if count < 2:
        return jnp.float32(0.0)
    squares = jnp.maximum(2.0 - 2.0 * jnp.matmul(z, z.T, precision=_EXACT), 0.0)
    logits = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, -t * squares)
    return jax.nn.logsumexp(logits) - jnp.log(count * (count - 1.0))


def effective_rank(features: Array) -> Array:
    """How many directions the centred features use: exp of the entropy of their singular values.

    Roy and Vetterli (EUSIPCO 2007): p_k = s_k / sum(s), rank = exp(-sum p_k log p_k); between 1,
    also for equal rows, and min(B - 1, D). The values come from an SVD: those of a Gram matrix
    lose half of their digits, and one direction would count as 1.1.

    Centred features show the spread around a common mean, however large the mean is;
    `mean_cosine_between_samples` shows how large it is.

    Args:
      features: [B, D].
    """
    x = features.astype(jnp.float32)
    values = jnp.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    # Without the floor, rounding errors of rows that are equal would count as directions.
    floor = jnp.finfo(jnp.float32).eps * jnp.linalg.norm(x)
    values = jnp.where(values > floor, values, 0.0)
    total = jnp.sum(values)
    p = values / jnp.where(total > 0, total, 1.0)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)))


def mean_cosine_between_samples(pooled: Array) -> Array:
    """Mean cosine over pairs of different rows of [B, D]; 1 where all samples look alike."""
    return _mean_cosine(pooled)


def mean_cosine_between_tokens(tokens: Array) -> Array:
    """Mean cosine over pairs of different tokens of an image, [B, N, D]; 1 where all are alike."""
    return jnp.mean(_mean_cosine(tokens))


def isotropy(tokens: Array) -> Array:
    """1 - the mean cosine between different tokens of a sequence [B, N, D], in [0, 2].

    As Contrastive Search measures a language model (arXiv 2202.06417; named in arXiv 2210.14140):
    near 0 where the tokens lie in a narrow cone, 1 where they point anywhere.
    """
    return 1.0 - mean_cosine_between_tokens(tokens)


def negatives_perplexity(
    logits: Array, log_weights: Array | float = 0.0, axis: int | tuple[int, ...] = -1
) -> Array:
    """The effective number of negatives: exp of the entropy of their share in the gradient.

    The shares are the softmax of logits + log weights over the negatives of a query. The number
    is K if all weigh the same, 1 if one outweighs the rest, 0 if there is none.

    Args:
      logits: [..., K], -distance / temperature; -inf for a row that is no negative of the query.
      log_weights: of each negative, broadcast against `logits`; -inf leaves one out too.
      axis: where the negatives lie.

    Returns:
      One float32 number a query: the shape of `logits` without `axis`.
    """
    logits = logits.astype(jnp.float32) + log_weights
    lse = jax.nn.logsumexp(logits, axis=axis, keepdims=True)
    exists = jnp.isfinite(logits)
    log_shares = jnp.where(exists, logits - jnp.where(jnp.isfinite(lse), lse, 0.0), 0.0)
    shares = jnp.where(exists, jnp.exp(log_shares), 0.0)
    perplexity = jnp.exp(-jnp.sum(shares * log_shares, axis=axis))
    return jnp.where(jnp.any(exists, axis=axis), perplexity, 0.0)


def positive_share(positive_logit: Array, negatives_lse: Array) -> Array:
    """The positive's share in the softmax of InfoNCE: e^s+ / (e^s+ + sum over negatives of e^s).

    Near 1 the term has little left to teach. 1 where there is no negative.

    Args:
      positive_logit: [B] -distance / temperature of the positive.
      negatives_lse: [B] log-sum-exp of the logits of the negatives, -inf for none.
    """
    return jax.nn.sigmoid(positive_logit.astype(jnp.float32) - negatives_lse)


def ridge_probe(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    num_classes: int,
    ridge: float = 1e-2,
    *,
    train_mask: Array | None = None,
    test_mask: Array | None = None,
) -> Array:
    """Accuracy on held-out rows of a linear probe, by ridge regression in closed form.

    Features are standardised by the training rows, classes are one-hot and centred (which is an
    unpenalised intercept): W = (X^T X / n + ridge I)^-1 X^T Y / n, the class with the largest
    X W + mean(Y) is the answer.

    Args:
      train_features: [n, D].
      train_labels: [n] integers in [0, num_classes).
      test_features: [m, D].
      test_labels: [m].
      num_classes: C.
      ridge: positive; the variance of a standardised feature is 1.
      train_mask: [n] bool, False for rows of padding; None for no padding.
      test_mask: [m] bool, likewise.

    Returns:
      A float32 scalar in [0, 1]; 0 where every test row is padding.
    """
    train, test = train_features.astype(jnp.float32), test_features.astype(jnp.float32)
    rows = _as_weights(train_mask, train.shape[0])
    mean = jnp.sum(rows * train, axis=0)
    deviation = jnp.sqrt(jnp.sum(rows * (train - mean) ** 2, axis=0))
    varies = deviation > 1e-6 * jnp.abs(mean)  # more than rounding errors of a constant do
    scale = jnp.where(varies, 1.0 / jnp.where(varies, deviation, 1.0), 0.0)
    x, test = (train - mean) * scale, (test - mean) * scale
    y = jax.nn.one_hot(train_labels, num_classes)
    intercept = jnp.sum(rows * y, axis=0)
    weighted = (rows * x).T
    covariance = jnp.matmul(weighted, x, precision=_EXACT) + ridge * jnp.eye(x.shape[1])
    moments = jnp.matmul(weighted, y - intercept, precision=_EXACT)
    w = jax.scipy.linalg.solve(covariance, moments, assume_a="pos")
    answers = jnp.argmax(jnp.matmul(test, w, precision=_EXACT) + intercept, axis=-1)
    return jnp.sum(_as_weights(test_mask, test.shape[0])[:, 0] * (answers == test_labels))


def gradient_share(term_gradient: Array, flow_gradient: Array) -> tuple[Array, Array]:
    """How much a term pulls at the tap beside the flow loss, and whether it pulls the same way.

    Args:
      term_gradient: of the weighted term with respect to the tapped tokens; any shape.
      flow_gradient: of the flow loss, the same shape.

    Returns:
      |term| / (|flow| + |term|) in [0, 1], 0 where both are zero; and the cosine between them, 0
      where either is zero.
    """
    term, term_scale = _scaled(term_gradient)
    flow, flow_scale = _scaled(flow_gradient)
    term_norm, flow_norm = jnp.linalg.norm(term), jnp.linalg.norm(flow)
    cosine = jnp.sum(term * flow) / jnp.maximum(term_norm * flow_norm, 0.5)
    # Relative to the larger, as a sum of the norms themselves may underflow to zero.
    larger = jnp.maximum(term_scale, flow_scale)
    larger = jnp.where(larger > 0, larger, 1.0)
    term_norm, flow_norm = term_norm * (term_scale / larger), flow_norm * (flow_scale / larger)
    total = term_norm + flow_norm
    return term_norm / jnp.where(total > 0, total, 1.0), cosine


def _scaled(x: Array) -> tuple[Array, Array]:
    """Flat x over its largest magnitude, and that magnitude: squares of 1e-20 would be zero."""
    x = x.astype(jnp.float32).ravel()
    largest = jnp.max(jnp.abs(x))
    return x / jnp.where(largest > 0, largest, 1.0), largest


def _unit(x: Array) -> Array:
    return l2_normalize(x.astype(jnp.float32))


def _mean_cosine(x: Array) -> Array:
    """Mean of u_i . u_j over i != j of [..., N, D] by |sum u|^2 - sum |u|^2; 0 for one row."""
    unit = _unit(x)
    count = x.shape[-2]
    together = jnp.sum(jnp.sum(unit, axis=-2) ** 2, axis=-1)
    return (together - jnp.sum(unit**2, axis=(-2, -1))) / max(count * (count - 1), 1)


def _as_weights(mask: Array | None, count: int) -> Array:
    """[count, 1]: equal weights of the rows in the mask, with sum 1."""
    rows = jnp.ones(count) if mask is None else mask.astype(jnp.float32)
    return (rows / jnp.maximum(jnp.sum(rows), 1.0))[:, None]
