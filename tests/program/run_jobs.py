"""Runs the program several times in a process, or in each of several that join each other.

    python -m tests.program.run_jobs FOLDER COUNT '[{"mode": "train", ...}, ...]' --flags

A job has a mode, a workdir and values of the configuration. The processes are forks of one that has
imported the libraries: importing takes longer than the tiny jobs. The output of process K goes to
`FOLDER/K.txt`; with COUNT 1 there is no fork, and the output is the program's own.
"""

import gc
import json
import os
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from repulsor_jax import main as program
from repulsor_jax import sharding

sharding.MIN_SPLIT_SIZE = 64  # as in conftest.py: the tiny parameters are split, too


def shuffled(create_mesh):
    """A mesh in which the devices of a process are not neighbours."""

    def create(*arguments, **keywords):
        mesh = create_mesh(*arguments, **keywords)
        order = np.random.default_rng(0).permutation(mesh.devices.size)
        devices = mesh.devices.ravel()[order].reshape(mesh.devices.shape)
        mesh = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
        runs = sharding.local_rows(mesh, sharding.batch_shards(mesh))
        print(f"process {jax.process_index()} holds {runs}", flush=True)
        return mesh

    return create


def main(argv):
    create_mesh = sharding.create_mesh
    for job in json.loads(argv[1]):
        flags.FLAGS.mode = job["mode"]
        flags.FLAGS.workdir = job["workdir"]
        flags.FLAGS.trajectory = job.get("trajectory", False)
        flags.FLAGS.config.update_from_flattened_dict(job["config"])
        sharding.create_mesh = shuffled(create_mesh) if job.get("shuffled") else create_mesh
        program.main(argv[:1])


if __name__ == "__main__":
    folder, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    jax.config.config_with_absl()
    gc.freeze()  # else every process looks through the libraries at its end
    children = []
    if count == 1:
        sys.argv[1:] = sys.argv[3:]
        app.run(main, flags_parser=program.parse_flags)
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        output = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv[1:] = [*sys.argv[3:], f"--num_processes={count}", f"--process_id={rank}"]
        app.run(main, flags_parser=program.parse_flags)  # it ends the child
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) > 0)
