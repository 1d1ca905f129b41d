"""What the terms do to the representation, in numbers: a jitted function of its own.

It reads the state and a batch as a train step does, and changes nothing. It looks at the first
micro-batch, so that it needs no more memory than a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.data.latents import LatentFormat, normalize, sample_posterior
from repulsor_jax.flows.paths import interpolate
from repulsor_jax.loss import (
    Batch,
    Inputs,
    Teacher,
    draw_inputs,
    make_forward,
    start_points,
    term_loss,
)
from repulsor_jax.method import diagnostics
from repulsor_jax.method.memory_bank import EMPTY, MemoryBank
from repulsor_jax.method.repulsion import l2_normalize
from repulsor_jax.method.term import Compared, Term
from repulsor_jax.models.dit import tokens_after
from repulsor_jax.models.token_groups import pixel_times
from repulsor_jax.train_state import Trainer, TrainState
from repulsor_jax.train_step import split_batch

Array = jax.Array
Values = dict[str, Array]

MOST_BLOCKS = 8  # looked at beside the taps
MOST_QUERIES = 64  # projections that are compared with every row of the bank
MOST_ROWS = 256  # pooled samples in an effective rank, projections in a uniformity
PROBE_TIME = 0.5  # half noise, half data


class HeldOut(NamedTuple):
    """Images for the linear probe, in whole micro-batches; rows of neither part are padding."""

    latents: Array  # [n, H, W, C] as stored
    labels: Array  # int32 [n], in [0, number of probed classes)
    fits: Array  # bool [n], the classifier is fitted to them
    tests: Array  # bool [n], and its accuracy is that on them


def watched_blocks(depth: int, taps: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that are looked at: the taps, and at most 8 evenly spaced, first and last too."""
    spaced = np.linspace(0, depth - 1, min(depth, MOST_BLOCKS)).round().astype(int).tolist()
    return tuple(sorted({*spaced, *taps}))


