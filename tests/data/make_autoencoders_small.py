"""Writes autoencoders_small.npz, values of small autoencoders, from diffusers and torch.

    python -m tests.data.make_autoencoders_small

`kl` is diffusers' AutoencoderKL, `tiny` the equations in tests/oracles/autoencoders.py, both in
float64, with random weights that are exact in float16, in which the file stores them.
"""

import json
import pathlib

import numpy as np
import torch

from tests.oracles.autoencoders import (
    kl_config,
    load_diffusers,
    randomise,
    tiny_decode,
    tiny_encode,
    tiny_state,
)

WIDTH, LATENT_CHANNELS = 8, 5


def main():
    """Writes the file."""
    config = kl_config()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((2, 3, 16, 24), generator=generator).double() * 2 - 1
    latents = torch.randn((2, config["latent_channels"], 8, 12), generator=generator).double()
    model = randomise(load_diffusers().AutoencoderKL(**config)).double()
    arrays = {f"kl/state/{name}": tensor.half() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        arrays |= {
            "images": images.permute(0, 2, 3, 1),
            "kl/latents": latents.permute(0, 2, 3, 1),
            "kl/moments": model.encode(images).latent_dist.parameters.permute(0, 2, 3, 1),
            "kl/decoded": model.decode(latents).sample.permute(0, 2, 3, 1),
        }
    state = tiny_state(WIDTH, LATENT_CHANNELS, pooled=True)
    arrays |= {f"tiny/state/{name}": tensor for name, tensor in state.items()}
    state = {name: tensor.double() for name, tensor in state.items()}
    latents = 2 * torch.randn((2, LATENT_CHANNELS, 2, 3), generator=generator).double()
    arrays |= {
        "tiny/latents": latents.permute(0, 2, 3, 1),
        "tiny/encoded": tiny_encode(state, images).permute(0, 2, 3, 1),
        "tiny/decoded": tiny_decode(state, latents).permute(0, 2, 3, 1),
    }
    arrays = {
        name: tensor.numpy() if tensor.dtype == torch.float16 else tensor.numpy().astype(np.float32)
        for name, tensor in arrays.items()
    }
    path = pathlib.Path(__file__).with_name("autoencoders_small.npz")
    np.savez_compressed(path, **{"kl/config": json.dumps(config)}, **arrays)


if __name__ == "__main__":
    main()
