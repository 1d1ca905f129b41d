"""One of two processes that make shards and save together, of which one cannot write for a while.

    python -m tests.program.run_failing_process ADDRESS RANK FOLDER RANK_THAT_FAILS

It fails by the limit of the operating system on the size of a file.
"""

import itertools
import pathlib
import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax import sharding
from repulsor_jax.checkpoints import storage
from repulsor_jax.checkpoints.checkpointer import Checkpointer
from repulsor_jax.files.shards import Shards, fill

RECORDS = ({"next_index": 1}, {"batch_size": 16}, {})


def state(step, mesh):
    """Each process holds 1.6 MB that do not compress."""
    values = np.random.default_rng(step).standard_normal((4, 200_000)).astype(np.float32)
    where = sharding.batch_sharding(mesh)
    return {
        "step": jax.device_put(jnp.int32(step), sharding.replicated(mesh)),
        "w": jax.make_array_from_callback(values.shape, where, lambda index: values[index]),
    }


def limit_files(size):
    """No file of this process may grow larger; None lifts that."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or most, most))


def produce(todo):
    """Each item has 400 kB."""
    for _ in todo:
        yield {"x": np.zeros((1, 50_000))}


def main(address, rank, folder, failing):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, int(rank))
    storage.BARRIER_SECONDS = 5
    mesh = sharding.create_mesh()
    shards = Shards(pathlib.Path(folder).with_name("shards"), count=1, per_shard=1)
    with Checkpointer(pathlib.Path(folder), retry_steps=2, max_lost_steps=1000) as checkpointer:
        checkpointer.save(10, state(10, mesh), *RECORDS)
        checkpointer.wait()
        if rank == failing:
            limit_files(20_000)
        try:  # the first process writes for both
            made = fill(shards, produce, title="shards")
            print(f"shards made: {made}", flush=True)
        except OSError as error:
            print(f"no shards: {error}", flush=True)
        checkpointer.save(12, state(12, mesh), *RECORDS)
        for step in itertools.count(13):  # training goes on
            time.sleep(0.05)
            if checkpointer.retry_due(step):
                break
        print(f"steps before the next attempt: {checkpointer.steps()}", flush=True)
        limit_files(None)
        checkpointer.save(step, state(step, mesh), *RECORDS, patience=60.0)
        print(f"saved {checkpointer.steps() == [10, step]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
