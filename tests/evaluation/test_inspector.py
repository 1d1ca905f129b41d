"""What a run says of its terms on the way: images that are read again, curves, warnings."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import experiment as experiment_lib
from repulsor_jax.evaluation.inspector import Inspector, find_warnings, read_held_out
from repulsor_jax.method import registry
from repulsor_jax.method.memory_bank import EMPTY, UNKNOWN
from repulsor_jax.runtime.metrics import MetricWriter, read_jsonl
from repulsor_jax.train_state import create_train_state
from tests.oracles import latent_sets, tiny


@pytest.fixture
def make(tmp_path, data_dir):
    """An inspector of digits whose measure is the test's own, and the first state of the run."""

    def make(measure, dataset=None, **overrides):
        values = tiny.digits_dict(data_dir, **overrides)
        experiment, digits = experiment_lib.prepare(config_lib.parse(values), tmp_path)
        trainer = experiment_lib.make_trainer(experiment.config, experiment.mesh)
        state = create_train_state(trainer, experiment.mesh)
        terms = trainer.objective.terms
        return Inspector(experiment, dataset or digits, terms, measure, None), state

    return make


def test_the_images_of_the_oldest_slot_are_read_again_row_by_row(tmp_path, make):
    """Four rows an image, two records an image; and rows whose image is not to be had."""
    latents, labels = latent_sets.random_latents(23, views=2)
    dataset = latent_sets.write(
        tmp_path / "flipped", latents, labels, dtype="float32", flipped=True
    )
    shown = []

    def measure(state, batch, oldest, held_out):
        shown.append(jax.device_get(oldest))
        return {}

    inspector, state = make(
        measure, dataset, repulsor__pooling="token", repulsor__bank_rows=3 * 4 * 16
    )
    images = np.array([5, 22, 0, 5, EMPTY, UNKNOWN, 23, *range(9)], np.int32)
    ids = np.full((3, 4 * 16), 7, np.int32)
    ids[1] = images.repeat(4)
    bank = state.bank
    tags = bank.tags._replace(ids=jax.device_put(ids, bank.tags.ids.sharding))
    # Two slots are written, 1 and 2.
    bank = dataclasses.replace(bank, tags=tags, cursor=jnp.int32(0), filled=jnp.int32(2))
    with MetricWriter(tmp_path, 0) as writer:
        inspector.look(1, state.replace(bank=bank), {}, writer)
    (found,) = shown
    known = (images >= 0) & (images < 23)
    np.testing.assert_array_equal(found["ids"][known], images[known])
    assert not (found["ids"] == images)[~known].any(), "the measure must see that they differ"
    np.testing.assert_array_equal(found["latents"][known], latents[images[known], 0])
    np.testing.assert_array_equal(found["labels"][known], labels[images[known]])


def test_a_look_writes_and_draws_what_is_finite_and_warns_once(tmp_path, make, capsys):
    values = {"repulsor/cosine_bank": 0.999, "repulsor/drift": np.nan, "block_0/isotropy": 0.5}
    inspector, state = make(lambda *shown: values)
    with MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            inspector.look(step, state, {}, writer)
    said = capsys.readouterr().out
    assert said.count("warning") == 1
    assert "step 2: warning: repulsor: the rows of its bank are all alike" in said
    line = {"diagnostics/repulsor/cosine_bank": 0.999, "diagnostics/block_0/isotropy": 0.5}
    lines = list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert lines == [{"step": step, **line} for step in (1, 2, 3)]
    assert (tmp_path / "diagnostics.png").is_file()


def test_where_the_picture_cannot_be_written_the_run_goes_on(tmp_path, make, capsys):
    (tmp_path / "diagnostics.png").mkdir()
    inspector, state = make(lambda *shown: {"block_0/isotropy": 0.5})
    with MetricWriter(tmp_path, 0) as writer:
        inspector.look(1, state, {}, writer)
    assert "step 1: no picture of the diagnostics" in capsys.readouterr().out


BANK = 48
HEALTHY = {
    "repulsor/filled": 32.0,
    "repulsor/cosine_bank": 0.5,
    "repulsor/cosine_samples": 0.5,
    "repulsor/gradient_share": 0.1,
    "block_0/cosine_tokens": 0.5,
}


def warnings(values, before, **overrides):
    terms = registry.build(tiny.config(**overrides))
    return find_warnings(terms, 5, HEALTHY | values, before and HEALTHY | before, BANK)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repulsor/filled": 16.0}, "does not fill: 16 of 48 rows"),
        ({"repulsor/cosine_bank": 0.999}, "rows of its bank are all alike .mean cosine 0.9990"),
        ({"repulsor/cosine_samples": 0.995}, "projections of different images are all alike"),
        ({"block_0/cosine_tokens": 0.999}, "tokens of block 0, which it reads, are all alike"),
        ({"repulsor/gradient_share": 0.0}, "gradient is zero .* Raise config.repulsor.weight"),
    ],
)
def test_each_warning_names_the_term_and_what_to_do(values, message):
    (said,) = warnings(values, values | {"repulsor/filled": 16.0}).values()
    assert said.startswith("repulsor: ")
    assert re.search(message, said), said


def test_nothing_is_said_of_a_healthy_run_or_of_one_that_has_just_begun():
    assert not warnings({}, {"repulsor/filled": 16.0})
    assert not warnings({"repulsor/filled": 48.0}, {"repulsor/filled": 48.0})
    alike = dict.fromkeys(
        ["repulsor/cosine_bank", "repulsor/cosine_samples", "block_0/cosine_tokens"], 0.999
    )
    assert not warnings(alike, {})
    assert not warnings(alike, {"repulsor/filled": 16.0})
    # What the configuration asks for is no fault.
    assert not warnings({}, {}, repulsor__bank_start_step=5)
    assert not warnings({"repulsor/gradient_share": 0.0}, {}, repulsor__stop_step=5)


def test_held_out_images_are_as_many_of_each_class_to_fit_and_to_test(tmp_path):
    """70 classes, of which the 64 with the most images are taken, and 16 images of each."""
    labels = np.repeat(np.arange(70), 18)
    labels = np.delete(labels, np.flatnonzero(labels < 6)[::2])  # 9 images of each of these
    np.random.default_rng(0).shuffle(labels)
    latents, _ = latent_sets.random_latents(len(labels), shape=(1, 1, 1))
    dataset = latent_sets.write(
        tmp_path, latents, labels, dtype="float32", class_names=tuple(map(str, range(70)))
    )
    images, num_classes = read_held_out(dataset, dataset.open(), multiple=48)
    assert num_classes == 64
    assert len(images.labels) == 1056  # 1,024 and padding
    taken = images.fits | images.tests
    assert not (images.fits & images.tests).any()
    assert not images.latents[~taken].any()
    for part in (images.fits, images.tests):
        np.testing.assert_array_equal(np.bincount(images.labels[part]), np.full(64, 8))
    label_of = dict(zip(latents.ravel().tolist(), labels.tolist(), strict=True))
    found = [label_of[x] for x in images.latents[taken].ravel().tolist()]
    pairs = set(zip(found, images.labels[taken].tolist(), strict=True))
    assert sorted(k for k, _ in pairs) == list(range(6, 70)), "a number is one class"
