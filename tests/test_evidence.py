"""The bench of docs/evidence.md: its pure parts, and a short form of the whole."""

import json
import os
import pathlib
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import __main__ as bench
from benchmarks.evidence import ledger, measure, report
from benchmarks.evidence.classifier import Classifier, Trained
from benchmarks.evidence.control import control_term
from benchmarks.evidence.measure import nearest
from benchmarks.evidence.pictures import Pictures
from benchmarks.evidence.statistics import paired_ratio
from configs import evidence as configs
from repulsor_jax import config as config_lib
from repulsor_jax.method.term import Seen
from repulsor_jax.models.build import build_model, build_source
from tests.oracles import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_interval_of_a_paired_ratio():
    rng = np.random.default_rng(0)
    arm, base = ({s: float(v) for s, v in enumerate(rng.uniform(5, 9, 5))} for _ in range(2))
    found = paired_ratio(arm | {7: 1.0}, base | {8: 1.0})  # seeds without a partner do not count
    expected = stats.ttest_rel(np.log([*arm.values()]), np.log([*base.values()]))
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], np.exp([low, high]), rtol=1e-6)
    assert found.ratio == pytest.approx(np.sqrt(found.low * found.high))
    assert found.seeds == 5


def test_two_seeds_and_one():
    two = paired_ratio({0: 1.0, 1: np.e**2}, {0: 1.0, 1: 1.0})
    # The mean of 0 and 2 is 1, their standard error 1, and t is 12.706 with one degree of freedom.
    np.testing.assert_allclose(np.log(two[:3]), [1.0, -11.706, 13.706], rtol=1e-4)
    one = paired_ratio({0: 3.0}, {0: 4.0})
    assert one.ratio == pytest.approx(0.75)
    assert np.isnan(one.low)
    with pytest.raises(ValueError, match="none is in both"):
        paired_ratio({0: 1.0}, {1: 1.0})


def test_the_nearest_picture():
    rng = np.random.default_rng(1)
    images, others = (rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8) for n in (3, 5))
    pairs = (images[:, None].astype(float) - others) / 127.5
    expected = np.sqrt((pairs**2).mean((2, 3, 4))).min(1)
    np.testing.assert_allclose(nearest(images, others), expected, rtol=1e-6)
    np.testing.assert_allclose(nearest(others[1:2], others), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", list(bench.BENCHES))
def test_every_arm_of_every_bench_is_a_configuration(name):
    for arm in configs.ARMS:
        config = config_lib.parse(configs.get_config(f"{name},{arm}"))
        assert config.model.latent_size == bench.BENCHES[name].size
        assert (config.model.num_classes > 1) == bench.BENCHES[name].labelled
    assert config_lib.parse(configs.get_config(f"{name},positives_256")).repulsor.bank_rows == 256
    arm = "positives_1024+repulsor.pooling=token+repulsor.temperature=0.2"
    found = config_lib.parse(configs.get_config(f"{name},{arm}")).repulsor
    assert (found.bank_rows, found.pooling, found.temperature) == (1_024, "token", 0.2)


def test_words_that_are_no_setting(capsys):
    with pytest.raises(ValueError, match="cifar16,pain: expected BENCH,ARM with a bench of"):
        configs.get_config("cifar16,pain")
    for arm, said in {
        "pain": "cifar16,pain: expected BENCH,ARM with a bench of",
        "plain+repulse.weight=1": "config.repulse.weight: unknown key",
        "plain+repulsor.weigth=1": "config.repulsor.weigth: unknown key",
        "plain+repulsor.weight": "plain+repulsor.weight: expected +SECTION.FIELD=VALUE",
        "plain+repulsor.weight=heavy": "expected a valid number, found 'heavy'",
        "plain+optimizer.learning_rate=1e-2": "plain+optimizer.learning_rate=1e-2: seed, steps, b",
    }.items():
        with pytest.raises(SystemExit):
            bench.parse_arguments([f"--arms={arm},plain"])
        assert "error: --arms: " in (found := capsys.readouterr().err)
        assert said in found


def test_the_command_line():
    args = bench.parse_arguments(["--bench=digits", "--arms=sra,plain", "--rates=2e-3,1e-3"])
    assert args.arms == ("plain", "sra")  # whatever is compared is compared with plain
    assert args.rates == (1e-3, 2e-3)
    assert (*args.seeds,) == (0, 1, 2, 3, 4)
    assert (*bench.parse_arguments(["--first_seed=200", "--seeds=2"]).seeds,) == (200, 201)
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--first_seed=99", "--seeds=2"])  # the seed of the search is 100
    assert (args.source, args.steps, args.search_steps, args.every) == ("digits", 4000, 2000, 1000)


def _measured(args, arm, rate, seed, step, distance):
    workdir = report.run_folder(args.root, arm, rate, seed)
    workdir.mkdir(parents=True, exist_ok=True)
    numbers = {
        f"{name}@{scale:g}": distance
        for name in ("features", "pixels", "near_copies")
        for scale in (1.0, *args.stretches)
    }
    numbers |= {"flow_loss": distance / 40, "flow_loss_by_t": [0.3, 0.2]}
    numbers |= {"probe_by_block": [0.4, 0.5], "rank_by_block": [9.0, 8.0]}
    (workdir / f"measure_{step}.json").write_text(json.dumps(numbers))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "seconds_per_step": 0.02}) + "\n")


