"""One accelerator, one command: images/s and MFU, the cost of the bank, the largest batch.

    python -m benchmarks.accelerator --platform=cuda --peers     # XL/2 and B/2, bfloat16
    python -m benchmarks.accelerator --platform=cpu --sizes=S --batch_sizes=2 --dtype=float32

Every variant has the machine to itself, in its own process: none, the method and, with --peers,
diffusers' DiT under `torch.compile`, one after the other and then in the opposite order. A step
is forward, backward, AdamW and EMA. MFU counts the model's FLOPs, 3 x forward, against the
published bfloat16 peak or, if that is not known, against a large matrix product.

The largest batch is found by compiling: the memory of two batch sizes gives a line, and the
candidate is compiled and run before it is reported.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks import step as step_benchmark
from benchmarks.step import Worker

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="cuda", choices=["cpu", "cuda", "tpu"])
    parser.add_argument("--sizes", nargs="+", default=["XL", "B"], choices=["S", "B", "L", "XL"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[64, 256], help="of each")
    parser.add_argument("--patch_size", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="dots", choices=["none", "dots", "full"])
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn"])
    parser.add_argument("--bank_rows", type=int, default=65_536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="in one timing")
    parser.add_argument("--rounds", type=int, default=3, help="timings of a variant, twice")
    parser.add_argument("--peers", action="store_true", help="also diffusers' DiT in PyTorch")
    parser.add_argument("--largest", action="store_true", help="also the largest batch")
    args = parser.parse_args()
    if len(args.batch_sizes) != len(args.sizes):
        parser.error("--batch_sizes: give one for each of --sizes")
    args.allocator = "default"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"  # each variant has the memory to itself

    started = time.perf_counter()
    for size, batch_size in zip(args.sizes, args.batch_sizes, strict=True):
        args.size, args.batch_size = size, batch_size
        print_rows(args, measure(args))
    if args.largest:
        args.size, args.batch_size = args.sizes[0], args.batch_sizes[0]
        print_largest(args)
    print(f"\nall in {(time.perf_counter() - started) / 60:.1f} minutes")


def measure(args: argparse.Namespace) -> dict[str, Row]:
    """Times every variant, there and back, each alone on the device."""
    builders: dict[str, step_benchmark.Build] = {
        name: functools.partial(step_benchmark.build_jax, name) for name in ("none", "repulsor")
    }
    if args.peers:
        builders["torch compiled"] = functools.partial(step_benchmark.build_torch, True)
    builders["matmul"] = step_benchmark.build_jax_matmul
    rows: dict[str, Row] = {}
    for name in [*builders, *reversed(builders)]:
        worker = Worker(builders[name], args)
        worker.run()  # the first run is slower
        times = [worker.run() for _ in range(args.rounds)]
        row = rows.setdefault(name, worker.info | {"times": []})
        row["times"] += times
        if name != "matmul":
            row["peak_bytes"] = worker.run("peak_bytes")
        worker.close()
    return rows


def print_rows(args: argparse.Namespace, rows: dict[str, Row]) -> None:
    from repulsor_jax.runtime import chips

    kind = rows["none"]["device_kind"]
    chip = chips.find(kind)
    product = rows["matmul"]["flops"] / statistics.median(rows["matmul"]["times"])
    published = chip and chip.peak_flops / chip.devices_per_chip
    peak, of = (published, "published") if published else (product, "matrix product's")
    flops = 3 * step_benchmark.forward_flops(args)
    print(
        f"\nDiT-{args.size}/{args.patch_size}, 32x32x4, batch {args.batch_size}, {args.dtype}, "
        f"remat {args.remat}, {kind}; {of} peak {peak / 1e12:.4g} TFLOP/s, "
        f"matrix product {product / 1e12:.4g}\n"
    )
    print("| step | s/step (min to max) | images/s | MFU | peak memory | compiled in |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        if name == "matmul":
            continue
        times = row["times"]
        seconds = statistics.median(times)
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else "-"
        compiled = f"{row['compile_seconds']:.0f} s" if "compile_seconds" in row else "-"
        print(
            f"| {row['label']} | {seconds:.4f} ({min(times):.4f} to {max(times):.4f}) "
            f"| {args.batch_size / seconds:.1f} | {flops / seconds / peak:.1%} | {memory} "
            f"| {compiled} |"
        )
    medians = {name: statistics.median(row["times"]) for name, row in rows.items()}
    print(
        f"\nThe method against none, K = {args.bank_rows:,}, d = {args.dim}: "
        f"x {medians['repulsor'] / medians['none']:.4f} the time"
    )
    if "torch compiled" in medians:
        ratio = medians["torch compiled"] / medians["none"]
        print(f"repulsor_jax against compiled PyTorch: x {ratio:.3f} the images/s")


def print_largest(args: argparse.Namespace) -> None:
    """Finds the largest batch, to a multiple of 8, whose compiled step fits, and runs it."""
    worker = Worker(_build_largest, args)
    worker.close()
    found = worker.info
    print(f"\nlargest batch of DiT-{args.size}/{args.patch_size}: {found['tried']}")


def _build_largest(args: argparse.Namespace) -> tuple[Callable[..., float], Row]:
    small, large = args.batch_size, 2 * args.batch_size
    limit, needs_small = _compiled_bytes(args, small)
    if limit is None:
        return (lambda: 0.0), {"tried": "the device says no limit of its memory"}
    _, needs_large = _compiled_bytes(args, large)
    slope = (needs_large - needs_small) / (large - small)
    candidate = int((limit - needs_small) / slope + small) // 8 * 8
    tried = []
    while candidate > 0:
        try:
            timed, _ = step_benchmark.build_jax("repulsor", _with_batch(args, candidate))
            timed()
            tried.append(f"{candidate} runs")
            break
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tried.append(f"{candidate} does not fit")
            candidate -= max(8, candidate // 16 // 8 * 8)
    return (lambda: 0.0), {"tried": ", ".join(tried)}


def _with_batch(args: argparse.Namespace, batch_size: int) -> argparse.Namespace:
    """The same arguments with another batch, and a bank of about the same size."""
    slots = max(1, args.bank_rows // batch_size)
    return argparse.Namespace(
        **vars(args) | {"batch_size": batch_size, "bank_rows": slots * batch_size}
    )


def _compiled_bytes(args: argparse.Namespace, batch_size: int) -> tuple[int | None, int]:
    """Bytes of the device that programs may use, and bytes that the compiled step needs."""
    import jax

    program, _ = step_benchmark.compile_jax("repulsor", _with_batch(args, batch_size))
    found = program.step.memory_analysis()
    needs = found.argument_size_in_bytes + found.temp_size_in_bytes
    needs += found.output_size_in_bytes - found.alias_size_in_bytes
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit"), needs


if __name__ == "__main__":
    main()
