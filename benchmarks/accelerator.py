"""One accelerator, one command, at most ten minutes: what a step takes, beside what its plan says.

    python -m benchmarks.accelerator --platform=cuda             # XL/2 and B/2, bfloat16
    python -m benchmarks.accelerator --platform=cuda --peers     # diffusers' DiT in PyTorch as well
    python -m benchmarks.accelerator --platform=cpu --sizes=S --batch_sizes=2 --patch_size=8 \\
        --dtype=float32 --bank_rows=64 --remats none dots --steps=1 --rounds=1

A step is forward, backward, AdamW and EMA. For each size: the method under each of --remats, no
method under the first of them and, with --peers, diffusers' DiT under `torch.compile`. Every
setting has the machine to itself, in its own process; all are measured in this order and then in
the opposite one, for which the compiled programs are kept in a temporary cache.

A plan is the estimate of `--mode=plan` for the same compiled step, if all of its parts overlap and
if none do, and the memory that the compiler counts. It needs published rates of the device.
MFU counts the model's FLOPs, 3 x forward, against the published bfloat16 peak or, if that is not
known, against a large matrix product.

After --minutes measuring has ended: a setting that takes longer than what is left, judged by the
longest of its size so far, is not begun, and one that is under way is ended. Both are listed.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import step as step_benchmark
from benchmarks.step import Worker

Row = dict[str, Any]

REMATS = ["none", "dots", "dots_attention", "full"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One program to measure."""

    size: str
    batch_size: int
    variant: str  # an objective, "torch compiled" or "matmul"
    remat: str = ""

    @property
    def label(self) -> str:
        """In words."""
        if not self.remat:
            return self.variant
        return f"{self.size}, batch {self.batch_size}, {self.variant}, remat {self.remat}"


