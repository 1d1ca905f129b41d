"""Writes sit_tiny.npz, reference values of a tiny SiT, from the published equations in PyTorch.

    python tests/data/make_sit_tiny.py               writes sit_tiny.npz beside this file
    python tests/data/make_sit_tiny.py other.npz     compares with a file of the same layout

It shares no code with the library: the equations are those of arXiv 2212.09748 (DiT) and
2401.08740 (SiT), evaluated in float64 on a state dict with the published names. Weights are random,
none of them zero, and exact in float16, in which the file stores them.
"""

import ast
import pathlib
import sys

import numpy as np
import torch
from torch.nn import functional as F

CONFIG = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 3.0,
    "num_classes": 5,
    "learn_sigma": True,
}

# Tensors whose gradients of mean(out ** 2) the file holds.
GRADIENTS = (
    "x_embedder.proj.weight",
    "t_embedder.mlp.2.bias",
    "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.adaLN_modulation.1.weight",
    "blocks.1.mlp.fc1.weight",
)


def table(side, width):
    """Fixed positions: channel quarters are sin(column), cos(column), sin(row), cos(row)."""
    index = torch.arange(side, dtype=torch.float64)
    rate = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) * 4 / width)
    row, column = torch.meshgrid(index, index, indexing="ij")
    parts = [f(p[..., None] * rate) for p in (column, row) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, -1).reshape(1, side * side, width)


