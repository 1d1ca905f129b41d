"""Parameters of `dit.DiT` from, and to, the state dict of the published PyTorch SiT and DiT.

The PyTorch code fuses query, key and value as [3, num_heads, hd]; `dit.Block` lays the same rows
out heads-major, [num_heads, 3, hd]. Linear weights are transposed, and the patch embedding's
convolution kernel [D, C, p, p] becomes a matrix [p * p * C, D].

Nothing here imports torch: tensors come in through `np.asarray`, and go out as NumPy arrays.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from repulsor_jax.models import dit

State = dict[str, np.ndarray]
Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor in both worlds: its names, its shape in torch, and the two conversions."""

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    to_jax: Transform
    to_torch: Transform


@dataclasses.dataclass(frozen=True)
class _Sizes:
    width: int
    channels: int
    out_channels: int
    patch_size: int
    num_heads: int
    depth: int
    mlp_width: int
    label_rows: int
    qk_norm: bool


def from_torch_state_dict(
    state: Mapping[str, Any], *, num_heads: int, patch_size: int, in_channels: int
) -> dit.Params:
    """Converts a SiT or DiT state dict to the parameters of `dit.DiT`.

    Width, depth, classes, `mlp_ratio`, `learn_sigma` and `qk_norm` are read off the tensors; the
    arguments are what the shapes are checked against.

    Args:
      state: tensor names to NumPy arrays or CPU torch tensors of any float type.
      num_heads: attention heads.
      patch_size: side p of a patch.
      in_channels: latent channels C.

    Returns:
      Nested dict of float32 NumPy arrays in the layout of `scan_blocks=False`; see
      `dit.stack_blocks` for the other. The fixed `pos_embed` is checked and left out.

    Raises:
      ValueError: if a tensor is missing, superfluous or of another shape, naming it with the
        shape found and the one expected, or if `pos_embed` is not the sine-cosine table.
    """
    arrays = {name: _to_float32(tensor) for name, tensor in state.items()}
    sizes = _sizes_from_state(arrays, num_heads, patch_size, in_channels)
    _check_positions(arrays, sizes.width)
    params: dit.Params = {}
    entries = list(_entries(sizes))
    for entry in entries:
        array = _take(arrays, entry.name, entry.shape)
        _insert(params, entry.path, np.ascontiguousarray(entry.to_jax(array)))
    _refuse_extra(arrays, {"pos_embed", *(entry.name for entry in entries)})
    return params


