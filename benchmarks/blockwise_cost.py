"""What a blockwise network costs in sampling beside the plain transformer, and where it jumps.

    python -m benchmarks.blockwise_cost                                  # XL/2, by compilation
    python -m benchmarks.blockwise_cost --variant=digits --workdir=runs/blockwise  # of a run

Without --workdir: FLOPs of matrix products, parameters and temporary memory of one evaluation,
counted in the programs that XLA compiles for this CPU from shapes. No weights are needed and
nothing is run. With --workdir, of a trained run: the difference of the two velocities at each
boundary on held-out images, and a picture of samples after each segment, `segments.png`.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax import config as config_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax.configs import blockwise, imagenet256
from repulsor_jax.data.latents import denormalize, normalize, sample_posterior
from repulsor_jax.data.pipeline import read_records
from repulsor_jax.files.pictures import save_grid, to_uint8
from repulsor_jax.flows import paths, sampler, solvers
from repulsor_jax.inference import run as run_lib
from repulsor_jax.models.build import build_model, init_model_params
from repulsor_jax.planning.cost import program_cost
from repulsor_jax.runtime.throughput import forward_flops

STEPS = (1, 4, 16)  # of a segment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="xl_2", help="of configs/blockwise.py")
    parser.add_argument("--residual_depth", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--workdir", default="", help="of a trained run, to look at its boundaries")
    args = parser.parse_args()
    config = config_lib.parse(blockwise.get_config(args.variant))
    if args.workdir:
        look(config, pathlib.Path(args.workdir))
    else:
        costs(config, args.residual_depth, args.batch_size)


def costs(config: config_lib.Config, residual_depth: int, batch_size: int) -> None:
    """Prints the table of FLOPs and memory."""
    model = dataclasses.replace(
        config.model, dtype="float32", attention="xla", remat="none", scan_blocks=True
    )
    plain = dataclasses.replace(model, architecture="dit")
    if model.hidden_size == 1152:
        depth = imagenet256.get_config("xl_2").model.depth
        plain = dataclasses.replace(plain, depth=depth)
    second = dataclasses.replace(model, residual_depth=residual_depth)
    rows = {
        "plain": measure(plain, batch_size),
        "blockwise": measure(model, batch_size, segment=True),
        "its step with the residual network alone": measure(
            second, batch_size, segment=True, start=True
        ),
    }
    base, whole, changed = (row["flops"] for row in rows.values())
    print(f"\n{batch_size} rows, float32, one evaluation, XLA for a CPU\n")
    print("| network | GFLOP a row | beside plain | parameters, M | temporaries, MiB |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['flops'] / batch_size / 1e9:.2f} | {row['flops'] / base:.3f} | "
            f"{row['params'] / 1e6:.1f} | {row['temporaries'] / 2**20:.0f} |"
        )
    for k in STEPS:
        mean = (whole + (k - 1) * changed) / k
        print(
            f"| with the residual network, {k} steps a segment | {mean / batch_size / 1e9:.2f} | "
            f"{mean / base:.3f} | | |"
        )
    closed = forward_flops(plain) / 1e9, forward_flops(model) / 1e9
    print(f"\nin closed form: plain {closed[0]:.2f}, blockwise {closed[1]:.2f} GFLOP a row")


def measure(
    model_config: config_lib.ModelConfig,
    batch_size: int,
    *,
    segment: bool = False,
    start: bool = False,
) -> dict[str, float]:
    """Compiles one evaluation and counts it."""
    model: Any = build_model(model_config)
    params = nn.unbox(jax.eval_shape(lambda key: init_model_params(model, key), jax.random.key(0)))
    shape = jax.ShapeDtypeStruct
    size, width = model_config.latent_size, model_config.hidden_size
    tokens = (size // model_config.patch_size) ** 2
    arguments: dict[str, Any] = {}
    if segment:
        arguments["segment"] = shape((), jnp.int32)
    if start:
        arguments["start"] = shape((batch_size, 1, tokens, width), jnp.float32)
    compiled = (
        jax.jit(model.apply)
        .lower(
            {"params": params},
            shape((batch_size, size, size, model_config.in_channels), jnp.float32),
            shape((batch_size,), jnp.float32),
            shape((batch_size,), jnp.int32),
            **arguments,
        )
        .compile()
    )
    memory: Any = compiled.memory_analysis()
    return {
        "flops": program_cost(compiled.as_text() or "").matmul_flops,
        "params": float(sum(leaf.size for leaf in jax.tree.leaves(params))),
        "temporaries": float(memory.temp_size_in_bytes),
    }


def look(config: config_lib.Config, workdir: pathlib.Path) -> None:
    """Prints the jumps of the velocity at the boundaries; draws samples after each segment."""
    with run_lib.open_checkpoints(config, workdir) as checkpointer:
        step = checkpointer.resolve(None)
        experiment = run_lib.open_experiment(config, workdir, checkpointer, step)
        params = run_lib.restore_params(experiment, checkpointer, step)
    model: Any = experiment.model
    held_out = experiment_lib.open_held_out(config, workdir)
    assert held_out is not None, "the run has no held-out images"
    count = min(256, held_out.num_images)
    numbers = np.arange(count) * held_out.views
    batch = read_records(held_out, held_out.open(), numbers)
    latents, labels = jnp.asarray(batch["latents"]), jnp.asarray(batch["labels"])
    if held_out.stochastic:
        latents = sample_posterior(jax.random.key(1), latents)
    data = normalize(latents, experiment.latent_format)
    noise = sampler.initial_noise(0, jnp.arange(count), data.shape[1:])
    path = paths.get_path(config.flow.path)

    def evaluate(x: Any, t: Any, labels: Any, segment: Any) -> Any:
        times = jnp.full(len(x), t, jnp.float32)
        return model.apply({"params": params}, x, times, labels, segment=segment)

    velocity: Any = jax.jit(evaluate)
    print(f"\nstep {step}: root mean square over {count} held-out images, at each boundary\n")
    print(
        "| t | velocity before | after | difference | difference / before |\n|---|---|---|---|---|"
    )
    for segment in range(model.segments - 1):
        t = (segment + 1) / model.segments
        x = paths.interpolate(path, data, noise, jnp.full(count, t))
        before, after = (velocity(x, t, labels, s) for s in (segment, segment + 1))
        rms = [float(jnp.sqrt(jnp.square(v).mean())) for v in (before, after, after - before)]
        values = " | ".join(f"{value:.4f}" for value in (*rms, rms[2] / rms[0]))
        print(f"| {t:.3f} | {values} |")

    autoencoder = experiment.autoencoder
    assert autoencoder is not None
    classes = run_lib.present_classes(experiment)[:10]
    x, labels = noise[: len(classes)], jnp.asarray(classes, jnp.int32)
    pictures = [x]
    k = config.sampling.num_steps // model.segments
    for segment in range(model.segments):
        ends = segment / model.segments, (segment + 1) / model.segments
        times = solvers.time_grid(k, *ends)
        x = solvers.solve_ode(
            lambda x, t, s=segment: velocity(x, t, labels, s), x, times, config.sampling.solver
        )
        pictures.append(x)
    decoded = autoencoder.decode(
        autoencoder.params, denormalize(jnp.concatenate(pictures), experiment.latent_format)
    )
    images = np.asarray(to_uint8(decoded, config.sampling.rounding))
    upscale = max(1, 48 // images.shape[1])
    save_grid(images, workdir / "segments.png", columns=len(classes), upscale=upscale, smooth=True)
    print(f"\n{workdir / 'segments.png'}: noise, and the samples after each segment, row by row")


if __name__ == "__main__":
    main()
