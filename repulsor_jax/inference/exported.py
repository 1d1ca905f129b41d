"""EMA parameters as others read them: SiT's names, diffusers' folder, and a card."""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from repulsor_jax import __version__
from repulsor_jax.config import ConfigError
from repulsor_jax.data import classes
from repulsor_jax.experiment import Experiment, latents_record
from repulsor_jax.files.untrusted import printable
from repulsor_jax.inference.pretrained import EXPORTED
from repulsor_jax.models import diffusers_names, published, torch_weights
from repulsor_jax.models.blockwise import Blockwise

PIPELINE = "pipeline.py"
TRAINING_CONFIG = "training_config.json"  # read by configs/of_run.py
_REPOSITORIES = "stabilityai/"  # of the autoencoders that diffusers' AutoencoderKL reads


def write_weights(
    folder: pathlib.Path, experiment: Experiment, params: Any, convention: str
) -> torch_weights.State:
    """Writes `EXPORTED`: a state dict in SiT's names, and what it is in the file's metadata.

    Args:
      folder: exists.
      experiment: of the run.
      params: of its network, on the host.
      convention: "sit" is as trained here; "reversed" as REPA's and SRA's code has it: t = 0 is
        data, the velocity has the other sign, and no channels of a variance.

    Returns:
      The state dict as trained here.

    Raises:
      ConfigError: the network has more than a SiT, or does not predict what the convention has.
    """
    model, flow = experiment.model, experiment.config.flow
    sizes = {"num_heads": model.num_heads, "patch_size": model.patch_size}
    sizes["latent_size"] = model.latent_size
    if isinstance(model, Blockwise):
        raise ConfigError(
            "--mode=export writes a plain SiT or DiT, and this run's network is another: "
            "config.model.architecture='blockwise'"
        )
    try:
        state = torch_weights.to_torch_state_dict(params, **sizes)
    except ValueError as error:
        raise ConfigError(
            f"--mode=export writes a plain SiT or DiT, and this run's network has more: {error}"
        ) from error
    found, own = state, "dit" if model.time_steps else "sit"
    if convention == "reversed":
        if own == "dit" or flow.prediction != "velocity":
            raise ConfigError(
                "--convention=reversed is of velocities in t, and this run predicts "
                f"config.flow.prediction={flow.prediction!r}; leave it at 'sit'"
            )
        if "blocks" in params:
            params = torch_weights.unstack_blocks(params)
        found = torch_weights.to_torch_state_dict(published.reverse(params), **sizes)
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            channels = model.in_channels * (2 if model.learn_sigma else 1)
            is_kept = np.arange(len(found[name])) % channels < model.in_channels
            found[name] = found[name][is_kept]
    about = {"convention": convention if convention == "reversed" else own, "format": "pt"}
    about["latents"] = json.dumps(latents_record(experiment))
    about |= {"path": flow.path, "prediction": flow.prediction, "num_heads": str(model.num_heads)}
    save_file(found, folder / EXPORTED, about)
    return state


