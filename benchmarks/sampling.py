"""Cost of sampling, against PyTorch: one DiT, one machine, Euler steps, interleaved.

    python -m benchmarks.sampling                       # ours alone
    pip install torch diffusers && python -m benchmarks.sampling --peers

Prints seconds per image, unguided and guided (classifier-free, all channels, 2 B rows a step), and
the share of the machine's matrix-product peak, measured in the same rounds; the cost of one more
step against the cost of the model; the compile time of the sampler for few and many steps; and the
number of compilations while the guidance changes. Nothing is decoded. Rates count the model's
FLOPs, the same number for every variant.

Every implementation has its own process and takes its turn in every round; see
`benchmarks.step` for the allocator settings, the peak and the PyTorch model that both share.
"""

import argparse
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.step import (
    Build,
    Timed,
    add_options,
    forward_flops,
    matmul_builders,
    matmul_peak,
    model_config,
    setting,
    start_workers,
    torch_dit,
)

OURS = "repulsor_jax"
GUIDED = (False, True)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Case(NamedTuple):
    """A case that a worker times: a number of steps from noise; 0 is one call of the model."""

    guided: bool
    num_steps: int


class Call(NamedTuple):
    """One call of the generator: its guidance in words, and the outcome."""

    guidance: str
    num_compilations: int
    is_new: bool  # the images differ from all earlier ones


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds=5)
    parser.add_argument("--num_steps", type=int, default=8, help="Euler steps; at least 2")
    parser.add_argument(
        "--many_steps", type=int, default=250, help="also compiled for so many, but not run"
    )
    parser.add_argument("--cfg_scale", type=float, default=1.5, help="of the guided samplers")
    args = parser.parse_args()
    if args.num_steps < 2:
        parser.error(f"--num_steps is {args.num_steps}; a slope takes at least 2")

    builders: dict[str, Build] = {OURS: build_jax}
    if args.peers:
        builders["PyTorch eager (diffusers)"] = functools.partial(build_torch, False)
        builders["PyTorch compiled (diffusers)"] = functools.partial(build_torch, True)
    matmuls = matmul_builders(args)
    workers = start_workers(builders | matmuls | {"sweep": build_sweep}, args)
    info = {name: worker.info for name, worker in workers.items()}
    for name in matmuls:
        workers[name].run()
    products: dict[str, list[float]] = {name: [] for name in matmuls}
    times: dict[tuple[str, Case], list[float]] = {}
    for _ in range(args.rounds):
        for name in matmuls:
            products[name].append(workers[name].run())
        for guided in GUIDED:
            case = Case(guided, args.num_steps)
            turns = [(name, case) for name in builders]
            turns += [(OURS, Case(guided, count)) for count in (few_steps(args), 0)]
            for name, case in turns:
                times.setdefault((name, case), []).append(workers[name].run(*case))
    peak = matmul_peak(info, products)
    print(
        f"\n{setting(args)}; {args.num_steps} Euler steps; median of {args.rounds} rounds "
        f"(least to most); matrix-product peak {peak / 1e9:.0f} GFLOP/s"
    )
    print_speed(args, list(builders), times, peak)
    print_steps(args, times)
    print_compilation(args, info)
    print_sweep(info["sweep"]["calls"])


def print_speed(
    args: argparse.Namespace,
    names: list[str],
    times: dict[tuple[str, Case], list[float]],
    peak: float,
) -> None:
    for guided in GUIDED:
        case = Case(guided, args.num_steps)
        flops = forward_flops(args) * (1 + guided)
        floor = args.num_steps * flops / peak / args.batch_size
        title = f"Guided, scale {args.cfg_scale}" if guided else "Unguided"
        print(
            f"\n{title}: {flops / args.batch_size / 1e9:.2f} GFLOP an image and step, "
            f"at the peak {floor:.3f} s/image.\n"
        )
        print("| sampler | s/image | relative to torch eager | share of peak |")
        print("|---|---|---|---|")
        for name in names:
            per_image = [seconds / args.batch_size for seconds in times[name, case]]
            ratio = "-"
            if args.peers:
                eager = times[names[1], case]
                ratio = spread([a / b for a, b in zip(eager, times[name, case], strict=True)], 2)
            share = floor / statistics.median(per_image)
            print(f"| {name} | {spread(per_image, 3)} | {ratio} | {share:.0%} |")


