"""Time from the command to the first training step, phase by phase, compilation cold and warm.

    python -m benchmarks.compile_time                                   # a small model on a CPU
    python -m benchmarks.compile_time --platform=tpu --size=xl_2        # on the TPUs here
    python -m benchmarks.compile_time --topology=v5e:16x16 --size=xl_2  # for TPUs elsewhere

Every measurement is a new process: imports, the devices, building, tracing and compiling the step,
then (not with --topology) initialising the state and one step on random latents. Cold begins with
an empty compilation cache, warm with the cache that cold filled. Programs for a topology elsewhere
cannot be read back from the cache: JAX 0.10 loads programs only onto devices.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

PHASES = ("imports", "devices", "build", "trace and compile", "state", "first step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="cpu", choices=["cpu", "cuda", "tpu"])
    parser.add_argument(
        "--topology", default="", help="as v5e:16x16: compiles for it, runs nothing"
    )
    parser.add_argument("--size", default="s_8", help="as configs/imagenet256.py has it")
    parser.add_argument("--objective", default="repulsor")
    parser.add_argument("--batch_size", type=int, default=0, help="0: 256, on a CPU 8")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_size = args.batch_size or (
        8 if args.platform == "cpu" and not args.topology else 256
    )
    if args.child:
        print(json.dumps(child(args, json.loads(args.child))))
        return
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold",) if args.topology else ("cold", "warm"):
                found[kind].append(start(args, cache))
    print(
        f"\n{args.size},{args.objective}, batch {args.batch_size}, "
        f"{args.topology or args.platform}; seconds, median of {args.rounds} (min to max)\n"
    )
    kinds = [kind for kind in found if found[kind]]
    print("| phase | " + " | ".join(kinds) + " |\n|" + "---|" * (len(kinds) + 1))
    for phase in (*PHASES, "sum"):
        columns = [[run[phase] for run in found[kind] if phase in run] for kind in kinds]
        if all(columns):
            print(f"| {phase} | " + " | ".join(map(spread, columns)) + " |")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def start(args: argparse.Namespace, cache: str) -> dict[str, float]:
    """Runs one measurement in a new process."""
    platform = "cpu" if args.topology else args.platform
    options = [f"--{k}={v}" for k, v in vars(args).items() if k not in ("child", "rounds")]
    about = json.dumps({"cache": cache, "started": time.time()})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", *options, f"--child={about}"],
        env=os.environ | {"JAX_PLATFORMS": platform},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(args: argparse.Namespace, about: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase of one start."""
    times: dict[str, float] = {}
    last = about["started"]

    def phase(name: str) -> None:
        nonlocal last
        now = time.time()
        times[name], last = now - last, now

    import jax
    import numpy as np

    from configs import imagenet256
    from repulsor_jax import config as config_lib
    from repulsor_jax import main as main_lib  # imports all that the program imports
    from repulsor_jax import sharding
    from repulsor_jax.experiment import make_trainer
    from repulsor_jax.planning import programs
    from repulsor_jax.planning.topology import open_topology
    from repulsor_jax.train_state import create_train_state

    del main_lib
    if not args.topology:
        jax.config.update("jax_compilation_cache_dir", about["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    phase("imports")
    topology = open_topology(args.topology or "local")
    phase("devices")
    c = imagenet256.get_config(f"{args.size},{args.objective}")
    c.batch_size, c.mesh.fsdp = args.batch_size, args.fsdp
    c.sampling.batch_size = len(topology.devices)
    config = config_lib.parse(c)
    experiment = programs.abstract_experiment(config, pathlib.Path(), topology)
    built = programs.build("train", experiment, topology)
    phase("build")
    step = built.compile()
    phase("trace and compile")
    if not args.topology:
        trainer = make_trainer(config, experiment.mesh)
        state = jax.block_until_ready(create_train_state(trainer, experiment.mesh))
        phase("state")
        rng = np.random.default_rng(0)
        batch = {
            name: rng.uniform(0, 10, each.shape).astype(each.dtype)
            for name, each in built.kinds["batch"].items()
        }
        jax.block_until_ready(step(state, sharding.to_global(batch, experiment.mesh)))
        phase("first step")
    return times | {"sum": sum(times.values())}


if __name__ == "__main__":
    main()
