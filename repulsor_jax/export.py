"""The export mode: a model as others read it, from a checkpoint's EMA parameters."""

import pathlib
import shutil

import jax
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.evaluation import report
from repulsor_jax.files import locks
from repulsor_jax.inference import exported, pretrained, run
from repulsor_jax.inference.generator import (
    Guide,
    configured_guidance,
    generate_images,
    make_generator,
    write_grid,
)

CONVENTIONS = ("sit", "reversed")


def export(
    config: Config,
    workdir: pathlib.Path,
    step: int | None = None,
    *,
    convention: str = "sit",
    push_to: str = "",
) -> pathlib.Path:
    """Writes `<workdir>/export/step_<step>`: weights, a folder for diffusers, a card, a grid.

    Beside them: the configuration as `training_config.json`, and every evaluation of these weights
    with its protocol in `evaluations/`. Absolute paths of this machine are left out.

    Args:
      config: the configuration.
      workdir: of a trained run.
      step: which checkpoint; the newest by default, or `config.model.init_from` without any.
      convention: of the weights, see `exported.write_weights`.
      push_to: a Hugging Face repository "owner/name" to upload to; "" uploads nothing.

    Returns:
      The folder.

    Raises:
      ConfigError, CheckpointError: one message that names the key or file.
      SamplingError: a sample is not a finite number.
    """
    if push_to and push_to.count("/") != 1:
        raise ConfigError(f"--push_to={push_to!r}: expected a repository, as owner/name")
    opened = pretrained.open_model(config, workdir, step)
    experiment, records = opened.experiment, opened.records
    host_params = sharding.to_host(opened.params)
    digest = run.params_sha256(host_params)
    guidance = configured_guidance(config.sampling)
    guide = run.load_guide(experiment) if guidance else None
    folder = workdir / "export" / f"step_{opened.step}"
    is_main = jax.process_index() == 0
    with locks.locked(folder, enabled=is_main):
        partial = folder.with_name(f".{folder.name}.incomplete")
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            state = exported.write_weights(partial, experiment, host_params, convention)
            no_diffusers = exported.write_diffusers(partial, experiment, state)
        count = config.sampling.grid_samples
        generator = make_generator(experiment, guide)
        images, labels = generate_images(generator, opened.params, count, guidance)
        if is_main:
            write_grid(experiment, partial / "samples.png", images, labels)
            saved = exported.without_folders(records["config"])
            saved["model"]["learn_sigma"] &= convention != "reversed"
            if saved.get("sampling", {}).get("guiding_run"):  # a folder of this machine
                saved["sampling"] |= {"guiding_run": "", "cfg_scale": 1.0}
            exported.write_json(partial / exported.TRAINING_CONFIG, saved)
            evaluations = _copy_evaluations(workdir / "evaluations", partial, digest)
            exported.write_card(
                partial,
                experiment,
                title=workdir.name,
                origin=_origin(opened, guidance, guide),
                convention=convention,
                no_diffusers=no_diffusers,
                evaluations=evaluations,
            )
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            print(f"exported step {opened.step}: {folder}")
            if no_diffusers:
                print(f"without a folder for diffusers: {no_diffusers}")
            if push_to:
                print(f"uploaded: {exported.push(folder, push_to)}")
    return folder


def _origin(opened: pretrained.Opened, guidance: object, guide: Guide | None) -> list[str]:
    """Lines for the card: what the parameters were trained on, and how the grid was drawn."""
    experiment, config = opened.experiment, opened.records["config"]
    lines = []
    if experiment.weights_file:
        file = experiment.weights_file
        lines.append(f"Converted from the file {file['file']}, SHA-256 {file['sha256']}")
    else:
        data = opened.records["latents"].get("dataset", {})
        about = ", ".join(f"{key} {value}" for key, value in data.items() if value)
        lines.append(f"Trained for {opened.step:,} steps of {config['batch_size']:,} images")
        lines.append(f"Parameters: the average with decay {config['optimizer']['ema_decay']}")
        lines.append(f"Data set: {about or 'not known'}")
        lines.append(f"Losses beside the flow loss: {config.get('terms', 'none')}")
    c = experiment.config.sampling
    drawn = f"Samples shown: {c.solver}, {c.num_steps} steps, seed {c.seed}"
    drawn += f", {guidance or 'without guidance'}"
    if guide:
        drawn += " by {run}, step {step}".format_map(exported.without_folders(guide.description))
    return [*lines, drawn]


def _copy_evaluations(source: pathlib.Path, target: pathlib.Path, digest: str) -> str:
    """Copies the records of these weights with their protocols; returns their table."""
    readable, others = report.read_all(source)
    if others:
        tqdm.write(f"warning: {source}: no record can be read in {', '.join(others)}")
    records = map(exported.without_folders, readable)
    found = [record for record in records if record["protocol"].get("weights_sha256") == digest]
    for record in found:
        (target / "evaluations").mkdir(exist_ok=True)
        exported.write_json(target / "evaluations" / record["file"], record)
    table = report.table(found) if found else ""
    return f"{table}\n\nWhole protocols: `evaluations/`." if found else ""