class Clock:
    """Says whether there is time for another setting, by how long those of its size took."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._started = now, now()
        self.deadline = self._started + seconds
        self._longest: dict[tuple[str, bool], float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started

    def has_time(self, setting: Setting, is_compiled: bool) -> bool:
        """Whether as long as the longest like it is left; the first of a size is always begun."""
        longest = self._longest.get((setting.size, is_compiled), 0.0)
        return self._now() + longest < self.deadline

    def took(self, setting: Setting, is_compiled: bool, seconds: float) -> None:
        """Keeps what a setting took."""
        key = setting.size, is_compiled
        self._longest[key] = max(seconds, self._longest.get(key, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="cuda", choices=["cpu", "cuda", "tpu"])
    parser.add_argument("--sizes", nargs="+", default=["XL", "B"], choices=["S", "B", "L", "XL"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[64, 256], help="of each")
    parser.add_argument("--patch_size", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--remats", nargs="+", default=["dots_attention", "dots"], choices=REMATS)
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn"])
    parser.add_argument("--bank_rows", type=int, default=65_536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="in one timing")
    parser.add_argument("--rounds", type=int, default=3, help="timings of a setting, twice")
    parser.add_argument("--minutes", type=float, default=9.0, help="for measuring")
    parser.add_argument("--peers", action="store_true", help="also diffusers' DiT in PyTorch")
    parser.add_argument("--largest", action="store_true", help="also the largest batch")
    args = parser.parse_args()
    if len(args.batch_sizes) != len(args.sizes):
        parser.error("--batch_sizes: give one for each of --sizes")
    args.allocator = "default"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"  # each setting has the memory to itself

    clock = Clock(60 * args.minutes)
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        rows, skipped = measure(args, settings(args), clock)
        print_rows(args, rows)
        if args.largest and clock.elapsed < 60 * args.minutes:
            print_largest(args, clock)
    for line in skipped:
        print(f"skipped: {line}")
    print(f"\nall in {clock.elapsed / 60:.1f} of {args.minutes:g} minutes", flush=True)


def settings(args: argparse.Namespace) -> list[Setting]:
    """What is measured, the most wanted first."""
    found = []
    for size, batch_size in zip(args.sizes, args.batch_sizes, strict=True):
        first, *others = args.remats
        found += [Setting(size, batch_size, name, first) for name in ("repulsor", "none")]
        found += [Setting(size, batch_size, "repulsor", remat) for remat in others]
        if args.peers:
            found.append(Setting(size, batch_size, "torch compiled"))
    return [Setting("", 0, "matmul"), *found]


def measure(
    args: argparse.Namespace, wanted: list[Setting], clock: Clock
) -> tuple[dict[Setting, Row], list[str]]:
    """Times the settings, there and back, and says which of them there was no time for."""
    rows: dict[Setting, Row] = {}
    skipped: list[str] = []
    for way, order in (("first", wanted), ("second", reversed(wanted))):
        for setting in order:
            is_compiled = setting in rows
            if way == "second" and not is_compiled:
                continue
            if not clock.has_time(setting, is_compiled):
                skipped.append(f"{setting.label}, the {way} time: too little time is left")
                continue
            started = time.monotonic()
            try:
                row = _measure_one(args, setting, clock.deadline)
            except TimeoutError:
                skipped.append(f"{setting.label}, the {way} time: the time was up")
                continue
            clock.took(setting, is_compiled, time.monotonic() - started)
            if known := rows.get(setting):
                known["times"] += row["times"]
            else:
                rows[setting] = row
            median = statistics.median(row["times"])
            # At once: what ends the program from outside leaves what it has measured.
            print(f"{clock.elapsed:4.0f} s: {setting.label}: {median:.4f} s", flush=True)
    return rows, skipped


def _measure_one(args: argparse.Namespace, setting: Setting, deadline: float) -> Row:
    own = argparse.Namespace(**vars(args) | dataclasses.asdict(setting))
    if setting.variant == "matmul":
        build: step_benchmark.Build = step_benchmark.build_jax_matmul
    elif setting.variant == "torch compiled":
        build = functools.partial(step_benchmark.build_torch, True)
    else:
        build = functools.partial(step_benchmark.build_jax, setting.variant)
    worker = Worker(build, own, deadline)
    worker.run()  # the first run is slower
    row = worker.info | {"times": [worker.run() for _ in range(args.rounds)]}
    if setting.variant != "matmul":
        row["peak_bytes"] = worker.run("peak_bytes")
    worker.close()
    return row


def print_rows(args: argparse.Namespace, rows: dict[Setting, Row]) -> None:
    from repulsor_jax.runtime import chips

    matmul = next((row for setting, row in rows.items() if setting.variant == "matmul"), None)
    if matmul is None or len(rows) < 2:
        print("\nthere was no time for a step")
        return
    kind = matmul["device_kind"]
    chip = chips.find(kind)
    product = matmul["flops"] / statistics.median(matmul["times"])
    published = chip and chip.peak_flops / chip.devices_per_chip
    peak, of = (published, "published") if published else (product, "matrix product's")
    print(
        f"\nDiT with patches of {args.patch_size}, 32x32x4, {args.dtype}, K = {args.bank_rows:,}, "
        f"d = {args.dim}, {kind}; {of} peak {peak / 1e12:.4g} TFLOP/s, matrix product "
        f"{product / 1e12:.4g}\n"
    )
    print(
        "| step | measured (min to max) | planned | images/s | MFU | peak memory | planned "
        "| compiled in |"
    )
    print("|---|---|---|---|---|---|---|---|")
    medians = {}
    for setting, row in rows.items():
        if setting.variant == "matmul":
            continue
        own = argparse.Namespace(**vars(args) | dataclasses.asdict(setting))
        times = row["times"]
        medians[setting] = seconds = statistics.median(times)
        mfu = 3 * step_benchmark.forward_flops(own) / seconds / peak
        label = setting.label
        if not setting.remat:
            label = f"{setting.size}, batch {setting.batch_size}, {row['label']}"
        compiled = f"{row['compile_seconds']:.0f} s" if "compile_seconds" in row else "-"
        print(
            f"| {label} | {1e3 * seconds:.1f} ms ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
            f" | {_planned(row.get('planned_seconds'))} | {setting.batch_size / seconds:.1f} "
            f"| {mfu:.1%} | {_gib(row['peak_bytes'])} | {_gib(row.get('planned_bytes'))} "
            f"| {compiled} |"
        )
    print()
    for size, batch_size in zip(args.sizes, args.batch_sizes, strict=True):
        first, *others = args.remats
        method = Setting(size, batch_size, "repulsor", first)
        against = [("the method against none", Setting(size, batch_size, "none", first))]
        against += [
            (f"remat {first} against {remat}", Setting(size, batch_size, "repulsor", remat))
            for remat in others
        ]
        against.append(("the method against torch", Setting(size, batch_size, "torch compiled")))
        for what, other in against:
            if method in medians and other in medians:
                print(f"{size}: {what}: x {medians[method] / medians[other]:.4f} the time")


def _planned(seconds: tuple[float, float] | None) -> str:
    return f"{1e3 * seconds[0]:.1f} to {1e3 * seconds[1]:.1f} ms" if seconds else "-"


def _gib(count: float | None) -> str:
    return f"{count / 2**30:.2f} GiB" if count else "-"


def print_largest(args: argparse.Namespace, clock: Clock) -> None:
    """Finds the largest batch, to a multiple of 8, whose compiled step fits, and runs it."""
    own = argparse.Namespace(**vars(args))
    own.size, own.batch_size, own.remat = args.sizes[0], args.batch_sizes[0], args.remats[0]
    try:
        worker = Worker(_build_largest, own, clock.deadline)
        worker.close()
        found = worker.info["tried"]
    except TimeoutError:
        found = "the time was up"
    print(f"\nlargest batch of DiT-{own.size}/{own.patch_size}: {found}")


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
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit"), step_benchmark.compiled_bytes(program.step)


if __name__ == "__main__":
    main()
