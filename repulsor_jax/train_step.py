"""The train step: a pure function `(state, batch) -> (state, metrics)`.

It carries the memory bank as sharded state. Everything here is traced once and runs on the mesh
as one program; the caller jits it with the state donated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from repulsor_jax import config as config_lib
from repulsor_jax import sharding, split_params
from repulsor_jax.data.latents import LatentFormat
from repulsor_jax.loss import (
    Batch,
    Inputs,
    Metrics,
    Teacher,
    draw_inputs,
    make_loss,
    make_residual_loss,
)
from repulsor_jax.method import memory_bank
from repulsor_jax.method.memory_bank import MemoryBank, Tags
from repulsor_jax.method.repulsor import row_tags
from repulsor_jax.method.term import Rows
from repulsor_jax.train_state import (
    Trainer,
    TrainState,
    abstract_train_state,
    create_train_state,
)

Array = jax.Array
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    trainer: Trainer,
    latent_format: LatentFormat,
    mesh: Mesh | None = None,
    *,
    in_branch: bool = True,
) -> Step:
    """Builds the step.

    Args:
      trainer: model, objective and optimizer.
      latent_format: how stored latents become the model's.
      mesh: that the state lies on, to be made current where the step is traced; None leaves to
        XLA what is gathered when.
      in_branch: whether the update is a branch, which a refused step does not take, or a selection
        between the new and the old value of every number; the results are the same.

    Returns:
      A pure function of the state and one global batch, `{"latents": [B, H, W, C] (or
      [B, H, W, 2C] moments), "labels": int32 [B], "ids": int32 [B] image numbers}`, that returns
      the next state and float32 scalars. A step whose loss or gradient is not finite, or above the
      configured limits, leaves the state as it was, and has the metric "refused" at 1.
    """
    config, objective = trainer.config, trainer.objective
    optimizer, learning_rate, terms = trainer.optimizer, trainer.learning_rate, objective.terms
    loss_fn = make_residual_loss(trainer) if config.model.residual_depth else make_loss(trainer)

    read = split_params.make_reader(trainer, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        inputs = draw_inputs(rng, batch, objective, latent_format)
        reads, averaged = read(state)
        teacher = Teacher(*averaged)
        weights = {term.name: term.weight(state.step) for term in terms}

        def loss_of(params: dict, part: Inputs) -> tuple[Array, tuple[Metrics, Rows | None]]:
            return loss_fn(reads(params), teacher, part, state.bank, weights)

        grad_fn = jax.grad(loss_of, has_aux=True)
        grads, (metrics, rows) = accumulate(
            lambda part: grad_fn(state.params, part),
            inputs,
            config.optimizer.accumulation_steps,
            trainer.model.segments,
        )

        grad_norm = optax.tree.norm(grads)
        metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate(state.step)}
        metrics |= {f"{name}_weight": weight for name, weight in weights.items()}

        def update(state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            averaged = {name: params["terms"][name] for name in state.ema_terms}
            trained = {name: state.ema_params[name] for name in params["model"]}
            ema_params, ema_terms = optax.incremental_update(
                (params["model"], averaged),
                (trained, state.ema_terms),
                1.0 - config.optimizer.ema_decay,
            )
            return state.replace(
                step=state.step + 1,
                params=params,
                ema_params=state.ema_params | ema_params,  # what is not trained stays as it is
                ema_terms=ema_terms,
                opt_state=opt_state,
            )

        # The bank stays outside of the branch, which would copy it.
        good = _within(metrics["loss"], config.divergence.max_loss)
        good &= _within(grad_norm, config.divergence.max_grad_norm)
        metrics["refused"] = 1.0 - good
        bank = state.bank
        if bank is not None:
            (start,) = (term.bank_start_step for term in terms if term.create_bank)
            valid = good & (state.step >= start) if start else good
            bank = _enqueue(bank, rows, inputs.tags, valid)
        state = state.replace(bank=None)
        if in_branch:
            state = jax.lax.cond(good, update, lambda state: state, state)
        else:
            select = lambda new, old: old if new is old else jnp.where(good, new, old)
            state = jax.tree.map(select, update(state), state)
        return state.replace(bank=bank), metrics

    return train_step


def _enqueue(bank: MemoryBank, rows: Rows, tags: Tags, valid: Array) -> MemoryBank:
    features = rows.features.reshape(-1, rows.features.shape[-1])
    tags = row_tags(tags, rows.times, features.shape[0] // rows.times.shape[0])
    return memory_bank.enqueue(bank, features, valid, tags=tags)


def _within(value: Array, limit: float) -> Array:
    """Whether a scalar is finite and, where there is a limit, at most that."""
    return jnp.isfinite(value) & (value <= limit if limit else True)


def accumulate(
    gradients: Callable, inputs: Inputs, num_microbatches: int, group_size: int = 1
) -> tuple:
    """Averages gradients and metrics over micro-batches run one after the other.

    See `split_batch` for which rows are in which.

    Args:
      gradients: `inputs -> (grads, (metrics, rows))`.
      inputs: arrays `[B, ...]`.
      num_microbatches: A; A group_size divides B / devices.
      group_size: consecutive rows that stay together.

    Returns:
      Mean gradients, mean metrics, and the arrays `[B, ...]` of `rows` in the batch's order.
    """
    if num_microbatches == 1:
        return gradients(inputs)

    def join(x: Array) -> Array:
        groups = x.reshape(num_microbatches, -1, group_size, *x.shape[2:])
        return groups.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def add(total: tuple, part: Inputs) -> tuple[tuple, Rows | None]:
        grads, (metrics, rows) = gradients(part)
        return jax.tree.map(jnp.add, total, (grads, metrics)), rows

    micro = split_batch(inputs, num_microbatches, group_size)
    first = jax.tree.map(lambda x: x[0], micro)
    abstract_grads, (abstract_metrics, _) = jax.eval_shape(gradients, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (abstract_grads, abstract_metrics))
    total, rows = jax.lax.scan(add, zeros, micro)
    grads, metrics = jax.tree.map(lambda x: x / num_microbatches, total)
    return grads, (metrics, jax.tree.map(join, rows))


def split_batch(tree: Any, num_microbatches: int, group_size: int = 1) -> Any:
    """Arrays `[B, ...]` as micro-batches `[A, B / A, ...]`.

    Micro-batch a is groups a, a + A, a + 2A, ... of `group_size` consecutive rows: with the batch
    axis sharded, every device keeps its own rows, and nothing moves. A row's number modulo the
    size of a group, by which `Blockwise` finds its segment, is the same in its micro-batch.
    """

    def split(x: Array) -> Array:
        groups = x.reshape(-1, num_microbatches, group_size, *x.shape[1:]).swapaxes(0, 1)
        return groups.reshape(num_microbatches, -1, *x.shape[1:])

    return jax.tree.map(split, tree)


class TrainingProgram(NamedTuple):
    """What a run executes, ready on its mesh.

    The compiled step donates its state: the state passed in is gone after the call.
    """

    abstract_state: TrainState  # shapes with shardings: what a restore asks for
    create_state: Callable[..., TrainState]  # makes the first state; `create_train_state`'s `pick`
    step: Any  # jax.stages.Compiled, or a function of the same call


def abstract_batch(
    batch_size: int,
    record_shape: tuple[int, ...],
    record_dtype: str,
    mesh: Mesh,
    condition_channels: int = 0,
    features: np.ndarray | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a compiled step takes: shapes, dtypes and shardings of one global batch.

    With `condition_channels` it holds a condition of so many, stored as the latents are; with
    `features`, rows of these.
    """
    rows = sharding.batch_sharding(mesh)
    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows)
    latents = jax.ShapeDtypeStruct((batch_size, *record_shape), record_dtype, sharding=rows)
    batch = {"latents": latents, "labels": numbers, "ids": numbers}
    if condition_channels:
        shape = (batch_size, *record_shape[:-1], condition_channels)
        batch["condition"] = jax.ShapeDtypeStruct(shape, record_dtype, sharding=rows)
    if features is not None:
        shape = (batch_size, *features.shape[1:])
        batch["features"] = jax.ShapeDtypeStruct(shape, features.dtype, sharding=rows)
    return batch


