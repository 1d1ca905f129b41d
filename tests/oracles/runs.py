"""Whole runs of the loop on digits, with faults at its seams: the feed, the step, the monitor."""

import dataclasses
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax import train as train_lib
from repulsor_jax.method.registry import TERMS
from repulsor_jax.runtime.metrics import read_jsonl
from repulsor_jax.train_step import compile_training
from tests.oracles import tiny

MESH = {"mesh.data": 4, "mesh.fsdp": 2}


class Feed:
    """The batches of a run, from 1: some changed by `change(number, batch)`, some left out."""

    def __init__(self, feed, change=None, without=()):
        self._feed, self._change, self._without = feed, change, without
        self.get_state, self.set_state = feed.get_state, feed.set_state

    def __next__(self):
        while (number := self.get_state()["next_index"] + 1) in self._without:
            next(self._feed)
        batch = next(self._feed)
        return self._change(number, batch) if self._change else batch


def poisoned(*numbers):
    """Batches of these numbers are all nan."""

    def change(number, batch):
        nan = np.full_like(batch["latents"], np.nan)
        return batch | {"latents": nan} if number in numbers else batch

    return change


def acting(**actions):
    """Acts before the batch of a number, `_7=action`."""

    def change(number, batch):
        actions.get(f"_{number}", lambda: None)()
        return batch

    return change


def told_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="session")
def programs():
    """Compiled training programs: runs of equal configurations share them and their first state."""
    sections = ("model", "flow", "source", "terms", "optimizer", *TERMS)
    found = {}

    def program(experiment, dataset, trainer=None):
        config = experiment.config
        limits = (config.divergence.max_loss, config.divergence.max_grad_norm)
        key = (config.seed, config.total_steps, config.batch_size, limits, experiment.mesh, trainer)
        key += tuple(getattr(config, name) for name in sections)
        if key not in found:
            parts = experiment_lib.make_trainer(config, experiment.mesh)
            if trainer is not None:
                parts = trainer(parts)
            latent_format = experiment.latent_format
            made = compile_training(
                parts, latent_format, dataset.shape, dataset.dtype, experiment.mesh
            )
            first = made.create_state()
            found[key] = made._replace(create_state=lambda: jax.tree.map(jnp.copy, first))
        return found[key]

    return program


@pytest.fixture
def run(programs, data_dir):
    """Trains as the program does, in a folder, with the given configuration and faults."""

    def train(workdir, *, whole_mesh=False, fault=None, at=(), change=None, without=(), **options):
        data = options.pop("data", data_dir)
        watches = options.pop("monitor", lambda experiment: None)
        values = tiny.digits_dict(data, **MESH, **options)
        workdir.mkdir(exist_ok=True)
        experiment, dataset = experiment_lib.prepare(config_lib.parse(values), workdir)
        if not whole_mesh:
            experiment = dataclasses.replace(experiment, mesh=tiny.mesh())
        program = programs(experiment, dataset)
        if fault:
            good, bad = program.step, fault(experiment, dataset, programs)
            numbers = itertools.count(1)  # of the steps that are tried
            program = program._replace(
                step=lambda *inputs: (bad if next(numbers) in at else good)(*inputs)
            )
        feed = Feed(train_lib.open_feed(experiment, dataset), change, without)
        return train_lib.train(
            experiment, dataset, watches(experiment), values.to_dict(), program=program, feed=feed
        )

    return train


def losses(workdir):
    kept = ("loss", "flow_loss", "repulsor_loss", "grad_norm")
    return [
        {"step": line["step"]} | {name: line[name] for name in kept}
        for line in read_jsonl(workdir / "metrics.jsonl")
        if "loss" in line
    ]


def on_host(state):
    return jax.device_get(tiny.raw(state))


def assert_same_run(workdir, state, reference):
    """Every loss and the last state are those of a reference, a folder and a state, bit for bit."""
    other, expected = reference
    assert losses(workdir) == losses(other)
    assert [line["step"] for line in losses(workdir)] == list(range(1, 13))
    jax.tree.map(np.testing.assert_array_equal, on_host(state), expected)


@pytest.fixture(scope="session")
def references():
    return {}


@pytest.fixture
def without(references, run, tmp_path_factory):
    """Of numbers of batches: the folder and last state of a run whose data never held them."""

    def trained(*numbers):
        if numbers not in references:
            workdir = tmp_path_factory.mktemp("without")
            references[numbers] = workdir, on_host(run(workdir, without=numbers))
        return references[numbers]

    return trained


@pytest.fixture
def uninterrupted(without):
    return without()


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def position(workdir, step):
    return json.loads((workdir / f"checkpoints/{step}/data/metadata").read_text())["next_index"]


def read_events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
