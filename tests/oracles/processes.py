"""Starts several processes of a job on this machine, and waits for them."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_address() -> str:
    """host:port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(module: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts `python -m module arguments...` on the CPU; its errors go to its output."""
    return _start("-m", module, *arguments, **environment)


def start_code(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts `python -c code arguments...`, likewise."""
    return _start("-c", code, *arguments)


def _start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(processes: list[subprocess.Popen[str]], timeout: float = 300.0) -> list[str]:
    """Waits for all of them to succeed, and returns their outputs; kills them on a failure."""
    try:
        said = []
        for process in processes:
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, output
            said.append(output)
        return said
    finally:
        for process in processes:
            process.kill()
