"""Trains the arm `control`: all but the objective is the program's.

    python -m benchmarks.evidence.train_control --config=configs/evidence.py:cifar16,control \\
        --workdir=... --classifier=classifier_control.npz

The registry of the program does not have the control's term, so its flags are not those of `main`.
"""

import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks.evidence.classifier import load_classifier
from benchmarks.evidence.control import control_term
from repulsor_jax import config as config_lib
from repulsor_jax.experiment import make_trainer, prepare
from repulsor_jax.files import locks
from repulsor_jax.runtime import preemption
from repulsor_jax.train import train
from repulsor_jax.train_step import compile_training

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_CLASSIFIER = flags.DEFINE_string("classifier", None, "Its parameters, .npz.", required=True)
_CACHE_DIR = flags.DEFINE_string("compilation_cache_dir", "", "Keeps compiled programs.")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_compilation_cache_dir", _CACHE_DIR.value or None)
    config = config_lib.parse(_CONFIG.value)
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    with locks.sole(workdir, "training", "give this one another --workdir"):
        experiment, dataset = prepare(config, workdir)
        trainer = make_trainer(config, experiment.mesh)
        term = control_term(config, load_classifier(pathlib.Path(_CLASSIFIER.value)))
        terms = (*trainer.objective.terms, term)
        program = compile_training(
            trainer._replace(objective=trainer.objective._replace(terms=terms)),
            experiment.latent_format,
            dataset.shape,
            dataset.dtype,
            experiment.mesh,
        )
        try:
            train(experiment, dataset, None, _CONFIG.value.to_dict(), program=program)
        except preemption.Preempted as told:
            print(told, file=sys.stderr)
            sys.exit(preemption.EXIT_CODE)


if __name__ == "__main__":
    app.run(main)
