"""Small checkpoints, what came back of them, and damage to their files."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax import sharding
from repulsor_jax.checkpoints.places import open_folder
from repulsor_jax.checkpoints.storage import Storage
from repulsor_jax.method import memory_bank
from repulsor_jax.train_state import TrainState

TAG_DTYPES = (jnp.int32, jnp.int32, jnp.float32)  # ids, labels, times
RECORDS = ({"next_index": 1}, {"batch_size": 16}, {"shift": [0.5]})  # data, config, latents


def state(step):
    """Half a megabyte that does not compress."""
    rng = np.random.default_rng(step)
    return {"step": jnp.int32(step), "w": jnp.asarray(rng.standard_normal(125_000), jnp.float32)}


def train_state(step, mesh, *, slots=3, batch=16, width=8, bank_dtype=jnp.bfloat16):
    """A state of few arrays, with values of its step, split over the mesh as a model's are.

    Two batches of 16 are in the bank.
    """
    rng = np.random.default_rng(step)

    def split(values, *axes):
        return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*axes)))

    def normal(shape, *axes):
        return split(rng.standard_normal(shape).astype(np.float32), *axes)

    def model():
        return {"bias": normal((width,), "tensor"), "kernel": normal((8, width), "fsdp", "tensor")}

    params = {
        "model": model(),
        "terms": {"repulsor": {"kernel": normal((width, 8), None, "tensor")}},
    }
    features = np.zeros((slots, batch, 8), np.float32)
    features.reshape(-1, 8)[:32] = rng.standard_normal((32, 8))[: slots * batch]
    rows = [split(jnp.zeros((slots, batch), t), None, sharding.BATCH_AXES) for t in TAG_DTYPES]
    return TrainState(
        step=split(jnp.int32(step)),
        params=params,
        ema_params=model(),
        ema_terms={},
        opt_state=(split(jnp.int32(step)), optax.EmptyState(), {"mu": jax.tree.map(abs, params)}),
        bank=memory_bank.MemoryBank(
            features=split(jnp.asarray(features, bank_dtype), None, sharding.BATCH_AXES),
            tags=memory_bank.Tags(*rows),
            cursor=split(jnp.int32(2)),
            filled=split(jnp.int32(2)),
        ),
        rng=split(jax.random.key(step)),
    )


def abstract(state):
    """Shapes with shardings, as a restore asks for them."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_holds(directory, step):
    """Reads `state(step)` back, compared with the manifest, and compares it with the original."""
    storage = Storage(open_folder(directory), read_only=True)
    about, records = storage.read_records(step)
    assert tuple(records.values()) == RECORDS
    found = storage.read_arrays(step, about, jax.eval_shape(lambda: state(step)))
    storage.close()
    jax.tree.map(np.testing.assert_array_equal, found, state(step))


def at_rest(checkpointer):
    """Waits, without asking how it went, until nothing is being saved."""
    while checkpointer.is_saving():
        time.sleep(0.01)


def array_files(step_folder):
    """Every file with arrays; which of them holds which is different in every checkpoint."""
    return [path for path in (step_folder / "state").rglob("d/*") if path.is_file()]


def spoil(step_folder):
    """Changes bytes all over the arrays."""
    for path in array_files(step_folder):
        content = bytearray(path.read_bytes())
        content[::100] = bytes(byte ^ 0x10 for byte in content[::100])
        path.write_bytes(content)


def cut(step_folder):
    """Leaves the beginning of the arrays only."""
    for path in array_files(step_folder):
        os.truncate(path, path.stat().st_size // 10)


def flip(path):
    """Changes one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
