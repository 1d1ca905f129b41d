"""The tiny autoencoders of github.com/madebyollin/taesd, distilled from large ones.

They map to the latent space of Stable Diffusion 1 (taesd), XL (taesdxl) and 3 (taesd3), of FLUX.1
(taef1) and of FLUX.2 (taef2), in the scale that the diffusion model sees, in a few per cent of the
time. Linen modules that bear the published names, layers being numbered. Layout is `[B, H, W, C]`.
"""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.autoencoders import weights as weight_files
from repulsor_jax.autoencoders.base import Autoencoder, build, check_image_size, upsample
from repulsor_jax.files.tensors import read_tensors

_DOWNSAMPLING = 8


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """A member of the family.

    If it is pooled, the blocks at the latents' size begin with a group-normed branch, through which
    a position sees the whole image.
    """

    latent_channels: int
    pooled: bool = False
    width: int = 64  # channels inside


CONFIGS = {
    "taesd": TinyConfig(4),
    "taesdxl": TinyConfig(4),
    "taesd3": TinyConfig(16),
    "taef1": TinyConfig(16),
    "taef2": TinyConfig(32, pooled=True),
}


class Block(nn.Module):
    """Three 3 x 3 convolutions added to the input `[B, h, w, c]`, with ReLU between and after."""

    pooled: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, c]` to the same shape."""
        width = x.shape[-1]
        if self.pooled:
            h = _conv(4 * width, self.dtype, "pool.0", size=1, use_bias=False)(x)
            norm = {"epsilon": 1e-5, "dtype": self.dtype, "use_fast_variance": False}
            h = nn.relu(nn.GroupNorm(4, **norm, name="pool.1")(h))
            x = x + _conv(width, self.dtype, "pool.3", size=1, use_bias=False)(h)
        h = nn.relu(_conv(width, self.dtype, "conv.0")(x))
        h = nn.relu(_conv(width, self.dtype, "conv.2")(h))
        return nn.relu(x + _conv(width, self.dtype, "conv.4")(h))


class Encoder(nn.Module):
    """Images `[B, H, W, 3]` in [0, 1] to latents `[B, H / 8, W / 8, c]`."""

    config: TinyConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the latents."""
        config, dtype = self.config, self.dtype
        x = _conv(config.width, dtype, "0")(x)
        x = Block(False, dtype, name="1")(x)
        for first in (2, 6, 10):
            x = _conv(config.width, dtype, str(first), strides=2, use_bias=False)(x)
            for i in range(first + 1, first + 4):
                x = Block(config.pooled and first == 10, dtype, name=str(i))(x)
        return _conv(config.latent_channels, dtype, "14")(x)


class Decoder(nn.Module):
    """Latents `[B, h, w, c]` to images `[B, 8 h, 8 w, 3]` in [0, 1]."""

    config: TinyConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the images."""
        config, dtype = self.config, self.dtype
        x = 3 * jnp.tanh(x / 3)  # layer 0 bounds the latents
        x = nn.relu(_conv(config.width, dtype, "1")(x))
        for first in (3, 8, 13):
            for i in range(first, first + 3):
                x = Block(config.pooled and first == 3, dtype, name=str(i))(x)
            x = _conv(config.width, dtype, str(first + 4), use_bias=False)(upsample(x))
        x = Block(False, dtype, name="18")(x)
        return _conv(3, dtype, "19")(x)


class TinyAutoencoder(nn.Module):
    """Encoder and decoder for images in [-1, 1]."""

    config: TinyConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Names the two parts."""
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` to latents `[B, h, w, c]`; see `Autoencoder.encode`."""
        check_image_size(images, _DOWNSAMPLING)
        return self.encoder((images + 1) / 2).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[B, h, w, c]` to images `[B, H, W, 3]`; see `Autoencoder.decode`."""
        return 2 * self.decoder(latents).astype(jnp.float32) - 1

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes and decodes."""
        return self.decode(self.encode(images))


def load_tiny(name: str, weights: str, dtype: Any, *, abstract: bool) -> Autoencoder:
    """Builds a tiny autoencoder with pretrained weights, or with their shapes where `abstract`.

    The weights are a `.safetensors` or `.pth` file with the tensors of both parts; a folder with
    such a file, called `diffusion_pytorch_model.safetensors` or `<name>.safetensors`, or with the
    two files `<name>_encoder` and `<name>_decoder` (`.safetensors` or `.pth`); or a repository
    "org/name". Empty is madebyollin/<name>.

    Raises:
      FileNotFoundError: files are missing or cannot be downloaded; says which.
      ValueError: a damaged file, or tensors that are missing, superfluous or of another shape.
    """
    tensors, source = (None, "") if abstract else _read(name, weights)
    module = TinyAutoencoder(CONFIGS[name], dtype)
    image = (1, _DOWNSAMPLING, _DOWNSAMPLING, 3)
    return build(name, module, image, tensors, source, stochastic=False)


def _read(name: str, weights: str) -> tuple[dict[str, np.ndarray], str]:
    """The tensors by their published names, and the files that they are from."""
    both = ["diffusion_pytorch_model.safetensors", f"{name}.safetensors"]
    # diffusers has no model of the pooled ones.
    published = both[1] if CONFIGS[name].pooled else both[0]
    path = weight_files.locate(name, weights, f"madebyollin/{name}", [published])
    files, parts = [path], ("encoder", "decoder")
    if path.is_dir():
        halves = [[f"{name}_{p}{suffix}" for p in parts] for suffix in (".safetensors", ".pth")]
        files = weight_files.find(path, [[file] for file in both] + halves)
    if len(files) == 1:
        return _with_published_names(read_tensors(files[0]), files[0]), str(files[0])
    tensors = {
        f"{part}.{key}": tensor
        for part, file in zip(parts, files, strict=True)
        for key, tensor in read_tensors(file).items()
    }
    return tensors, " and ".join(map(str, files))


def _with_published_names(
    tensors: dict[str, np.ndarray], file: pathlib.Path
) -> dict[str, np.ndarray]:
    """Renames diffusers' `<part>.layers.<i>`, which counts the decoder's layers from 0, not 1."""
    if tensors and not any(name.startswith(("encoder.", "decoder.")) for name in tensors):
        raise ValueError(
            f"{file}: found {next(iter(tensors))}, expected names that begin with encoder. or "
            "decoder.; for two files, one of each part, give the folder that holds both"
        )
    published = {}
    for name, tensor in tensors.items():
        part, *rest = name.split(".")
        if len(rest) > 1 and rest[0] == "layers" and rest[1].isdigit():
            rest = [str(int(rest[1]) + (part == "decoder")), *rest[2:]]
        published[".".join([part, *rest])] = tensor
    return published


def _conv(features: int, dtype: Any, name: str, *, size: int = 3, **options: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name, **options)
