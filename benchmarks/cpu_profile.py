"""Where the time of a step goes on one core of a CPU: ours, and PyTorch's compiled one.

    python -m benchmarks.cpu_profile
    pip install torch diffusers && python -m benchmarks.cpu_profile --peers

On one core nothing runs at the same time, so that the times of a step's parts add up. Prints, for
each program, ms by kind of work, and the rate of its matrix products.
"""

import argparse
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import step

KINDS = ("matrix products", "attention", "optimizer and average", "the rest, elementwise")
PRODUCTS, ATTENTION, UPDATE, REST = KINDS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    step.add_options(parser, rounds=4)
    args = parser.parse_args()
    args.bank_rows, args.dim, args.steps = 65_536, 128, 1
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # workers inherit it
    os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch counts the machine's cores
    builders: dict[str, step.Build] = {"repulsor_jax": profile_jax}
    if args.peers:
        builders["PyTorch compiled"] = profile_torch
    workers = step.start_workers(builders, args)
    infos = {name: worker.info for name, worker in workers.items()}
    print(f"\n{step.setting(args)}; one core used\n")
    print("| | ms/step | " + " | ".join(KINDS) + " | GFLOP/s of the products |")
    print("|---|---|" + "---|" * len(KINDS) + "---|")
    for name in builders:
        found, linear = infos[name]["ms"], infos[name]["flops"]
        rate = linear / found[PRODUCTS] / 1e6
        cells = " | ".join(f"{found[kind]:.0f}" for kind in KINDS)
        print(f"| {name} | {infos[name]['seconds'] * 1e3:.0f} | {cells} | {rate:.0f} |")


def linear_flops(args: argparse.Namespace) -> float:
    """FLOPs of a step's products of activations and weights: all but attention's two."""
    from repulsor_jax.models.dit import DIT_SIZES

    size, tokens = DIT_SIZES[args.size], (32 // args.patch_size) ** 2
    attention = 4 * args.batch_size * size["depth"] * size["hidden_size"] * tokens**2
    return 3 * (step.forward_flops(args) - attention)


def profile_jax(args: argparse.Namespace) -> tuple[step.Timed, dict[str, Any]]:
    program, mesh = step.compile_jax("none", args)
    import jax

    state, batch = program.create_state(), step.random_batch(args, mesh)

    def run() -> None:
        nonlocal state
        state, metrics = program.step(state, batch)
        jax.block_until_ready((state, metrics))

    seconds = step_seconds(run, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    made_by = dict(re.findall(r'%([\w.-]+) = .*op_name="([^"]*)"', program.step.as_text() or ""))
    events = (
        (_kind_of_hlo(made_by[event.name], event.name), event.duration_ns / 1e6)
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name in made_by
    )
    return profiled(args, seconds, events)


def _kind_of_hlo(op: str, name: str) -> str:
    if "/cond" in op:
        return UPDATE
    if "_attend/" in op and not re.search("_attend/(qkv|proj)/", op):
        return ATTENTION
    return PRODUCTS if re.search(r"dot_general|/transpose$", op) and "copy" not in name else REST


def profile_torch(args: argparse.Namespace) -> tuple[step.Timed, dict[str, Any]]:
    import torch

    timed, _ = step.build_torch(True, args)
    seconds = step_seconds(timed, args.rounds)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        timed()
    events = ((_kind_of_torch(e.key), e.self_cpu_time_total / 1e3) for e in found.key_averages())
    return profiled(args, seconds, events)


def _kind_of_torch(name: str) -> str:
    if re.fullmatch(r"aten::(mm|addmm|bmm)", name):
        return PRODUCTS
    if "scaled_dot_product" in name:
        return ATTENTION
    return UPDATE if re.search("adamw|lerp|Optimizer", name) else REST


def profiled(
    args: argparse.Namespace, seconds: float, events: Iterable[tuple[str, float]]
) -> tuple[step.Timed, dict[str, Any]]:
    """What a worker returns: nothing to time any more, and ms by kind of the events' (kind, ms)."""
    total = dict.fromkeys(KINDS, 0.0)
    for kind, ms in events:
        total[kind] += ms
    return (lambda: 0.0), {"ms": total, "seconds": seconds, "flops": linear_flops(args)}


def step_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the quickest of some runs, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
