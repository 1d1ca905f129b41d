"""The memory bank on a mesh of devices: its rows lie where the rows of the batch lie.

    python examples/sharded_mesh.py

On a CPU, the devices are 8 virtual ones. It prints how the bank is divided, the losses on the mesh
and on one device, and the largest array that the compiled step sends between devices.
"""

import functools
import os
import re

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import repulsor_jax as rj

SLOTS, BATCH, DIM, STEPS = 64, 64, 16, 70


def train_step(w, bank, h):
    def loss_fn(w):
        z = h @ w
        z /= jnp.linalg.norm(z, axis=-1, keepdims=True)
        return rj.repulsion_loss(z, bank, temperature=0.5), z  # of the global batch

    (loss, z), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
    return w - 0.3 * grads, rj.enqueue(bank, z, valid=jnp.isfinite(loss)), loss


def features(step):
    """Hidden features [B, D] of a batch, nearly the same for every sample."""
    return 2.0 + jax.random.normal(jax.random.key(step), (BATCH, 64))


def train(devices):
    """Trains on a mesh of these devices; returns the bank, the losses and the compiled step."""
    mesh = Mesh(np.array(devices), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    banks = rj.bank_shardings(mesh, "data")
    # The bank is created in place, and donated: each step overwrites its oldest slot.
    create = functools.partial(rj.create_bank, num_slots=SLOTS, batch_size=BATCH, dim=DIM)
    bank = jax.jit(create, out_shardings=banks)()
    w = jax.device_put(jax.random.normal(jax.random.key(1), (64, DIM)), everywhere)
    jitted = jax.jit(
        train_step,
        in_shardings=(everywhere, banks, rows),
        out_shardings=(everywhere, banks, everywhere),
        donate_argnums=(0, 1),
    )
    step = jitted.lower(w, bank, features(0)).compile()
    losses = []
    for k in range(STEPS):
        w, bank, loss = step(w, bank, jax.device_put(features(k), rows))
        losses.append(float(loss))
    return bank, losses, step


bank, losses, step = train(jax.devices())
shard = bank.features.addressable_shards[0].data.shape
print(f"bank {bank.features.shape}, on each of {jax.device_count()} devices {shard}")
_, alone, _ = train(jax.devices()[:1])
print(f"loss {losses[0]:.5f} -> {losses[-1]:.5f}; on one device {alone[0]:.5f} -> {alone[-1]:.5f}")
text = step.as_text().splitlines()  # as: %all-reduce.1 = f32[64,16]{1,0} all-reduce(...)
results = [line.partition(" all-")[0] for line in text if " all-" in line]
shapes = [shape.split(",") for line in results for shape in re.findall(r"\[([\d,]+)\]", line)]
largest = max(int(np.prod([int(n) for n in shape])) for shape in shapes)
print(f"largest array sent in a step: {largest:,} numbers, of {bank.features.size:,} in the bank")
