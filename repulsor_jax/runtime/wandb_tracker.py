"""Weights & Biases, beside the event files; its package is the extra `wandb`."""

import importlib.util
import json
import pathlib
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from repulsor_jax.config import ConfigError
from repulsor_jax.files import atomic
from repulsor_jax.files.untrusted import printable, read_json
from repulsor_jax.files.webpage import escaped

RECORD_NAME = "wandb.json"  # project and id of the run, by which a resumed run goes on there
INIT_SECONDS = 60.0
FINISH_SECONDS = 60.0


def check_installed(project: str) -> None:
    """Raises ConfigError where a project is named and the package is absent."""
    spec = importlib.util.find_spec("wandb") if project else None
    if project and (spec is None or spec.origin is None):  # a folder of that name has no origin
        raise ConfigError(
            f"config.log.wandb={project!r}: found no package wandb: install it by "
            "pip install 'repulsor_jax[wandb]', or set config.log.wandb=''"
        )


class WandB:
    """A `metrics.Tracker` that sends a run to Weights & Biases from a thread of its own.

    Nothing here makes the loop wait, but for at most `FINISH_SECONDS` at the end. Where the service
    is not reached at the start, the run is kept in `<workdir>/wandb` as with WANDB_MODE=offline. An
    error of the package is reported once; what comes after it is not sent.

    Its history only grows: steps that a run takes again after it went back to a checkpoint are left
    out, until the first new one.
    """

    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> None:
        """Goes on in the run that the working directory names, or in a new one of the project."""
        self._calls: queue.SimpleQueue[Callable[[Any, Any], None] | None] = queue.SimpleQueue()
        self._last = 0
        self._failed = False
        target = lambda: self._work(workdir, project, config)
        self._thread = threading.Thread(target=target, name="wandb", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers of a step."""
        self._calls.put(lambda wandb, run: self._log(run, step, dict(values)))

    def text(self, step: int, name: str, text: str) -> None:
        """Sends a text as it stands."""
        html = f"<pre>{escaped(text)}</pre>"
        self._calls.put(lambda wandb, run: self._log(run, step, {name: wandb.Html(html)}))

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Sends a picture file."""
        self._calls.put(lambda wandb, run: self._log(run, step, {name: wandb.Image(str(path))}))

    def rewind(self, step: int) -> None:
        """Nothing: see above."""

    def flush(self) -> None:
        """Nothing: it sends at once."""

    def close(self, *, failed: bool) -> None:
        """Waits until all is sent, for a bounded time."""
        self._failed = failed
        self._calls.put(None)
        self._thread.join(timeout=FINISH_SECONDS + 5.0)
        if self._thread.is_alive():
            tqdm.write("warning: Weights & Biases has not taken all; `wandb sync` sends the rest")

    def _log(self, run: Any, step: int, values: dict[str, Any]) -> None:
        if step >= self._last:
            self._last = step
            run.log(values, step=step)

    def _work(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> None:
        """The thread: opens the run, then makes one call after another."""
        try:
            import wandb

            run = _open_run(wandb, workdir, project, config)
            self._last = run.starting_step
            while (call := self._calls.get()) is not None:
                call(wandb, run)
            run.finish(exit_code=int(self._failed))
        except Exception as error:
            tqdm.write(printable(f"warning: nothing more goes to Weights & Biases ({error})"))


def _open_run(wandb: Any, workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> Any:
    settings = wandb.Settings(
        silent=True,  # neither asks for a key nor writes between the lines of the progress bar
        console="off",
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    wandb.setup(settings=settings)

    def start(mode: str | None) -> Any:
        return wandb.init(
            project=project,
            id=_run_id(workdir, project),
            name=workdir.name,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            mode=mode,
            settings=settings,
        )

    try:
        run = start(None)
    except Exception as error:
        reason = printable(str(error)).splitlines()[:1]
        tqdm.write(
            f"warning: Weights & Biases is not reached ({' '.join(reason)}); the run is kept in "
            f"{workdir / 'wandb'}, from where `wandb sync` sends it"
        )
        wandb.teardown()  # which gives the number of the run free
        wandb.setup(settings=settings)
        run = start("offline")
    tqdm.write(f"Weights & Biases: {run.url or workdir / 'wandb'}")
    return run


def _run_id(workdir: pathlib.Path, project: str) -> str:
    path = workdir / RECORD_NAME
    try:
        record = read_json(path)
        if record["project"] == project and isinstance(record["id"], str):
            return record["id"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    record = {"project": project, "id": secrets.token_hex(4)}
    atomic.write_text(path, json.dumps(record) + "\n")
    return record["id"]
