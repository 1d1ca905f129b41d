"""What training shows on its way: grids of samples, and evaluations of few samples."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from repulsor_jax import sharding
from repulsor_jax.data.pipeline import DamagedDataError
from repulsor_jax.evaluation.evaluator import Evaluator, evaluate_params
from repulsor_jax.evaluation.yardstick import make_yardstick
from repulsor_jax.experiment import Experiment
from repulsor_jax.inference.generator import (
    Generator,
    SamplingError,
    configured_guidance,
    generate_images,
    make_generator,
    write_grid,
)
from repulsor_jax.inference.run import load_guide, params_sha256
from repulsor_jax.runtime.metrics import JSONL_NAME, MetricWriter, read_jsonl


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Draws samples of EMA parameters; a fault is reported, and training goes on.

    The evaluator is None where the configuration asks for no evaluation.
    """

    experiment: Experiment
    generator: Generator
    evaluator: Evaluator | None

    def is_due(self, step: int) -> bool:
        """Whether something is to be drawn after a step."""
        return self._grid_is_due(step) or self._evaluation_is_due(step)

    def look(
        self,
        step: int,
        params: Any,
        writer: MetricWriter,
        beat: Callable[[str, int], None],
        *,
        missing: bool = False,
    ) -> None:
        """Draws a grid and evaluates, each where it is due; every process of the job takes part.

        Args:
          step, params: EMA parameters, and their step.
          writer: of the run.
          beat: told of each phase, "grid" and "evaluate", and the step, as it begins.
          missing: skip a grid or an evaluation that exists, as after a restart.
        """
        grid = self._grid_is_due, self._has_grid, self._write_grid
        evaluation = self._evaluation_is_due, self._has_evaluation, self._evaluate
        for phase, fault, (due, exists, draw) in (
            ("grid", "no grid", grid),
            ("evaluate", "not evaluated", evaluation),
        ):
            if not due(step) or (missing and sharding.agree(int(exists(step)))):
                continue
            beat(phase, step)
            try:
                draw(step, params, writer)
            except (SamplingError, DamagedDataError, ValueError, OSError) as error:
                # Raised, it would end the run.
                if jax.process_index() == 0:
                    tqdm.write(f"step {step}: {fault}: {error}")

    def _grid_is_due(self, step: int) -> bool:
        c = self.experiment.config
        return is_due(c.sampling.grid_every_steps, step, c.total_steps)

    def _evaluation_is_due(self, step: int) -> bool:
        c = self.experiment.config
        return is_due(c.evaluation.every_steps, step, c.total_steps)

    def _has_evaluation(self, step: int) -> bool:
        return any(
            line["step"] == step and any(name.endswith(self._suffix()) for name in line)
            for line in read_jsonl(self.experiment.workdir / JSONL_NAME)
        )

    def _has_grid(self, step: int) -> bool:
        return self._grid_path(step).is_file()

    def _grid_path(self, step: int) -> pathlib.Path:
        return self.experiment.workdir / "samples" / f"train_{step:08d}.png"

    def _suffix(self) -> str:
        """Suffix of metric names: values of few samples compare only at the same count."""
        return f"_{self.experiment.config.evaluation.training_samples}"

    def _write_grid(self, step: int, params: Any, writer: MetricWriter) -> None:
        config = self.experiment.config.sampling
        guidance = configured_guidance(config)
        samples = generate_images(self.generator, params, config.grid_samples, guidance)
        pictures = self.generator.pictures
        beside = pictures(config.grid_samples) if pictures else ()
        if jax.process_index() == 0:
            path = self._grid_path(step)
            write_grid(self.experiment, path, *samples, beside)
            writer.image(step, "samples", path)

    def _evaluate(self, step: int, params: Any, writer: MetricWriter) -> None:
        assert self.evaluator is not None
        config = self.experiment.config
        record = evaluate_params(
            self.evaluator,
            params,
            configured_guidance(config.sampling),
            step=step,
            weights_sha256=params_sha256(params),
            num_samples=config.evaluation.training_samples,
        )
        if record:
            named = {name + self._suffix(): value for name, value in record["metrics"].items()}
            writer.scalars(step, named)
            writer.text(step, "evaluation/protocol", json.dumps(record, indent=2))


def is_due(every_steps: int, step: int, total_steps: int) -> bool:
    """Whether something done every so many steps, and after the last one, is due; 0 is never."""
    return every_steps > 0 and (step % every_steps == 0 or step == total_steps)


def make_monitor(experiment: Experiment) -> Monitor:
    """Builds the monitor, with its yardstick if the configuration asks for evaluations.

    Raises:
      ConfigError, ValueError, OSError: one message that names the key or file.
    """
    generator = make_generator(experiment, load_guide(experiment), gathers=False)
    evaluator = None
    if experiment.config.evaluation.every_steps:
        evaluator = Evaluator(experiment, generator, make_yardstick(experiment))
    return Monitor(experiment, generator, evaluator)
