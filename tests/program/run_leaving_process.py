"""One of two processes that are told to stop when their work is done and they are about to end.

python -m tests.program.run_leaving_process ADDRESS RANK
"""

import os
import signal
import sys
import time

import jax

from repulsor_jax import sharding
from repulsor_jax.runtime import preemption


def main(address, rank):
    jax.distributed.initialize(address, 2, int(rank))
    sharding.any_process(False)  # as in a run, the processes have met before
    with preemption.Preemption() as told:
        assert not told.reached(1)
        if rank == "0":
            os.kill(os.getpid(), signal.SIGTERM)
    started = time.monotonic()
    preemption.settle()
    jax.distributed.shutdown()
    print(f"left after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
