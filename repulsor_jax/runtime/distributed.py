"""Joins the other processes of a job: finds their launcher, and limits how long to wait for them.

JAX finds the coordinator and the numbers itself (`jax.distributed.initialize`), but not whether
there is anything to join. A single process must not wait for others because of a variable that a
launcher left in its environment.
"""

import contextlib
import glob
import importlib.util
import os
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class JoinError(RuntimeError):
    """The other processes of the job cannot be joined; the message says why."""


class Launcher(NamedTuple):
    """The program that started the processes of a job."""

    name: str
    method: str  # its name for `jax.distributed.initialize`
    # This process drives every device that it sees. By default, JAX gives each process of a host
    # one device on Slurm and Open MPI.
    sees_own_devices: bool = True


def detect(
    environ: Mapping[str, str], tpu_vm_workers: Callable[[], int] | None = None
) -> Launcher | None:
    """Finds the launcher of a job of several processes; None for a single process.

    `tpu_vm_workers` returns the number of processes of a Cloud TPU job, which the environment does
    not hold; it is called only if the environment names no launcher. None stands for 1 process.

    Raises:
      JoinError: a variable does not hold a number.
    """
    e = environ
    visible = [gpu for gpu in e.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if "OMPI_MCA_orte_hnp_uri" in e and _number(e, "OMPI_COMM_WORLD_SIZE") > 1:
        alone = _number(e, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) == 1
        return Launcher("Open MPI", "ompi", alone or len(visible) == 1)
    # JAX needs all of these variables. A salloc shell or a login sets only some,
    # or reports one task.
    needed = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    if all(f"SLURM_{name}" in e for name in needed):
        tasks = _number(e, "SLURM_NTASKS")
        if min(tasks, _number(e, "SLURM_STEP_NUM_TASKS", tasks)) > 1:
            alone = _number(e, "SLURM_STEP_NUM_NODES", 0) == tasks
            return Launcher("Slurm", "slurm", alone or len(visible) == 1)
    if "tpu" not in (e.get("JAX_PLATFORMS") or "tpu"):
        return None
    slices = _number(e, "MEGASCALE_NUM_SLICES", 1)
    hosts = e.get("TPU_PROCESS_ADDRESSES", e.get("TPU_WORKER_HOSTNAMES", ""))
    if hosts:
        return Launcher("GKE", "gketpu") if len(hosts.split(",")) * slices > 1 else None
    # JAX sets the variable on a machine without TPU chips.
    if tpu_vm_workers is None or "TPU_SKIP_MDS_QUERY" in e:
        return None
    return Launcher("Cloud TPU", "gcetpu") if max(slices, tpu_vm_workers()) > 1 else None


def join(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 300,
) -> str | None:
    """Joins the other processes of the job, if there are any; to be called before any array exists.

    Args:
      mode: "auto" joins if a launcher started several processes or the next arguments say so, "on"
        joins the processes that JAX finds, "off" joins nothing.
      coordinator_address, num_processes, process_id: host:port of process 0, and numbers, from 0,
        for a job without a known launcher.
      timeout_seconds: how long to wait for the others. After it the process ends.

    Returns:
      A line that says what was joined; None for a process that is alone or has joined already.

    Raises:
      JoinError: an argument is missing or contradicts another, or JAX cannot join.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    named = [flag for flag, value in given.items() if value is not None]
    if mode == "off" and named:
        raise JoinError(f"--distributed=off contradicts {', '.join(named)}")
    if mode == "off" or jax.distributed.is_initialized():
        return None
    launcher = detect(os.environ, tpu_vm_workers)
    if launcher is None and named and len(named) < len(given):
        missing = ", ".join(flag for flag in given if flag not in named)
        raise JoinError(f"found {', '.join(named)}, but not {missing}, and no launcher knows them")
    if mode == "auto" and launcher is None and not named:
        return None
    how = "flags" if len(named) == len(given) else launcher.name if launcher else "JAX's detection"
    # None leaves the choice of devices to JAX, and an empty list takes all devices.
    local_devices: list[int] | None = [] if launcher is None or launcher.sees_own_devices else None
    where = f" at {coordinator_address}" if coordinator_address else ""
    with _deadline(timeout_seconds, f"{how}{where}"):
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                # JAX reads the variable itself.
                local_device_ids=None if "JAX_LOCAL_DEVICE_IDS" in os.environ else local_devices,
                cluster_detection_method=launcher.method if launcher else None,
                # JAX's own timeout aborts the process with a stack trace: let it come after ours.
                initialization_timeout=timeout_seconds + 60,
                # The first process writes and measures at the end, while the others wait to leave.
                shutdown_timeout_seconds=24 * 3600,
            )
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise JoinError(
                f"the other processes cannot be joined by {how}: {reason}; start one process with "
                "--distributed=off, or give --coordinator_address, --num_processes, --process_id"
            ) from error
    count = jax.process_count()
    return f"process {jax.process_index()} of {count} (0 to {count - 1}), joined by {how}"


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise JoinError(f"the environment has {name}={text!r}, expected a number")
    return int(text)


@contextlib.contextmanager
def _deadline(seconds: int, how: str) -> Iterator[None]:
    """Ends the process with one line of error if the block takes longer than `seconds`."""

    def end() -> None:
        print(
            f"error: joining by {how} took more than {seconds} s: process 0 cannot be reached, "
            "or not every process was started; --join_timeout sets how long to wait",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def has_tpu_chips() -> bool:
    """Whether this machine has TPU chips, and libtpu to drive them."""
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def read_metadata(key: str) -> str:
    """Asks the metadata server of a Cloud TPU machine."""
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as reply:
        return str(reply.read(), "utf-8")


def tpu_vm_workers(
    has_chips: Callable[[], bool] = has_tpu_chips, read: Callable[[str], str] = read_metadata
) -> int:
    """Processes of this Cloud TPU job by its metadata server; 1 on any other machine.

    Only a machine with TPU chips asks: on other machines there is no such server, and the question
    would cost its timeout.
    """
    if not has_chips():
        return 1
    try:
        hosts = read("worker-network-endpoints").split(",")
        lines = [line.partition(":") for line in read("tpu-env").splitlines()]
        about = {key: value.strip(" '") for key, _, value in lines}
        return len(hosts) * int(about.get("MEGASCALE_NUM_SLICES", "1"))
    except (OSError, ValueError):
        return 1
