"""Which networks a configuration names, and their initial parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from repulsor_jax.models.blockwise import Blockwise
from repulsor_jax.models.dit import DiT
from repulsor_jax.models.source import ClassSource

_SOURCE_KEY = 3_000_001  # folded into the key of the model's parameters


def build_model(config: Any, device: jax.Device | None = None, *, conditioning: Any = None) -> DiT:
    """Returns the transformer that the configuration describes.

    Args:
      config: the section `model` of a configuration.
      device: one of those that will run it, for what is chosen by platform; None is a CPU.
      conditioning: the section of that name; None is without a condition.
    """
    attention: Any = config.attention
    if attention == "auto":
        attention = "cudnn" if _has_cudnn_attention(config, device) else None
    fields: dict[str, Any] = {
        "latent_size": config.latent_size,
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": config.num_classes,
        "learn_sigma": config.learn_sigma,
        "qk_norm": config.qk_norm,
        "scan_blocks": config.scan_blocks,
        "remat": config.remat,
        "dtype": jnp.dtype(config.dtype),
        "attention": attention,
        "attention_separation": config.attention_separation,
        **_condition_fields(config, conditioning),
        "time_steps": config.time_steps,
    }
    if config.architecture == "dit":
        return DiT(**fields)
    return Blockwise(
        **fields,
        segments=config.segments,
        segment_depth=config.segment_depth,
        adaln_rank=config.adaln_rank,
        residual_depth=config.residual_depth,
    )


def num_segments(config: Any) -> int:
    """How many parts time has, each with a network of its own; 1 for a plain transformer."""
    segments: int = config.segments if config.architecture == "blockwise" else 1
    return segments


def _condition_fields(config: Any, conditioning: Any) -> dict[str, Any]:
    kind = conditioning.kind if conditioning else "none"
    if kind == "inpaint":  # what is known, and the mask
        return {"condition_channels": config.in_channels + 1}
    if kind == "semantic":
        channels, classes = conditioning.channels, conditioning.classes
        return {"condition_channels": channels, "condition_classes": classes}
    return {}


def _has_cudnn_attention(config: Any, device: jax.Device | None) -> bool:
    """Whether cuDNN's fused attention runs this model: NVIDIA from Ampere on, half precision."""
    capability = getattr(device, "compute_capability", None)  # as "9.0"; ROCm says "gfx90a"
    head_size = config.hidden_size // config.num_heads
    num_tokens = (config.latent_size // config.patch_size) ** 2
    return (
        isinstance(capability, str)
        and capability[0].isdigit()
        and float(capability) >= 8.0
        and jnp.dtype(config.dtype).itemsize == 2
        and head_size % 8 == 0
        and head_size <= 128
        # JAX passes the mask as a bias, which cuDNN takes for an even number of tokens alone.
        and not (config.attention_separation and num_tokens % 2)
    )


def build_source(source: Any, model: Any) -> ClassSource | None:
    """Returns the learned source of the sections `source` and `model`; None where it is N(0, I)."""
    if source.name == "gaussian":
        return None
    shape = (model.latent_size, model.latent_size, model.in_channels)
    return ClassSource(model.num_classes, shape, source.rank, source.learn_variance)


def init_model_params(model: DiT, key: jax.Array, source: ClassSource | None = None) -> Any:
    """Returns all that samples depend on, initial and boxed with logical axis names.

    The parameters of the model and, under "source", those of a learned source.
    """
    rows = model.segments
    x = jnp.zeros((rows, model.latent_size, model.latent_size, model.in_channels))
    labels = jnp.zeros((rows,), jnp.int32)
    params = model.init(key, x, jnp.zeros((rows,)), labels)["params"]
    if source is not None:
        source_key = jax.random.fold_in(key, _SOURCE_KEY)
        params = params | {"source": source.init(source_key, labels)["params"]}
    return params
