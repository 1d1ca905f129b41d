"""Worker processes that read and prepare images; they import nothing heavier than this."""

import collections
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from loky import ProcessPoolExecutor

from repulsor_jax.data.preprocess import BadImageError, read_images

Images = list[np.ndarray | BadImageError]

_work: tuple[Any, int] | None = None  # of a worker process: source and image size


def read_in_order(
    source: Any,
    chunks: Iterable[Sequence[int]],
    size: int,
    *,
    num_workers: int,
    ahead: int,
    executor: Callable[..., Any] = ProcessPoolExecutor,
) -> Iterator[tuple[Images, np.ndarray]]:
    """Yields what `preprocess.read_images` gives for each chunk of indices, in order.

    The processes are loky's: unlike the standard library's they do not import the main module, and
    JAX with it, so that they start in a fraction of a second. They end with their parent, however
    that ends. Each gets a copy of the `ImageSource`; with 0 workers the caller reads. `ahead`
    chunks are read before they are asked for. Where the `executor` cannot be had, as in a container
    without /dev/shm, a warning says so, and the caller reads. Raises OSError where a process died.
    """
    pool = None
    if num_workers:
        begin = {"initializer": _start, "initargs": (source, size, os.getpid())}
        try:
            pool = executor(num_workers, **begin, timeout=None)
        except OSError as error:
            print(
                f"warning: no worker processes ({error}): they need semaphores, for which /dev/shm "
                "must be there and writable. Images are read in this process, more slowly; "
                "config.data.encode_workers=0 does so without this warning",
                flush=True,
            )
    if pool is None:
        for chunk in chunks:
            yield read_images(source, chunk, size)
        return
    pending: collections.deque[Any] = collections.deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_read, chunk))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process that reads images died, often for want of memory: lower "
            f"config.data.encode_workers, {num_workers} now; the same command goes on"
        ) from error
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _start(source: Any, size: int, parent: int) -> None:
    global _work
    _work = source, size
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent was killed, as no error reaches it through the queues."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _read(indices: Sequence[int]) -> tuple[Images, np.ndarray]:
    assert _work is not None
    source, size = _work
    return read_images(source, indices, size)