def compile_training(
    trainer: Trainer,
    latent_format: LatentFormat,
    record_shape: tuple[int, ...],
    record_dtype: str,
    mesh: Mesh,
) -> TrainingProgram:
    """Compiles the step of a trainer for a mesh, ahead of time and without data.

    Args:
      trainer: model, objective and optimizer.
      latent_format: how stored latents, of `record_shape` and `record_dtype`, become the model's.
      record_shape: shape of one stored latent, without its condition.
      record_dtype: its dtype.
      mesh: of devices that need not be here.
    """
    abstract_state = abstract_train_state(trainer, mesh)
    config = trainer.config
    stored = config_lib.stored_condition_channels(config.conditioning, record_shape[-1])
    features = config_lib.stored_features(config)
    batch = abstract_batch(config.batch_size, record_shape, record_dtype, mesh, stored, features)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    # A GPU's conditional copies the whole state; a TPU's moves less than a selection does.
    in_branch = mesh.devices.flat[0].platform != "gpu"
    jitted = jax.jit(
        make_train_step(trainer, latent_format, mesh, in_branch=in_branch),
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
    with sharding.use_mesh(mesh):
        step = jitted.lower(abstract_state, batch).compile()
    create_state = functools.partial(create_train_state, trainer, mesh)
    return TrainingProgram(abstract_state, create_state, step)
