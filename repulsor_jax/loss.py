"""What a step minimises, and what it draws for that.

`draw_inputs` draws all that is random; `make_loss` builds the function of parameters and inputs
that the step differentiates: the networks run, each term reads what it needs of them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from repulsor_jax import split_params
from repulsor_jax.data.latents import LatentFormat, normalize, sample_posterior
from repulsor_jax.flows import source as source_lib
from repulsor_jax.flows.paths import interpolate, target_velocity
from repulsor_jax.flows.source import Source
from repulsor_jax.method import memory_bank
from repulsor_jax.method.alignment import teacher_time
from repulsor_jax.method.crops import random_crops
from repulsor_jax.method.memory_bank import MemoryBank, Tags
from repulsor_jax.method.term import Rows, Seen, Term, View
from repulsor_jax.models.blockwise import segment_of_rows
from repulsor_jax.models.dit import DiT, tokens_after
from repulsor_jax.models.token_groups import (
    draw_groups,
    group_times,
    mean_times,
    pixel_times,
    teacher_group_times,
)
from repulsor_jax.split_params import on_rows
from repulsor_jax.train_state import Objective, Trainer

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]

# Folded into a step's key; those of the views are below, see `draw_inputs`.
_GROUPS = 3_000_001  # the groups of tokens
_CONDITION = 3_100_000  # the masks
_CROPS = 3_200_000  # and up to 1e6 more: the crops of the views


class Shown(NamedTuple):
    """What the teacher is shown of each image, where the student is shown what `Inputs` has."""

    t: Array  # [B]; [B, G] with groups of tokens
    noise: Array  # [B, H, W, C]
    data: Array | None = None  # [B, H, W, C], crops of the data; None: the data


class Inputs(NamedTuple):
    """What the model is trained on, one row per sample; all drawn before the loss."""

    data: Array  # [B, H, W, C] latents of the data (t = 1)
    noise: Array  # [B, H, W, C] standard normal; without a learned source the point at t = 0
    t: Array  # [B] times; [B, G] with groups of tokens, which are extras["groups"], [B, N]
    labels: Array  # [B], some replaced by the null class
    tags: Tags  # [B] image numbers, classes and times, of groups the mean over tokens
    views: dict[View, Shown]  # what the teacher is shown
    drawn: dict[str, Any]  # name of a term -> its own `draw`, [B, ...]
    extras: dict[str, Array]  # what else the model reads, by its argument's name, [B, ...]
    features: Array | None = None  # [B, N, P] of an encoder, where they are stored


class Teacher(NamedTuple):
    """The averaged parameters that terms compare with; they have no gradient."""

    params: Any  # of the model
    terms: dict[str, Any]  # name of a term -> its own


def make_loss(trainer: Trainer) -> Callable:
    """Builds the loss that a step differentiates.

    Returns:
      `(params, teacher, inputs, bank, weights) -> (loss, (metrics, rows))`: `weights` are the
      terms' by name, and `rows` are for the bank, or None.
    """
    forward, terms = make_forward(trainer), trainer.objective.terms

    def loss_fn(
        params: dict,
        teacher: Teacher,
        inputs: Inputs,
        bank: MemoryBank | None,
        weights: dict[str, Array],
    ) -> tuple[Array, tuple[Metrics, Rows | None]]:
        loss, seen = forward(params, teacher, inputs)
        metrics, rows = {"flow_loss": loss}, None
        for name, (weight, value) in source_losses(trainer, params["model"], inputs).items():
            loss += weight * value
            metrics[f"{name}_loss"] = value
        for term in terms:
            value, own_rows = term_loss(term, params, teacher, inputs, seen, bank)
            rows = own_rows if term.create_bank else rows
            loss += weights[term.name] * value
            metrics[f"{term.name}_loss"] = value
        return loss, (metrics | {"loss": loss}, rows)

    return loss_fn


def make_residual_loss(trainer: Trainer) -> Callable:
    """Builds the loss of the residual network of a blockwise model, the rest of which is frozen.

    It is the mean of (F(x_s, s) + r G(x_t, t) - F(x_t, t))^2, s the start of the row's segment and
    r the part of it behind t (arXiv 2510.21167): x_s and x_t have the same data, noise and label.
    F is of the averaged parameters, which are those of the run that it was trained in.

    Returns:
      As `make_loss`; `params["model"]` holds the residual network's alone.
    """
    model: Any = trainer.model
    path, last = trainer.objective.path, (trainer.model.depth - 1,)

    def loss_fn(  # without a bank and terms
        params: dict, teacher: Teacher, inputs: Inputs, *_: Any
    ) -> tuple[Array, tuple[Metrics, None]]:
        data, labels = inputs.data, inputs.labels
        noise = start_points(trainer, teacher.params, inputs, inputs.noise)
        start = segment_of_rows(len(data), model.segments) / model.segments
        x_start, x = (interpolate(path, data, noise, t) for t in (start, inputs.t))

        def run(
            params: Any,
            x_start: Array,
            start: Array,
            x: Array,
            t: Array,
            labels: Array,
            extras: Any,
        ) -> tuple[Array, Array]:
            def trunk(x: Array, t: Array) -> Array:
                return tokens_after(model, params["trunk"], x, t, labels, last, extras)[0]

            approximated: Array = model.apply(
                {"params": params["trunk"] | params["residual"]},
                x,
                t,
                labels,
                start=trunk(x_start, start)[:, None],
                has_output=False,
            )
            return approximated, trunk(x, t)

        networks = {"trunk": teacher.params, "residual": params["model"]}
        rows = x_start, start, x, inputs.t, labels, inputs.extras
        found, expected = on_rows(run, networks, *rows)
        loss = jnp.mean(jnp.square(found - expected.astype(jnp.float32)))
        return loss, ({"residual_loss": loss, "loss": loss}, None)

    return loss_fn


def make_forward(trainer: Trainer) -> Callable:
    """Builds the networks' part of the loss.

    Returns:
      `(params, teacher, inputs, nudges=None) -> (flow loss, seen)`: the mean flow loss of a
      micro-batch, and what its terms may read, `Seen.drawn` apart. For the nudges see `DiT`.
    """
    model, objective = trainer.model, trainer.objective
    taps, detaches = objective.taps, trainer.config.source.detach_target

    def network(params: Any, x: Array, t: Array, labels: Array, nudges: Any, extras: dict) -> Any:
        extras = extras | _modulations(model, params, t, labels)
        return model.apply({"params": params}, x, t, labels, taps=taps, nudges=nudges, **extras)

    def tokens_of(
        blocks: tuple[int, ...], params: Any, x: Array, t: Array, labels: Array, extras: dict
    ) -> tuple[Array, ...]:
        extras = extras | _modulations(model, params, t, labels, max(blocks) + 1)
        return tokens_after(model, params, x, t, labels, blocks, extras)

    def forward(
        params: dict,
        teacher: Teacher,
        inputs: Inputs,
        nudges: Mapping[int, Array] | None = None,
    ) -> tuple[Array, Seen]:
        data, t, labels = inputs.data, inputs.t, inputs.labels
        extras: Any = inputs.extras
        groups, size = extras.get("groups"), data.shape[1]
        at = pixel_times(t, groups, size)
        x_0 = start_points(trainer, params["model"], inputs, inputs.noise)
        x_t = interpolate(objective.path, data, x_0, at)
        found: Any = on_rows(network, params["model"], x_t, t, labels, nudges, extras)
        output, tokens = found if taps else (found, ())
        if trainer.source is not None and detaches:
            x_0 = jax.lax.stop_gradient(x_0)
        loss = objective.flow_loss(output, data, x_0, at).mean()

        shown = {}
        for view, blocks in objective.views.items():
            view_time, view_noise, crops = inputs.views[view]
            shown_labels = inputs.tags.labels if view.true_labels else labels
            own_inputs = inputs._replace(labels=shown_labels)
            view_x_0 = start_points(trainer, teacher.params, own_inputs, view_noise)
            view_at = pixel_times(view_time, groups, size)
            x = interpolate(objective.path, data if crops is None else crops, view_x_0, view_at)
            of_blocks = functools.partial(tokens_of, blocks)
            seen_tokens = on_rows(of_blocks, teacher.params, x, view_time, shown_labels, extras)
            view_time = mean_times(view_time, groups)
            shown[view] = view_time, dict(zip(blocks, seen_tokens, strict=True))
        tapped = dict(zip(taps, tokens, strict=True))
        times = mean_times(t, groups)
        tags, features = inputs.tags, inputs.features
        by_row = Partial(on_rows)
        return loss, Seen(data, times, tags, output, tapped, shown, None, features, by_row)

    return forward


def _modulations(
    model: DiT, params: Any, t: Array, labels: Array, depth: int | None = None
) -> dict[str, Array]:
    """The blocks' modulations, as the model's argument, where their layers are not gathered."""
    layer = params.get("blocks", {}).get("modulation", {})
    kernel = layer.get("kernel")
    if not split_params.is_split(kernel) or kernel.place.gathered:
        return {}
    kernel, bias = jax.tree.map(lambda x: x[:depth], (kernel, layer["bias"]))
    condition: Any = model.apply({"params": params}, t, labels, method="embed_condition")
    return {"modulations": split_params.apply_dense(condition, kernel, bias)}


def start_points(trainer: Trainer, params: Any, inputs: Inputs, noise: Array) -> Array:
    """The points at t = 0 that noise becomes: itself, or by the source in the model's `params`.

    The source is that of the true class, also where the label is dropped, or with
    `config.source.null="gaussian"` that of the label that the model is given.
    """
    if trainer.source is None:
        return noise
    is_true = trainer.config.source.null == "class"
    labels = inputs.tags.labels if is_true else inputs.labels
    return source_lib.sample(_source_of(trainer, params, labels), noise)


def source_losses(trainer: Trainer, params: Any, inputs: Inputs) -> dict[str, tuple[float, Array]]:
    """What a learned source adds to the flow loss: name -> weight and value; empty without one."""
    if trainer.source is None:
        return {}
    c, found = trainer.config.source, {}
    source = _source_of(trainer, params, inputs.tags.labels)
    if source.log_variance is not None:
        penalty = source_lib.variance_penalty(source.log_variance)
        found["source_variance"] = c.variance_weight, penalty
    if c.alignment_weight > 0:
        penalty = source_lib.direction_penalty(source.mean, inputs.data, c.alignment_axis)
        found["source_alignment"] = c.alignment_weight, penalty
    return found


def _source_of(trainer: Trainer, params: Any, labels: Array) -> Source:
    module: Any = trainer.source
    return Source(*on_rows(module.apply, {"params": params["source"]}, labels))


def term_loss(
    term: Term,
    params: dict,
    teacher: Teacher,
    inputs: Inputs,
    seen: Seen,
    bank: MemoryBank | None,
) -> tuple[Array, Rows | None]:
    """The loss of one term on a micro-batch, and its rows for the bank or None."""
    return term.loss(
        params["terms"].get(term.name),
        teacher.terms.get(term.name),
        seen._replace(drawn=inputs.drawn.get(term.name)),
        bank if term.create_bank else None,
    )


def draw_inputs(
    rng: Array, batch: Batch, objective: Objective, latent_format: LatentFormat
) -> Inputs:
    """Draws all that is random in a step: posterior, noise, times, dropped labels, views, masks.

    A row's numbers depend on the key and its place in the global batch alone, so every mesh and
    every number of micro-batches draws the same.

    Args:
      rng: the key of this step.
      batch: `{"latents": [B, H, W, C] or moments [B, H, W, 2C], "labels": int32 [B]}`, and "ids"
        int32 [B] where the images have numbers, "condition" [B, h, w, K] and "features" [B, N, P]
        where they are stored.
      objective: draws times, drops labels, makes the condition, and has the terms.
      latent_format: how stored latents become the model's.
    """
    posterior_key, noise_key, time_key, label_key = jax.random.split(rng, 4)
    latents, classes = batch["latents"], batch["labels"]
    if latent_format.stochastic:
        latents = sample_posterior(posterior_key, latents)
    data = normalize(latents, latent_format)
    extras: dict[str, Array] = {}
    groups, spec = None, objective.groups
    if spec is None:
        t = objective.sample_times(time_key, data.shape[0])
    else:
        groups = draw_groups(jax.random.fold_in(rng, _GROUPS), data.shape[0], spec)
        drawn_times = objective.sample_times(time_key, data.shape[0] * len(spec.counts))
        t = group_times(drawn_times.reshape(data.shape[0], -1), groups)
        extras["groups"] = groups
    noise = jax.random.normal(noise_key, data.shape)
    labels = objective.drop_labels(label_key, classes)
    ids = batch.get("ids", jnp.full_like(classes, memory_bank.UNKNOWN))

    views = {}
    for view in objective.views:
        # A number of the view's own, its crop apart, so that what else is in the sum makes no
        # difference; 0 to 3 give the keys of the split above.
        number = 4 + 2 * round(1e6 * view.time_gap) + view.new_noise
        gap_key, view_noise_key = jax.random.split(jax.random.fold_in(rng, number))
        u = jax.random.uniform(gap_key, t.shape)
        own = jax.random.normal(view_noise_key, data.shape) if view.new_noise else noise
        moved = teacher_time(t, u, view.time_gap, objective.last_time)
        moved = teacher_group_times(moved, t, spec.teacher_times) if spec else moved
        crops = None
        if view.min_crop < 1:
            crop_key = jax.random.fold_in(rng, _CROPS + round(1e6 * view.min_crop))
            crops = random_crops(crop_key, data, view.min_crop)
        views[view] = Shown(moved, own, crops)
    tags, drawn = Tags(ids, classes, mean_times(t, groups)), {}
    if any(term.draw for term in objective.terms):
        target = target_velocity(objective.path, data, noise, pixel_times(t, groups, data.shape[1]))
        drawn = {
            term.name: term.draw(target, labels, tags) for term in objective.terms if term.draw
        }
    if objective.condition is not None:
        key, stored = jax.random.fold_in(rng, _CONDITION), batch.get("condition")
        extras["condition"] = objective.condition(key, data, stored, latent_format)
    features = batch.get("features")
    return Inputs(data, noise, t, labels, tags, views, drawn, extras, features)
