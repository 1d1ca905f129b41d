"""The largest batch that fits: by a straight line, and a compilation that confirms it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from repulsor_jax import sharding
from repulsor_jax.config import Config
from repulsor_jax.planning.programs import Program
from repulsor_jax.planning.topology import Topology

_MOST_COMPILATIONS = 5


def largest_batch(
    config: Config,
    topology: Topology,
    first: Program,
    compile_train: Callable[[Config], Program],
) -> dict[str, Any] | None:
    """Finds the largest global batch whose train step fits, in multiples that the mesh can split.

    The line through two compilations says where to look, and one more whether that fits; a few
    more correct it where it does not.

    Args:
      config: the configuration.
      topology: its devices.
      first: the train step as configured.
      compile_train: compiles the train step of another configuration.

    Returns:
      The batch size, its memory per chip, compilations and seconds; None where the memory of the
      devices is not known, or nothing fits.
    """
    available = topology.device_bytes
    if available is None:
        return None
    unit = sharding.batch_shards(first.mesh) * config.optimizer.accumulation_steps
    started = time.perf_counter()
    found = {config.batch_size: first}
    guess: int | None = 2 * config.batch_size
    while guess is not None and len(found) < _MOST_COMPILATIONS:
        found[guess] = compile_train(with_batch(config, guess))
        sizes = {batch: program.total_bytes for batch, program in found.items()}
        guess = next_guess(sizes, available, unit)
    fitting = [batch for batch, program in found.items() if not program.refusal]
    if not fitting:
        return None
    return {
        "batch_size": max(fitting),
        "total_bytes_per_chip": topology.devices_per_chip * found[max(fitting)].total_bytes,
        "compilations": len(found),
        "seconds": time.perf_counter() - started,
    }


def next_guess(sizes: dict[int, float], available: float, unit: int) -> int | None:
    """The batch to try next, a multiple of `unit`; None where none is left between what is known.

    Args:
      sizes: bytes that a device needs, by batch; two or more.
      available: bytes that it has.
      unit: what batches are multiples of.
    """
    low = max((batch for batch, size in sizes.items() if size <= available), default=0)
    high = min((batch for batch, size in sizes.items() if size > available), default=None)
    # From the one nearest to the limit, by the line to the one farthest from it: between two close
    # ones it is what the compiler happens to do that shows.
    x0, y0 = min(sizes.items(), key=lambda item: abs(item[1] - available))
    x1, y1 = max(sizes.items(), key=lambda item: abs(item[0] - x0))
    slope = (y1 - y0) / (x1 - x0)
    if slope <= 0:
        return None if high is not None else 2 * low
    guess = int((x0 + (available - y0) / slope) // unit) * unit
    if high is not None:
        guess = min(guess, high - unit)
    if guess <= low or guess in sizes:
        return None
    return guess


def with_batch(config: Config, batch_size: int) -> Config:
    """The configuration with another batch; the bank keeps its rows, up to a whole batch more."""
    regularizer = config.regularizer
    rows = -(-regularizer.bank_rows // batch_size) * batch_size
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        regularizer=dataclasses.replace(regularizer, bank_rows=rows),
    )
