"""Published weights of DiT at ImageNet 256x256: noise prediction on DiT's own 1,000 steps.

    python -m repulsor_jax.main --config=dit256:xl_2 --mode=sample --workdir=samples \
        --config.model.init_from=DiT-XL-2-256x256.pt --config.sampling.cfg_scale=1.5

`:SIZE` is that of configs/imagenet256.py. Training goes on from such a file, with the noise as the
target. Not run here on the published file; docs/weights.md says what was compared on small models.
"""

import ml_collections

from repulsor_jax.configs import imagenet256


def get_config(size: str = "xl_2") -> ml_collections.ConfigDict:
    """Returns the configuration of one model size."""
    c = imagenet256.get_config(f"{size},none")
    c.model.init_convention = "dit"
    c.model.time_steps = 1_000
    c.flow.path = "ddpm_linear"
    c.flow.prediction = "noise"
    c.sampling.solver = "heun"
    c.sampling.num_steps = 125
    return c
