"""What the compiler decides about a program, asked in a process of its own.

XLA first rewrites a program (partitions, fusions, collectives, the place of each buffer) and then
emits machine code for it. All that a plan reads is decided by the first part, which takes seconds;
the second takes minutes for the convolutions of an autoencoder. Between the two XLA can write the
rewritten program and its buffers to a folder (`--xla_dump_to`). A process compiles, another thread
of it waits for these files, and the process ends with the answer as soon as they are there. Where
they do not come, as from a compiler with other files, the answer is that of the whole compilation.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax

from repulsor_jax.planning.gpus import NO_TRIALS


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one program takes beside its arguments, or why the compiler refused it."""

    memory: dict[str, float]  # bytes on one device by kind; "arguments" are those with padding
    hlo: str = ""  # the optimised program; "" where it was refused
    refusal: str = ""
    emitted: bool = True  # False: before machine code; its bytes and what it adds are not counted


def compiled_answer(compiled: jax.stages.Compiled) -> Answer:
    """The answer of a whole compilation."""
    stats: Any = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    return Answer(memory, compiled.as_text() or "")


def dumped_answer(hlo: str, buffers: str) -> Answer:
    """The answer of XLA's `after_optimizations` files, before there is any machine code.

    Args:
      hlo: the optimised program.
      buffers: its buffer assignment.
    """
    memory = {"arguments": 0.0, "temporaries": 0.0, "results": 0.0}
    for size, about in re.findall(r"^allocation \d+: size (\d+)(.*):$", buffers, re.MULTILINE):
        if ", color " in about:  # not in main memory
            continue
        if ", parameter " in about:
            memory["arguments"] += int(size)
        elif ", preallocated-temp" in about:
            memory["temporaries"] += int(size)
        elif ", maybe-live-out" in about:
            memory["results"] += int(size)
    return Answer(memory, hlo, emitted=False)


def ask(request: dict[str, Any], *, emits: bool = False) -> Answer:
    """The answer for `programs.requested(**request)`, from a new process.

    Where it `emits`, the process compiles to the end, machine code included.

    Raises:
      RuntimeError: the process failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="repulsor-plan-") as folder:
        dump = "" if emits else f"--xla_dump_to={folder}"
        flags = f"{NO_TRIALS} {os.environ.get('XLA_FLAGS', '')} {dump}"
        reply = pathlib.Path(folder, "reply")
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import serve; serve()", str(reply)],
            input=json.dumps(request).encode(),
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            check=False,
        )
        if not reply.exists():
            said = done.stderr.decode(errors="replace").strip()[-2000:]
            raise RuntimeError(f"the compiler's process ended with {done.returncode}: {said}")
        return Answer(**json.loads(reply.read_text("utf-8")))


def serve() -> None:
    """The process of `ask`: reads a request, writes the answer to the file of argv, and ends."""
    # Imported here: `programs` imports this module.
    from repulsor_jax.planning import programs

    jax.config.update("jax_enable_compilation_cache", False)
    reply = pathlib.Path(sys.argv[1])
    built = programs.requested(**json.load(sys.stdin))
    once = threading.Lock()

    def finish(answer: Answer) -> None:
        once.acquire()  # never released: the first answer counts
        part = reply.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(answer)), "utf-8")
        part.replace(reply)
        os._exit(0)  # the compiler's threads with it

    def watch() -> None:
        seen = set(reply.parent.iterdir())
        # XLA's last file of an optimised program; those of this machine's CPU are other programs.
        end = "-memory-usage-report.txt"
        while True:
            time.sleep(0.05)
            for file in set(reply.parent.glob(f"*after_optimizations{end}")) - seen:
                stem = file.name.removesuffix(end)
                hlo, buffers = (
                    file.with_name(f"{stem}{of}.txt") for of in ("", "-buffer-assignment")
                )
                if ".cpu_" not in stem and hlo.exists() and buffers.exists():
                    finish(dumped_answer(hlo.read_text("utf-8"), buffers.read_text("utf-8")))

    threading.Thread(target=watch, daemon=True).start()
    finish(programs.compiled(built))
