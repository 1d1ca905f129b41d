"""The configuration of a run, from a checkpoint: what --mode=sample takes without --config.

    python -m repulsor_jax.main --mode=sample --workdir=runs/digits

`of_run:JSON` is a list of the folder of checkpoints and a step, "" for the newest; or of the
training_config.json that --mode=export wrote, and "". The mesh is the default's, for the run's may
not be of this machine; keys that the run did not know have their defaults.
"""

import json
from typing import Any

import ml_collections
from etils import epath

from repulsor_jax.configs import default


def get_config(of: str = '["checkpoints", ""]') -> ml_collections.ConfigDict:
    """Returns the configuration that a checkpoint holds."""
    directory, asked = json.loads(of)
    saved = _record(epath.Path(directory), asked)
    c = default.get_config()
    for key, value in saved.items():
        if key in ("mesh", "regularizer") or key not in c:
            continue
        if isinstance(value, dict):
            for name in value.keys() & c[key].keys():
                c[key][name] = _typed(value[name], c[key][name])
        else:
            c[key] = _typed(value, c[key])
    c.checkpoint.directory = ""  # they were found where they are, and may have been moved
    former = saved.get("regularizer", {}) if "terms" not in saved else {}
    for name, value in former.items():
        if name in c.regularizer:
            c.regularizer[name] = value
    return c


def _record(directory: epath.Path, asked: str) -> dict[str, Any]:
    """The content of a checkpoint's record, or of a file, without the library of checkpoints.

    That would ask for the devices, before this process has joined the others.
    """
    found = {}
    if directory.is_file():
        return dict(json.loads(directory.read_text()))
    if directory.is_dir():
        steps = [path for path in directory.iterdir() if path.name.isdecimal()]
        if str(directory).startswith("gs://"):  # where orbax marks what is whole
            steps = [path for path in steps if (path / "commit_success.txt").exists()]
        found = {int(path.name): path / "config" / "metadata" for path in steps}
    if not found:
        raise ValueError(
            f"{directory} holds no checkpoint: check --workdir and --config.checkpoint.directory, "
            "or give --config"
        )
    step = int(asked) if asked.isdecimal() else max(found)
    if step not in found:
        raise ValueError(f"{directory} holds no step {step}, but {sorted(found)}")
    try:
        return dict(json.loads(found[step].read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory}/{step}: found no readable configuration of a run ({error!r}): give "
            "--config, or another --checkpoint_step"
        ) from error


def _typed(value: Any, like: Any) -> Any:
    """A value of JSON as the configuration has it: lists are tuples."""
    if isinstance(value, list):
        return tuple(_typed(each, None) for each in value)
    return float(value) if isinstance(like, float) and isinstance(value, int) else value
