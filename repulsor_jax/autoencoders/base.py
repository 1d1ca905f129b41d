"""What encoding, sampling and evaluation need of an autoencoder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.files.tensors import to_linen

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Images to latents and back, as two pure functions and their parameters.

    What the diffusion model sees is `(latents - shift) * scale`.

    Attributes:
      name: the name `get_autoencoder` knows it by.
      params: a tree of arrays, the first argument of both functions. Pass it into a jitted function
        as an argument: closed over, it would be compiled in as constants.
      encode: (params, float32 images `[B, H, W, C]` in [-1, 1]) to float32 latents `[B, h, w, c]`
        or, where `stochastic`, to the posterior's mean and log-variance `[B, h, w, 2c]`,
        concatenated on the last axis.
      decode: (params, float32 latents `[B, h, w, c]` as `encode` gives them, neither shifted nor
        scaled) to float32 images `[B, H, W, C]` about [-1, 1], not clipped.
      stochastic: `encode` returns the posterior's moments.
      scale: fixed factor that brings latents to about unit variance (0.18215 for the SD-VAE).
      shift: fixed offset of latents.
      weights_sha256: digest of the weights, see `weights.tensors_sha256`; empty without any.
    """

    name: str
    params: Any
    encode: Callable[[Any, jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    stochastic: bool
    scale: float
    shift: float = 0.0
    weights_sha256: str = ""

    @property
    def identity(self) -> str:
        """All that its images and latents follow from: name, weights and float type."""
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(self.params)})
        return " ".join([self.name, self.weights_sha256[:16], *dtypes])


def compute_dtype(name: str) -> Any:
    """Returns the dtype called "float32" or "bfloat16"; raises ValueError for another name."""
    if name not in DTYPES:
        raise ValueError(f"autoencoder dtype: found {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_params(
    module: nn.Module, image: tuple[int, ...], tensors: dict[str, np.ndarray], source: str
) -> Any:
    """Device arrays for a module whose call is encode, then decode.

    Args:
      module: its parameters bear PyTorch's names, see `weights.to_linen`; its `dtype` is the one
        that parameters are cast to.
      image: shape [1, H, W, C] of an image that it takes.
      tensors: by PyTorch's names.
      source: the file, for errors.

    Raises:
      ValueError: a tensor is missing, superfluous or of another shape; names it and the file.
    """
    images = jax.ShapeDtypeStruct(image, jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    arrays = to_linen(tensors, abstract, source)
    dtype = module.dtype
    return jax.device_put(jax.tree.map(lambda a: a.astype(dtype), arrays))


def abstract_params(module: nn.Module, image: tuple[int, ...]) -> Any:
    """Shapes and dtypes of what `load_params` loads, for a program to be compiled without it."""
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(image))["params"]
    dtype = module.dtype
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), abstract)


def method(module: nn.Module, name: str) -> Callable[[Any, jax.Array], jax.Array]:
    """A method of a module as a function of (params, array)."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        y: jax.Array = module.apply({"params": params}, x, method=name)  # type: ignore[assignment]
        return y

    return apply


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
