"""A Flax NNX trainer that carries the memory bank as one of its variables.

    python examples/flax_nnx.py

A small network learns the ten digits of scikit-learn; its hidden features are repelled from the
features of the last 16 batches. It prints the losses and the accuracy on unseen images.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import repulsor_jax as rj

BATCH, DIM, STEPS, WEIGHT = 64, 32, 300, 0.05


class Bank(nnx.Variable):
    """Holds an `rj.MemoryBank`; nnx.grad and the optimizer skip it, because they take nnx.Param."""


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)
        self.head = nnx.Linear(128, DIM, rngs=rngs)  # only for training
        self.bank = Bank(rj.create_bank(num_slots=16, batch_size=BATCH, dim=DIM))

    def __call__(self, x):
        h = nnx.gelu(self.hidden(x))
        return self.out(h), h


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        logits, h = model(images)
        z = model.head(h)
        z /= jnp.linalg.norm(z, axis=-1, keepdims=True)
        repulsion = rj.repulsion_loss(z, model.bank.get_value(), temperature=0.5)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss + WEIGHT * repulsion, (loss, repulsion, z)

    (_, (loss, repulsion, z)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    model.bank.set_value(rj.enqueue(model.bank.get_value(), z))
    return loss, repulsion


digits = load_digits()
images, labels = jnp.asarray(digits.data / 8 - 1, jnp.float32), jnp.asarray(digits.target)
train_images, train_labels = images[:1500], labels[:1500]
model = Classifier(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
for step in range(1, STEPS + 1):
    rows = jax.random.randint(jax.random.key(step), (BATCH,), 0, len(train_images))
    loss, repulsion = train_step(model, optimizer, train_images[rows], train_labels[rows])
    if step == 1 or step % 100 == 0:
        print(f"step {step:3}: loss {loss:.4f}, repulsion {repulsion:.4f}")
accuracy = (model(images[1500:])[0].argmax(-1) == labels[1500:]).mean()
print(f"accuracy {accuracy:.3f}; the bank holds {int(model.bank.get_value().filled)} batches")
