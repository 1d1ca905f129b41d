"""Repulsor, the family: contrast of hidden representations with a bank, built from its section.

Published is the idea (arXiv 2512.08648, abstract): a large bank of negatives, a low-dimensional
head, nothing at inference. The forms are ours; docs/method.md says where each comes from.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from repulsor_jax.method import memory_bank
from repulsor_jax.method.head import LatentEncoder, ProjectionHead, pool
from repulsor_jax.method.memory_bank import MemoryBank, Tags
from repulsor_jax.method.repulsion import (
    Contrast,
    Keys,
    info_nce,
    log_mean_negatives,
    paired_distances,
)
from repulsor_jax.method.schedule import weight_schedule
from repulsor_jax.method.term import Compared, Rows, Seen, Term, View, tapped_block

Array = jax.Array

POSITIVES = ("none", "view")
KEYS = ("online", "teacher", "latent")
NEGATIVES = ("all", "none")
POOLINGS = ("mean", "flatten", "token")


def build(config: Any) -> Term:
    """Builds the term from the section `repulsor` of a configuration.

    The loss of sample i, whose projection z_i is that of the student's tokens at x_t:

    - without positives, the repulsion of `log_mean_negatives`;
    - with a positive k_i, InfoNCE; or the mean distance to k_i where negatives are "none".

    The positive is the same image seen by the EMA teacher at another noise level, or, with
    bank_keys="latent", the projection of the clean latent by an encoder's EMA. The negatives among
    the batch and the rows that go into the bank are of one kind: z ("online", those of the batch
    with gradient), the teacher's projections ("teacher"), or those of the latents ("latent"). With
    the last two one network makes all that a sample is compared with. With "online" the positive is
    the teacher's and the negatives are not: two networks that differ can be told apart, and the
    positive be found without a look at the image.

    The latents' encoder learns by InfoNCE the other way round: its projection of image i is to
    find z_i, stopped, among those of the batch. This adds its gradient to the loss, not its value.
    """
    c, model = config.repulsor, config.model
    block, num_rows = tapped_block(c, model.depth), rows_per_image(c)
    contrast = Contrast(c.temperature, c.distance, c.same_class_weight, c.time_window)
    has_positives, has_negatives = c.positives == "view", c.negatives == "all"
    needs_teacher = c.bank_keys == "teacher" or (has_positives and c.bank_keys == "online")
    view = None
    if needs_teacher:
        view = View(c.time_gap, c.view_noise == "new", min_crop=c.view_min_crop)
    modules: dict[str, nn.Module] = {"head": ProjectionHead(c.projection_dim, model.hidden_size)}
    if c.predictor:
        modules["predictor"] = ProjectionHead(c.projection_dim, model.hidden_size)
    if c.bank_keys == "latent":
        modules["latent"] = LatentEncoder(
            c.projection_dim, model.hidden_size, model.patch_size, c.pooling, c.pool_grid
        )

    def init(key: Array) -> Any:
        num_tokens = (model.latent_size // model.patch_size) ** 2
        tokens = jnp.zeros((1, num_tokens, model.hidden_size))
        inputs = {
            "head": pool(tokens, c.pooling, c.pool_grid),
            "predictor": jnp.zeros((1, c.projection_dim)),
            "latent": jnp.zeros((1, model.latent_size, model.latent_size, model.in_channels)),
        }
        # The head's key is the term's own, whatever other modules there are.
        others = jax.random.split(jax.random.fold_in(key, 1), len(modules))
        keys = {name: others[i] if i else key for i, name in enumerate(modules)}
        return {
            name: module.init(keys[name], inputs[name])["params"]
            for name, module in modules.items()
        }

    def create_bank() -> MemoryBank:
        slot = config.batch_size * num_rows
        dtype = jnp.dtype(c.bank_dtype)
        return memory_bank.create(c.bank_rows // slot, slot, c.projection_dim, dtype)

    def apply(name: str, params: Any, seen: Seen, x: Array) -> Any:
        return seen.on_rows(modules[name].apply, {"params": params[name]}, x)

    def project(params: Any, seen: Seen, tokens: Array) -> Array:
        return apply("head", params, seen, pool(tokens, c.pooling, c.pool_grid))

    def compare(params: Any, ema: Any, seen: Seen) -> tuple[Compared, Rows]:
        z = project(params, seen, seen.tokens[block])
        keys, rows = z, Rows(z, seen.t)
        positives = z  # not read without positives
        if view is not None:
            view_time, tokens = seen.teacher[view]
            positives = jax.lax.stop_gradient(project(ema, seen, tokens[block]))
            if c.bank_keys == "teacher":
                keys, rows = positives, Rows(positives, view_time)
        if c.bank_keys == "latent":
            keys = positives = jax.lax.stop_gradient(apply("latent", ema, seen, seen.data))
            rows = Rows(keys, jnp.ones_like(seen.t))
        if c.predictor:
            z = apply("predictor", params, seen, z)

        def flat(x: Array) -> Array:
            return x.reshape(-1, c.projection_dim)

        compared = Compared(
            contrast,
            num_rows,
            flat(z),
            row_tags(seen.tags, seen.t, num_rows),
            flat(positives) if has_positives else None,
            Keys(flat(keys), row_tags(seen.tags, rows.times, num_rows)) if has_negatives else None,
        )
        return compared, rows

    def loss(params: Any, ema: Any, seen: Seen, bank: MemoryBank | None) -> tuple[Array, Rows]:
        (_, _, z, tags, positives, keys), rows = compare(params, ema, seen)
        if keys is None:
            assert positives is not None, "the configuration refuses a contrast with nothing"
            return paired_distances(z, positives, c.distance).mean(), rows
        losses, count = log_mean_negatives(
            z, bank, tags, contrast=contrast, keys=keys, rows_per_sample=num_rows
        )
        if positives is not None:
            losses = info_nce(contrast.paired_logits(positives, z), losses, count)
        value = losses.mean()
        if c.bank_keys == "latent":
            of_encoder = encoder_loss(params, seen, jax.lax.stop_gradient(z), tags)
            value += of_encoder - jax.lax.stop_gradient(of_encoder)
        return value, rows

    def encoder_loss(params: Any, seen: Seen, z: Array, tags: Tags) -> Array:
        own = apply("latent", params, seen, seen.data).reshape(z.shape)
        log_mean, count = log_mean_negatives(
            own, None, tags, contrast=contrast, keys=Keys(z, tags), rows_per_sample=num_rows
        )
        return info_nce(contrast.paired_logits(z, own), log_mean, count).mean()

    return Term(
        name="repulsor",
        weight=weight_schedule(c, config.total_steps),
        loss=loss,
        taps=(block,),
        view=view,
        teacher_taps=(block,) if view else (),
        init=init,
        has_ema=view is not None or c.bank_keys == "latent",
        create_bank=create_bank if c.bank_rows and has_negatives else None,
        bank_start_step=c.bank_start_step,
        compare=lambda *shown: compare(*shown)[0],
    )


def rows_per_image(section: Any) -> int:
    """Rows that an image has in the bank: one, or one for each square of `pooling="token"`."""
    rows: int = section.pool_grid**2 if section.pooling == "token" else 1
    return rows


def row_tags(tags: Tags, times: Array, rows_per_image: int) -> Tags:
    """Tags of `rows_per_image` rows for each image, seen at these times."""
    tags = tags._replace(times=times)
    return jax.tree.map(lambda x: jnp.repeat(x, rows_per_image), tags)
