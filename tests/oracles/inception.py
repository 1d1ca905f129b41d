"""What the tests compare Inception metrics with: torch-fidelity, and random weights for both."""

import importlib.util
import pathlib
import sys
import types
import zlib
from typing import Any

import numpy as np
import pytest

LAYERS = ("64", "192", "768", "2048", "logits_unbiased", "logits")


def import_torch_fidelity() -> types.ModuleType:
    """torch_fidelity with its metric modules, or skips the test."""
    torch = pytest.importorskip("torch")
    for name in ("torchvision", "torch_fidelity"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # torchvision built for another torch cannot load its operators, and then fails to import.
        # Declaring the two it asks for is enough: torch-fidelity uses none of them.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torch_fidelity

        torch_fidelity.operators = library  # they are declared as long as this object lives
    import torch_fidelity
    import torch_fidelity.metric_fid
    import torch_fidelity.metric_isc
    import torch_fidelity.metric_kid
    import torch_fidelity.metric_prc

    return torch_fidelity


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor for the Inception state dict that depends on its name and shape alone.

    Its scale keeps activations near one through all layers, as He et al. (arXiv 1502.01852) do.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith((".bn.weight", ".bn.running_var")):
        tensor = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        tensor = rng.normal(0, 0.2, shape)
    else:
        tensor = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    return tensor.astype(np.float32)


def torch_inception(weights: pathlib.Path, dtype: str = "float32") -> Any:
    """torch-fidelity's InceptionV3 with weights of a file: uint8 `[B, H, W, 3]` to a dict."""
    import_torch_fidelity()
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    model = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        list(LAYERS),
        feature_extractor_weights_path=str(weights),
        feature_extractor_internal_dtype=dtype,
    )
    spatial = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[-1]))

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        spatial.clear()
        with torch.no_grad():
            found = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        layers = {name: value.numpy() for name, value in zip(LAYERS, found, strict=True)}
        layers["spatial"] = spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1).float().numpy()
        return layers

    return run