def print_steps(args: argparse.Namespace, times: dict[tuple[str, Case], list[float]]) -> None:
    few, many = few_steps(args), args.num_steps
    print(f"\nA step more, from {few} to {many} steps, against the model alone (jitted, once):\n")
    print("| | s/step, slope | s, model alone | slope / model alone |")
    print("|---|---|---|---|")
    for guided in GUIDED:
        alone, short, long = (times[OURS, Case(guided, count)] for count in (0, few, many))
        slopes = [(b - a) / (many - few) for a, b in zip(short, long, strict=True)]
        ratios = [slope / once for slope, once in zip(slopes, alone, strict=True)]
        print(
            f"| {title_of(guided)}, {args.batch_size * (1 + guided)} rows | {spread(slopes, 3)} "
            f"| {spread(alone, 3)} | {spread(ratios, 2)} |"
        )


def print_compilation(args: argparse.Namespace, info: dict[str, dict[str, Any]]) -> None:
    counts = compiled_step_counts(args)
    compiled = [name for name in info if info[name].get("compile_calls")]
    print(
        "\nSeconds before the first step: for ours, to trace and lower + to compile, each program "
        "from nothing; for torch.compile, the first call less the second, for any number of steps\n"
    )
    titles = [*(f"{OURS}, {count} steps" for count in counts), *compiled]
    print(f"| | {' | '.join(titles)} |")
    print("|---" * (1 + len(titles)) + "|")
    for guided in GUIDED:
        parts = [info[OURS]["compile_parts"][Case(guided, count)] for count in counts]
        cells = [f"{lower:.1f} + {compilation:.1f}" for lower, compilation in parts]
        for name in compiled:
            first, second = info[name]["compile_calls"][guided]
            cells.append(f"{first - second:.1f}")
        print(f"| {title_of(guided)} | {' | '.join(cells)} |")


def print_sweep(calls: list[Call]) -> None:
    print("\nOne process, one generator (a small model, identity autoencoder), call after call:\n")
    print("| guidance | XLA compilations | images |")
    print("|---|---|---|")
    for call in calls:
        images = "new" if call.is_new else "as before"
        print(f"| {call.guidance} | {call.num_compilations} | {images} |")
    after = calls[2:]
    print(
        f"\nCompilations in {len(after)} calls after the first guided one: "
        f"{sum(call.num_compilations for call in after)}"
    )


