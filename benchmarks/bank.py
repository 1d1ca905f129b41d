"""The loss against a large bank, as its rows grow: both forms, time, memory, FLOPs and error.

    python -m benchmarks.bank                                  # 65,536 to 1,048,576 x 128
    python -m benchmarks.bank --rows 65536 --batch_size 32 --dtypes float32

A run is loss, gradient and enqueue, with a full bank. Every form, size and dtype has two processes:
one runs once, for its memory; the other takes its turn in every round, for its time. Peak memory is
the memory that the first run takes above the memory before it, the bank included. Loss and gradient
are compared with NumPy in float64, over chunks of the same rows. FLOPs are those of the matrix
products of the compiled program, every turn of its loops included.
"""

import argparse
import ctypes
import functools
import gc
import os
import pathlib
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.step import Build, Timed, Worker, start_workers

TEMPERATURE = 0.5
ROWS_AT_ONCE = 16_384  # rows of the bank, in the reference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="cpu", choices=["cpu", "cuda", "tpu"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[65_536, 262_144, 1_048_576])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", default=["direct", "online"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--allocator", default="reuse", choices=["reuse", "default"])
    args = parser.parse_args()
    for rows in args.rows:
        if rows % args.batch_size or rows < 2 * args.batch_size:
            parser.error(f"--rows={rows} must be a multiple of --batch_size={args.batch_size}")

    print(
        f"\nbatch {args.batch_size}, d = {args.dim}, {args.platform}, {os.cpu_count()} cores, "
        f"median of {args.rounds} rounds; the form marked * is chosen by itself\n"
    )
    print(
        "| rows | bank | form | s/run (min to max) | peak memory | compiled temporaries "
        "| GFLOP | error of loss | of gradient |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for rows in args.rows:
        for dtype in args.dtypes:
            print_lines(rows, dtype, args)


def print_lines(rows: int, dtype: str, args: argparse.Namespace) -> None:
    """Measures both forms at one size."""
    builders: dict[str, Build] = {
        form: functools.partial(build, form, rows, dtype) for form in args.forms
    }
    peaks = {}
    for form, builder in builders.items():  # alone, with an allocator that returns memory
        os.environ.pop("GLIBC_TUNABLES", None)
        peaks[form] = Worker(builder, args).run("memory")
    expected = reference(rows, dtype, args)
    workers = start_workers(builders, args)
    times: dict[str, list[float]] = {form: [] for form in workers}
    for worker in workers.values():
        worker.run("time")
    for _ in range(args.rounds):
        for form, worker in workers.items():
            times[form].append(worker.run("time"))
    for form, seconds in times.items():
        info = workers[form].info
        errors = [
            np.abs(found - exact).max() / np.abs(exact).max()
            for found, exact in zip((info["loss"], info["gradient"]), expected, strict=True)
        ]
        print(
            f"| {rows:,} | {dtype} | {form}{'*' * info['chosen']} "
            f"| {statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f}) "
            f"| {peaks[form] / 2**20:,.0f} MiB | {info['temp_bytes'] / 2**20:,.1f} MiB "
            f"| {info['flops'] / 1e9:.2f} | {errors[0]:.1e} | {errors[1]:.1e} |",
            flush=True,
        )


def build(
    form: str, rows: int, dtype: str, args: argparse.Namespace
) -> tuple[Timed, dict[str, Any]]:
    os.environ["JAX_PLATFORMS"] = args.platform
    import jax
    import jax.numpy as jnp

    from repulsor_jax.method import memory_bank, repulsion
    from repulsor_jax.method.online_logsumexp import slots_at_once
    from repulsor_jax.planning.cost import program_cost

    num_slots = rows // args.batch_size
    shape = (num_slots, args.batch_size, args.dim)
    abstract = jax.eval_shape(lambda: memory_bank.create(*shape, jnp.dtype(dtype)))
    by_itself = slots_at_once(abstract.features, args.batch_size, repulsion.MAX_LOGITS)
    chunk_slots = num_slots if form == "direct" else min(by_itself, num_slots - 1)
    loss_fn = functools.partial(
        repulsion.repulsion_loss, temperature=TEMPERATURE, chunk_slots=chunk_slots
    )

    def step(z: jax.Array, bank: memory_bank.MemoryBank) -> Any:
        loss, gradient = jax.value_and_grad(loss_fn)(z, bank)
        return loss, gradient, memory_bank.enqueue(bank, z, valid=jnp.isfinite(loss))

    z = jnp.asarray(queries(args))
    compiled = jax.jit(step, donate_argnums=1).lower(z, abstract).compile()
    full = np.empty((rows, args.dim), jnp.dtype(dtype))
    for first, chunk in negatives(rows, args.dim):
        full[first : first + len(chunk)] = chunk
    slots = jnp.int32(num_slots)
    ids = jnp.arange(rows, dtype=jnp.int32).reshape(shape[:2])
    features = jnp.array(full.reshape(shape))
    bank = memory_bank.MemoryBank(features, memory_bank.tag(ids), jnp.int32(0), slots)
    del full
    jax.block_until_ready(bank)

    before = memory_now(args.platform)
    loss, gradient, bank = jax.block_until_ready(compiled(z, bank))
    peak = memory_peak(args.platform) - before
    memory: Any = compiled.memory_analysis()

    def run(what: str) -> float:
        nonlocal bank
        if what == "memory":
            return peak
        started = time.perf_counter()
        _, _, bank = jax.block_until_ready(compiled(z, bank))
        return time.perf_counter() - started

    return run, {
        "chosen": (by_itself == num_slots) == (form == "direct"),
        "loss": np.asarray(loss),
        "gradient": np.asarray(gradient),
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": program_cost(compiled.as_text() or "").matmul_flops,
    }


def memory_now(platform: str) -> int:
    """Bytes in use; also resets the peak, on systems that allow it."""
    if platform != "cpu":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # glibc: returns the memory that creating the bank and compiling freed
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    return _status("VmRSS")


def memory_peak(platform: str) -> int:
    if platform != "cpu":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return _status("VmHWM")


def _status(name: str) -> int:
    text = pathlib.Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(kilobytes)


def queries(args: argparse.Namespace) -> np.ndarray:
    return _unit(np.random.default_rng(1), args.batch_size, args.dim)


def negatives(rows: int, dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of the bank, the same in every process: chunks with their first row."""
    rng = np.random.default_rng(0)
    for first in range(0, rows, ROWS_AT_ONCE):
        yield first, _unit(rng, min(ROWS_AT_ONCE, rows - first), dim)


def _unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    x = rng.standard_normal((rows, dim), np.float32)
    x[:, 0] += 1.0  # a common direction, so that the gradient is not the mean of pure noise
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def reference(rows: int, dtype: str, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient in float64, from the definition, chunk by chunk; squared L2."""
    import jax.numpy as jnp

    z = queries(args).astype(np.float64)

    def weights_of(negatives: np.ndarray) -> np.ndarray:  # at most 1, and not small: unit vectors
        squares = (z**2).sum(1)[:, None] + (negatives**2).sum(1) - 2 * z @ negatives.T
        return np.exp(-squares / TEMPERATURE)

    within = weights_of(z)
    np.fill_diagonal(within, 0.0)
    total, pull = within.sum(1), within @ z
    for _, chunk in negatives(rows, args.dim):
        stored = chunk.astype(jnp.dtype(dtype)).astype(np.float64)
        weights = weights_of(stored)
        total += weights.sum(1)
        pull += weights @ stored
    loss = np.log(total / (len(z) - 1 + rows)).mean()
    shares = within / total[:, None]
    own = pull / total[:, None] - z
    mutual = shares.T @ z - shares.sum(0)[:, None] * z  # of the terms it is a negative of
    return loss, 2 / TEMPERATURE * (own + mutual) / len(z)


if __name__ == "__main__":
    main()
