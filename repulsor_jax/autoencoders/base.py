"""What encoding, sampling and evaluation need of an autoencoder, and what its kinds share."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.files.tensors import check_tensors, tensors_sha256


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Images to latents and back, as two pure functions and their parameters.

    The diffusion model sees `(latents - shift) * scale`.

    Attributes:
      params: a tree of arrays, the first argument of both functions. Pass it into a jitted function
        as an argument: closed over, it would be compiled in as constants.
      encode: (params, float32 images `[B, H, W, C]` in [-1, 1]) to float32 latents `[B, h, w, c]`
        or, where `stochastic`, to the posterior's mean and log-variance `[B, h, w, 2c]`,
        concatenated on the last axis.
      decode: (params, float32 latents `[B, h, w, c]` as `encode` gives them, neither shifted nor
        scaled) to float32 images `[B, H, W, C]` about [-1, 1], not clipped.
    """

    name: str  # by which `get_autoencoder` knows it
    params: Any
    encode: Callable[[Any, jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    stochastic: bool
    scale: float = 1.0  # brings latents to about unit variance (0.18215 for the SD-VAE)
    shift: float = 0.0
    weights_sha256: str = ""  # see `tensors_sha256`; empty without weights

    @property
    def identity(self) -> str:
        """What determines its images and latents: name, weights and float type."""
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(self.params)})
        return " ".join([self.name, self.weights_sha256[:16], *dtypes])


def _same(params: Any, x: jax.Array) -> jax.Array:
    return x


PIXELS = Autoencoder("identity", {}, _same, _same, stochastic=False)


def build(
    name: str,
    module: nn.Module,
    image: tuple[int, ...],
    tensors: Mapping[str, np.ndarray] | None,
    source: str | os.PathLike[str],
    **facts: Any,
) -> Autoencoder:
    """Makes an autoencoder of a Linen module and pretrained tensors.

    Args:
      name: see `Autoencoder`, as `facts`: `stochastic`, `scale` and `shift`.
      module: has methods `encode` and `decode`, is called with images to do both, and bears
        PyTorch's names, see `to_linen`; parameters are cast to its `dtype`.
      image: shape [1, H, W, C] of an image that the module takes.
      tensors: by PyTorch's names; without any, `params` holds shapes and dtypes alone.
      source: the file, for errors.

    Raises:
      ValueError: a tensor is missing, superfluous or of another shape; names it and the file.
    """
    images = jax.ShapeDtypeStruct(image, jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    dtype, digest = module.dtype, ""
    if tensors is None:
        params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)
    else:
        arrays = to_linen(tensors, params, source)
        params = jax.device_put(jax.tree.map(lambda a: a.astype(dtype), arrays))
        digest = tensors_sha256(tensors)

    def encode(params: Any, images: jax.Array) -> Any:
        return module.apply({"params": params}, images, method="encode")

    def decode(params: Any, latents: jax.Array) -> Any:
        return module.apply({"params": params}, latents, method="decode")

    return Autoencoder(name, params, encode, decode, weights_sha256=digest, **facts)


def to_linen(
    tensors: Mapping[str, np.ndarray], abstract_params: Any, source: str | os.PathLike[str]
) -> Any:
    """Arranges PyTorch tensors as the parameters of Linen modules that bear PyTorch's names.

    The path of a parameter, joined by dots, is its name in PyTorch, where `kernel` and `scale` are
    called `weight`. Kernels of convolutions [O, I, kh, kw] become [kh, kw, I, O], those of dense
    layers [O, I] become [I, O].

    Returns:
      A tree as `abstract_params`, which is unboxed, of float32 NumPy arrays.

    Raises:
      ValueError: a tensor is missing, superfluous or of another shape, see `check_tensors`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_params)
    shapes, orders = {}, {}
    for path, leaf in leaves:
        *parents, last = (str(key.key) for key in path)
        name = ".".join([*parents, "weight" if last in ("kernel", "scale") else last])
        orders[name] = (2, 3, 1, 0) if leaf.ndim == 4 else range(leaf.ndim)[::-1]
        shapes[name] = tuple(leaf.shape[i] for i in np.argsort(orders[name]))
    check_tensors(tensors, shapes, source)
    arrays = [np.asarray(tensors[n], np.float32).transpose(order) for n, order in orders.items()]
    return jax.tree_util.tree_unflatten(structure, arrays)


def check_image_size(images: jax.Array, factor: int) -> None:
    """Raises ValueError unless height and width of `[B, H, W, C]` are multiples of `factor`."""
    height, width = images.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(
            f"images: found {height} x {width} pixels, expected multiples of {factor}, by which "
            "the autoencoder divides them; crop or resize first"
        )


def upsample(x: jax.Array) -> jax.Array:
    """Repeats every position of `[B, h, w, c]` twice in height and width."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