def to_torch_state_dict(
    params: Mapping[str, Any], *, num_heads: int, patch_size: int, latent_size: int
) -> State:
    """Converts parameters of `dit.DiT` to a SiT state dict; inverts `from_torch_state_dict`.

    Args:
      params: nested dict of arrays, unboxed, in either layout of the blocks.
      num_heads: attention heads.
      patch_size: side of a patch.
      latent_size: height and width of the latents, for the `pos_embed` table.

    Returns:
      Tensor names to float32 NumPy arrays, `pos_embed` [1, N, D] first.

    Raises:
      ValueError: if a parameter is missing, superfluous or of another shape, naming it with the
        shape found and the one expected.
    """
    if "blocks" in params:
        params = dit.unstack_blocks(params)
    flat = {"/".join(path): _to_float32(leaf) for path, leaf in _leaves(params)}
    sizes = _sizes_from_params(flat, num_heads, patch_size)
    positions = dit.position_embedding(latent_size // patch_size, sizes.width)
    state = {"pos_embed": positions[None]}
    entries = {"/".join(entry.path): entry for entry in _entries(sizes)}
    for path, entry in entries.items():
        array = _take(flat, path, entry.to_jax(np.empty(entry.shape, np.float32)).shape)
        state[entry.name] = np.ascontiguousarray(entry.to_torch(array))
    _refuse_extra(flat, set(entries))
    return state


def _entries(sizes: _Sizes) -> Iterator[_Entry]:
    """Every parameter of the model, in the order of the published state dict."""
    width, p = sizes.width, sizes.patch_size
    yield _Entry(
        "x_embedder.proj.weight",
        ("patch_embed", "kernel"),
        (width, sizes.channels, p, p),
        lambda w: w.transpose(2, 3, 1, 0).reshape(p * p * sizes.channels, width),
        lambda k: k.reshape(p, p, sizes.channels, width).transpose(3, 2, 0, 1),
    )
    yield _vector("x_embedder.proj.bias", ("patch_embed", "bias"), width)
    yield from _linear("t_embedder.mlp.0", ("time_in",), dit.NUM_FREQUENCIES, width)
    yield from _linear("t_embedder.mlp.2", ("time_out",), width, width)
    yield _Entry(
        "y_embedder.embedding_table.weight",
        ("label_embed", "embedding"),
        (sizes.label_rows, width),
        _same,
        _same,
    )
    for i in range(sizes.depth):
        yield from _block_entries(sizes, f"blocks.{i}", f"block_{i}")
    yield from _linear("final_layer.linear", ("final",), width, p * p * sizes.out_channels)
    yield from _linear("final_layer.adaLN_modulation.1", ("final_modulation",), width, 2 * width)


def _block_entries(sizes: _Sizes, name: str, block: str) -> Iterator[_Entry]:
    width, heads = sizes.width, sizes.num_heads
    size = width // heads
    yield _Entry(
        f"{name}.attn.qkv.weight",
        (block, "qkv", "kernel"),
        (3 * width, width),
        lambda w: w.reshape(3, heads, size, width).transpose(3, 1, 0, 2).reshape(width, 3 * width),
        lambda k: k.reshape(width, heads, 3, size).transpose(2, 1, 3, 0).reshape(3 * width, width),
    )
    yield _Entry(
        f"{name}.attn.qkv.bias",
        (block, "qkv", "bias"),
        (3 * width,),
        lambda b: b.reshape(3, heads, size).swapaxes(0, 1).reshape(-1),
        lambda b: b.reshape(heads, 3, size).swapaxes(0, 1).reshape(-1),
    )
    if sizes.qk_norm:
        for norm in ("q_norm", "k_norm"):
            yield _vector(f"{name}.attn.{norm}.weight", (block, norm, "scale"), size)
            yield _vector(f"{name}.attn.{norm}.bias", (block, norm, "bias"), size)
    yield from _linear(f"{name}.attn.proj", (block, "proj"), width, width)
    yield from _linear(f"{name}.mlp.fc1", (block, "mlp_in"), width, sizes.mlp_width)
    yield from _linear(f"{name}.mlp.fc2", (block, "mlp_out"), sizes.mlp_width, width)
    yield from _linear(f"{name}.adaLN_modulation.1", (block, "modulation"), width, 6 * width)


def _linear(name: str, path: tuple[str, ...], inputs: int, outputs: int) -> Iterator[_Entry]:
    yield _Entry(f"{name}.weight", (*path, "kernel"), (outputs, inputs), np.transpose, np.transpose)
    yield _vector(f"{name}.bias", (*path, "bias"), outputs)


def _vector(name: str, path: tuple[str, ...], size: int) -> _Entry:
    return _Entry(name, path, (size,), _same, _same)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _sizes_from_state(
    arrays: Mapping[str, np.ndarray], num_heads: int, patch_size: int, in_channels: int
) -> _Sizes:
    patch_bias = _take(arrays, "x_embedder.proj.bias", (None,))
    table = _take(arrays, "y_embedder.embedding_table.weight", (None, None))
    hidden = _take(arrays, "blocks.0.mlp.fc1.bias", (None,))
    final = _take(arrays, "final_layer.linear.bias", (None,))
    blocks = {name.split(".")[1] for name in arrays if name.startswith("blocks.")}
    return _check_sizes(
        _Sizes(
            width=len(patch_bias),
            channels=in_channels,
            out_channels=len(final) // patch_size**2,
            patch_size=patch_size,
            num_heads=num_heads,
            depth=len(blocks),
            mlp_width=len(hidden),
            label_rows=len(table),
            qk_norm="blocks.0.attn.q_norm.weight" in arrays,
        )
    )


def _sizes_from_params(flat: Mapping[str, np.ndarray], num_heads: int, patch_size: int) -> _Sizes:
    patch = _take(flat, "patch_embed/kernel", (None, None))
    table = _take(flat, "label_embed/embedding", (None, None))
    hidden = _take(flat, "block_0/mlp_in/bias", (None,))
    final = _take(flat, "final/bias", (None,))
    blocks = {name.split("/")[0] for name in flat if name.startswith("block_")}
    return _check_sizes(
        _Sizes(
            width=patch.shape[1],
            channels=patch.shape[0] // patch_size**2,
            out_channels=len(final) // patch_size**2,
            patch_size=patch_size,
            num_heads=num_heads,
            depth=len(blocks),
            mlp_width=len(hidden),
            label_rows=len(table),
            qk_norm="block_0/q_norm/scale" in flat,
        )
    )


def _check_sizes(sizes: _Sizes) -> _Sizes:
    if sizes.width % sizes.num_heads:
        raise ValueError(
            f"num_heads: found {sizes.num_heads}, expected a divisor of the width {sizes.width}"
        )
    if sizes.out_channels not in (sizes.channels, 2 * sizes.channels):
        raise ValueError(
            f"final_layer.linear.bias: found {sizes.out_channels} output channels, expected "
            f"{sizes.channels} or, with learn_sigma, {2 * sizes.channels}"
        )
    return sizes


def _check_positions(arrays: Mapping[str, np.ndarray], width: int) -> None:
    """Compares `pos_embed` with the fixed table: another one means another model."""
    found = _take(arrays, "pos_embed", (1, None, width))[0]
    side = round(len(found) ** 0.5)
    expected = dit.position_embedding(side, width)
    if found.shape != expected.shape:
        raise ValueError(f"pos_embed: found {len(found)} positions, expected a square number")
    error = float(np.abs(found - expected).max())
    if not error < 1e-5:
        raise ValueError(
            f"pos_embed: found values up to {error:.2g} away from the 2-D sine-cosine table of "
            f"{side} x {side} positions, expected that table, which is not a parameter here"
        )


def _take(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The named array, if its shape is `shape`, in which None stands for any length."""
    wanted = "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
    if name not in arrays:
        raise ValueError(f"{name}: found no such tensor, expected one of shape {wanted}")
    array = arrays[name]
    fits = all(size in (None, length) for size, length in zip(shape, array.shape, strict=False))
    if array.ndim != len(shape) or not fits:
        raise ValueError(f"{name}: found shape {list(array.shape)}, expected {wanted}")
    return array


def _refuse_extra(arrays: Mapping[str, np.ndarray], known: set[str]) -> None:
    extra = sorted(set(arrays) - known)
    if extra:
        shape = list(arrays[extra[0]].shape)
        others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ValueError(
            f"{extra[0]}{others}: found a tensor of shape {shape}, expected none of this name"
        )


def _to_float32(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):
        # NumPy has no bfloat16: torch widens its tensors itself, and only without a gradient.
        tensor = tensor.detach().float()
    return np.asarray(tensor, np.float32)


def _insert(tree: dit.Params, path: tuple[str, ...], leaf: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value