def write_diffusers(
    folder: pathlib.Path, experiment: Experiment, state: torch_weights.State
) -> str:
    """Writes the network for diffusers, and the pipeline that draws from it.

    Returns:
      "" or, where diffusers has no place for this network or flow, why nothing was written.
    """
    model, flow = experiment.model, experiment.config.flow
    if reason := diffusers_names.inexpressible(model):
        return reason
    if experiment.config.source.name != "gaussian":
        return "config.source: the pipeline starts from N(0, I), and not by class"
    if flow.prediction != "velocity" or flow.path not in ("linear", "gvp"):
        return (
            f"config.flow.prediction={flow.prediction!r} on path {flow.path!r}: the pipeline "
            "integrates velocities on the linear and gvp paths"
        )
    transformer = folder / "transformer"
    transformer.mkdir()
    write_json(transformer / "config.json", diffusers_names.config(model))
    tensors = diffusers_names.from_sit(state)
    save_file(
        {name: np.array(a) for name, a in tensors.items()},
        transformer / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    shutil.copy(pathlib.Path(__file__).with_name("diffusers_pipeline.py"), folder / PIPELINE)
    autoencoder = experiment.autoencoder
    index = {
        "_class_name": [PIPELINE.removesuffix(".py"), "FlowPipeline"],
        "_diffusers_version": "0.35.0",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
        "latent_shift": np.asarray(experiment.latent_format.shift, float).tolist(),
        "latent_factor": np.asarray(experiment.latent_format.factor, float).tolist(),
        "autoencoder": autoencoder.name if autoencoder else "none",
        "classes": list(classes.readable(experiment.class_names)),
    }
    write_json(folder / "model_index.json", index)
    return ""


def write_card(
    folder: pathlib.Path,
    experiment: Experiment,
    *,
    title: str,
    origin: Sequence[str],
    convention: str,
    no_diffusers: str,
    evaluations: str,
) -> None:
    """Writes README.md: what the model is, where it is from, how it was measured, how to use it.

    Args:
      folder: has the files that `write_weights` and `write_diffusers` left.
      experiment: of the run.
      title: of the card.
      origin: lines on where the parameters are from.
      convention: of `EXPORTED`.
      no_diffusers: why there is no folder for diffusers; "" where there is one.
      evaluations: a table; "" where nothing was measured.
    """
    m, flow, sampling = experiment.model, experiment.config.flow, experiment.config.sampling
    autoencoder = experiment.autoencoder.name if experiment.autoencoder else "none"
    names = classes.readable(experiment.class_names)
    some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    network = (
        f"Diffusion transformer (SiT's, adaLN-Zero): {m.depth} blocks of width {m.hidden_size}, "
        f"{m.num_heads} heads, patch {m.patch_size}, on latents of {m.latent_size}x{m.latent_size}x"
        f"{m.in_channels} by the autoencoder `{autoencoder}`"
    )
    settings = f" --config.sampling.cfg_scale={sampling.cfg_scale:g}"
    if sampling.guiding_run:
        settings = f" --config.sampling.guiding_run=RUN{settings}"
    if convention == "reversed" and m.learn_sigma:  # its channels are not in the file
        settings = f" --config.model.learn_sigma=False{settings}"
    vae = ""
    if autoencoder.startswith("sd-vae"):
        vae = f', vae=AutoencoderKL.from_pretrained("{_REPOSITORIES}{autoencoder}")'
    elif autoencoder != "identity":
        vae = ", vae=..."
    use = f"""`{EXPORTED}` is a state dict in the names of SiT's code, convention `{convention}`: {
        "t = 0 is data, t = 1 is noise, the output is the velocity noise - data, as REPA's and "
        "SRA's code has it (its heads are not there: `strict=False`)"
        if convention == "reversed"
        else "t = 0 is noise, t = 1 is data, as SiT's code has it"
    }. Ours:

```
python -m repulsor_jax.main --mode=sample --workdir=out --config.model.init_from=FOLDER{settings}
```

The configuration is `{
        TRAINING_CONFIG
    }`. PyTorch: `model.load_state_dict(safetensors.torch.load_file("{EXPORTED}"))`.
"""
    if experiment.config.source.name != "gaussian":
        use += """
Samples start from mean + exp(log_variance / 2) noise of their class, not from noise alone. The
tensors `source.*`, for which SiT's code has no place (`strict=False`), give them: a row of `table`,
then `hidden`, SiLU, and `mean` and, where it is there, `log_variance`, each [C, H, W].
"""
    guidance = ""  # its pipeline knows no other guide than the model without a class
    if not sampling.guiding_run:
        guidance = f", guidance_scale={sampling.cfg_scale:g}"
        guidance += f", guidance_channels={sampling.cfg_channels}" if sampling.cfg_channels else ""
    if no_diffusers:
        use += f"\nNot for diffusers: {no_diffusers}.\n"
    else:
        use += f"""
diffusers, by the pipeline in `{PIPELINE}`, which also sets the frequencies of the time embedding
(diffusers' own differ from DiT's, so that `DiTPipeline` would draw something else):

```python
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True{vae})
pipe([0], num_inference_steps={sampling.num_steps}{guidance}).images[0]
```
"""
    lines = [
        "---",
        "library_name: diffusers" if not no_diffusers else "library_name: repulsor_jax",
        "tags: [image-generation, flow-matching, diffusion-transformer, jax]",
        "---",
        f"# {title}",
        "",
        "![Samples](samples.png)",
        "",
        f"{network}. It predicts the {flow.prediction} on the path `{flow.path}`, for "
        f"{len(names):,} classes ({some}). Written by repulsor_jax {__version__}.",
        "",
        *(f"- {line}" for line in origin),
        "",
        "## Measured",
        "",
        evaluations or "Nothing was measured.",
        "",
        "## Use",
        "",
        use,
    ]
    text = "\n".join(printable(line) for line in "\n".join(lines).split("\n"))
    (folder / "README.md").write_text(text + "\n", "utf-8")


def push(folder: pathlib.Path, repository: str) -> str:
    """Uploads a folder to a Hugging Face repository, which is made where absent; gives its address.

    The client takes the token that `hf auth login` or HF_TOKEN left.

    Raises:
      ConfigError: it fails; says why and what to do.
    """
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export")
    except Exception as error:  # of its own, of its HTTP library and of the file system
        reason = printable(str(error).strip().split("\n")[0])
        raise ConfigError(
            f"--push_to={repository}: not uploaded ({type(error).__name__}: {reason}). The folder "
            f"is whole: {folder}; log in by `hf auth login`, or upload it by `hf upload "
            f"{repository} {folder}` on a machine with a network"
        ) from error
    return f"https://huggingface.co/{repository}"


def without_folders(value: Any) -> Any:
    """Plain values with absolute paths of this machine by their last name."""
    if isinstance(value, Mapping):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    if isinstance(value, str) and value.startswith("/"):
        return pathlib.Path(value).name
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes plain values."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
