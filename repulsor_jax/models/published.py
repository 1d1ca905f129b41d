"""What a published file of SiT's kind is, told by its tensors, and its convention made ours.

Three conventions share the names of the tensors. "sit": t = 1 is data, the output is the velocity
data - noise; SiT, LayerSync. "reversed": t = 0 is data, the velocity is noise - data; the SiT of
REPA and of SRA. "dit": the output is the noise, t is the index of DiT's 1,000 steps; DiT, fast-DiT,
the DiT of SRA.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from repulsor_jax.models import dit
from repulsor_jax.models.torch_weights import State

CONVENTIONS = ("sit", "reversed", "dit")
PARTS = ("ema", "model", "state_dict")  # of a checkpoint of training, the best first

Convention = Literal["sit", "reversed", "dit"]

_KNOWN = "x_embedder.proj.bias"
_HEADS = {"projectors.": "REPA", "ap_head.": "SRA"}  # trained beside the network, and left out


class Published(NamedTuple):
    """A state dict in SiT's names, and what it is."""

    state: State
    convention: Convention
    is_certain: bool  # the tensors tell the convention
    description: str
    sizes: dict[str, Any]  # fields of `dit.DiT`, all but the number of heads


def recognise(tensors: Mapping[str, np.ndarray]) -> Published:
    """Says what a state dict is, and gives it without prefixes of wrappers and training heads.

    Raises:
      ValueError: it is none of SiT's kind; says what was found.
    """
    state, origin = _without_heads(_without_prefix(tensors))
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    outputs = len(_find(state, "final_layer.linear.bias")) // patch**2
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    learn_sigma = outputs == 2 * channels
    sizes = {
        "latent_size": round(_find(state, "pos_embed").shape[-2] ** 0.5) * patch,
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "num_classes": len(_find(state, "y_embedder.embedding_table.weight")) - 1,
        "mlp_ratio": len(_find(state, "blocks.0.mlp.fc1.bias")) / width,
        "learn_sigma": learn_sigma,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    convention: Convention = "reversed" if origin and not learn_sigma else "sit"
    kind = f"{origin}'s SiT" if origin else "SiT, or DiT, which has the same tensors"
    if origin == "SRA" and learn_sigma:
        convention, kind = "dit", "SRA's DiT"
    elif not origin and not learn_sigma:
        kind = "SiT, or that of REPA or SRA without its head"
    left = f", without its head ({len(tensors) - len(state)} tensors)" if origin else ""
    sigma = ", with a variance" if learn_sigma else ""
    description = (
        f"{kind}{left}: {depth} blocks of width {width}, patch {patch}, {sizes['num_classes']:,} "
        f"classes, latents of {channels} channel{'s' * (channels > 1)}{sigma}"
    )
    return Published(state, convention, bool(origin), description, sizes)


def reverse(params: Mapping[str, Any]) -> dit.Params:
    """Parameters of the network -f(x, 1 - t), from those of f(x, t): the same network otherwise.

    cos(w (1 - t)) and sin(w (1 - t)) are a fixed rotation of cos(w t) and sin(w t) for each
    frequency w, so the time goes into the first layer that reads it, in float64, and the sign into
    the last layer. Twice is the identity, to rounding.

    Args:
      params: of `dit.DiT`, unboxed, in either layout of the blocks.
    """
    half = dit.NUM_FREQUENCIES // 2
    frequencies = np.asarray(dit.frequencies(), np.float64)[:, None]
    kernel = np.asarray(params["time_in"]["kernel"], np.float64)
    cosines, sines = kernel[:half], kernel[half:]
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    turned = np.concatenate([cos * cosines + sin * sines, sin * cosines - cos * sines])
    final = {name: -np.asarray(value) for name, value in params["final"].items()}
    time_in = {**params["time_in"], "kernel": turned.astype(np.float32)}
    return {**params, "time_in": time_in, "final": final}


def _without_prefix(tensors: Mapping[str, np.ndarray]) -> State:
    """Takes off what wrappers put before all names: "module.", "_orig_mod."."""
    prefixes = [name.removesuffix(_KNOWN) for name in tensors if name.endswith(_KNOWN)]
    if not prefixes or "x_embedder.proj.weight" not in {
        name.removeprefix(prefixes[0]) for name in tensors
    }:
        hint = ""
        if any("transformer_blocks." in name for name in tensors):
            hint = ": these are diffusers' names; give the file that the authors published"
        raise ValueError(
            f"found {len(tensors)} tensors, as {next(iter(tensors), 'none')}, expected those of a "
            f"SiT or DiT, among them {_KNOWN}{hint}"
        )
    return {name.removeprefix(prefixes[0]): np.asarray(a) for name, a in tensors.items()}


def _without_heads(state: State) -> tuple[State, str]:
    """Leaves out training heads, and gives former names of REPA present ones; says whose it is."""
    origins = [who for head, who in _HEADS.items() if any(n.startswith(head) for n in state)]
    state = {name: a for name, a in state.items() if not name.startswith(tuple(_HEADS))}
    first = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    found = {}
    for name, array in state.items():
        start, _, rest = name.partition(".")
        if start == "decoder_blocks":  # REPA's first version counted the blocks in two parts
            number, _, rest = rest.partition(".")
            name = f"blocks.{first + int(number)}.{rest}"
        found[name] = array
    return found, origins[0] if origins else ""


def _find(state: State, name: str) -> np.ndarray:
    if name not in state:
        raise ValueError(f"{name}: found no such tensor, expected one, as SiT and DiT have it")
    return state[name]
