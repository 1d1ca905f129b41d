"""Detection by environments as launchers leave them; joining is in test_processes.py."""

import pytest

from repulsor_jax.runtime import distributed
from repulsor_jax.runtime.distributed import JoinError, Launcher, detect, tpu_vm_workers

# What srun sets in each of 16 tasks on 2 nodes of 8 GPUs.
SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
MPIRUN = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "TPU_WORKER_ID": "1"}


def without(environ, *names):
    return {key: value for key, value in environ.items() if key not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),  # a laptop
        (SRUN, Launcher("Slurm", "slurm", False)),
        # One task on each node drives all its GPUs; a task that sees one GPU drives it.
        (SRUN | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, Launcher("Slurm", "slurm")),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "3"}, Launcher("Slurm", "slurm")),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Launcher("Slurm", "slurm", False)),
        # srun -n 1; the shell of salloc -n 16, in its own step or outside steps; ssh to a node.
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), None),
        ({"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "16"}, None),
        (MPIRUN, Launcher("Open MPI", "ompi", False)),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Launcher("Open MPI", "ompi")),
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (GKE, Launcher("GKE", "gketpu")),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (
            GKE | {"TPU_WORKER_HOSTNAMES": "job-0.svc", "MEGASCALE_NUM_SLICES": "2"},
            Launcher("GKE", "gketpu"),
        ),
        (GKE | {"JAX_PLATFORMS": "cpu"}, None),
        (GKE | {"JAX_PLATFORMS": ""}, Launcher("GKE", "gketpu")),
    ],
)
def test_the_launcher_is_known_by_the_environment(environ, expected):
    assert detect(environ) == expected
    assert detect(environ, lambda: 1) == expected


def test_a_tpu_vm_asks_for_the_number_of_its_workers():
    assert detect({}, lambda: 8) == Launcher("Cloud TPU", "gcetpu")
    assert detect({}, lambda: 1) is None

    def never():
        pytest.fail("asked a server that is not there")

    assert detect({"TPU_SKIP_MDS_QUERY": "1"}, never) is None
    assert detect({"JAX_PLATFORMS": "cpu"}, never) is None
    assert detect(SRUN, never) == Launcher("Slurm", "slurm", False)


@pytest.mark.parametrize(
    ("endpoints", "about", "expected"),
    [
        ("10.0.0.1", "ACCELERATOR_TYPE: 'v5litepod-8'\n", 1),
        ("a:b:10.0.0.1,a:b:10.0.0.2", "ACCELERATOR_TYPE: 'v4-16'\n", 2),
        ("10.0.0.1", "X: 'y'\nMEGASCALE_NUM_SLICES: '2'\n", 2),
    ],
)
def test_the_metadata_server_counts_workers_and_slices(endpoints, about, expected):
    answers = {"worker-network-endpoints": endpoints, "tpu-env": about}
    assert tpu_vm_workers(lambda: True, answers.__getitem__) == expected


def test_a_machine_without_chips_or_without_an_answer_is_alone():
    def unreachable(key):
        raise OSError("no route")

    assert tpu_vm_workers(lambda: True, unreachable) == 1
    assert tpu_vm_workers(lambda: False, lambda key: pytest.fail("asked")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "off", "process_id": 0}, "--distributed=off contradicts --process_id"),
        ({"process_id": 0}, "found --process_id, but not --coordinator_address, --num_processes"),
    ],
)
def test_flags_that_contradict_or_miss_each_other(arguments, message):
    with pytest.raises(JoinError, match=message):
        distributed.join(**arguments)


def test_a_variable_without_a_number_is_named():
    with pytest.raises(JoinError, match="SLURM_NTASKS='many'"):
        detect(SRUN | {"SLURM_NTASKS": "many"})


def test_a_single_process_joins_nothing():
    """The tests are a single process: join neither touches a backend nor waits for a server."""
    assert distributed.join() is None
    assert distributed.join("off") is None
