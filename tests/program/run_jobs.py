"""Runs the program several times in a process, for the tests of several processes.

    python -m tests.program.run_jobs "[{\"mode\": \"train\", \"workdir\": ..., ...}, ...]" --flags

Starting a process and its libraries takes longer than the tiny jobs do.
"""

import json

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from repulsor_jax import main as program
from repulsor_jax import sharding


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
        flags.FLAGS.config.update_from_flattened_dict(job["config"])
        sharding.create_mesh = shuffled(create_mesh) if job.get("shuffled") else create_mesh
        program.main(argv[:1])


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main, flags_parser=program._parse_flags)
