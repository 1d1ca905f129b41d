"""The published blockwise network's PyTorch names and layouts as the parameters of `Blockwise`."""

import jax
import numpy as np
from flax import traverse_util

from repulsor_jax.models.blockwise import Blockwise

PATCH, CHANNELS, HEADS = 2, 4, 2
LINEARS = {
    "t_embedder.mlp.0": "time_in",
    "t_embedder.mlp.2": "time_out",
    "representation_x_embedder.proj": "patch_embed",
    "x_embedder.proj": "velocity_embed",
    "global_adaLN_modulation.1": "global_modulation",
    "global_adaLN_modulation2.1": "stack_modulation",
    "final_layer.linear": "final",
    "final_layer.adaLN_modulation.1": "final_modulation",
}
IN_BLOCK = {
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
}


def to_jax(name, value):
    """One published tensor as ours: transposed, heads-major, patches (row, column, channel)."""
    if "qkv" in name:  # rows (3, heads, hd)
        value = value.reshape(3, HEADS, -1, *value.shape[1:]).swapaxes(0, 1)
        value = value.reshape(-1, *value.shape[3:])
    if "x_embedder.proj.weight" in name:  # [D, (C, p, p)]
        value = value.reshape(-1, CHANNELS, PATCH, PATCH).transpose(0, 2, 3, 1)
        value = value.reshape(len(value), -1)
    if "final_layer.linear" in name:  # [(C, p, p), ...]
        value = np.moveaxis(value.reshape(CHANNELS, PATCH, PATCH, *value.shape[1:]), 0, 2)
        value = value.reshape(-1, *value.shape[3:])
    return value.T if name.endswith("weight") and value.ndim == 2 else value


def _block(name, low_rank):
    inner = dict(IN_BLOCK)
    if low_rank:
        inner |= {"adaLN_modulation.1": "adaln_in", "adaLN_modulation.2": "modulation"}
    else:
        inner |= {"adaLN_modulation.1": "modulation"}
    found = {}
    for theirs, ours in inner.items():
        found[f"{name}.{theirs}.weight"] = f"{ours}/kernel"
        found[f"{name}.{theirs}.bias"] = f"{ours}/bias"
    for norm in ("q_norm", "k_norm"):
        found[f"{name}.attn.{norm}.weight"] = f"{norm}/scale"
    return found


def names(depth, segments, segment_depth, residual_depth):
    """Published name -> our path, and the segment that it is the part of, or None."""
    found = {"y_embedder.embedding_table.weight": ("label_embed/embedding", None)}
    for theirs, ours in LINEARS.items():
        found[f"{theirs}.weight"] = f"{ours}/kernel", None
        found[f"{theirs}.bias"] = f"{ours}/bias", None
    blocks = [(f"representation_blocks.{i}", f"block_{i}", None, True) for i in range(depth)]
    blocks += [
        (f"frn_blocks.{i}", f"residual/block_{i}", None, False) for i in range(residual_depth)
    ]
    blocks += [
        (f"velocity_blocks.{s}.{i}", f"stacks/block_{i}", s, True)
        for s in range(segments)
        for i in range(segment_depth)
    ]
    for theirs, ours, segment, low_rank in blocks:
        for name, leaf in _block(theirs, low_rank).items():
            found[name] = f"{ours}/{leaf}", segment
    return found


def params_of(state, sizes):
    """The published state dict as our parameters, `scan_blocks=False`; every tensor is used."""
    left, flat = dict(state), {}
    for theirs, (ours, segment) in names(*sizes).items():
        value = left.pop(theirs)
        if not theirs.startswith("y_embedder"):
            value = to_jax(theirs, value)
        if segment is None:
            flat[ours] = value
        else:
            flat.setdefault(ours, []).append(value)
    assert not [name for name in left if not name.startswith("linear_projection")]
    stacked = {name: np.stack(v) if isinstance(v, list) else v for name, v in flat.items()}
    return traverse_util.unflatten_dict(stacked, sep="/")


def leaf(tree, theirs, sizes):
    """The part of our tree that a published tensor is."""
    ours, segment = names(*sizes)[theirs]
    found = traverse_util.flatten_dict(tree, sep="/")[ours]
    return found if segment is None else found[segment]


class Reversed(Blockwise):
    """A network that was told the time from data (0) to noise (1)."""

    def _condition(self, t: jax.Array, labels: jax.Array) -> jax.Array:
        return super()._condition(1.0 - t, labels)
