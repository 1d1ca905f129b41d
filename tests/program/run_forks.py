"""Runs the program once for each list of arguments, in children of a process that has imported it.

    python -m tests.program.run_forks FOLDER '[["--config=...", ...], ...]'

The libraries take seconds to import, and a complaint about a flag none. Of child K the folder gets
`K.stdout`, `K.stderr` and its exit status `K.status`.
"""

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
    for number, arguments in enumerate(lists):
        child = os.fork()
        if not child:
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / f"{number}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
            sys.argv[1:] = arguments
            app.run(program.main, flags_parser=program.parse_flags)  # it ends the child
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{number}.status").write_text(str(status))
