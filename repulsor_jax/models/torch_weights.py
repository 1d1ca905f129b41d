"""Parameters of `dit.DiT` from, and to, the state dict of the published PyTorch SiT and DiT.

The PyTorch code fuses query, key and value as [3, num_heads, hd]; `dit.Block` lays the same rows
out heads-major, [num_heads, 3, hd]. Linear weights are transposed, and the patch embedding's
convolution kernel [D, C, p, p] becomes a matrix [p * p * C, D].

A learned source (`source.ClassSource`), which SiT does not have, has names of our own,
`source.table.weight`, `source.hidden.*`, `source.mean.*` and `source.log_variance.*`: Linear layers
whose outputs are [C, H, W]. A model that does not know them refuses the state dict by these names.

Nothing here imports torch: tensors come in through `np.asarray`, and go out as NumPy arrays.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from repulsor_jax.models import dit

State = dict[str, np.ndarray]
Transform = Callable[[np.ndarray], np.ndarray]


class _Entry(NamedTuple):
    """A parameter in both worlds; the shape is the one in torch."""

    torch_name: str
    jax_name: str
    shape: tuple[int, ...]
    to_jax: Transform = np.asarray
    to_torch: Transform = np.asarray


def from_torch_state_dict(
    state: Mapping[str, Any], *, num_heads: int, patch_size: int, in_channels: int
) -> dit.Params:
    """Converts a SiT or DiT state dict to the parameters of `dit.DiT`.

    Width, depth, classes, `mlp_ratio`, `learn_sigma` and `qk_norm` are read off the tensors, NumPy
    arrays or CPU torch tensors of any float type; shapes are checked against the arguments.

    Returns:
      Nested dict of float32 NumPy arrays in the layout of `scan_blocks=False`; see
      `stack_blocks` for the other. The fixed `pos_embed` is checked and left out.

    Raises:
      ValueError: a tensor is missing, superfluous or of another shape, `pos_embed` is not the
        sine-cosine table, or this is a whole checkpoint or has prefixed names; names it.
    """
    _check_is_plain(state)
    arrays = {name: _to_float32(tensor) for name, tensor in state.items()}
    names = (
        *("x_embedder.proj.bias", "y_embedder.embedding_table.weight"),
        *("blocks.0.mlp.fc1.bias", "final_layer.linear.bias"),
    )
    found = _entries(arrays, names, num_heads, patch_size, in_channels)
    entries = [(e.torch_name, e.jax_name, e.shape, e.to_jax) for e in found]
    _check_positions(_find(arrays, "pos_embed"), len(arrays["x_embedder.proj.bias"]))
    del arrays["pos_embed"]
    nested: dit.Params = traverse_util.unflatten_dict(_convert(arrays, entries), sep="/")
    return nested


def _check_is_plain(state: Mapping[str, Any]) -> None:
    """Raises ValueError for a checkpoint of training, and for names that a wrapper prefixed."""
    if nested := [name for name, value in state.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"found dictionaries under {nested}, as in a checkpoint of training, expected tensors: "
            "give one of them, such as state['ema'], the average"
        )
    known = "x_embedder.proj.bias"
    for name in state:
        if name != known and name.endswith(f".{known}"):
            prefix = name.removesuffix(known)
            raise ValueError(
                f"found names that begin with {prefix!r}, as {name}, expected none: take it off, "
                f"{{name.removeprefix({prefix!r}): tensor for name, tensor in state.items()}}"
            )


def to_torch_state_dict(
    params: Mapping[str, Any], *, num_heads: int, patch_size: int, latent_size: int
) -> State:
    """Converts unboxed parameters of `dit.DiT`, of either block layout, to a SiT state dict.

    Returns:
      Tensor names to float32 NumPy arrays, `pos_embed` [1, N, D] first.

    Raises:
      ValueError: a parameter is missing, superfluous or of another shape; names it.
    """
    if "blocks" in params:
        params = unstack_blocks(params)
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {name: _to_float32(leaf) for name, leaf in flat.items()}
    rows = len(_find(arrays, "patch_embed/kernel"))
    names = ("patch_embed/bias", "label_embed/embedding", "block_0/mlp_in/bias", "final/bias")
    entries = [
        (e.jax_name, e.torch_name, e.to_jax(np.empty(e.shape)).shape, e.to_torch)
        for e in _entries(arrays, names, num_heads, patch_size, rows // patch_size**2)
    ]
    positions = dit.position_embedding(latent_size // patch_size, len(arrays["patch_embed/bias"]))
    return {"pos_embed": positions[None], **_convert(arrays, entries)}


def stack_blocks(params: Mapping[str, Any]) -> dit.Params:
    """Converts loop parameters ("block_0", ...) to scanned ones ("blocks", leading layer axis).

    Raises:
      ValueError: `params` holds no "block_0" or skips a block.
    """
    names = [name for name in params if name.startswith("block_")]
    blocks = [params.get(f"block_{i}") for i in range(len(names))]
    if not blocks or any(block is None for block in blocks):
        raise ValueError(f"params: found blocks {sorted(names)}, expected block_0, block_1, ...")
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return {name: params[name] for name in params if name not in names} | {"blocks": stacked}


def unstack_blocks(params: Mapping[str, Any]) -> dit.Params:
    """The inverse of `stack_blocks`; ValueError where `params` holds no "blocks"."""
    if "blocks" not in params:
        raise ValueError(f"params: found {sorted(params)}, expected an entry named blocks")
    rest = dict(params)
    stacked = rest.pop("blocks")
    depth = len(jax.tree.leaves(stacked)[0])
    return rest | {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)}


def _entries(
    arrays: State, names: tuple[str, ...], heads: int, p: int, channels: int
) -> Iterator[_Entry]:
    """Every parameter of the model, in the order of the published state dict.

    The sizes are read off the lengths of four parameters and the names of all.
    """
    width, label_rows, mlp_width, final = (len(_find(arrays, name)) for name in names)
    out_channels = final // p**2
    if width % heads:
        raise ValueError(f"num_heads: found {heads}, expected a divisor of the width {width}")
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"final_layer.linear.bias: found {out_channels} output channels, expected {channels} "
            f"or, with learn_sigma, {2 * channels}"
        )
    matches = [re.match(r"blocks?[._](\d+)", name) for name in arrays]
    depth = len({match[1] for match in matches if match})
    qk_norm = any(name.endswith(("q_norm.weight", "q_norm/scale")) for name in arrays)
    yield _Entry(
        *("x_embedder.proj.weight", "patch_embed/kernel", (width, channels, p, p)),
        lambda w: w.transpose(2, 3, 1, 0).reshape(p * p * channels, width),
        lambda k: k.reshape(p, p, channels, width).transpose(3, 2, 0, 1),
    )
    yield _Entry("x_embedder.proj.bias", "patch_embed/bias", (width,))
    yield from _linear("t_embedder.mlp.0", "time_in", dit.NUM_FREQUENCIES, width)
    yield from _linear("t_embedder.mlp.2", "time_out", width, width)
    table = "y_embedder.embedding_table.weight"
    yield _Entry(table, "label_embed/embedding", (label_rows, width))
    for i in range(depth):
        yield from _block_entries(f"blocks.{i}", f"block_{i}", width, heads, mlp_width, qk_norm)
    yield from _linear("final_layer.linear", "final", width, p * p * out_channels)
    yield from _linear("final_layer.adaLN_modulation.1", "final_modulation", width, 2 * width)
    yield from _source_entries(arrays, channels)


def _source_entries(arrays: State, channels: int) -> Iterator[_Entry]:
    """Those of a learned source, where there is one: the heads' outputs are [C, H, W] in torch."""
    names = [name for name in ("source.table.weight", "source/table/embedding") if name in arrays]
    if not names:
        return
    classes, rank = arrays[names[0]].shape
    yield _Entry("source.table.weight", "source/table/embedding", (classes, rank))
    yield from _linear("source.hidden", "source/hidden", rank, rank)

    def to_jax(x: np.ndarray) -> np.ndarray:
        return x.reshape(channels, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape).T

    def to_torch(x: np.ndarray) -> np.ndarray:
        x = x.T
        return x.reshape(-1, channels, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    for name in ("mean", "log_variance"):
        biases = [arrays[b] for b in (f"source.{name}.bias", f"source/{name}/bias") if b in arrays]
        for size in map(len, biases):
            torch_name, jax_name = f"source.{name}", f"source/{name}"
            shape = (size, rank)
            yield _Entry(f"{torch_name}.weight", f"{jax_name}/kernel", shape, to_jax, to_torch)
            yield _Entry(f"{torch_name}.bias", f"{jax_name}/bias", shape[:1], to_jax, to_torch)


def _block_entries(
    name: str, block: str, width: int, heads: int, mlp_width: int, qk_norm: bool
) -> Iterator[_Entry]:
    size = width // heads
    yield _Entry(
        *(f"{name}.attn.qkv.weight", f"{block}/qkv/kernel", (3 * width, width)),
        lambda w: w.reshape(3, heads, size, width).transpose(3, 1, 0, 2).reshape(width, 3 * width),
        lambda k: k.reshape(width, heads, 3, size).transpose(2, 1, 3, 0).reshape(3 * width, width),
    )
    yield _Entry(
        *(f"{name}.attn.qkv.bias", f"{block}/qkv/bias", (3 * width,)),
        lambda b: b.reshape(3, heads, size).swapaxes(0, 1).reshape(-1),
        lambda b: b.reshape(heads, 3, size).swapaxes(0, 1).reshape(-1),
    )
    for norm in ("q_norm", "k_norm") if qk_norm else ():
        yield _Entry(f"{name}.attn.{norm}.weight", f"{block}/{norm}/scale", (size,))
        yield _Entry(f"{name}.attn.{norm}.bias", f"{block}/{norm}/bias", (size,))
    yield from _linear(f"{name}.attn.proj", f"{block}/proj", width, width)
    yield from _linear(f"{name}.mlp.fc1", f"{block}/mlp_in", width, mlp_width)
    yield from _linear(f"{name}.mlp.fc2", f"{block}/mlp_out", mlp_width, width)
    yield from _linear(f"{name}.adaLN_modulation.1", f"{block}/modulation", width, 6 * width)


def _linear(torch_name: str, jax_name: str, inputs: int, outputs: int) -> Iterator[_Entry]:
    names, shape = (f"{torch_name}.weight", f"{jax_name}/kernel"), (outputs, inputs)
    yield _Entry(*names, shape, np.transpose, np.transpose)
    yield _Entry(f"{torch_name}.bias", f"{jax_name}/bias", (outputs,))


def _check_positions(found: np.ndarray, width: int) -> None:
    """Compares `pos_embed` with the fixed table: another one means another model."""
    side = round((found.size / width) ** 0.5)
    expected = dit.position_embedding(side, width)[None]
    if found.shape != expected.shape:
        shape = list(found.shape)
        raise ValueError(f"pos_embed: found shape {shape}, expected [1, N, {width}], N a square")
    error = float(np.abs(found - expected).max())
    if not error < 1e-5:
        raise ValueError(
            f"pos_embed: found values up to {error:.2g} away from the 2-D sine-cosine table of "
            f"{side} x {side} positions, expected that table, which is not a parameter here"
        )


def _convert(
    arrays: State, entries: Sequence[tuple[str, str, tuple[int, ...], Transform]]
) -> State:
    """Renames and converts all arrays. Each entry: old name, new name, shape, conversion."""
    converted = {}
    left = dict(arrays)
    for name, new_name, shape, transform in entries:
        array = _find(arrays, name)
        if array.shape != shape:
            raise ValueError(f"{name}: found shape {list(array.shape)}, expected {list(shape)}")
        converted[new_name] = np.ascontiguousarray(transform(array))
        del left[name]
    for name, array in left.items():
        found = list(array.shape)
        raise ValueError(f"{name}: found a tensor of shape {found}, expected none of this name")
    return converted


def _find(arrays: State, name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"{name}: found no such tensor, expected one")
    return np.atleast_1d(arrays[name])


def _to_float32(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):
        # NumPy has no bfloat16: torch widens its tensors itself, and only without a gradient.
        tensor = tensor.detach().float()
    return np.asarray(tensor, np.float32)
