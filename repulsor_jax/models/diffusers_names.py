"""A SiT state dict as diffusers' `DiTTransformer2DModel` has it: names, copies, configuration."""

from typing import Any

import numpy as np

from repulsor_jax.models.dit import DiT
from repulsor_jax.models.torch_weights import State

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDERS = {  # diffusers gives every block embedders of its own
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_REST = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def inexpressible(model: DiT) -> str:
    """What of a network `DiTTransformer2DModel` has no place for; "" where it has for all."""
    if model.qk_norm:
        return "config.model.qk_norm: diffusers' DiT has no norm of queries and keys"
    if int(model.hidden_size * model.mlp_ratio) != 4 * model.hidden_size:
        return f"config.model.mlp_ratio={model.mlp_ratio}: diffusers' DiT has 4"
    if model.time_steps:
        return "config.model.time_steps: the pipeline integrates velocities in t"
    return ""


def config(model: DiT) -> dict[str, Any]:
    """The content of its config.json.

    Its time embedding is not ours: its 128 frequencies end at 1e-4, ours at 1e-4 ** (127 / 128).
    No key of the configuration says so; `inference.diffusers_pipeline` sets it on the module.
    """
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "dropout": 0.0,
        "in_channels": model.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": model.num_heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": model.depth,
        "out_channels": model.in_channels * (2 if model.learn_sigma else 1),
        "patch_size": model.patch_size,
        "sample_size": model.latent_size,
    }


def from_sit(state: State) -> State:
    """Renames the tensors of `torch_weights.to_torch_state_dict`; the embedders are copied."""
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    found = {}
    for name, array in state.items():
        module, _, kind = name.rpartition(".")
        if module in _REST:
            found[f"{_REST[module]}.{kind}"] = array
        elif module in _EMBEDDERS:
            for i in range(depth):
                found[f"transformer_blocks.{i}.norm1.emb.{_EMBEDDERS[module]}.{kind}"] = array
        elif module.endswith(".attn.qkv"):
            block = f"transformer_blocks.{module.split('.')[1]}"
            for which, part in zip("qkv", np.split(array, 3), strict=True):
                found[f"{block}.attn1.to_{which}.{kind}"] = part
        elif name.startswith("blocks."):
            _, number, rest = module.split(".", 2)
            found[f"transformer_blocks.{number}.{_BLOCK[rest]}.{kind}"] = array
    return found
