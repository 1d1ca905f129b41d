"""Where an autoencoder's weights are: in a file, a folder or a Hugging Face repository."""

import pathlib
import re
from collections.abc import Sequence

from repulsor_jax.files.untrusted import printable

_HUB = "hf://"
# Names of folders; nobody publishes models under them.
_FOLDERS = {
    *("weights", "models", "checkpoints", "ckpt", "ckpts", "pretrained", "data", "runs", "output"),
    *("outputs", "vae", "autoencoder", "autoencoders"),
}


def locate(name: str, weights: str, repository: str, wanted: Sequence[str]) -> pathlib.Path:
    """Finds the file or folder that `weights` stands for, downloading it where it is a repository.

    Args:
      name: the autoencoder, for errors.
      weights: path of a file or folder, or a repository "org/name", or "hf://org/name" where that
        looks like a path; empty is `repository`.
      repository: where the weights are published; empty where they are not.
      wanted: files to download from a repository.

    Raises:
      ValueError: `weights` is empty and has no default.
      FileNotFoundError: the path does not exist, or the repository cannot be downloaded; says
        what to fetch and which key to set.
    """
    if not (weights or repository):
        raise ValueError(
            f"config.data.autoencoder_weights: found none, expected a folder or repository with "
            f"config.json and diffusion_pytorch_model.safetensors for the autoencoder {name!r}"
        )
    path = pathlib.Path(weights).expanduser()
    if weights and path.exists():
        refuse_pipeline(path)
        return path
    if weights and not _names_repository(weights):
        raise FileNotFoundError(
            f"config.data.autoencoder_weights: found nothing at {weights} in {pathlib.Path.cwd()}, "
            f"expected a file, a folder or a repository org/name with the weights of {name!r} (a "
            f"repository whose name looks like a path is written {_HUB}org/name)"
        )
    absent = f"there is no file or folder {weights} here, and as a repository " if weights else ""
    repository = weights.removeprefix(_HUB) or repository
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(repository, allow_patterns=list(wanted)))
    except Exception as error:
        # The client raises errors of its own, of its HTTP library and of the file system.
        reason = printable(str(error).strip().split("\n")[0])  # its URL may hold a password
        raise FileNotFoundError(
            f"autoencoder {name!r}: {absent}its weights could not be downloaded "
            f"({type(error).__name__}: {reason}). Fetch {' and '.join(wanted)} from "
            f"https://huggingface.co/{repository}/tree/main on a machine with a network, put them "
            "in one folder, and set config.data.autoencoder_weights to it"
        ) from error


def _names_repository(weights: str) -> bool:
    """Whether a name is that of a repository, and not of a file or folder that is not there."""
    if weights.startswith(_HUB):
        return True
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights):
        return False
    folder, _, file = weights.partition("/")
    is_file = pathlib.Path(file).suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
    return not (is_file or folder.lower() in _FOLDERS or pathlib.Path(folder).exists())


def refuse_pipeline(path: pathlib.Path) -> None:
    """Raises ValueError where a folder is a whole pipeline of diffusers, not its autoencoder."""
    if (path / "model_index.json").is_file():
        raise ValueError(
            f"{path}: is a whole pipeline of diffusers, of which the autoencoder is a part: set "
            f"config.data.autoencoder_weights to its folder, {path / 'vae'}"
        )


def find(folder: pathlib.Path, candidates: Sequence[Sequence[str]]) -> list[pathlib.Path]:
    """Returns the first group of files that are all in `folder`.

    Raises:
      FileNotFoundError: no group is complete; lists all of them.
    """
    for group in candidates:
        paths = [folder / file for file in group]
        if all(path.is_file() for path in paths):
            return paths
    groups = ", or ".join(" and ".join(group) for group in candidates)
    raise FileNotFoundError(
        f"config.data.autoencoder_weights: found no weights in {folder}, expected {groups}"
    )
