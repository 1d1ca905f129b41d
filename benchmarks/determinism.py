"""How far samples agree over meshes and batch sizes: bit for bit, or by how much they differ.

    python -m benchmarks.determinism

32 samples of a random 1M-parameter model in float32 on virtual CPU devices: latents of one device
and a batch of 16 against those of other meshes and batches, and the 8-bit images that they become.
"""

import argparse
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

COUNT = 32
SOLVERS = {
    "euler x10": {"solver": "euler", "num_steps": 10},
    "euler x10, cfg 2.5": {"solver": "euler", "num_steps": 10, "cfg_scale": 2.5},
    "heun x5": {"solver": "heun", "num_steps": 5},
    "euler_maruyama x10": {"solver": "euler_maruyama", "num_steps": 10},
    "dopri5, rtol 1e-3": {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3},
}
MESHES = {
    "1 device, batch 16": ((1, 1, 1), 16),
    "2 devices, batch 16": ((2, 1, 1), 16),
    "8 devices, batch 16": ((8, 1, 1), 16),
    "8 devices (4 data, 2 fsdp), batch 16": ((4, 2, 1), 16),
    "1 device, batch 32": ((1, 1, 1), 32),
    "8 devices, batch 32": ((8, 1, 1), 32),
    "8 devices (4 data, 2 tensor), batch 16": ((4, 1, 2), 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    names = list(MESHES)
    print(f"against {names[0]}: largest difference of latents / largest latent; 8-bit values")
    print("| | " + " | ".join(names[1:]) + " |")
    print("|---" * len(names) + "|")
    for label, options in SOLVERS.items():
        first, *others = (samples(options, *MESHES[name]) for name in names)
        cells = [compared(first, other) for other in others]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def samples(options: dict, shape: tuple[int, int, int], batch_size: int) -> np.ndarray:
    """Latents `[COUNT, 16, 16, 4]` drawn on a mesh."""
    from repulsor_jax import sharding
    from repulsor_jax.config import parse
    from repulsor_jax.flows import sampler, solvers
    from repulsor_jax.inference.generator import make_latent_sampler
    from repulsor_jax.models.build import build_model, init_model_params

    config = parse(config_dict(options))
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = sharding.create_mesh(*shape, devices=devices)
    model = build_model(config.model)
    boxed = jax.eval_shape(lambda key: init_model_params(model, key), jax.random.key(0))
    params = placed_params(boxed, mesh)
    solve: Callable[..., jax.Array] = make_latent_sampler(config, model)
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def draw(params: dict, indices: jax.Array) -> jax.Array:
        labels = sampler.sample_labels(0, indices, config.model.num_classes)
        noise = sampler.initial_noise(0, indices, (16, 16, 4))
        stochastic = config.sampling.solver in solvers.SDE_STEPS
        keys = sampler.brownian_keys(0, indices) if stochastic else None
        scale = None if config.sampling.cfg_scale == 1 else config.sampling.cfg_scale
        return solve(params, noise, labels, scale, keys=keys)

    with sharding.use_mesh(mesh):
        found = [
            draw(params, jax.device_put(np.arange(k, k + batch_size, dtype=np.int32), rows))
            for k in range(0, COUNT, batch_size)
        ]
    return np.concatenate([np.asarray(x) for x in found])


def config_dict(options: dict) -> dict:
    """The default configuration with a smaller model, in float32."""
    from configs import default

    c = default.get_config()
    c.model.update(
        latent_size=16, hidden_size=128, depth=4, num_heads=4, num_classes=10, dtype="float32"
    )
    c.sampling.update(options)
    values: dict = c.to_dict()
    return values


def placed_params(boxed: dict, mesh: Mesh) -> dict:
    """Random parameters, the same on every mesh; initialised parameters would give zero."""
    import flax.linen as nn

    from repulsor_jax import sharding

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.05 * rng.standard_normal(x.shape)).astype(np.float32), nn.unbox(boxed)
    )
    placed: dict = jax.device_put(params, sharding.tree_shardings(boxed, mesh))
    return placed


def compared(first: np.ndarray, other: np.ndarray) -> str:
    """'equal to the bit', or how much the latents differ and how many 8-bit values do."""
    from repulsor_jax.files.pictures import to_uint8

    if (first == other).all():
        return "bit-equal"
    relative = np.abs(first - other).max() / np.abs(first).max()
    # Latents of about unit variance become pixels of which few are clipped.
    a, b = (np.asarray(to_uint8(0.4 * x)).astype(int) for x in (first, other))
    values = f"{(a != b).sum()} of {a.size:,} 8-bit values"
    return f"{relative:.1e}; {values}" + (f", by {np.abs(a - b).max()}" if (a != b).any() else "")


if __name__ == "__main__":
    main()
