"""The tiny SiT of tests/data, whose values PyTorch computed, and PyTorch's own for other inputs."""

import pathlib

import numpy as np

TINY = pathlib.Path(__file__).parents[1] / "data" / "sit_tiny.npz"


def tiny_state():
    """Its state dict, in SiT's names."""
    values = np.load(TINY)
    names = [key for key in values.files if key.startswith("state/")]
    return {key.removeprefix("state/"): values[key].astype(np.float32) for key in names}


def evaluate(state, x, t, labels, **sizes):
    """The output [B, C, H, W] of a state dict by the published equations, in float64 PyTorch."""
    import torch

    from tests.data import make_sit_tiny

    tensors = {name: torch.from_numpy(np.asarray(a, np.float64)) for name, a in state.items()}
    out, _ = make_sit_tiny.evaluate(
        tensors,
        make_sit_tiny.CONFIG | sizes,
        torch.from_numpy(np.asarray(x, np.float64)),
        torch.from_numpy(np.asarray(t, np.float64)),
        torch.from_numpy(np.asarray(labels, np.int64)),
    )
    return out.numpy()
