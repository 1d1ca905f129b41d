"""The autoencoders that ours are compared with: diffusers' models, and the tiny ones in torch."""

import importlib.util

import pytest


def load_diffusers():
    """Imports diffusers, or skips the test.

    diffusers needs torchvision nowhere in its autoencoders but imports it where it is installed,
    and fails if it is one that the installed torch cannot load: such a one is hidden.
    """
    pytest.importorskip("torch")
    find_spec = importlib.util.find_spec
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        importlib.util.find_spec = lambda name, *rest: (
            None if name.split(".")[0] == "torchvision" else find_spec(name, *rest)
        )
    try:
        diffusers = pytest.importorskip("diffusers")
        diffusers.AutoencoderKL, diffusers.AutoencoderTiny  # noqa: B018 - imported on access
    finally:
        importlib.util.find_spec = find_spec
    return diffusers


def kl_config(widths=(8, 16), **changes):
    """The config.json of a small AutoencoderKL."""
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 1,
        "latent_channels": 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.4,
        **changes,
    }


def randomise(model, seed=0):
    """Gives every tensor of a torch module random values, exact in float16, and returns it.

    Weights of matrices and kernels keep activations of unit size, those of norms are about one.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                values = values / tensor[0].numel() ** 0.5
            else:
                values = 0.2 * values + ("norm" in name and name.endswith("weight"))
            tensor.copy_(values.half())
    return model.eval()


def tiny_state(width, latent_channels, pooled, seed=0):
    """Random tensors of both parts of a tiny autoencoder, by name, exact in float16."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, outputs, inputs, size=3, bias=True):
        values = torch.randn((outputs, inputs, size, size), generator=generator)
        state[f"{name}.weight"] = (values / (inputs * size**2) ** 0.5).half()
        if bias:
            state[f"{name}.bias"] = (0.2 * torch.randn(outputs, generator=generator)).half()

    def block(name, with_pool):
        for i in (0, 2, 4):
            conv(f"{name}.conv.{i}", width, width)
        if with_pool:
            conv(f"{name}.pool.0", 4 * width, width, 1, bias=False)
            state[f"{name}.pool.1.weight"] = 1 + 0.2 * torch.randn(4 * width, generator=generator)
            state[f"{name}.pool.1.bias"] = 0.2 * torch.randn(4 * width, generator=generator)
            conv(f"{name}.pool.3", width, 4 * width, 1, bias=False)

    conv("encoder.0", width, 3)
    conv("encoder.14", latent_channels, width)
    for i in (2, 6, 10):
        conv(f"encoder.{i}", width, width, bias=False)
    for i in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        block(f"encoder.{i}", pooled and i > 10)
    conv("decoder.1", width, latent_channels)
    conv("decoder.19", 3, width)
    for i in (7, 12, 17):
        conv(f"decoder.{i}", width, width, bias=False)
    for i in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(f"decoder.{i}", pooled and i < 6)
    return {name: tensor.half() for name, tensor in state.items()}


def tiny_encode(state, images):
    """Latents [B, c, h, w] of torch images [B, 3, H, W] in [-1, 1]."""
    return _tiny_layers(state, "encoder", (images + 1) / 2)


def tiny_decode(state, latents):
    """Torch images [B, 3, H, W] in [-1, 1] of latents [B, c, h, w]."""
    return _tiny_layers(state, "decoder", 3 * (latents / 3).tanh()) * 2 - 1


def _tiny_layers(state, part, x):
    """Runs the numbered layers; those without tensors are a ReLU (2) and upsamplings."""
    from torch.nn import functional as F

    def conv(name, x, **options):
        weight = state[f"{name}.weight"]
        bias = state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, **options)

    last = max(int(name.split(".")[1]) for name in state if name.startswith(part))
    for i in range(part == "decoder", last + 1):
        name = f"{part}.{i}"
        if f"{name}.conv.0.weight" in state:
            if f"{name}.pool.0.weight" in state:
                h = conv(f"{name}.pool.0", x)
                h = F.group_norm(h, 4, state[f"{name}.pool.1.weight"], state[f"{name}.pool.1.bias"])
                x = x + conv(f"{name}.pool.3", h.relu())
            h = conv(f"{name}.conv.2", conv(f"{name}.conv.0", x).relu()).relu()
            x = (x + conv(f"{name}.conv.4", h)).relu()
        elif f"{name}.weight" in state:
            halves = part == "encoder" and f"{name}.bias" not in state
            x = conv(name, x, stride=2 if halves else 1)
        elif i == 2:
            x = x.relu()
        else:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
    return x
