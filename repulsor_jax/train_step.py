"""The train step: a pure function `(state, batch) -> (state, metrics)`.

It carries the memory bank as sharded state. Everything here is traced once and runs on the mesh
as one program; the caller jits it with the state donated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from repulsor_jax import sharding
from repulsor_jax.data.latents import LatentFormat, normalize, sample_posterior
from repulsor_jax.flows.paths import interpolate
from repulsor_jax.method import memory_bank
from repulsor_jax.method.memory_bank import MemoryBank
from repulsor_jax.train_state import (
    Objective,
    Trainer,
    TrainState,
    abstract_train_state,
    create_train_state,
)

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Inputs(NamedTuple):
    """What the model is trained on, one row per sample; all drawn before the loss."""

    data: Array  # [B, H, W, C] latents of the data (t = 1)
    noise: Array  # [B, H, W, C] (t = 0)
    t: Array  # [B] times
    labels: Array  # [B], some replaced by the null class


def make_train_step(trainer: Trainer, latent_format: LatentFormat) -> Step:
    """Builds the step.

    Args:
      trainer: model, objective and optimizer.
      latent_format: how stored latents become the model's.

    Returns:
      A pure function of the state and one global batch, `{"latents": [B, H, W, C] (or
      [B, H, W, 2C] moments), "labels": int32 [B]}`, that returns the next state and float32
      scalars. A step whose loss or gradient is not finite, or above the configured limits, leaves
      the state as it was, and has the metric "refused" at 1.
    """
    config, model, objective, optimizer, learning_rate = trainer
    regularizer = objective.regularizer

    def loss_fn(
        params: dict, inputs: Inputs, bank: MemoryBank | None, weight: Array
    ) -> tuple[Array, tuple[Metrics, Array | None]]:
        data, noise, t, labels = inputs
        x_t = interpolate(objective.path, data, noise, t)
        output: Any = model.apply({"params": params["model"]}, x_t, t, labels, tap=objective.tap)
        if regularizer is not None:
            output, tokens = output
        flow_loss = objective.flow_loss(output, data, noise, t).mean()
        if regularizer is None:
            return flow_loss, ({"loss": flow_loss, "flow_loss": flow_loss}, None)
        penalty, z = regularizer.loss(params["regularizer"], tokens, bank)
        loss = flow_loss + weight * penalty
        return loss, ({"loss": loss, "flow_loss": flow_loss, "regularizer_loss": penalty}, z)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        inputs = draw_inputs(rng, batch, objective, latent_format)
        weight = objective.weight(state.step)
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, (metrics, z) = accumulate(
            lambda rows: grad_fn(state.params, rows, state.bank, weight),
            inputs,
            config.optimizer.accumulation_steps,
        )

        grad_norm = optax.tree.norm(grads)
        metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate(state.step)}
        if regularizer is not None:
            metrics["regularizer_weight"] = weight

        def update(state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema_params = optax.incremental_update(
                params["model"], state.ema_params, 1.0 - config.optimizer.ema_decay
            )
            return state.replace(
                step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
            )

        # A branch, and not a select on every array: that would read and write the state once more.
        # The bank stays outside of the branch, which would copy it.
        good = _within(metrics["loss"], config.divergence.max_loss)
        good &= _within(grad_norm, config.divergence.max_grad_norm)
        metrics["refused"] = 1.0 - good
        bank = None if state.bank is None else memory_bank.enqueue(state.bank, z, valid=good)
        state = jax.lax.cond(good, update, lambda state: state, state.replace(bank=None))
        return state.replace(bank=bank), metrics

    return train_step


def _within(value: Array, limit: float) -> Array:
    """Whether a scalar is finite and, where there is a limit, at most that."""
    return jnp.isfinite(value) & (value <= limit if limit else True)


def draw_inputs(
    rng: Array, batch: Batch, objective: Objective, latent_format: LatentFormat
) -> Inputs:
    """Draws all that is random in a step: posterior, noise, times, dropped labels.

    A row's numbers depend on the key and its place in the global batch alone, so every mesh and
    every number of micro-batches draws the same.

    Args:
      rng: the key of this step.
      batch: `{"latents": [B, H, W, C] or moments [B, H, W, 2C], "labels": int32 [B]}`.
      objective: draws the times, and drops labels.
      latent_format: how stored latents become the model's.
    """
    posterior_key, noise_key, time_key, label_key = jax.random.split(rng, 4)
    latents, labels = batch["latents"], batch["labels"]
    if latent_format.stochastic:
        latents = sample_posterior(posterior_key, latents)
    data = normalize(latents, latent_format)
    t = objective.sample_times(time_key, data.shape[0])
    noise = jax.random.normal(noise_key, data.shape)
    return Inputs(data, noise, t, objective.drop_labels(label_key, labels))


def accumulate(gradients: Callable, inputs: Inputs, num_microbatches: int) -> tuple:
    """Averages gradients and metrics over micro-batches run one after the other.

    Micro-batch a is rows a, a + A, a + 2A, ...: with the batch axis sharded, every device keeps
    its own rows, and nothing moves.

    Args:
      gradients: `rows -> (grads, (metrics, z))`.
      inputs: arrays `[B, ...]`.
      num_microbatches: A, which divides B / devices.

    Returns:
      Mean gradients, mean metrics, and z `[B, d]` of all rows in their order (or None).
    """
    if num_microbatches == 1:
        return gradients(inputs)

    def split(x: Array) -> Array:
        return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

    def add(total: tuple, rows: Inputs) -> tuple[tuple, Array | None]:
        grads, (metrics, z) = gradients(rows)
        return jax.tree.map(jnp.add, total, (grads, metrics)), z

    micro = jax.tree.map(split, inputs)
    first = jax.tree.map(lambda x: x[0], micro)
    abstract_grads, (abstract_metrics, _) = jax.eval_shape(gradients, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (abstract_grads, abstract_metrics))
    total, z = jax.lax.scan(add, zeros, micro)
    grads, metrics = jax.tree.map(lambda x: x / num_microbatches, total)
    if z is not None:
        z = z.swapaxes(0, 1).reshape(-1, z.shape[-1])
    return grads, (metrics, z)


class TrainingProgram(NamedTuple):
    """What a run executes, ready on its mesh.

    The compiled step donates its state: the state passed in is gone after the call.
    """

    abstract_state: TrainState  # shapes with shardings: what a restore asks for
    create_state: Callable[[], TrainState]  # makes the first state
    step: Any  # jax.stages.Compiled, or a function of the same call


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
      record_shape: shape of one stored latent.
      record_dtype: its dtype.
      mesh: of devices that need not be here.
    """
    abstract_state = abstract_train_state(trainer, mesh)
    batch_size, rows = trainer.config.batch_size, sharding.batch_sharding(mesh)
    batch = {
        "latents": jax.ShapeDtypeStruct((batch_size, *record_shape), record_dtype, sharding=rows),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows),
    }
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    jitted = jax.jit(
        make_train_step(trainer, latent_format),
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
    with sharding.use_mesh(mesh):
        step = jitted.lower(abstract_state, batch).compile()
    return TrainingProgram(abstract_state, lambda: create_train_state(trainer, mesh), step)