def spread(values: list[float], digits: int) -> str:
    """The median (least to most)."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def title_of(guided: bool) -> str:
    return "guided" if guided else "unguided"


def few_steps(args: argparse.Namespace) -> int:
    """Where the slope starts."""
    return max(1, args.num_steps // 4)


def compiled_step_counts(args: argparse.Namespace) -> tuple[int, int, int]:
    return few_steps(args), args.num_steps, args.many_steps


def build_jax(args: argparse.Namespace) -> tuple[Timed, dict[str, Any]]:
    """Our sampler as `repulsor_jax.inference.generator` jits it: scale and interval are traced."""
    os.environ["JAX_PLATFORMS"] = args.platform
    import jax
    import numpy as np

    from repulsor_jax import config as config_lib
    from repulsor_jax.inference.generator import make_latent_sampler
    from repulsor_jax.models.build import build_model

    c = model_config(args)
    c.sampling.solver = "euler"
    model = build_model(config_lib.parse(c).model)
    params = random_params(model)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2 * args.batch_size, 32, 32, 4)).astype(np.float32)
    labels = rng.integers(0, 1000, 2 * args.batch_size).astype(np.int32)
    times = np.full(2 * args.batch_size, 0.5, np.float32)
    guidance = np.float32(args.cfg_scale), (np.float32(0), np.float32(1))

    programs, inputs = {}, {}
    compile_parts: dict[Case, tuple[float, float]] = {}
    for guided in GUIDED:
        for num_steps in (0, *compiled_step_counts(args)):
            case = Case(guided, num_steps)
            if num_steps:
                c.sampling.num_steps = num_steps
                function: Callable[..., Any] = make_latent_sampler(config_lib.parse(c), model)
                rows = slice(args.batch_size)
                given: tuple[Any, ...] = (noise[rows], labels[rows])
                given += guidance if guided else (None, None)
            else:
                function = lambda params, *given: model.apply({"params": params}, *given)
                rows = slice(args.batch_size * (1 + guided))
                given = (noise[rows], times[rows], labels[rows])
            inputs[case] = (params, *jax.device_put(given))
            jax.clear_caches()  # each compilation starts with empty caches, as in a new process
            started = time.perf_counter()
            lowered = jax.jit(function).lower(*inputs[case])
            lowered_at = time.perf_counter()
            programs[case] = lowered.compile()
            compile_parts[case] = lowered_at - started, time.perf_counter() - lowered_at

    def timed(*case: Any) -> float:
        started = time.perf_counter()
        samples = jax.block_until_ready(programs[Case(*case)](*inputs[Case(*case)]))
        elapsed = time.perf_counter() - started
        assert np.isfinite(samples).all()
        return elapsed

    for guided in GUIDED:
        for num_steps in (0, few_steps(args), args.num_steps):
            timed(guided, num_steps)
    return timed, {"compile_parts": compile_parts}


def random_params(model: Any) -> Any:
    """Normal values of deviation 0.02: with initialised parameters the model's output is zero."""
    import flax.linen as nn
    import jax

    from repulsor_jax.models.build import init_model_params

    shapes = jax.eval_shape(lambda key: nn.unbox(init_model_params(model, key)), jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def build_torch(compile_it: bool, args: argparse.Namespace) -> tuple[Timed, dict[str, Any]]:
    """The same Euler steps and guidance around diffusers' model, compiled or not."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = (
        "1"  # the caches of an earlier run would hide the cost
    )
    import torch

    device = torch.device(args.platform)
    model = torch_dit(args).eval()
    # With dynamic shapes, the program for 2 B rows would be a general and slower one.
    forward = torch.compile(model, dynamic=False) if compile_it else model
    noise = torch.randn(args.batch_size, 4, 32, 32, device=device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=device)
    labels_and_nulls = torch.cat([labels, torch.full_like(labels, 1000)])
    half = args.dtype == "bfloat16"

    def predict(x: torch.Tensor, t: float, labels: torch.Tensor) -> torch.Tensor:
        times = torch.full((len(x),), t, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return forward(x, timestep=times, class_labels=labels).sample.float()

    def velocity(x: torch.Tensor, t: float, guided: bool) -> torch.Tensor:
        if not guided:
            return predict(x, t, labels)
        conditional, unconditional = predict(torch.cat([x, x]), t, labels_and_nulls).chunk(2)
        return unconditional + args.cfg_scale * (conditional - unconditional)

    @torch.no_grad()
    def timed(guided: bool, num_steps: int) -> float:
        started = time.perf_counter()
        x = noise
        for i in range(num_steps):
            x = x + velocity(x, i / num_steps, guided) / num_steps
        finite = x.isfinite().all().item()
        elapsed = time.perf_counter() - started
        assert finite
        return elapsed

    calls = {guided: (timed(guided, 1), timed(guided, 1)) for guided in GUIDED}
    return timed, {"compile_calls": calls if compile_it else None}


def build_sweep(args: argparse.Namespace) -> tuple[Timed, dict[str, Any]]:
    """Counts compilations while one generator samples under changing guidance."""
    os.environ["JAX_PLATFORMS"] = args.platform
    import jax
    import numpy as np

    from configs import default
    from repulsor_jax import config as config_lib
    from repulsor_jax import sharding
    from repulsor_jax.autoencoders import get_autoencoder
    from repulsor_jax.data.latents import LatentFormat
    from repulsor_jax.experiment import Experiment
    from repulsor_jax.inference.generator import Guidance, generate_images, make_generator
    from repulsor_jax.models.build import build_model

    c = default.get_config()
    c.model.update(latent_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2)
    c.model.update(num_classes=3, dtype="float32")
    c.sampling.update(num_steps=4, batch_size=8)
    config = config_lib.parse(c)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    experiment = Experiment(
        config=config,
        workdir=pathlib.Path(),
        mesh=mesh,
        model=build_model(config.model),
        autoencoder=get_autoencoder("identity"),
        latent_format=LatentFormat(False, np.zeros(3, np.float32), np.ones(3, np.float32)),
        latents_sha256="",
        class_names=("a", "b", "c"),
    )
    generator = make_generator(experiment)
    # Larger values than in the comparison, so that uint8 images of two settings differ.
    params = jax.tree.map(lambda x: 10.0 * x, random_params(experiment.model))
    params = jax.device_put(params, sharding.replicated(mesh))

    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == COMPILE_EVENT:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    settings = [
        None,
        Guidance(1.5),
        Guidance(2.0),
        Guidance(4.0),
        Guidance(4.0, 0.0, 0.5),
        Guidance(4.0, 0.3, 0.8),
        Guidance(7.5, 0.3, 0.8),
        Guidance(1.0),  # equal to no guidance
        None,
    ]
    calls, seen = [], set()
    for guidance in settings:
        compilations.clear()
        images, _ = generate_images(generator, params, config.sampling.batch_size, guidance)
        words = "none" if guidance is None else "scale {}, interval {} to {}".format(*guidance)
        calls.append(Call(words, len(compilations), images.tobytes() not in seen))
        seen.add(images.tobytes())
    return lambda: 0.0, {"calls": calls}


if __name__ == "__main__":
    main()
