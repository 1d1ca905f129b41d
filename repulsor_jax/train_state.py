"""What a step reads and writes, the parts that it is made of, and its start on the mesh."""

import zlib
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
from repulsor_jax.method.term import Term, View
from repulsor_jax.models.build import init_model_params
from repulsor_jax.models.dit import DiT
from repulsor_jax.models.source import ClassSource
from repulsor_jax.models.token_groups import TokenGroups

Array = jax.Array


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes; one pytree of sharded arrays."""

    step: Array  # int32 scalar, optimizer steps taken
    params: dict[str, Any]  # {"model": ..., "terms": {name: ...}}, float32
    # float32 moving average of params["model"], and what is not trained; samples are drawn from it
    ema_params: Any
    ema_terms: dict[str, Any]  # and of the parameters of the terms that compare with a teacher
    opt_state: optax.OptState  # for params
    bank: MemoryBank | None
    rng: Array  # typed key; the step folds its number into it


class Objective(NamedTuple):
    """What a step minimises: the choices of the configuration, resolved to functions."""

    path: Path  # from noise to data
    flow_loss: Callable[[Array, Array, Array, Array], Array]  # (output, data, noise, t) -> [B]
    sample_times: Callable[[Array, int], Array]  # (key, batch size) -> t [B]
    drop_labels: Callable[[Array, Array], Array]  # (key, labels [B]) -> some of them the null class
    terms: tuple[Term, ...]  # the losses beside the flow loss
    # (key, data, stored condition or None, latent format) -> the model's condition [B, H, W, K]
    condition: Callable[..., Array] | None = None
    groups: TokenGroups | None = None  # of tokens with times of their own; None: one time for all
    last_time: float = 1.0  # of `sample_times`

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks whose tokens some term reads, ascending."""
        return tuple(sorted({tap for term in self.terms for tap in term.taps}))

    @property
    def views(self) -> dict[View, tuple[int, ...]]:
        """What the teacher is shown, each once, and the blocks that are read of it."""
        views = {term.view for term in self.terms if term.view}
        return {
            view: tuple(
                sorted({t for term in self.terms if term.view == view for t in term.teacher_taps})
            )
            for view in sorted(views)
        }


class Trainer(NamedTuple):
    """The parts that a train step and its state are made of; `experiment.make_trainer`."""

    config: Config
    model: DiT
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule  # of the optimizer, for the metrics
    source: ClassSource | None = None  # of x at t = 0, `params["model"]["source"]`; None: N(0, I)


def create_train_state(
    trainer: Trainer, mesh: Mesh, pick: Callable[[TrainState], TrainState] = lambda state: state
) -> TrainState:
    """Initialises the state directly in its shards, in one jitted call.

    What `pick` leaves out of the state is not computed.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(trainer, mesh))
    with sharding.use_mesh(mesh):
        init = lambda key: pick(nn.unbox(_init(trainer, key)))
        return jax.jit(init, out_shardings=pick(shardings))(jax.random.key(trainer.config.seed))


def abstract_train_state(
    trainer: Trainer, mesh: Mesh, *, split_update: bool | None = None
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`, each with its sharding; no memory is taken.

    Parameters, and what mirrors them, are sharded by their logical names, the bank by its rows.
    With `config.mesh.split_update`, which `split_update` replaces, those of the networks, and not
    the small ones of terms and source, are split over `data` too.
    """
    boxed = jax.eval_shape(lambda key: _init(trainer, key), jax.random.key(trainer.config.seed))
    shardings = sharding.tree_shardings(boxed, mesh)
    if trainer.config.mesh.split_update if split_update is None else split_update:
        shardings = jax.tree_util.tree_map_with_path(
            lambda path, split, whole: whole if _is_small(path) else split,
            sharding.tree_shardings(boxed, mesh, over_data=True),
            shardings,
        )
    if boxed.bank is not None:
        shardings = shardings.replace(bank=memory_bank.shardings(mesh, sharding.BATCH_AXES))
    return sharding.abstract_arrays(boxed, shardings)


def _is_small(path: tuple[Any, ...]) -> bool:
    names = {str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path}
    return bool(names & {"terms", "ema_terms", "source"})


def unsplit_shardings(trainer: Trainer, mesh: Mesh) -> TrainState:
    """Where a state lies without `config.mesh.split_update`."""
    shapes = abstract_train_state(trainer, mesh, split_update=False)
    found: TrainState = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return found


def abstract_model_params(model: DiT, source: ClassSource | None, mesh: Mesh) -> Any:
    """A model's parameters, and its source's, as `jax.ShapeDtypeStruct` with their shardings."""
    init = lambda key: init_model_params(model, key, source)
    boxed = jax.eval_shape(init, jax.random.key(0))
    return sharding.abstract_arrays(boxed, sharding.tree_shardings(boxed, mesh))


def trained_part(trainer: Trainer, params: Any) -> Any:
    """The parameters of the model that are trained: all, or those of the residual network alone."""
    if trainer.config.model.residual_depth:
        return {"residual": params["residual"]}
    return params


def _init(trainer: Trainer, key: Array) -> TrainState:
    """The first state; parameters come boxed with their logical axis names."""
    model_key, terms_key, rng = jax.random.split(key, 3)
    whole = init_model_params(trainer.model, model_key, trainer.source)
    params: dict[str, Any] = {"model": trained_part(trainer, whole), "terms": {}}
    ema_terms, bank = {}, None
    for term in trainer.objective.terms:
        # By its name, so that what else is in the sum makes no difference.
        own = term.init(jax.random.fold_in(terms_key, zlib.crc32(term.name.encode())))
        if own:
            params["terms"][term.name] = own
        if own and term.has_ema:
            ema_terms[term.name] = own
        if term.create_bank:
            bank = term.create_bank()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=whole,  # separate buffers: jit's outputs do not alias each other
        ema_terms=ema_terms,
        opt_state=trainer.optimizer.init(params),
        bank=bank,
        rng=rng,
    )