def make_measure(
    trainer: Trainer, latent_format: LatentFormat, num_images: int, num_probed: int
) -> Callable[[TrainState, Batch, Batch | None, HeldOut | None], Values]:
    """Builds the function that measures.

    Args:
      trainer: of the run.
      latent_format: as for `make_train_step`.
      num_images: of the data set.
      num_probed: classes of the held-out images.

    Returns:
      `(state, batch, oldest, held_out) -> {"<where>/<what>": float32 scalar}`, where is the name
      of a term or "block_<number>"; nan where something cannot be said. The state is that after
      the step that took this batch. `oldest` is the batch of the images in the oldest written slot
      of the bank, row by row, read again; None without a bank. A row that holds another image does
      not count. `held_out` None leaves the probe out.
    """
    model, objective = trainer.model, trainer.objective
    num_parts = trainer.config.optimizer.accumulation_steps
    blocks = watched_blocks(model.depth, objective.taps)
    forward = make_forward(trainer)

    def first_part(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[0], split_batch(tree, num_parts, model.segments))

    def draw(key: Array, batch: Batch) -> Inputs:
        return first_part(draw_inputs(key, batch, objective, latent_format))

    def pooled_tokens(params: Any, x: Array, t: Array, labels: Array, extras: Any = None) -> Any:
        tokens = tokens_after(model, params, x, t, labels, blocks, extras)
        return tokens, [each.astype(jnp.float32).mean(axis=1) for each in tokens]

    def by_depth(state: TrainState, inputs: Inputs) -> Values:
        x_0 = start_points(trainer, state.params["model"], inputs, inputs.noise)
        at = pixel_times(inputs.t, inputs.extras.get("groups"), inputs.data.shape[1])
        x = interpolate(objective.path, inputs.data, x_0, at)
        found = pooled_tokens(state.params["model"], x, inputs.t, inputs.labels, inputs.extras)
        values: Values = {}
        for block, tokens, pooled in zip(blocks, *found, strict=True):
            values |= {
                f"block_{block}/effective_rank": diagnostics.effective_rank(
                    _first(pooled, MOST_ROWS)
                ),
                f"block_{block}/isotropy": diagnostics.isotropy(tokens),
                f"block_{block}/cosine_tokens": diagnostics.mean_cosine_between_tokens(tokens),
                f"block_{block}/cosine_samples": diagnostics.mean_cosine_between_samples(pooled),
            }
        return values

    def by_term(state: TrainState, teacher: Teacher, inputs: Inputs) -> Values:
        # All that a term does to the blocks before it passes its first tap, or the last block.
        places = {term: min(term.taps, default=model.depth - 1) for term in objective.terms}
        num_tokens = (model.latent_size // model.patch_size) ** 2
        zeros = jnp.zeros((len(inputs.t), num_tokens, model.hidden_size), model.dtype)

        def losses(nudges: dict[int, Array]) -> Any:
            flow_loss, seen = forward(state.params, teacher, inputs, nudges)
            weighted = [
                term.weight(state.step)
                * term_loss(term, state.params, teacher, inputs, seen, state.bank)[0]
                for term in places
            ]
            return [flow_loss, *weighted], seen

        found, pull_back, seen = jax.vjp(
            losses, dict.fromkeys(places.values(), zeros), has_aux=True
        )
        flow, *others = (pull_back(list(one_hot))[0] for one_hot in jnp.eye(len(found)))
        values: Values = {}
        for (term, block), own in zip(places.items(), others, strict=True):
            share, cosine = diagnostics.gradient_share(own[block], flow[block])
            values |= {
                f"{term.name}/gradient_share": share,
                f"{term.name}/gradient_cosine": cosine,
            }
            if term.compare:
                own_params = state.params["terms"].get(term.name)
                compared = term.compare(own_params, teacher.terms.get(term.name), seen)
                bank = state.bank if term.create_bank else None
                for name, value in _contrast(compared, bank, num_images).items():
                    values[f"{term.name}/{name}"] = value
        return values

    def drift(
        key: Array, term: Term, state: TrainState, teacher: Teacher, slot: Array, batch: Batch
    ) -> Array:
        """Mean cosine of a slot's rows with today's projections of its images at its times.

        With groups of tokens, of whose times the slot has the mean, all groups are at that.
        """
        bank: Any = state.bank
        rows = jax.tree.map(lambda x: x[slot], (bank.features, bank.tags.ids, bank.tags.times))
        by_image = jax.tree.map(lambda x: x.reshape(len(batch["ids"]), -1, *x.shape[1:]), rows)
        stored, ids, times = first_part(by_image)  # [b, G, ...]
        inputs = draw(key, batch)
        t = times[:, 0]
        if inputs.t.ndim == 2:
            t = jnp.broadcast_to(t[:, None], inputs.t.shape)
        views = {view: shown._replace(t=t) for view, shown in inputs.views.items()}
        inputs = inputs._replace(t=t, labels=inputs.tags.labels, views=views)
        _, seen = forward(state.params, teacher, inputs)
        _, now = term_loss(term, state.params, teacher, inputs, seen, None)
        assert now is not None, "a term with a bank gives rows for it"
        today = l2_normalize(now.features).reshape(stored.shape)
        cosines = jnp.sum(today * l2_normalize(stored.astype(jnp.float32)), axis=-1)
        counts = ids == inputs.tags.ids[:, None]
        return jnp.sum(cosines * counts) / jnp.sum(counts)

    def probe(params: Any, held_out: HeldOut) -> Values:
        noise_key, posterior_key = jax.random.split(jax.random.key(0))
        latents = held_out.latents
        if latent_format.stochastic:
            latents = sample_posterior(posterior_key, latents)
        data = normalize(latents, latent_format)
        t = jnp.full(len(data), PROBE_TIME)
        # N(0, I) whatever the source: a class's own mean would be the answer too.
        x = interpolate(objective.path, data, jax.random.normal(noise_key, data.shape), t)
        no_class = jnp.full(len(data), model.num_classes, jnp.int32)  # a label would be the answer
        num_chunks = len(data) * num_parts // trainer.config.batch_size
        inputs = split_batch((x, t, no_class), num_chunks)
        pooled = jax.lax.map(lambda chunk: pooled_tokens(params, *chunk)[1], inputs)
        labels, fits, tests = split_batch(held_out[1:], num_chunks)
        values = {}
        for block, features in zip(blocks, pooled, strict=True):
            rows = features.reshape(-1, model.hidden_size), labels.ravel()
            values[f"block_{block}/probe_accuracy"] = diagnostics.ridge_probe(
                *rows, *rows, num_probed, train_mask=fits.ravel(), test_mask=tests.ravel()
            )
        return values

    def measure(
        state: TrainState, batch: Batch, oldest: Batch | None, held_out: HeldOut | None
    ) -> Values:
        keys = jax.random.split(jax.random.fold_in(state.rng, state.step), 3)
        teacher = Teacher(state.ema_params, state.ema_terms)
        inputs = draw(keys[0], batch)
        values = by_depth(state, inputs) | by_term(state, teacher, inputs)
        if oldest is not None and state.bank is not None:
            (term,) = (term for term in objective.terms if term.create_bank)
            newest_slot, oldest_slot = written_slots(state.bank)
            shown = term, state, teacher
            values[f"{term.name}/drift"] = drift(keys[1], *shown, oldest_slot, oldest)
            values[f"{term.name}/drift_newest"] = drift(keys[2], *shown, newest_slot, batch)
        if held_out is not None:
            values |= probe(state.params["model"], held_out)
        return values

    return measure


def written_slots(bank: MemoryBank) -> tuple[Array, Array]:
    """Numbers of the newest and the oldest written slot; of some unwritten one where none is."""
    num_slots = bank.features.shape[0]
    return (bank.cursor - 1) % num_slots, (bank.cursor - bank.filled) % num_slots


def _contrast(compared: Compared, bank: MemoryBank | None, num_images: int) -> Values:
    """What a contrast compares: how its projections lie, and how much its negatives count."""
    values = {
        "uniformity": diagnostics.uniformity(_first(compared.z, MOST_ROWS)),
        "cosine_samples": diagnostics.mean_cosine_between_samples(
            compared.z[:: compared.rows_per_image]
        ),
    }
    if compared.positives is not None:
        values["alignment"] = diagnostics.alignment(compared.z, compared.positives)
    if compared.keys is not None:
        values |= _negatives(compared, bank)
    if bank is not None:
        values |= _bank(_first(compared.tags.ids, MOST_QUERIES), bank, num_images)
    return values


def _first(tree: Any, count: int) -> Any:
    """The first rows, on every device: split over them, they would have the bank sent around."""
    return jax.tree.map(lambda x: nn.with_logical_constraint(x[:count], (None,) * x.ndim), tree)


def _negatives(compared: Compared, bank: MemoryBank | None) -> Values:
    contrast, rows_per_image, z, tags, positives, keys = compared
    z, tags = _first((z, tags), MOST_QUERIES)
    assert keys is not None
    image = jnp.arange(len(keys.features)) // rows_per_image
    others = image[:, None] != image[: len(z)]
    weights = contrast.weights(keys.tags, tags) * others
    groups = [contrast.weighted(contrast.logits(keys.features, z), weights)]
    if bank is not None:
        weights = contrast.weights(bank.tags, tags)
        groups.append(contrast.weighted(contrast.logits(bank.features, z), weights))

    # Entropy of all shares = entropy of the groups' shares + the mean entropy within the groups:
    # batch and bank are never joined in one array, which would move the bank between devices.
    axes = [tuple(range(logits.ndim - 1)) for logits in groups]
    pairs = list(zip(groups, axes, strict=True))
    sums = jnp.stack([jax.nn.logsumexp(logits, axis) for logits, axis in pairs])  # [groups, B]
    within = jnp.stack([diagnostics.negatives_perplexity(x, axis=axis) for x, axis in pairs])
    total = jax.nn.logsumexp(sums, axis=0)
    shares = jnp.where(jnp.isfinite(sums), jnp.exp(sums - total), 0.0)
    inside = jnp.sum(shares * jnp.log(jnp.maximum(within, 1.0)), axis=0)
    perplexity = diagnostics.negatives_perplexity(sums, axis=0) * jnp.exp(inside)
    values = {"perplexity": perplexity.mean()}
    if positives is not None:
        logits = contrast.paired_logits(_first(positives, MOST_QUERIES), z)
        values["positive_share"] = diagnostics.positive_share(logits, total).mean()
    return values


def _bank(queries: Array, bank: MemoryBank, num_images: int) -> Values:
    """How full the bank is, how alike its rows are, and how often it holds images `queries`.

    Copies are counted in the slots of earlier batches: the newest slot holds this batch itself.
    """
    newest, _ = written_slots(bank)
    written = bank.tags.ids != EMPTY
    slots = jnp.arange(len(bank.tags.ids))[:, None]
    earlier = jnp.where(slots == newest, EMPTY, bank.tags.ids)
    copies = (earlier[..., None] == queries) & (queries >= 0)
    total = l2_normalize(bank.features.astype(jnp.float32)).sum((0, 1))  # unwritten rows are zero
    count = written.sum(dtype=jnp.float32)
    return {
        "filled": count,
        "age": bank.filled.astype(jnp.float32),  # a slot is written at each step
        "cosine_bank": (total @ total - count) / jnp.maximum(count * (count - 1.0), 1.0),
        "copies_found": copies.sum((0, 1)).mean(dtype=jnp.float32),
        "copies_expected": (earlier >= 0).sum(dtype=jnp.float32) / num_images,
    }
