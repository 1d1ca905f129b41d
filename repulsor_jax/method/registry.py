"""The registry of terms: which losses can be added to the flow loss, by name.

A new term is one file with its loss, one builder and one line in `TERMS`. A builder reads its own
section of the configuration, `config.<name>`, and what else it needs of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from repulsor_jax.method import alignment, contrastive_flow, repulsor
from repulsor_jax.method.dispersive import dispersive_loss
from repulsor_jax.method.memory_bank import Tags
from repulsor_jax.method.schedule import weight_schedule
from repulsor_jax.method.term import Seen, Term, View, tapped_block
from repulsor_jax.method.token_heads import TokenHead

Array = jax.Array


def parse_terms(text: str) -> tuple[str, ...]:
    """Names in a sum of terms, as "repulsor+layersync"; "" and "none" are no term.

    Raises:
      ValueError: a name is unknown, or there twice.
    """
    names = tuple(name.strip() for name in text.split("+")) if text not in ("", "none") else ()
    for name in names:
        if name not in TERMS:
            known = ", ".join(sorted(TERMS))
            raise ValueError(f"expected none, or a sum of {known}, found {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"expected each term once, found {name!r} twice")
    return names


def active_terms(config: Any) -> tuple[str, ...]:
    """Names of the terms of a configuration, in their order; one with weight 0 is no term."""
    return tuple(name for name in parse_terms(config.terms) if getattr(config, name).weight > 0)


def build(config: Any) -> tuple[Term, ...]:
    """Returns the terms of a configuration, in the order of `active_terms`.

    Args:
      config: with `terms`, a section for each of them, `model`, `batch_size` and `total_steps`.
    """
    return tuple(TERMS[name](config) for name in active_terms(config))


def _build_dispersive(config: Any) -> Term:
    c = config.dispersive
    block = tapped_block(c, config.model.depth)

    def loss(params: Any, ema: Any, seen: Seen, bank: Any) -> tuple[Array, None]:
        value = dispersive_loss(
            seen.tokens[block], variant=c.variant, temperature=c.temperature, margin=c.margin
        )
        return value, None

    weight = weight_schedule(c, config.total_steps)
    return Term("dispersive", weight, loss, taps=(block,))


def _build_layersync(config: Any) -> Term:
    c = config.layersync
    student, teacher = layersync_blocks(config)

    def loss(params: Any, ema: Any, seen: Seen, bank: Any) -> tuple[Array, None]:
        return alignment.layersync_loss(seen.tokens[student], seen.tokens[teacher]), None

    weight = weight_schedule(c, config.total_steps)
    return Term("layersync", weight, loss, taps=(student, teacher))


def layersync_blocks(config: Any) -> tuple[int, int]:
    """Student and teacher of LayerSync; by default the published 8 and 16 of 28, scaled."""
    c, depth = config.layersync, config.model.depth
    student = max(round(depth * 8 / 28), 1) - 1 if c.student_block == -1 else c.student_block
    teacher = max(round(depth * 16 / 28), 2) - 1 if c.teacher_block == -1 else c.teacher_block
    return student, teacher


def sra_blocks(config: Any) -> tuple[int, int]:
    """Student and teacher of SRA; by default a quarter and three quarters of the depth."""
    c, depth = config.sra, config.model.depth
    student = max(round(depth / 4), 1) - 1 if c.student_block == -1 else c.student_block
    teacher = max(round(depth * 3 / 4), 1) - 1 if c.teacher_block == -1 else c.teacher_block
    return student, teacher


def _build_sra(config: Any) -> Term:
    c, width = config.sra, config.model.hidden_size
    student, teacher = sra_blocks(config)
    view = View(c.time_gap, new_noise=False, true_labels=c.teacher_labels == "true")
    head = TokenHead(2 * width, width)
    schedule = weight_schedule(dataclasses.replace(c, weight=1.0), config.total_steps)

    def weight(step: Array) -> Array:
        decayed = alignment.decayed_weight(c.weight, step, c.decay_start, c.decay_steps)
        return schedule(step) * decayed

    def init(key: Array) -> Any:
        return head.init(key, jnp.zeros((1, 1, width)))["params"]

    def loss(params: Any, ema: Any, seen: Seen, bank: Any) -> tuple[Array, None]:
        ours: Any = seen.on_rows(head.apply, {"params": params}, seen.tokens[student])
        theirs = seen.teacher[view][1][teacher]
        return alignment.sra_loss(ours, theirs, distance=c.distance, axis=c.axis, beta=c.beta), None

    return Term("sra", weight, loss, taps=(student,), view=view, teacher_taps=(teacher,), init=init)


def _build_latent_alignment(config: Any) -> Term:
    c, model = config.latent_alignment, config.model
    block = tapped_block(c, model.depth)
    head = TokenHead(model.hidden_size, model.patch_size**2 * model.in_channels)

    def init(key: Array) -> Any:
        return head.init(key, jnp.zeros((1, 1, model.hidden_size)))["params"]

    def loss(params: Any, ema: Any, seen: Seen, bank: Any) -> tuple[Array, None]:
        ours: Any = seen.on_rows(head.apply, {"params": params}, seen.tokens[block])
        return alignment.clean_latent_loss(ours, seen.data, model.patch_size), None

    weight = weight_schedule(c, config.total_steps)
    return Term("latent_alignment", weight, loss, taps=(block,), init=init)


def feature_alignment_block(config: Any) -> int:
    """The block that is aligned; by default a trunk's last, or block depth // 3, counted from 1."""
    block: int = config.feature_alignment.block
    depth: int = config.model.depth
    if block != -1:
        return block
    return depth - 1 if config.model.architecture == "blockwise" else max(depth // 3, 1) - 1


def _build_feature_alignment(config: Any) -> Term:
    c, width = config.feature_alignment, config.model.hidden_size
    block = feature_alignment_block(config)
    head = TokenHead(c.head_size, c.dim, num_hidden=2)

    def init(key: Array) -> Any:
        return head.init(key, jnp.zeros((1, 1, width)))["params"]

    def loss(params: Any, ema: Any, seen: Seen, bank: Any) -> tuple[Array, None]:
        assert seen.features is not None, "the batch holds the features"
        ours: Any = seen.on_rows(head.apply, {"params": params}, seen.tokens[block])
        return alignment.feature_loss(ours, seen.features), None

    weight = weight_schedule(c, config.total_steps)
    return Term("feature_alignment", weight, loss, taps=(block,), init=init)


def _build_contrastive_flow(config: Any) -> Term:
    c, null_class = config.contrastive_flow, config.model.num_classes

    def draw(target: Array, labels: Array, tags: Tags) -> dict[str, Array]:
        other = contrastive_flow.negative_targets(tags.ids)
        weights = ((tags.ids != other) | (tags.ids < 0)).astype(jnp.float32)
        if c.labelled_only:
            weights *= contrastive_flow.row_weights(labels, null_class)
        return {"negatives": contrastive_flow.negative_targets(target), "weights": weights}

    def loss(params: Any, ema: Any, seen: Seen, bank: Any) -> tuple[Array, None]:
        drawn = seen.drawn
        return contrastive_flow.contrast(seen.output, drawn["negatives"], drawn["weights"]), None

    weight = weight_schedule(c, config.total_steps)
    return Term("contrastive_flow", weight, loss, draw=draw)


# The terms with a student and a teacher, and how their blocks are found.
PAIRS = {"layersync": layersync_blocks, "sra": sra_blocks}

# Each name is that of a section of the configuration.
TERMS: dict[str, Callable[[Any], Term]] = {
    "contrastive_flow": _build_contrastive_flow,
    "dispersive": _build_dispersive,
    "feature_alignment": _build_feature_alignment,
    "latent_alignment": _build_latent_alignment,
    "layersync": _build_layersync,
    "repulsor": repulsor.build,
    "sra": _build_sra,
}
