"""A small classifier: its features measure samples, and another one's guide the control."""

import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import traverse_util
from tqdm import tqdm

from benchmarks.evidence.pictures import Pictures, to_floats
from repulsor_jax.files.atomic import replacing

Array = jax.Array
SPATIAL = 128  # channels of the spatial features


class Classifier(nn.Module):
    """Four 3x3 convolutions and two dense layers; 0.3 million parameters."""

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        """Logits `[B, classes]`, features `[B, 64]` and spatial features `[B, h, w, SPATIAL]`.

        Pictures `[B, H, W, C]` are in [-1, 1]; h is H / 4, and H / 2 of pictures up to 8 wide.
        """
        x = nn.silu(nn.Conv(32, (3, 3))(x))
        x = nn.silu(nn.Conv(64, (3, 3), strides=2 if x.shape[1] > 8 else 1)(x))
        x = nn.silu(nn.Conv(SPATIAL, (3, 3), strides=2)(x))
        spatial = nn.silu(nn.Conv(SPATIAL, (3, 3))(x))
        features = nn.silu(nn.Dense(64)(spatial.mean((1, 2))))
        return nn.Dense(self.classes)(features), features, spatial


class Trained(NamedTuple):
    """A classifier, its parameters, and its accuracy on the held-out pictures."""

    net: Classifier
    params: Any
    accuracy: float


def load_classifier(path: pathlib.Path) -> Trained:
    """Reads what `train_classifier` wrote."""
    with np.load(path) as stored:
        flat = {name: stored[name] for name in stored.files if name != "accuracy"}
        accuracy = float(stored["accuracy"])
    params = traverse_util.unflatten_dict(flat, sep="/")
    return Trained(Classifier(len(params["Dense_1"]["bias"])), params, accuracy)


def train_classifier(
    path: pathlib.Path, pictures: Pictures, *, seed: int, steps: int, flips: bool, batch: int = 128
) -> None:
    """Trains a classifier on all training pictures, unless `path` has it; AdamW, cosine from 2e-3.

    Args:
      path: an .npz.
      pictures: uint8; their labels are used whatever the bench does.
      seed: of the parameters and the order; two seeds are two classifiers.
      steps, batch: of the optimizer.
      flips: show mirror images too.
    """
    if path.is_file():
        return
    x, y = to_floats(pictures.train), pictures.train_labels
    net = Classifier(int(y.max()) + 1)
    params = net.init(jax.random.key(seed), x[:2])["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3)

    @jax.jit
    def step(params: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any]:
        def loss(params: Any) -> Array:
            logits: Any = net.apply({"params": params}, x)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng, state = np.random.default_rng(seed), optimizer.init(params)
    for _ in tqdm(range(steps), desc=f"train {path.stem}", unit="step", mininterval=5):
        rows = rng.integers(0, len(x), batch)
        mirrored = rng.random(batch) < (0.5 if flips else 0.0)
        shown = np.where(mirrored[:, None, None, None], x[rows, :, ::-1], x[rows])
        params, state = step(params, state, shown, y[rows])
    logits, _ = classify(Trained(net, params, 0.0), pictures.test)
    accuracy = np.mean(logits.argmax(-1) == pictures.test_labels)
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, accuracy=accuracy, **flat)


def classify(trained: Trained, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, classes]` and features `[N, 64]` of uint8 pictures."""
    apply = jax.jit(lambda x: trained.net.apply({"params": trained.params}, x)[:2])
    parts = [apply(to_floats(pictures[i : i + 500])) for i in range(0, len(pictures), 500)]
    logits, features = zip(*jax.device_get(parts), strict=True)
    return np.concatenate(logits), np.concatenate(features)
