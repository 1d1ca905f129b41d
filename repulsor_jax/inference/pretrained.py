"""The file that `config.model.init_from` names, as parameters of the configured network."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repulsor_jax.checkpoints.checkpointer import Checkpointer
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data.classes import names_of
from repulsor_jax.experiment import (
    Experiment,
    check_weights,
    checked_mesh,
    latents_record,
    load_autoencoder,
)
from repulsor_jax.files.checksums import file_sha256
from repulsor_jax.files.tensors import open_safetensors, read_tensors
from repulsor_jax.files.untrusted import parse_json, printable
from repulsor_jax.flows import paths
from repulsor_jax.inference import run
from repulsor_jax.models import published, torch_weights
from repulsor_jax.models.build import build_source
from repulsor_jax.train_state import TrainState, abstract_model_params

EXPORTED = "model.safetensors"  # in a folder that --mode=export wrote
_HUB = "hf://"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class Pretrained(NamedTuple):
    """Parameters from a file, as NumPy arrays, and where they are from."""

    params: Any
    record: dict[str, str]  # file, SHA-256 and convention, for protocols
    description: str  # what was recognised
    latents: run.Latents | None  # of what `exported.write_weights` wrote


class Opened(NamedTuple):
    """A model to draw from: that of a checkpoint, or, with step 0, that of a file."""

    step: int
    experiment: Experiment
    params: Any  # on the mesh
    records: Mapping[str, Any]  # "config" and "latents" of the run, as plain values


def open_model(config: Config, workdir: pathlib.Path, step: int | None) -> Opened:
    """Opens a checkpoint, the newest for None; or `config.model.init_from` where there is none.

    Raises:
      ConfigError, CheckpointError: one message that names the key or file.
    """
    with run.open_checkpoints(config, workdir) as checkpointer:
        if reads_file(config, checkpointer, step):
            experiment, params = open_published(config, workdir)
            records = {"config": dataclasses.asdict(config), "latents": latents_record(experiment)}
            return Opened(0, experiment, params, records)
        step = checkpointer.resolve(step)
        experiment = run.open_experiment(config, workdir, checkpointer, step)
        params = run.restore_params(experiment, checkpointer, step)
        saved, latents, _ = checkpointer.records(step)
    return Opened(step, experiment, params, {"config": saved, "latents": latents})


def load(config: Config) -> Pretrained:
    """Reads the file of `config.model.init_from`, in the layout that the configuration has.

    Raises:
      ConfigError: there is no such file, it is none of a SiT or DiT, or one that does not fit the
        configuration; names what to set.
    """
    source = config.model.init_from
    path = locate(source)
    try:
        found = published.recognise(read_tensors(path, published.PARTS))
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.model.init_from={source!r}: {error}") from error
    metadata = _metadata(path)
    convention, how = _convention(config, path, found, metadata.get("convention"))
    if problem := _misfit(config, convention, found, metadata):
        raise ConfigError(f"config.model.init_from={source!r} is {found.description}; {problem}")
    m = config.model
    try:
        latents = _latents(config, path, metadata)
        params = torch_weights.from_torch_state_dict(
            found.state,
            num_heads=m.num_heads,
            patch_size=m.patch_size,
            in_channels=m.in_channels,
        )
    except ValueError as error:
        raise ConfigError(f"config.model.init_from={source!r}: {error}") from error
    if convention == "reversed":
        params = published.reverse(params)
    if m.scan_blocks:
        params = torch_weights.stack_blocks(params)
    record = {"file": path.name, "sha256": file_sha256(path), "convention": convention}
    description = f"{source}: {found.description}; read as {convention!r}{how}"
    return Pretrained(params, record, description, latents)


def reads_file(config: Config, checkpointer: Checkpointer, asked: object = None) -> bool:
    """Whether the file is read: there is no checkpoint, nor is one `asked` for."""
    return bool(config.model.init_from) and not asked and not checkpointer.steps()


def start_from(state: TrainState, found: Pretrained) -> TrainState:
    """A fresh state with the parameters of a file, also as their average.

    Raises:
      ConfigError: the network has other parameters than the file.
    """
    own = {name: state.params["model"][name] for name in found.params if name in state.ema_params}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, own)
    placed = place(found.params, own)

    def twice(tree: Any) -> tuple[Any, Any]:  # buffers of their own, for the step donates both
        return jax.tree.map(jnp.copy, tree), jax.tree.map(jnp.copy, tree)

    params, average = jax.jit(twice, out_shardings=(shardings, shardings))(placed)
    model = state.params["model"] | params
    return state.replace(
        params=state.params | {"model": model}, ema_params=state.ema_params | average
    )


def locate(source: str) -> pathlib.Path:
    """The local file that `model.init_from` stands for; one of a repository is downloaded.

    Args:
      source: a file; a folder that holds `EXPORTED`; or "owner/name/file" of a Hugging Face
        repository, "hf://owner/name/file" where that looks like a path.

    Raises:
      ConfigError: nothing is there, or it cannot be downloaded.
    """
    path = pathlib.Path(source)
    if path.is_dir() and (path / EXPORTED).is_file():
        return path / EXPORTED
    if path.is_file():
        return path
    name = source.removeprefix(_HUB)
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*/[\w./-]+", name)
    is_local = pathlib.Path(name.split("/")[0]).exists() and not source.startswith(_HUB)
    if not is_name or is_local or pathlib.Path(name).suffix not in _SUFFIXES:
        raise ConfigError(
            f"config.model.init_from={source!r}: found nothing there, seen from "
            f"{pathlib.Path.cwd()}; expected a file ({', '.join(_SUFFIXES)}), a folder with "
            f"{EXPORTED}, or owner/name/file of a Hugging Face repository, as "
            "owner/sit/SiT-XL-2-256x256.pt"
        )
    owner, repository, file = name.split("/", 2)
    try:
        from huggingface_hub import hf_hub_download

        return pathlib.Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # of its own, of its HTTP library and of the file system
        reason = printable(str(error).strip().split("\n")[0])
        raise ConfigError(
            f"config.model.init_from={source!r}: there is no such file here, and it could not be "
            f"downloaded ({type(error).__name__}: {reason}). Fetch {file} from "
            f"https://huggingface.co/{owner}/{repository}/tree/main on a machine with a network, "
            "and set config.model.init_from to its path"
        ) from error


def open_published(config: Config, workdir: pathlib.Path) -> tuple[Experiment, Any]:
    """What sampling needs of a file alone: the experiment, and the parameters on its mesh.

    The latents are those of the configured autoencoder. Their scale and shift, and the names of the
    classes, are those of the run that was exported; of other files the autoencoder's, and
    ImageNet's where there are 1,000 classes, else numbers.

    Raises:
      ConfigError: see `load`; or an exported run had another autoencoder.
    """
    found = load(config)
    mesh = checked_mesh(config, trains=False)
    autoencoder = load_autoencoder(config)
    if jax.process_index() == 0:
        print(f"draws from {found.description}", flush=True)
    m = config.model
    latents = found.latents or run.Latents(
        autoencoder=config.data.autoencoder,
        weights_sha256=autoencoder.weights_sha256,
        shift=(float(autoencoder.shift),) * m.in_channels,
        factor=(float(autoencoder.scale),) * m.in_channels,
        class_names=names_of(m.num_classes),
    )
    source = f"config.model.init_from={config.model.init_from!r} was trained on latents"
    if latents.autoencoder != config.data.autoencoder:
        raise ConfigError(
            f"config.data.autoencoder={config.data.autoencoder!r}: {source} of "
            f"{latents.autoencoder!r}; set it to that"
        )
    check_weights(autoencoder, latents.weights_sha256, f"{source} made")
    experiment = dataclasses.replace(
        run.experiment_of(config, workdir, mesh, autoencoder, latents),
        latents_sha256=autoencoder.weights_sha256,
        weights_file=found.record,
    )
    learned = build_source(config.source, config.model)
    expected = abstract_model_params(experiment.model, learned, mesh)
    return experiment, place(found.params, expected)


def place(params: Any, expected: Any) -> Any:
    """Puts NumPy arrays, the same on every process, where `expected` says: shapes and shardings.

    Raises:
      ConfigError: they are not these parameters.
    """
    shapes = [jax.tree.map(np.shape, tree) for tree in (params, expected)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            "config.model.init_from: the configured network has other parameters than a plain DiT "
            "of this size, which such a file holds: leave out what changes the network"
        )
    return jax.tree.map(
        lambda array, leaf: jax.make_array_from_callback(
            array.shape, leaf.sharding, lambda index: array[index]
        ),
        params,
        expected,
    )


def _metadata(path: pathlib.Path) -> Mapping[str, str]:
    """What `exported.write_weights` wrote of a file."""
    return (path.suffix == ".safetensors" and open_safetensors(path).metadata()) or {}


def _latents(config: Config, path: pathlib.Path, metadata: Mapping[str, str]) -> run.Latents | None:
    """What an export says of its latents; None for other files."""
    if "latents" not in metadata:
        return None
    where = f"{path}: latents"
    found = run.parse_latents(parse_json(metadata["latents"].encode(), where), where)
    m = config.model
    sizes = len(found.shift), len(found.factor), len(found.class_names)
    if sizes[:2] != (m.in_channels, m.in_channels) or sizes[2] > m.num_classes:
        raise ValueError(
            f"{where}: found {sizes[0]} in shift, {sizes[1]} in factor and {sizes[2]} classes, "
            f"expected {m.in_channels}, {m.in_channels} and at most {m.num_classes}"
        )
    return found


def _convention(
    config: Config, path: pathlib.Path, found: published.Published, written: str | None
) -> tuple[str, str]:
    """The convention of a file, and how it is known, for a person."""
    asked = config.model.init_convention
    known = written if written in published.CONVENTIONS else None
    if found.is_certain:
        known = found.convention
    if asked != "auto":
        if known not in (None, asked):
            raise ConfigError(
                f"config.model.init_convention={asked!r}: {path} is {found.description}, whose "
                f"convention is {known!r}; leave it at 'auto'"
            )
        return asked, ", as config.model.init_convention says"
    if known:
        return known, ""
    if found.sizes["learn_sigma"] and config.model.time_steps:
        return "dit", ", since config.model.time_steps is set"
    others = "'dit' for DiT's" if found.sizes["learn_sigma"] else "'reversed' for REPA's or SRA's"
    return "sit", f" (config.model.init_convention: {others})"


def _misfit(
    config: Config, convention: str, found: published.Published, metadata: Mapping[str, str]
) -> str:
    """What of the configuration does not fit a file, and what to set; "" where all does."""
    wanted: dict[str, Any] = {}
    for key, value in found.sizes.items():
        own = getattr(config.model, key)
        if isinstance(value, float):  # mlp_ratio, of which the width is rounded down
            width = found.sizes["hidden_size"]
            is_same = int(own * width) == round(value * width)
        else:
            is_same = own == value
        if not is_same:
            wanted[f"model.{key}"] = (own, value)
    if metadata.get("num_heads", "").isdecimal():  # of an export: tensors alone do not tell
        heads = int(metadata["num_heads"])
        if heads != config.model.num_heads:
            wanted["model.num_heads"] = (config.model.num_heads, heads)
    if config.source.name == "gaussian" and any(name.startswith("source.") for name in found.state):
        wanted["source.name"] = ("gaussian", "class")
    steps = paths.DDPM_STEPS if convention == "dit" else 0
    flow: dict[str, tuple[Any, Any]] = {"model.time_steps": (config.model.time_steps, steps)}
    prediction = metadata.get("prediction", "noise" if convention == "dit" else "velocity")
    flow["flow.prediction"] = (config.flow.prediction, prediction)
    if path := metadata.get("path", "ddpm_linear" if convention == "dit" else ""):
        flow["flow.path"] = (config.flow.path, path)
    wanted |= {key: pair for key, pair in flow.items() if pair[0] != pair[1]}
    if not wanted:
        return ""
    values = ", ".join(f"config.{key} is {own!r}" for key, (own, _) in wanted.items())
    flags = " ".join(f"--config.{key}={value}" for key, (_, value) in wanted.items())
    return f"but {values}: it needs {flags}"
