"""Cost of the method, and of the step against PyTorch: one DiT, one machine, interleaved.

    python -m benchmarks.step                       # with and without the method
    python -m benchmarks.step --objectives=layersync,sra,repulsor_positives
    pip install torch diffusers && python -m benchmarks.step --peers

Every variant has its own process, which builds and compiles a train step (forward, backward, AdamW,
EMA) and then takes its turn in every round: noise of the machine meets all variants alike. Prints
median time and images/s, ratios, and the share of the machine's matrix-product peak, measured in
the same rounds. Rates count the model's FLOPs, 3 x forward, the same number for every variant.

On Linux, all variants run with the same allocator settings, which keep freed memory mapped. Without
them (--allocator=default), every step pays for the page faults of its temporaries again.
"""

import argparse
import contextlib
import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

REUSE_MEMORY = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0xffffffffff:glibc.malloc.arena_max=1"
)

Timed = Callable[..., float]  # runs the case of its arguments once; returns seconds
Build = Callable[[argparse.Namespace], tuple[Timed, dict[str, Any]]]  # and facts to print


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds=7)
    parser.add_argument("--bank_rows", type=int, default=65_536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1, help="steps of a variant in a round")
    parser.add_argument("--objectives", default="repulsor", help="presets of configs/objectives.py")
    args = parser.parse_args()

    builders: dict[str, Build] = {
        name: functools.partial(build_jax, name) for name in ("none", *args.objectives.split(","))
    }
    if args.peers:
        builders["torch eager"] = functools.partial(build_torch, False)
        builders["torch compiled"] = functools.partial(build_torch, True)
    workers = start_workers(builders | matmul_builders(args), args)
    info = {name: worker.info for name, worker in workers.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.run(), worker.run()
    for _ in range(args.rounds):
        for name, worker in workers.items():
            times[name].append(worker.run())
    print_tables(args, info, times)


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the arguments that all comparisons of a model on a machine share."""
    parser.add_argument("--platform", default="cpu", choices=["cpu", "cuda", "tpu"])
    parser.add_argument("--size", default="S", choices=["S", "B", "L", "XL"])
    parser.add_argument("--patch_size", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--peers", action="store_true", help="also diffusers' DiT in PyTorch")
    parser.add_argument("--allocator", default="reuse", choices=["reuse", "default"])


def print_tables(
    args: argparse.Namespace, info: dict[str, dict], times: dict[str, list[float]]
) -> None:
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peak = matmul_peak(info, times)
    flops = 3 * forward_flops(args)
    print(
        f"\n{setting(args)}; median of {args.rounds} rounds; "
        f"matrix-product peak {peak / 1e9:.0f} GFLOP/s\n"
    )
    print("| step | s/step (min to max) | images/s | relative to torch eager | share of peak |")
    print("|---|---|---|---|---|")
    for name, values in times.items():
        if "matmul" in name:
            continue
        ratio = f"{seconds['torch eager'] / seconds[name]:.2f}" if args.peers else "-"
        print(
            f"| {info[name]['label']} | {seconds[name]:.3f} ({min(values):.3f} to "
            f"{max(values):.3f}) | {args.batch_size / seconds[name]:.2f} | {ratio} "
            f"| {flops / seconds[name] / peak:.0%} |"
        )
    none = info["none"]
    print(f"\nAgainst none, K = {args.bank_rows:,}, d = {args.dim}:\n")
    print("| objective | step time | FLOPs of the compiled step | bank | heads and their moments |")
    print("|---|---|---|---|---|")
    for name in args.objectives.split(","):
        pairs = [b / a for a, b in zip(times["none"], times[name], strict=True)]
        found = info[name]
        print(
            f"| {name} | x {statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f}) "
            f"| x {found['program_flops'] / none['program_flops']:.4f} "
            f"| {found['bank_bytes']:,} bytes "
            f"| {found['state_bytes'] - none['state_bytes'] - found['bank_bytes']:,} bytes |"
        )


def setting(args: argparse.Namespace) -> str:
    """The common settings of all variants, in words."""
    return (
        f"DiT-{args.size}/{args.patch_size}, 32x32x4, batch {args.batch_size}, {args.dtype}, "
        f"{args.platform}, {os.cpu_count()} cores, {args.allocator} allocator"
    )


def matmul_peak(info: dict[str, dict], times: dict[str, list[float]]) -> float:
    """FLOP/s of the faster library's large matrix product, by its median time."""
    return max(
        info[name]["flops"] / statistics.median(times[name]) for name in times if "matmul" in name
    )


def forward_flops(args: argparse.Namespace) -> float:
    """FLOPs of one forward pass of the transformer on a batch, 2 per multiply-add."""
    from repulsor_jax import config as config_lib
    from repulsor_jax.runtime import throughput

    return args.batch_size * throughput.forward_flops(config_lib.parse(model_config(args)).model)


class Worker:
    """A process that builds one variant, then times it when asked.

    At the `deadline` of `time.monotonic` it is ended, and what waits for it raises TimeoutError.
    """

    def __init__(self, build: Build, args: argparse.Namespace, deadline: float = math.inf) -> None:
        self._deadline = deadline
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, args, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.info = self._receive()  # workers build one after the other: each build has all cores

    def run(self, *case: Any) -> float:
        """Runs the variant's case and returns its seconds."""
        self._pipe.send(case)
        return self._receive()

    def _receive(self) -> Any:
        left = self._deadline - time.monotonic()
        if not self._pipe.poll(None if math.isinf(left) else max(left, 0)):
            self._process.kill()
            self.close()
            raise TimeoutError
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process, which frees the memory of its device."""
        self._pipe.close()
        self._process.join()


def start_workers(builders: dict[str, Build], args: argparse.Namespace) -> dict[str, Worker]:
    """Starts a worker for each variant, with the requested allocator settings."""
    if args.allocator == "reuse":
        os.environ["GLIBC_TUNABLES"] = REUSE_MEMORY  # read when a worker starts
    return {name: Worker(build, args) for name, build in builders.items()}


def matmul_builders(args: argparse.Namespace) -> dict[str, Build]:
    """The large matrix products, whose rate `matmul_peak` returns."""
    builders: dict[str, Build] = {"jax matmul": build_jax_matmul}
    return builders | ({"torch matmul": build_torch_matmul} if args.peers else {})


def _serve(build: Build, args: argparse.Namespace, pipe: Connection) -> None:
    timed, info = build(args)
    pipe.send(info)
    with contextlib.suppress(EOFError):  # the parent closed the pipe
        while True:
            pipe.send(timed(*pipe.recv()))


def model_config(args: argparse.Namespace) -> Any:
    """The default configuration with the model of the arguments."""
    from configs import default
    from repulsor_jax.models.dit import DIT_SIZES

    c = default.get_config()
    c.model.update(DIT_SIZES[args.size])
    c.model.patch_size = args.patch_size
    c.model.scan_blocks = args.platform != "cpu"
    c.model.dtype = args.dtype
    c.model.remat = getattr(args, "remat", "none")
    c.model.attention = getattr(args, "attention", "auto")
    return c


def compile_jax(objective: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """The compiled training program, and the mesh."""
    os.environ["JAX_PLATFORMS"] = args.platform
    import numpy as np

    from configs import objectives
    from repulsor_jax import config as config_lib
    from repulsor_jax import sharding
    from repulsor_jax.data.latents import LatentFormat
    from repulsor_jax.experiment import make_trainer
    from repulsor_jax.train_step import compile_training

    c = model_config(args)
    c.batch_size = args.batch_size
    c.repulsor.bank_rows = args.bank_rows
    c.repulsor.projection_dim = args.dim
    c.repulsor.bank_dtype = args.dtype
    objectives.use(c, objective, args.size)
    config = config_lib.parse(c)
    mesh = sharding.create_mesh()
    latent_format = LatentFormat(False, np.zeros(4, np.float32), np.ones(4, np.float32))
    trainer = make_trainer(config, mesh)
    return compile_training(trainer, latent_format, (32, 32, 4), "float16", mesh), mesh


def build_jax(objective: str, args: argparse.Namespace) -> tuple[Timed, dict[str, Any]]:
    started = time.perf_counter()
    program, mesh = compile_jax(objective, args)
    compiled, abstract = program.step, program.abstract_state
    compile_seconds = time.perf_counter() - started
    import jax

    from repulsor_jax.planning.cost import program_cost
    from repulsor_jax.planning.estimate import estimate
    from repulsor_jax.planning.topology import Topology

    cost = program_cost(compiled.as_text() or "")
    parts = estimate(cost, mesh, Topology("local", tuple(mesh.devices.flat)))
    state, batch = program.create_state(), random_batch(args, mesh)

    def timed(what: str = "seconds") -> float:
        nonlocal state
        if what == "peak_bytes":
            return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        started = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - started) / args.steps

    return timed, {
        "label": f"repulsor_jax, {objective}",
        "device_kind": jax.devices()[0].device_kind,
        "compile_seconds": compile_seconds,
        "program_flops": cost.matmul_flops,
        "planned_seconds": parts and (max(parts.values()), sum(parts.values())),
        "planned_bytes": compiled_bytes(compiled),
        "bank_bytes": _num_bytes(abstract.bank),
        "state_bytes": _num_bytes(abstract),
    }


def random_batch(args: argparse.Namespace, mesh: Any) -> Any:
    """A batch of noise for the program of `compile_jax`."""
    import numpy as np

    from repulsor_jax import sharding

    rng = np.random.default_rng(0)
    return sharding.to_global(
        {
            "latents": rng.standard_normal((args.batch_size, 32, 32, 4)).astype(np.float16),
            "labels": rng.integers(0, 1000, args.batch_size).astype(np.int32),
            "ids": np.arange(args.batch_size, dtype=np.int32),
        },
        mesh,
    )


def compiled_bytes(compiled: Any) -> int:
    """Memory of a device that a compiled step takes, its arguments included."""
    found = compiled.memory_analysis()
    used = found.argument_size_in_bytes + found.temp_size_in_bytes
    return used + found.output_size_in_bytes - found.alias_size_in_bytes


def _num_bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def build_jax_matmul(args: argparse.Namespace, size: int = 2048) -> tuple[Timed, dict[str, Any]]:
    os.environ["JAX_PLATFORMS"] = args.platform
    import jax

    a = jax.random.normal(jax.random.key(0), (size, size), args.dtype)
    product = jax.jit(lambda a, b: a @ b)

    def timed() -> float:
        started = time.perf_counter()
        jax.block_until_ready([product(a, a) for _ in range(5)])
        return time.perf_counter() - started

    return timed, {"flops": 5 * 2 * size**3, "device_kind": jax.devices()[0].device_kind}


def torch_dit(args: argparse.Namespace) -> Any:
    """diffusers' DiT of the size and on the device of the arguments."""
    import torch
    from diffusers import DiTTransformer2DModel

    from repulsor_jax.models.dit import DIT_SIZES

    size = DIT_SIZES[args.size]
    torch.manual_seed(0)
    network: Any = DiTTransformer2DModel(
        num_attention_heads=size["num_heads"],
        attention_head_dim=size["hidden_size"] // size["num_heads"],
        in_channels=4,
        out_channels=4,
        num_layers=size["depth"],
        sample_size=32,
        patch_size=args.patch_size,
        num_embeds_ada_norm=1000,
    )
    return network.to(args.platform)


def build_torch(compile_it: bool, args: argparse.Namespace) -> tuple[Timed, dict[str, Any]]:
    import torch

    device = torch.device(args.platform)
    model = torch_dit(args)
    parameters = list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    data = torch.randn(args.batch_size, 4, 32, 32, device=device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=device)
    forward = torch.compile(model) if compile_it else model
    half = args.dtype == "bfloat16"

    def step() -> torch.Tensor:
        t = torch.rand(args.batch_size, device=device)
        noise = torch.randn_like(data)
        x = t[:, None, None, None] * data + (1 - t[:, None, None, None]) * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = forward(x, timestep=t, class_labels=labels).sample
        loss = ((output.float() - (data - noise)) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1e-4)
        return loss.detach()

    def timed(what: str = "seconds") -> float:
        if what == "peak_bytes":
            return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        started = time.perf_counter()
        for _ in range(args.steps):
            loss = step()
        loss.item()
        return (time.perf_counter() - started) / args.steps

    return timed, {"label": f"PyTorch {'compiled' if compile_it else 'eager'} (diffusers)"}


def build_torch_matmul(args: argparse.Namespace, size: int = 2048) -> tuple[Timed, dict[str, Any]]:
    import torch

    a = torch.randn(size, size, device=args.platform, dtype=getattr(torch, args.dtype))

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(5):
            product = a @ a
        product[0, 0].item()
        return time.perf_counter() - started

    return timed, {"flops": 5 * 2 * size**3}


if __name__ == "__main__":
    main()
