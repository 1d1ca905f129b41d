"""The encode mode on a folder of small pictures; as a program, a process that tests may kill.

    python -m tests.oracles.encode_job WORKDIR PICTURES '{"data.flips": true}' [RANK ADDRESS DELAY]

With the last three, it is one of two processes. The second keeps the first waiting: it ends DELAY
seconds after the first has written its shards. Each prints a line where it decompresses an archive.
"""

import gzip
import json
import os
import pathlib
import sys
import time
import traceback
from typing import Any

import jax

from repulsor_jax import config as config_lib
from repulsor_jax import encode as encode_lib
from tests.oracles import tiny


def config(source_path: Any, **overrides: Any) -> config_lib.Config:
    """Encodes pictures of 8 x 8 pixels into shards of 8."""
    values = {
        "data.source": "folder",
        "data.source_path": str(source_path),
        "data.image_size": 8,
        "data.images_per_shard": 8,
        "model.in_channels": 3,
    }
    return config_lib.parse(tiny.digits_dict(**values | overrides))


def main(workdir: str, source_path: str, overrides: str, *process: str) -> None:
    """Runs the job."""
    chosen, folder = config(source_path, **json.loads(overrides)), pathlib.Path(workdir)
    if process:
        rank, address, delay = int(process[0]), process[1], float(process[2])
        jax.distributed.initialize(address, 2, rank)
        fill, gzip_open = encode_lib.fill, gzip.open

        def late_fill(*args: Any, **options: Any) -> int:
            count, first_is_done = fill(*args, **options), folder / "first_is_done"
            if rank == 0:
                first_is_done.touch()
                return count
            while not first_is_done.exists():
                time.sleep(0.1)
            time.sleep(delay)
            return count

        def told_open(*args: Any) -> Any:
            print("decompresses", flush=True)
            time.sleep(1)  # long enough for the other process to begin, too
            return gzip_open(*args)

        encode_lib.fill, gzip.open = late_fill, told_open
    try:
        encode_lib.encode(chosen, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # an orderly end would wait for the other process


if __name__ == "__main__":
    main(*sys.argv[1:])