def test_the_tables_of_what_is_there(tmp_path):
    words = ["--arms=positives_0,positives_256", "--rates=1e-3,2e-3", "--seeds=2", "--steps=10"]
    args = bench.parse_arguments([f"--workdir={tmp_path}", *words])
    for arm, best in (("plain", 1e-3), ("positives_0", 2e-3)):
        for rate in args.rates:
            _measured(args, arm, rate, 100, 5, 10.0 if rate == best else 11.0)
    rates = report.best_rates(args.root, args.arms, args.rates)
    assert rates == {"plain": 1e-3, "positives_0": 2e-3}  # the third was not searched yet

    for seed, distances in enumerate([(8.0, 4.0), (6.0, 3.0)]):
        _measured(args, "plain", 1e-3, seed, 10, distances[0])
        _measured(args, "positives_0", 2e-3, seed, 10, distances[1])
    text = report.write(args)
    assert text.startswith("PARTIAL: 2 of 6 runs are missing.")
    assert "| plain | **10.00 / 10.00 / 0.2500** | 11.00 / 11.00 / 0.2750 |" in text
    row = "| positives_0 | 0.002 | 2 | 3.5 ± 0.71 | 0.50 [0.50, 0.50] | 3.5 ± 0.71 |"
    assert row in text
    assert (args.root / "report.md").read_text() == text
    assert (args.root / "curves_images.png").is_file()
    assert (args.root / "ratios.png").is_file()
    args = bench.parse_arguments([f"--workdir={tmp_path}", *words, "--baseline=positives_0"])
    assert args.arms == ("positives_0", "positives_256")
    args.arms = (*args.arms, "plain")
    assert "| plain | 0.001 | 2 | 7 ± 1.4 | 2.00 [2.00, 2.00] |" in (text := report.write(args))
    assert "ratios to positives_0" in text
    assert "to plain" not in text

    path = report.run_folder(args.root, "plain", 1e-3, 0) / "measure_10.json"
    numbers = json.loads(path.read_text())
    del numbers[f"features@{args.stretches[-1]:g}"]  # it was measured at fewer stretches
    path.write_text(json.dumps(numbers))
    assert "| plain | 0.001 | 1 | 6 | 2.00 |" in report.write(args)


def test_a_bank_is_compared_with_none_where_all_else_is_equal(tmp_path):
    arms = [f"positives_{k}+repulsor.weight=1" for k in ("0", "256+repulsor.bank_start_step=5")]
    words = [f"--arms={','.join(arms)},positives_256", "--rates=1e-3", "--seeds=1", "--steps=10"]
    args = bench.parse_arguments([f"--workdir={tmp_path}", *words])
    for arm, distance in zip(args.arms, (8.0, 5.0, 4.0, 3.0), strict=True):
        _measured(args, arm, 1e-3, 0, 10, distance)
    table = report.write(args).partition("Ratio to K = 0")[2]
    assert f"| {arms[1]} | 0.80 | 0.80 | 0.800 |" in table
    assert table.partition("stretch")[0].count("| positives_256") == 1  # the other has no partner


def test_numbers_outlive_their_runs(tmp_path):
    words = ["--arms=positives_0", "--rates=1e-3", "--seeds=2", "--steps=10"]
    there, here = (bench.parse_arguments([f"--workdir={tmp_path}/{w}", *words]) for w in "ab")
    for seed, distances in enumerate([(8.0, 4.0), (6.0, 3.0)]):
        _measured(there, "plain", 1e-3, seed, 10, distances[0])
        _measured(there, "positives_0", 1e-3, seed, 10, distances[1])
    floor = {"samples": 100, "features": 0.5, "pixels": 0.25, "accuracy": 0.5}
    (there.root / "floor.json").write_text(json.dumps(floor))
    path = tmp_path / "numbers" / "digits.jsonl"
    ledger.pack(there.root, path)

    report.run_folder(here.root, "plain", 1e-3, 0).mkdir(parents=True)  # begun, and not measured
    ledger.unpack(path, here.root)
    assert report.write(here) == report.write(there)
    lines = path.read_text()
    ledger.pack(tmp_path / "empty", path)  # what a ledger has stays in it
    assert path.read_text() == lines
    seconds = {"plain": 0.02, "positives_0": 0.04}
    (there.root / report.SECONDS_NAME).write_text(json.dumps(seconds))
    ledger.pack(there.root, path)
    ledger.unpack(path, here.root)
    assert "| positives_0 | 5 |" in report.write(here)  # steps in the time of plain's 10
    job = bench.Job("plain", 1e-3, 0, 10)
    assert bench._is_measured(here, job)
    assert not bench._is_measured(here, job._replace(steps=20))
    assert not bench._is_measured(here, job._replace(seed=2))

    own = report.run_folder(here.root, "plain", 1e-3, 1) / "measure_10.json"
    own.write_text("{}")
    (here.root / "floor.json").write_text(json.dumps(floor | {"features": 0.5001}))
    ledger.unpack(path, here.root)  # what was measured here stays
    assert own.read_text() == "{}"
    (here.root / "floor.json").write_text(json.dumps(floor | {"features": 0.51}))
    with pytest.raises(ValueError, match="have features=0.5 there and 0.51 in"):
        ledger.unpack(path, here.root)