def evaluate(state, config, x, t, y):
    """The output [B, C, H, W] and the list of tokens [B, N, D] after each block."""
    width, heads, p = config["hidden_size"], config["num_heads"], config["patch_size"]

    def linear(name, h):
        return F.linear(h, state[name + ".weight"], state[name + ".bias"])

    def norm(h, shift, scale):
        return F.layer_norm(h, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angles = t[:, None] * torch.exp(-np.log(1e4) * torch.arange(128, dtype=t.dtype) / 128)
    time = torch.cat([angles.cos(), angles.sin()], 1)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time)))
    condition = F.silu(time + state["y_embedder.embedding_table.weight"][y])

    kernel, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    h = F.conv2d(x, kernel, bias, stride=p).flatten(2).mT + state["pos_embed"]
    taps = []
    for i in range(config["depth"]):
        block = f"blocks.{i}."
        modulation = linear(block + "adaLN_modulation.1", condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, 1)
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(block + "attn.qkv", norm(h, shift_a, scale_a)).chunk(3, -1)
        )
        if block + "attn.q_norm.weight" in state:
            q, k = (
                F.layer_norm(a, a.shape[-1:], state[n + ".weight"], state[n + ".bias"], 1e-5)
                for a, n in ((q, block + "attn.q_norm"), (k, block + "attn.k_norm"))
            )
        weights = (q @ k.mT / (width // heads) ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        h = h + gate_a[:, None] * linear(block + "attn.proj", mixed)
        inner = F.gelu(linear(block + "mlp.fc1", norm(h, shift_m, scale_m)), approximate="tanh")
        h = h + gate_m[:, None] * linear(block + "mlp.fc2", inner)
        taps.append(h)

    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
    patches = linear("final_layer.linear", norm(h, shift, scale))
    side = x.shape[-1] // p
    out = patches.unflatten(-1, (p, p, -1)).unflatten(1, (side, side))
    out = torch.einsum("nhwpqc->nchpwq", out).flatten(4, 5).flatten(2, 3)
    return out[:, : config["in_channels"]], taps


def guided(state, config, x, t, y, scale):
    """Guidance as SiT samples: on the first three channels, the rest being the conditional's."""
    cond, _ = evaluate(state, config, x, t, y)
    null, _ = evaluate(state, config, x, t, torch.full_like(y, config["num_classes"]))
    mixed = null + scale * (cond - null)
    return torch.cat([mixed[:, :3], cond[:, 3:]], 1)


def random_state(config, generator):
    """Random weights, float16-exact, of a size that keeps activations near one."""
    width, channels, p = config["hidden_size"], config["in_channels"], config["patch_size"]
    hidden, state = int(width * config["mlp_ratio"]), {}

    def add(name, *shape, fan_in=None):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[name] = (values / (fan_in or 25.0) ** 0.5).half().double()

    def add_linear(name, outputs, inputs):
        add(name + ".weight", outputs, inputs, fan_in=inputs)
        add(name + ".bias", outputs)

    add("x_embedder.proj.weight", width, channels, p, p, fan_in=channels * p * p)
    add("x_embedder.proj.bias", width)
    add_linear("t_embedder.mlp.0", width, 256)
    add_linear("t_embedder.mlp.2", width, width)
    add("y_embedder.embedding_table.weight", config["num_classes"] + 1, width, fan_in=1)
    for i in range(config["depth"]):
        add_linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        add_linear(f"blocks.{i}.attn.proj", width, width)
        add_linear(f"blocks.{i}.mlp.fc1", hidden, width)
        add_linear(f"blocks.{i}.mlp.fc2", width, hidden)
        add_linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    add_linear("final_layer.linear", p * p * channels * (1 + config["learn_sigma"]), width)
    add_linear("final_layer.adaLN_modulation.1", 2 * width, width)
    norms = {}
    for i in range(config["depth"]):
        for norm in (f"blocks.{i}.attn.q_norm", f"blocks.{i}.attn.k_norm"):
            for suffix in (".weight", ".bias"):
                add(norm + suffix, width // config["num_heads"], fan_in=1)
                norms[norm + suffix] = state.pop(norm + suffix)
    return state, norms


def compare(path):
    """Prints the largest error of every reference value in `path`, over its largest value."""
    data = np.load(path)
    config = ast.literal_eval(str(data["config"]))
    state = {
        key.removeprefix("state/"): torch.from_numpy(data[key].astype(np.float64))
        for key in data.files
        if key.startswith("state/")
    }
    x, t, y = (torch.from_numpy(data[key]) for key in ("x", "t", "y"))
    x, t = x.double(), t.double()
    out, taps = evaluate(state, config, x, t, y.long())
    found = {"out": out, "cfg3": guided(state, config, x, t, y.long(), 3.0)}
    found |= {f"block/{i}": tokens for i, tokens in enumerate(taps)}
    found["state/pos_embed"] = table(config["input_size"] // config["patch_size"], taps[0].shape[2])
    for key, value in found.items():
        error = np.abs(value.numpy() - data[key]).max() / np.abs(data[key]).max()
        print(f"{key}: {error:.2e}")


def main():
    """Writes the file."""
    generator = torch.Generator().manual_seed(0)
    state, norms = random_state(CONFIG, generator)
    side, channels = CONFIG["input_size"], CONFIG["in_channels"]
    x = torch.randn((3, channels, side, side), generator=generator).double()
    t = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float32).double()
    y = torch.tensor([0, 4, 5])
    positions = {"pos_embed": table(side // CONFIG["patch_size"], CONFIG["hidden_size"])}
    for key in GRADIENTS:
        state[key].requires_grad_(True)
    out, taps = evaluate(state | positions, CONFIG, x, t, y)
    out.square().mean().backward()
    values = {"x": x, "t": t, "out": out}
    values |= {f"block/{i}": tokens for i, tokens in enumerate(taps)}
    values["cfg3"] = guided(state | positions, CONFIG, x, t, y, 3.0)
    values["qk_norm/out"], _ = evaluate(state | positions | norms, CONFIG, x, t, y)
    values["state/pos_embed"] = positions["pos_embed"]
    values |= {f"grad/{key}": state[key].grad for key in GRADIENTS}
    arrays = {key: value.detach().numpy().astype(np.float32) for key, value in values.items()}
    arrays |= {f"state/{key}": value.detach().half().numpy() for key, value in state.items()}
    arrays |= {f"qk_norm/state/{key}": value.half().numpy() for key, value in norms.items()}
    path = pathlib.Path(__file__).with_name("sit_tiny.npz")
    np.savez_compressed(path, config=str(CONFIG), y=y.numpy().astype(np.int32), **arrays)


if __name__ == "__main__":
    compare(sys.argv[1]) if len(sys.argv) > 1 else main()
