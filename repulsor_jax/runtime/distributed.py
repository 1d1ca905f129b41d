"""Joining the other processes of a job: whether there are any, who started them, how long to wait.

JAX finds the coordinator and the numbers itself (`jax.distributed.initialize`); what it does not
say is whether there is anything to join. A variable that a launcher left in the environment of a
lone process must not make it wait for others.
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
_METADATA_TIMEOUT = 5  # seconds
# JAX gives up by aborting the process with a stack trace; this later than we do.
_LATER = 60  # seconds


class JoinError(RuntimeError):
    """The other processes of the job cannot be joined; says why."""


class Launcher(NamedTuple):
    """What started the processes of a job.

    Attributes:
      name: for messages.
      method: what `jax.distributed.initialize` calls it.
      sees_own_devices: whether this process drives every device that it sees. JAX otherwise takes
        one for each process of a host on Slurm and Open MPI.
    """

    name: str
    method: str
    sees_own_devices: bool = True


def detect(
    environ: Mapping[str, str], tpu_vm_workers: Callable[[], int] | None = None
) -> Launcher | None:
    """Finds what started this process together with others; None for a process of its own.

    Args:
      environ: the environment.
      tpu_vm_workers: the number of processes of a Cloud TPU job, which is not in the environment;
        asked where nothing else answers. None takes it for 1.

    Raises:
      JoinError: a variable does not hold a number.
    """
    e = environ
    visible = [gpu for gpu in e.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if "OMPI_MCA_orte_hnp_uri" in e and _number(e, "OMPI_COMM_WORLD_SIZE") > 1:
        alone = _number(e, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) == 1
        return Launcher("Open MPI", "ompi", alone or len(visible) == 1)
    # All that JAX needs. A shell of salloc or a login to a node has a part of them, or one task in
    # its step though the job was granted several.
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
    # JAX sets the variable where it finds no TPU chips.
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
    """Joins the other processes of the job where there are any; to be called before any array.

    Args:
      mode: "auto" joins where a launcher started several processes or the next arguments say so,
        "on" whatever JAX finds, "off" nothing.
      coordinator_address: host:port of process 0, where no launcher knows it.
      num_processes: likewise.
      process_id: likewise; from 0.
      timeout_seconds: how long to wait for the others. The process ends after it.

    Returns:
      A line that says what was joined; None for a process of its own, and for one that has joined
      already.

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
    launcher = detect(os.environ, _tpu_vm_workers)
    if launcher is None and named and len(named) < len(given):
        missing = ", ".join(flag for flag in given if flag not in named)
        raise JoinError(f"found {', '.join(named)}, but not {missing}, and no launcher knows them")
    if mode == "auto" and launcher is None and not named:
        return None
    how = "flags" if len(named) == len(given) else launcher.name if launcher else "JAX's detection"
    where = f" at {coordinator_address}" if coordinator_address else ""
    with _deadline(timeout_seconds, f"{how}{where}"):
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                # None lets JAX choose, and an empty list leaves all.
                local_device_ids=_local_devices(os.environ, launcher),
                cluster_detection_method=launcher.method if launcher else None,
                initialization_timeout=timeout_seconds + _LATER,
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


def _local_devices(environ: Mapping[str, str], launcher: Launcher | None) -> list[int] | None:
    if "JAX_LOCAL_DEVICE_IDS" in environ:  # which JAX reads
        return None
    return [] if launcher is None or launcher.sees_own_devices else None


@contextlib.contextmanager
def _deadline(seconds: int, what: str) -> Iterator[None]:
    """Ends the process with one line after so many seconds; JAX would abort with a stack trace."""

    def end() -> None:
        print(
            f"error: joining by {what} took more than {seconds} s: process 0 cannot be reached, "
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


def _tpu_vm_workers() -> int:
    """Processes of this Cloud TPU job by its metadata server; 1 on any other machine.

    Only a machine that has TPU chips and libtpu asks: elsewhere nobody would answer.
    """
    has_chips = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    if not has_chips or importlib.util.find_spec("libtpu") is None:
        return 1
    try:
        hosts = _metadata("worker-network-endpoints").split(",")
        about = dict(
            line.split(":", 1) for line in _metadata("tpu-env").splitlines() if ":" in line
        )
        return len(hosts) * int(about.get("MEGASCALE_NUM_SLICES", "1").strip(" '"))
    except (OSError, ValueError):
        return 1


def _metadata(key: str) -> str:
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=_METADATA_TIMEOUT) as reply:
        text: str = reply.read().decode()
    return text
