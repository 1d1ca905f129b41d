"""A configuration so small that it compiles in seconds, and the parts that tests build from it."""

import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs import default, digits
from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.checkpoints.checkpointer import Checkpointer
from repulsor_jax.data.latents import Description, LatentFormat
from repulsor_jax.experiment import make_trainer
from repulsor_jax.models.build import build_model, build_source, init_model_params
from repulsor_jax.models.dit import DiT
from repulsor_jax.train_state import Trainer, TrainState, create_train_state
from repulsor_jax.train_step import compile_training

BATCH, DIM, SLOTS = 16, 8, 3
FORMAT = LatentFormat(False, np.zeros(2, np.float32), np.ones(2, np.float32))
SHAPE = (4, 4, 2)


def config_dict(**overrides: Any):
    """The default configuration made tiny; keys as `model__depth`."""
    c = default.get_config()
    tiny = {
        "total_steps": 10,
        "batch_size": BATCH,
        "model.latent_size": 4,
        "model.in_channels": 2,
        "model.hidden_size": 32,
        "model.depth": 1,
        "model.num_heads": 2,
        "model.num_classes": 3,
        "model.scan_blocks": False,
        "model.dtype": "float32",
        "repulsor.projection_dim": DIM,
        "repulsor.bank_rows": SLOTS * BATCH,
        "repulsor.bank_dtype": "float32",
        "optimizer.learning_rate": 1e-2,
        "optimizer.ema_decay": 0.9,
        "sampling.num_steps": 3,
        "sampling.batch_size": 8,
        "sampling.num_samples": 8,
        "sampling.grid_samples": 8,
    }
    return _updated(c, tiny, overrides)


def _updated(c: Any, tiny: dict[str, Any], overrides: dict[str, Any]) -> Any:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    c.update_from_flattened_dict(tiny | named)
    return c


def config(**overrides: Any) -> config_lib.Config:
    return config_lib.parse(config_dict(**overrides))


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data x fsdp x tensor of the 8 devices."""
    return sharding.create_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def digits_dict(data_dir: Any = "", **overrides: Any):
    """The digits made tiny, for tests that run the whole program."""
    c = digits.get_config()
    tiny = {
        "total_steps": 12,
        "batch_size": 16,
        "model.hidden_size": 16,
        "model.depth": 1,
        "model.num_heads": 2,
        "repulsor.bank_rows": 4 * 16,
        "repulsor.projection_dim": DIM,
        "data.dir": str(data_dir),
        "checkpoint.every_steps": 5,
        "log.every_steps": 1,
        "log.diagnostics_every_steps": 0,
        "log.page": False,
        "sampling.num_steps": 2,
        "sampling.batch_size": 16,
        "sampling.num_samples": 20,
        "sampling.grid_samples": 20,
        "sampling.grid_every_steps": 0,
        "evaluation.every_steps": 0,
        "evaluation.num_samples": 32,
        "evaluation.training_samples": 32,
    }
    return _updated(c, tiny, overrides)


def get_config() -> Any:
    """What `--config=tests/oracles/tiny.py` loads."""
    return digits_dict()


def random_params(c: config_lib.Config, seed: int = 0) -> Any:
    """Parameters of the model, not those of its initialisation, whose output is zero."""
    model, source = build_model(c.model), build_source(c.source, c.model)
    init = lambda key: nn.unbox(init_model_params(model, key, source))
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def save_run(workdir: pathlib.Path, values: Any, steps: dict[int, Any], **record: Any) -> None:
    """A run's checkpoints as training leaves them, with given EMA parameters for each step."""
    c = config_lib.parse(values)
    state = create_train_state(trainer(c), mesh())
    channels = c.model.in_channels
    latents = {
        "autoencoder": "identity",
        "weights_sha256": "",
        "shift": [0.0] * channels,
        "factor": [1.0] * channels,
        "class_names": ["a", "b", "c"],
    }
    with Checkpointer(workdir / "checkpoints", keep_last=9) as checkpointer:
        for step, params in steps.items():
            saved = state.replace(step=jnp.int32(step), ema_params=jax.device_put(params))
            checkpointer.save(step, saved, {}, values.to_dict(), latents | record)


class Step(NamedTuple):
    """A compiled step and a fresh state for it."""

    config: config_lib.Config
    model: DiT
    state: TrainState
    compiled: jax.stages.Compiled
    mesh: Mesh

    def run(self, batches: list[dict[str, np.ndarray]]) -> tuple[TrainState, list[dict]]:
        """Runs the step over the batches; the state given at the start is donated."""
        state, history = self.state, []
        for batch in batches:
            state, metrics = self.compiled(state, sharding.to_global(batch, self.mesh))
            history.append({name: float(value) for name, value in metrics.items()})
        return state, history


def trainer(c: config_lib.Config) -> Trainer:
    return make_trainer(c, mesh())


def compile_only(
    c: config_lib.Config, on: Mesh, shape: tuple[int, ...] = SHAPE
) -> jax.stages.Compiled:
    return compile_training(trainer(c), FORMAT, shape, "float16", on).step


def build(c: config_lib.Config, on: Mesh) -> Step:
    program = compile_training(trainer(c), FORMAT, SHAPE, "float16", on)
    return Step(c, trainer(c).model, program.create_state(), program.step, on)


def batches(count: int, batch_size: int = BATCH, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "latents": rng.standard_normal((batch_size, *SHAPE)).astype(np.float16),
            "labels": rng.integers(0, 3, batch_size).astype(np.int32),
            "ids": np.arange(batch_size, dtype=np.int32) + batch * batch_size,
        }
        for batch in range(count)
    ]


def raw(state: TrainState) -> TrainState:
    """The state with its key as plain numbers, which NumPy can compare."""
    return state.replace(rng=jax.random.key_data(state.rng))


def description(**changes: Any) -> Description:
    """What a data set of latents says of itself."""
    about = {
        "stochastic": False,
        "autoencoder": "identity",
        "scale": 1.0,
        "source": "test",
        "split": "train",
        "class_names": ("a", "b", "c"),
    }
    return Description(**about | changes)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
