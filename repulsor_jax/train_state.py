"""The training state, and its initialisation on the mesh."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.method import memory_bank
from repulsor_jax.method.memory_bank import MemoryBank
from repulsor_jax.method.registry import Regularizer
from repulsor_jax.models.dit import DiT

Array = jax.Array


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes; one pytree of sharded arrays.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      params: `{"model": ..., "regularizer": ...}`, float32; the second is empty without a head.
      ema_params: float32 moving average of `params["model"]`; what samples are drawn from.
      opt_state: optax state for `params`.
      bank: the memory bank, or None.
      rng: typed key; the step folds its number into it.
    """

    step: Array
    params: dict[str, Any]
    ema_params: Any
    opt_state: optax.OptState
    bank: MemoryBank | None
    rng: Array


def build_model(config: config_lib.ModelConfig, device: jax.Device | None = None) -> DiT:
    """Returns the transformer that the configuration describes.

    Args:
      config: of the model.
      device: one of those that will run it, for what is chosen by platform; None is a CPU.
    """
    attention: Any = config.attention
    if attention == "auto":
        attention = "cudnn" if _has_cudnn_attention(config, device) else None
    return DiT(
        latent_size=config.latent_size,
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        learn_sigma=config.learn_sigma,
        qk_norm=config.qk_norm,
        scan_blocks=config.scan_blocks,
        remat=config.remat,
        dtype=jnp.dtype(config.dtype),
        attention=attention,
    )


def _has_cudnn_attention(config: config_lib.ModelConfig, device: jax.Device | None) -> bool:
    """Whether cuDNN's fused attention runs this model: NVIDIA from Ampere on, half precision."""
    capability = getattr(device, "compute_capability", None)  # as "9.0"; ROCm says "gfx90a"
    head_size = config.hidden_size // config.num_heads
    return (
        isinstance(capability, str)
        and capability[0].isdigit()
        and float(capability) >= 8.0
        and jnp.dtype(config.dtype).itemsize == 2
        and head_size % 8 == 0
        and head_size <= 128
    )


def learning_rate(config: config_lib.Config) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to 0 at `total_steps`.

    Step 0 takes the first part of the warm-up, not 0: its batch is not wasted.
    """
    c = config.optimizer

    def schedule(step: Any) -> Array:
        rate = c.learning_rate * jnp.minimum(1.0, (step + 1) / max(c.warmup_steps, 1))
        if c.schedule == "constant":
            return rate
        progress = (step - c.warmup_steps) / (config.total_steps - c.warmup_steps)
        return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))

    return schedule


def build_optimizer(config: config_lib.Config) -> optax.GradientTransformation:
    """AdamW with the schedule, after clipping by the global norm where configured.

    Its state has the same structure with and without clipping: a run may go on with the other.
    """
    c = config.optimizer
    adamw = optax.adamw(
        learning_rate(config), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay
    )
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    return optax.chain(clip, adamw)


def init_model_params(model: DiT, key: Array) -> Any:
    """Returns the model's initial parameters, boxed with their logical axis names."""
    x = jnp.zeros((1, model.latent_size, model.latent_size, model.in_channels))
    return model.init(key, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))["params"]


def init_fn(
    config: config_lib.Config,
    model: DiT,
    regularizer: Regularizer | None,
    optimizer: optax.GradientTransformation,
) -> Any:
    """Returns `init(key) -> TrainState`, a pure function; parameters come boxed."""

    def init(key: Array) -> TrainState:
        model_key, head_key, rng = jax.random.split(key, 3)
        params = {"model": init_model_params(model, model_key), "regularizer": {}}
        if regularizer is not None:
            num_tokens = (model.latent_size // model.patch_size) ** 2
            tokens = jax.ShapeDtypeStruct((1, num_tokens, model.hidden_size), model.dtype)
            params["regularizer"] = regularizer.init(head_key, tokens)
        has_bank = regularizer is not None and regularizer.create_bank is not None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=params["model"],  # separate buffers: jit's outputs do not alias each other
            opt_state=optimizer.init(params),
            bank=regularizer.create_bank() if has_bank else None,  # type: ignore[union-attr,misc]
            rng=rng,
        )

    return init


def state_shardings(abstract_state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a state: parameters and what mirrors them by their names, the bank by rows."""
    shardings = sharding.tree_shardings(abstract_state, mesh)
    if abstract_state.bank is None:
        return shardings
    return shardings.replace(bank=memory_bank.shardings(mesh, sharding.BATCH_AXES))


def create_train_state(
    config: config_lib.Config,
    model: DiT,
    regularizer: Regularizer | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Initialises the state directly in its shards, in one jitted call."""
    _, shardings = abstract_train_state(config, model, regularizer, optimizer, mesh)
    init = init_fn(config, model, regularizer, optimizer)
    with sharding.use_mesh(mesh):
        return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(
            jax.random.key(config.seed)
        )


def abstract_train_state(
    config: config_lib.Config,
    model: DiT,
    regularizer: Regularizer | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[TrainState, TrainState]:
    """Shapes, dtypes and shardings of the state, with no memory or device time spent.

    Returns:
      The tree of `jax.ShapeDtypeStruct` (each with its sharding), and the tree of shardings.
    """
    init = init_fn(config, model, regularizer, optimizer)
    boxed = jax.eval_shape(init, jax.random.key(config.seed))
    shardings = state_shardings(boxed, mesh)
    return sharding.abstract_arrays(boxed, shardings), shardings
