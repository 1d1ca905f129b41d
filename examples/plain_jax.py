"""The memory bank in a plain JAX step: a projection spreads features that have collapsed.

    python examples/plain_jax.py

It prints the repulsion loss and how alike the projections of a batch are (mean cosine).
"""

import jax
import jax.numpy as jnp

import repulsor_jax as rj

BATCH, DIM, STEPS = 32, 16, 60


def features(step):
    """Pooled hidden features [B, D] of a batch, nearly the same for every sample."""
    return 2.0 + jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (BATCH, 64))


def project(w, h):
    z = h @ w
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


@jax.jit
def train_step(w, bank, h):
    def loss_fn(w):
        z = project(w, h)
        return rj.repulsion_loss(z, bank, temperature=0.5), z  # + your own loss

    (loss, z), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
    # An update that is not finite leaves the bank as it was.
    return w - 0.3 * grads, rj.enqueue(bank, z, valid=jnp.isfinite(loss)), loss


def mean_cosine(z):
    """Of pairs of different samples: 1 for a collapsed batch, about 0 for a spread one."""
    return ((z @ z.T).sum() - BATCH) / (BATCH * (BATCH - 1))


w = jax.random.normal(jax.random.key(1), (64, DIM))
bank = rj.create_bank(num_slots=8, batch_size=BATCH, dim=DIM)  # 256 negatives
for step in range(STEPS + 1):
    h = features(step)
    cosine = mean_cosine(project(w, h))
    w, bank, loss = train_step(w, bank, h)
    if step % 20 == 0:
        print(f"step {step:2}: loss {loss:.4f}, mean cosine {cosine:.4f}")
print(f"the bank holds {int(bank.filled) * BATCH} projections")
