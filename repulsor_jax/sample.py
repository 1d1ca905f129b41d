"""The sample mode: a grid and an .npz from a checkpoint's EMA parameters."""

import jax

from repulsor_jax import images, sharding
from repulsor_jax.checkpoint import Checkpointer
from repulsor_jax.experiment import Experiment
from repulsor_jax.generation import make_generator, write_grid
from repulsor_jax.train_state import init_model_params


def sample(experiment: Experiment, step: int | None = None) -> None:
    """Writes `<workdir>/samples/step_<step>.png` and `.npz` (the ADM suite's layout).

    Args:
      experiment: from `experiment.prepare`.
      step: which checkpoint; the newest by default.

    Raises:
      CheckpointError: no such checkpoint, or it holds another model.
    """
    config, workdir = experiment.config, experiment.workdir
    boxed = jax.eval_shape(lambda key: init_model_params(experiment.model, key), jax.random.key(0))
    abstract_params = sharding.abstract_arrays(
        boxed, sharding.tree_shardings(boxed, experiment.mesh)
    )
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        params, step = checkpointer.restore_ema(abstract_params, step)
    pictures, labels = make_generator(experiment)(params, config.sampling.num_samples)
    if jax.process_index() == 0:
        path = workdir / "samples" / f"step_{step}.npz"
        images.save_samples(path, pictures, labels)
        write_grid(experiment, path.with_suffix(".png"), pictures, labels)
        print(f"{len(pictures)} samples of step {step}: {path} and {path.with_suffix('.png')}")
