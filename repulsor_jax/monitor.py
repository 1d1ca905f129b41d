"""What training shows on its way: grids of samples, and evaluations by few of them."""

import dataclasses
import json
from typing import Any

import jax
from tqdm import tqdm

from repulsor_jax import generation
from repulsor_jax.evaluate import Evaluator, evaluate_params
from repulsor_jax.experiment import Experiment
from repulsor_jax.generation import (
    Generator,
    SamplingError,
    configured_guidance,
    generate_images,
    make_generator,
)
from repulsor_jax.inference import load_guide, params_sha256
from repulsor_jax.metrics import MetricWriter
from repulsor_jax.yardstick import make_yardstick


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Draws samples of EMA parameters; a sample that is not finite is said, and stops nothing.

    Attributes:
      experiment: of the run.
      generator: of its samples.
      evaluator: None where the configuration asks for no evaluation.
    """

    experiment: Experiment
    generator: Generator
    evaluator: Evaluator | None

    def write_grid(self, step: int, params: Any, writer: MetricWriter) -> None:
        """Draws `config.sampling.grid_samples` samples as `<workdir>/samples/train_<step>.png`."""
        c = self.experiment.config.sampling
        try:
            samples = generate_images(
                self.generator, params, c.grid_samples, configured_guidance(c)
            )
        except SamplingError as error:
            _say(f"step {step}: no grid: {error}")
            return
        if jax.process_index() == 0:
            path = self.experiment.workdir / "samples" / f"train_{step:08d}.png"
            try:
                generation.write_grid(self.experiment, path, *samples)
                writer.image(step, "samples", path)
            except OSError as error:  # no reason to lose the run
                _say(f"step {step}: no grid: {error}")

    def evaluate(self, step: int, params: Any, writer: MetricWriter) -> None:
        """Evaluates with `config.evaluation.training_samples`, as the evaluate mode does.

        The count is part of every metric's name, as in fid_2000: a number of few samples is
        comparable with others of as many only.
        """
        assert self.evaluator is not None
        config = self.experiment.config
        try:
            record = evaluate_params(
                self.evaluator,
                params,
                configured_guidance(config.sampling),
                step=step,
                weights_sha256=params_sha256(params),
                num_samples=config.evaluation.training_samples,
            )
        except (SamplingError, ValueError, OSError) as error:  # no reason to lose the run
            _say(f"step {step}: not evaluated: {error}")
            return
        if record:
            count = config.evaluation.training_samples
            named = {f"{name}_{count}": value for name, value in record["metrics"].items()}
            writer.scalars(step, named)
            writer.text(step, "evaluation/protocol", json.dumps(record, indent=2))


def make_monitor(experiment: Experiment) -> Monitor:
    """Builds the monitor; where training is to be evaluated, opens what samples are compared with.

    Raises:
      ConfigError, ValueError, OSError: one message that names the key or file.
    """
    guide = load_guide(experiment)
    generator = make_generator(experiment, guide.guide if guide else None)
    evaluator = None
    if experiment.config.evaluation.every_steps:
        evaluator = Evaluator(experiment, generator, guide, make_yardstick(experiment))
    return Monitor(experiment, generator, evaluator)


def _say(message: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(message)