def test_the_control_is_a_cosine_with_the_features_of_the_clean_picture():
    config = config_lib.parse(configs.get_config("digits,control"))
    net, rng = Classifier(10), np.random.default_rng(2)
    data = jnp.asarray(rng.uniform(-1, 1, (2, 8, 8, 1)), jnp.float32)
    weights = net.init(jax.random.key(0), data)["params"]
    term = control_term(config, Trained(net, weights, 0.0))
    params = jax.device_get(nn.unbox(term.init(jax.random.key(1))))
    tokens = jnp.asarray(rng.standard_normal((2, 16, 64)), jnp.float32)
    (block,) = term.taps
    seen = Seen(data, None, None, None, {block: tokens}, {}, None)
    value, rows = term.loss(params, None, seen, None)

    hidden = np.asarray(tokens) @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    ours = hidden / (1 + np.exp(-hidden)) @ params["out"]["kernel"] + params["out"]["bias"]
    theirs = np.asarray(net.apply({"params": weights}, data)[2]).reshape(2, 16, -1)
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    assert float(value) == pytest.approx(1 - ((ours * theirs).sum(-1) / norms).mean(), rel=1e-4)
    assert rows is None


def test_the_held_out_loss_is_by_the_own_segment_and_from_the_learned_source():
    changes = {"architecture": "blockwise", "segments": 3, "segment_depth": 1, "adaln_rank": 4}
    c = tiny.config(
        batch_size=12,
        source__name="class",
        source__rank=8,
        terms="none",
        **{f"model__{name}": value for name, value in changes.items()},
    )
    model, params = build_model(c.model), tiny.random_params(c)
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (7, *tiny.SHAPE)).astype(np.uint8), np.arange(7) % 3
    pictures = Pictures(images, labels, images, labels)
    network = measure._make_network(
        types.SimpleNamespace(pictures=pictures), types.SimpleNamespace(model=model, config=c)
    )
    found = network(params)["flow_loss"]

    held = measure._hold(images, labels, 3)
    mean, _ = build_source(c.source, c.model).apply({"params": params["source"]}, held.labels)
    apply, errors = jax.jit(model.apply, static_argnames="segment"), []
    for i, t in enumerate(held.t):
        x_0 = held.noise[i] + mean[i]
        x = (t * held.data[i] + (1 - t) * x_0)[None]
        segment = int(np.floor(t * 3))
        v = apply({"params": params}, x, t[None], held.labels[i : i + 1], segment=segment)[0]
        errors.append(np.square(v - held.data[i] + x_0).mean())
    assert found == pytest.approx(np.mean(errors), rel=1e-4)


def _run(workdir, *arguments):
    command = [sys.executable, "-m", "benchmarks.evidence", "--bench=digits", "--rates=1e-3"]
    command += [f"--workdir={workdir}", "--seeds=1", "--samples=100", "--classifier_steps=4"]
    command += ["--stretches=1.1"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_an_empty_folder_to_the_table_and_on(tmp_path):
    said = _run(tmp_path, "--arms=control", "--steps=4", "--every=4", "--workers=2")
    assert "2/2 runs" in said
    assert "After 4 steps (256 images)" in said
    assert "| control | 0.001 | 1 |" in said
    assert "PARTIAL" not in said

    said = _run(tmp_path, "--arms=plain", "--steps=6", "--every=2", "--time_steps=2")
    assert "1/1 runs" in said
    assert "After 6 steps (384 images)" in said
    log = tmp_path / "digits" / "runs" / "plain" / "lr_0.001" / "seed_0" / "log.txt"
    assert "step 4 of 6" in log.read_text()
    assert json.loads((tmp_path / "digits" / "seconds.json").read_text())["plain"] > 0
