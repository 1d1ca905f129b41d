"""The positive control: tokens aligned with a classifier's spatial features.

REPA (arXiv 2410.06940) in miniature. It needs an outside encoder, which the method is about doing
without: a bench on which it does not help cannot show help.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.evidence.classifier import SPATIAL, Trained
from repulsor_jax.config import Config
from repulsor_jax.method.alignment import cosine_distance
from repulsor_jax.method.term import Seen, Term
from repulsor_jax.method.token_heads import TokenHead

Array = jax.Array


def control_term(config: Config, classifier: Trained, weight: float = 0.5) -> Term:
    """1 - cosine between a head on the tokens of block depth // 3 and the classifier's features.

    The features are of the clean picture, resized to the grid of tokens.
    """
    model, block = config.model, config.model.depth // 3
    side, head = model.latent_size // model.patch_size, TokenHead(2 * model.hidden_size, SPATIAL)

    def init(key: Array) -> Any:
        return head.init(key, jnp.zeros((1, 1, model.hidden_size)))["params"]

    def loss(params: Any, ema: Any, seen: Seen, bank: Any) -> tuple[Array, None]:
        found: Any = classifier.net.apply({"params": classifier.params}, seen.data)
        spatial = found[2]
        target = jax.image.resize(spatial, (len(spatial), side, side, SPATIAL), "linear")
        ours: Any = seen.on_rows(head.apply, {"params": params}, seen.tokens[block])
        return cosine_distance(ours, target.reshape(len(spatial), side**2, SPATIAL)), None

    return Term("control", lambda step: jnp.float32(weight), loss, taps=(block,), init=init)
