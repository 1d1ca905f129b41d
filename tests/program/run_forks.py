"""Runs the program once for each list of arguments, in children of a process that has imported it.

    python -m tests.program.run_forks FOLDER '[["--config=...", ...], ...]'

The libraries take seconds to import, and a complaint about a flag none. Child K works in FOLDER/K,
which gets its `stdout`, `stderr`, number (`pid`) and exit status (`status`).
"""

import gc
import json
import os
import pathlib
import sys

import jax
from absl import app, flags

from repulsor_jax import main as program

if __name__ == "__main__":
    folder, lists = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
    jax.config.config_with_absl()
    flags.mark_flags_as_required(["config", "workdir"])
    gc.freeze()  # else every child looks through the libraries at its end
    for number, arguments in enumerate(lists):
        own = folder / str(number)
        own.mkdir()
        child = os.fork()
        if not child:
            os.chdir(own)
            pathlib.Path("pid").write_text(str(os.getpid()))
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), descriptor)
            sys.argv[1:] = arguments
            app.run(program.main, flags_parser=program.parse_flags)  # it ends the child
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (own / "status").write_text(str(status))
