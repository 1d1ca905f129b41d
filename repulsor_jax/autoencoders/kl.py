"""The variational autoencoder of latent diffusion (arXiv 2112.10752), as Stable Diffusion uses it.

Linen modules that bear the names of diffusers' `AutoencoderKL`, whose files they read. Layout is
`[B, H, W, C]`; convolutions and attention compute in `dtype`, group norm statistics and the
softmax in float32.
"""

import dataclasses
import pathlib
import re
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from repulsor_jax.autoencoders import weights as weight_files
from repulsor_jax.autoencoders.base import Autoencoder, build, check_image_size, upsample
from repulsor_jax.files.tensors import read_tensors
from repulsor_jax.files.untrusted import checked, parse, read_json

REPOSITORIES = {
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "kl": "",  # any AutoencoderKL, described by the config.json beside its weights
}

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# A model of other sizes is not built: the tensors are compared with it afterwards.
_Width = Annotated[int, Field(ge=1, le=8192)]
_Widths = Annotated[tuple[_Width, ...], Field(min_length=1, max_length=8)]
_Factor = Annotated[float, Field(gt=-1e6, lt=1e6)]


@checked
class KLConfig:
    """The keys of diffusers' config.json that matter; the defaults are Stable Diffusion's."""

    block_out_channels: _Widths = (128, 256, 512, 512)  # each but the last halves both sides
    layers_per_block: Annotated[int, Field(ge=1, le=8)] = 2  # one more in the decoder
    latent_channels: _Width = 4
    norm_num_groups: _Width = 32  # of every group norm
    in_channels: _Width = 3
    out_channels: _Width = 3
    scaling_factor: _Factor = 0.18215
    shift_factor: _Factor = 0.0
    use_quant_conv: bool = True  # a 1 x 1 convolution after the encoder
    use_post_quant_conv: bool = True  # and before the decoder
    mid_block_add_attention: bool = True

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, in height and in width."""
        return int(2 ** (len(self.block_out_channels) - 1))


def read_config(path: pathlib.Path) -> KLConfig:
    """Reads the config.json of a diffusers AutoencoderKL.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, describes a model that `AutoencoderKL` is not, or one of absurd
        size; names the key.
    """
    if not path.is_file():
        weight_files.refuse_pipeline(path.parent)
        raise FileNotFoundError(
            f"{path}: found no such file, expected the config.json of a diffusers AutoencoderKL"
        )
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found {type(found).__name__}, expected a JSON object")
    required = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
    }
    for key, expected in required.items():
        values = found.get(key, expected)
        each = [values] if isinstance(values, str) else values
        if not isinstance(each, list) or any(value != expected for value in each):
            raise ValueError(f"{path}: {key}: found {values!r:.80}, expected {expected!r}")
    names = {field.name for field in dataclasses.fields(KLConfig)}
    # diffusers' defaults for keys that config.json leaves out, where not Stable Diffusion's.
    values = {"block_out_channels": (64,), "layers_per_block": 1}
    values |= {key: value for key, value in found.items() if key in names}
    values["shift_factor"] = values.get("shift_factor") or 0.0  # null means none
    return parse(KLConfig, values, str(path))


class ResidualBlock(nn.Module):
    """Twice group norm, SiLU and a 3 x 3 convolution, added to the input `[B, h, w, c]`."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, c]` to `[B, h, w, features]`."""
        h = x
        for i in (1, 2):
            h = nn.silu(_group_norm(self.groups, self.dtype, f"norm{i}")(h))
            h = _conv(self.features, 3, self.dtype, f"conv{i}")(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Attention of one head over all positions, added to the input."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, c]` to the same shape."""
        batch, height, width, channels = x.shape
        h = _group_norm(self.groups, self.dtype, "group_norm")(x)
        h = h.reshape(batch, height * width, 1, channels)
        q, k, v = (nn.Dense(channels, dtype=self.dtype, name=f"to_{n}")(h) for n in "qkv")
        h = jax.nn.dot_product_attention(q, k, v)
        h = nn.Dense(channels, dtype=self.dtype, name="to_out.0")(h)
        return x + h.reshape(x.shape)


class Encoder(nn.Module):
    """Images `[B, H, W, C]` to moments `[B, h, w, 2c]`, before `quant_conv`."""

    config: KLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the moments."""
        config, dtype = self.config, self.dtype
        x = _conv(config.block_out_channels[0], 3, dtype, "conv_in")(x)
        last = len(config.block_out_channels) - 1
        for i, features in enumerate(config.block_out_channels):
            for j in range(config.layers_per_block):
                name = f"down_blocks.{i}.resnets.{j}"
                x = ResidualBlock(features, config.norm_num_groups, dtype, name=name)(x)
            if i < last:
                name = f"down_blocks.{i}.downsamplers.0.conv"
                below = ((0, 1), (0, 1))  # published models pad below and to the right alone
                x = nn.Conv(features, (3, 3), 2, padding=below, dtype=dtype, name=name)(x)
        x = _middle(config, dtype, x)
        x = nn.silu(_group_norm(config.norm_num_groups, dtype, "conv_norm_out")(x))
        return _conv(2 * config.latent_channels, 3, dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents `[B, h, w, c]`, after `post_quant_conv`, to images `[B, H, W, C]`."""

    config: KLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the images."""
        config, dtype = self.config, self.dtype
        x = _conv(config.block_out_channels[-1], 3, dtype, "conv_in")(x)
        x = _middle(config, dtype, x)
        last = len(config.block_out_channels) - 1
        for i, features in enumerate(reversed(config.block_out_channels)):
            for j in range(config.layers_per_block + 1):
                name = f"up_blocks.{i}.resnets.{j}"
                x = ResidualBlock(features, config.norm_num_groups, dtype, name=name)(x)
            if i < last:
                name = f"up_blocks.{i}.upsamplers.0.conv"
                x = _conv(features, 3, dtype, name)(upsample(x))
        x = nn.silu(_group_norm(config.norm_num_groups, dtype, "conv_norm_out")(x))
        return _conv(config.out_channels, 3, dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1 x 1 convolutions between them."""

    config: KLConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Names the parts as diffusers does."""
        config, dtype = self.config, self.dtype
        self.encoder = Encoder(config, dtype)
        self.decoder = Decoder(config, dtype)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), dtype=dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=dtype)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[B, H, W, C]` to moments `[B, h, w, 2c]`; see `Autoencoder.encode`."""
        check_image_size(images, self.config.downsampling)
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return moments.astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[B, h, w, c]` to images `[B, H, W, C]`; see `Autoencoder.decode`."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Decodes the posterior's mean."""
        return self.decode(self.encode(images)[..., : self.config.latent_channels])


def load_kl(name: str, weights: str, dtype: Any, *, abstract: bool) -> Autoencoder:
    """Builds a KL autoencoder with pretrained weights, or with their shapes where `abstract`.

    Args:
      name: a key of `REPOSITORIES`. "kl" reads the config.json in the folder of the weights.
      weights: a folder in diffusers' layout, its `.safetensors` or `.bin` file, a file of the
        original latent-diffusion code, or a repository "org/name"; empty is the published one.
      dtype: of parameters and of the computation.
      abstract: reads no weights, and of "kl" the config.json, from its repository if need be.

    Raises:
      FileNotFoundError: files are missing or cannot be downloaded; says which.
      ValueError: no weights given for "kl", a damaged file, a config.json of another model, or
        tensors that are missing, superfluous or of another shape.
    """
    path = pathlib.Path(weights).expanduser()
    if not abstract or (name == "kl" and not path.exists()):
        wanted = ["config.json"] if abstract else ["config.json", _WEIGHTS]
        path = weight_files.locate(name, weights, REPOSITORIES[name], wanted)
    described = (path if path.is_dir() else path.parent) / "config.json"
    config = read_config(described) if name == "kl" else KLConfig()
    tensors, file = None, path
    if not abstract:
        if name != "kl" and path.is_dir() and described.is_file():
            found = read_config(described)
            if found != config:
                raise ValueError(
                    f"{described}: found {found}, expected {config} for {name!r}; "
                    "for another model set config.data.autoencoder='kl'"
                )
        if path.is_dir():
            files = [[_WEIGHTS], ["diffusion_pytorch_model.bin"]]
            file = weight_files.find(path, files)[0]
        tensors = _with_current_names(read_tensors(file))
    image = (1, config.downsampling, config.downsampling, config.in_channels)
    facts = {"scale": config.scaling_factor, "shift": config.shift_factor}
    module = AutoencoderKL(config, dtype)
    return build(name, module, image, tensors, file, stochastic=True, **facts)


_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_FIRST_STAGE = "first_stage_model."
_ORIGINAL = (  # names of the original code (CompVis/latent-diffusion), and diffusers' of today
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def _with_diffusers_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the tensors of the original code's files; those of diffusers stay as they are.

    There the autoencoder may be a part of a whole model, beside its loss, and the decoder's blocks
    are numbered from the image to the latents.
    """
    if any(name.startswith(_FIRST_STAGE) for name in tensors):
        tensors = {k.removeprefix(_FIRST_STAGE): v for k, v in tensors.items() if _FIRST_STAGE in k}
    if not any(".mid.block_1." in name for name in tensors):
        return tensors
    ups = [re.match(r"decoder\.up\.(\d+)\.", name) for name in tensors]
    last = max((int(match[1]) for match in ups if match), default=0)
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(_PARTS):
            continue
        for old, new in _ORIGINAL:
            name = re.sub(old, new, name)
        name = re.sub(r"up_blocks\.(\d+)", lambda k: f"up_blocks.{last - int(k[1])}", name)
        renamed[name] = tensor
    return renamed


def _with_current_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the attention's layers, which most published files name as before diffusers 0.17.

    Their weights may be those of 1 x 1 convolutions.
    """
    tensors = _with_diffusers_names(tensors)
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    current = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            *parts, layer, kind = name.split(".")
            name = ".".join([*parts, renamed.get(layer, layer), kind])
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        current[name] = tensor
    return current


def _middle(config: KLConfig, dtype: Any, x: jax.Array) -> jax.Array:
    features, groups = config.block_out_channels[-1], config.norm_num_groups
    x = ResidualBlock(features, groups, dtype, name="mid_block.resnets.0")(x)
    if config.mid_block_add_attention:
        x = Attention(groups, dtype, name="mid_block.attentions.0")(x)
    return ResidualBlock(features, groups, dtype, name="mid_block.resnets.1")(x)


def _conv(features: int, size: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


def _group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)
