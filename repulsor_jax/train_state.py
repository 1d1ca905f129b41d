"""What a step reads and writes, the parts that it is made of, and its start on the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from repulsor_jax import sharding
from repulsor_jax.config import Config
from repulsor_jax.flows.paths import Path
from repulsor_jax.method import memory_bank
from repulsor_jax.method.memory_bank import MemoryBank
from repulsor_jax.method.registry import Regularizer
from repulsor_jax.models.build import init_model_params
from repulsor_jax.models.dit import DiT

Array = jax.Array


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes; one pytree of sharded arrays."""

    step: Array  # int32 scalar, optimizer steps taken
    params: dict[str, Any]  # {"model": ..., "regularizer": ... or {} without a head}, float32
    ema_params: Any  # float32 moving average of params["model"]; samples are drawn from it
    opt_state: optax.OptState  # for params
    bank: MemoryBank | None
    rng: Array  # typed key; the step folds its number into it


class Objective(NamedTuple):
    """What a step minimises: the choices of the configuration, resolved to functions."""

    path: Path  # from noise to data
    flow_loss: Callable[[Array, Array, Array, Array], Array]  # (output, data, noise, t) -> [B]
    sample_times: Callable[[Array, int], Array]  # (key, batch size) -> t [B]
    drop_labels: Callable[[Array, Array], Array]  # (key, labels [B]) -> some of them the null class
    tap: int | None  # the block whose tokens the regulariser sees; None without a regulariser
    regularizer: Regularizer | None  # the loss on those tokens
    weight: Callable[[Array], Array]  # optimizer step -> lambda, the weight of that loss


class Trainer(NamedTuple):
    """The parts that a train step and its state are made of; `experiment.make_trainer`."""

    config: Config
    model: DiT
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule  # of the optimizer, for the metrics


def create_train_state(trainer: Trainer, mesh: Mesh) -> TrainState:
    """Initialises the state directly in its shards, in one jitted call."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(trainer, mesh))
    with sharding.use_mesh(mesh):
        return jax.jit(lambda key: nn.unbox(_init(trainer, key)), out_shardings=shardings)(
            jax.random.key(trainer.config.seed)
        )


def abstract_train_state(trainer: Trainer, mesh: Mesh) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`, each with its sharding; no memory is taken.

    Parameters, and what mirrors them, are sharded by their logical names, the bank by its rows.
    """
    boxed = jax.eval_shape(lambda key: _init(trainer, key), jax.random.key(trainer.config.seed))
    shardings = sharding.tree_shardings(boxed, mesh)
    if boxed.bank is not None:
        shardings = shardings.replace(bank=memory_bank.shardings(mesh, sharding.BATCH_AXES))
    return sharding.abstract_arrays(boxed, shardings)


def _init(trainer: Trainer, key: Array) -> TrainState:
    """The first state; parameters come boxed with their logical axis names."""
    model, regularizer = trainer.model, trainer.objective.regularizer
    model_key, head_key, rng = jax.random.split(key, 3)
    params = {"model": init_model_params(model, model_key), "regularizer": {}}
    bank = None
    if regularizer is not None:
        num_tokens = (model.latent_size // model.patch_size) ** 2
        tokens = jax.ShapeDtypeStruct((1, num_tokens, model.hidden_size), model.dtype)
        params["regularizer"] = regularizer.init(head_key, tokens)
        bank = regularizer.create_bank() if regularizer.create_bank else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=params["model"],  # separate buffers: jit's outputs do not alias each other
        opt_state=trainer.optimizer.init(params),
        bank=bank,
        rng=rng,
    )
