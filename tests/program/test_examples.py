"""The examples run, and the numbers that they print hold against counts by NumPy."""

import math
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.oracles import traffic

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(capsys):
    """Runs an example in this process; returns its names, and the numbers of each printed line."""

    def run_example(name):
        path = EXAMPLES / f"{name}.py"
        assert len(path.read_text().splitlines()) < 80
        names = runpy.run_path(str(path))
        lines = capsys.readouterr().out.replace(",", "").splitlines()
        return names, [list(map(float, re.findall(r"-?\d+\.?\d*", line))) for line in lines]

    return run_example


def project(w, h):
    z = np.asarray(h, np.float64) @ np.asarray(w)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_plain_jax_spreads_the_features_and_keeps_the_last_batches(run):
    names, printed = run("plain_jax")
    *steps, [rows] = printed
    (_, first_loss, first_cosine), (count, last_loss, last_cosine) = steps[0], steps[-1]
    assert last_loss < first_loss - 1
    assert abs(last_cosine) < 0.1 < first_cosine

    w = jax.random.normal(jax.random.key(1), (64, names["DIM"]))
    bank = names["rj"].create_bank(num_slots=8, batch_size=names["BATCH"], dim=names["DIM"])
    batches = []
    for step in range(int(count) + 1):
        batches.append(project(w, names["features"](step)))
        w, bank, _ = names["train_step"](w, bank, names["features"](step))
    z = batches[0]
    squared = ((z[:, None] - z) ** 2).sum(-1)
    others = np.exp(-squared / 0.5)[~np.eye(len(z), dtype=bool)].reshape(len(z), -1)
    assert first_loss == pytest.approx(np.log(others.mean(1)).mean(), abs=2e-4)
    assert first_cosine == pytest.approx(1 - squared.sum() / 2 / len(z) / (len(z) - 1), abs=2e-4)
    assert rows == 8 * names["BATCH"]
    oldest_first = np.roll(names["bank"].features, -int(names["bank"].cursor), axis=0)
    np.testing.assert_allclose(oldest_first, batches[-8:], atol=1e-4)


def test_flax_nnx_learns_and_its_bank_is_a_variable_of_the_model(run):
    names, printed = run("flax_nnx")
    *steps, (accuracy, filled) = printed
    assert steps[-1][1] < 0.1 * steps[0][1]  # the loss
    assert steps[-1][2] < steps[0][2] - 0.3  # the repulsion
    model, digits = names["model"], load_digits()

    def linear(layer, x):
        return x @ np.asarray(layer.kernel.get_value()) + np.asarray(layer.bias.get_value())

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    logits = linear(model.out, gelu(linear(model.hidden, digits.data[1500:] / 8 - 1)))
    expected = (logits.argmax(-1) == digits.target[1500:]).mean()
    assert accuracy == pytest.approx(expected, abs=1e-3)
    assert accuracy > 0.85
    assert filled == 16
    norms = np.linalg.norm(model.bank.get_value().features, axis=-1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def test_sharded_mesh_divides_the_bank_and_sends_no_array_of_its_size(run):
    names, [shapes, losses, sizes] = run("sharded_mesh")
    assert shapes == [64, 64, 16, 8, 64, 8, 16]
    assert losses[:2] == pytest.approx(losses[2:], abs=2e-5)
    assert losses[1] < losses[0] - 1
    largest = max(each.largest for each in traffic.collectives(names["step"].as_text()))
    assert sizes == [largest, 64 * 64 * 16]
    assert largest <= 64 * 16  # the queries, or the gradient of the projection
