"""Weights & Biases: what is sent, that the run goes on there, and that its faults end nothing."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest

from repulsor_jax.config import ConfigError
from repulsor_jax.runtime.metrics import MetricWriter, read_jsonl
from repulsor_jax.runtime.wandb_tracker import WandB, check_installed

SPEC = importlib.util.find_spec("wandb")
INSTALLED = SPEC is not None and SPEC.origin is not None


class Service:
    """A stand-in of the package; `faults` names what raises."""

    def __init__(self, faults=()):
        self.faults, self.opened, self.sent, self.ended = faults, [], [], []
        self.Settings = lambda **values: values
        self.Html = self.Image = lambda text: text
        self.setup = lambda settings: None
        self.teardown = lambda: None

    def init(self, **values):
        self.opened.append(values)
        if values["mode"] in self.faults:
            raise OSError("no network: https://me:secret@api")
        steps = [step for step, _ in self.sent]
        first = steps[-1] + 1 if steps else 0
        return types.SimpleNamespace(
            starting_step=first, url="", log=self.log, finish=lambda exit_code: self.end(exit_code)
        )

    def log(self, values, step):
        if "log" in self.faults:
            raise RuntimeError("the service is gone")
        self.sent.append((step, values))

    def end(self, code):
        self.ended.append(code)


@pytest.fixture
def service(monkeypatch):
    def install(*faults):
        service = Service(faults)
        monkeypatch.setitem(sys.modules, "wandb", service)
        return service

    return install


def test_a_run_that_goes_on_goes_on_there_and_repeats_nothing(tmp_path, service):
    there = service()
    with MetricWriter(tmp_path, 0, others=[WandB(tmp_path, "digits", {"seed": 1})]) as writer:
        for step in (2, 4, 6):
            writer.scalars(step, {"loss": float(step)})
        writer.rewind(4)
        writer.scalars(5, {"loss": 50.0})
        writer.scalars(6, {"loss": 60.0})
        writer.text(6, "protocol", "<b>")
    with (
        contextlib.suppress(KeyError),
        MetricWriter(tmp_path, 5, others=[WandB(tmp_path, "digits", {})]) as writer,
    ):
        for step in (6, 7):
            writer.scalars(step, {"loss": 70.0})
        raise KeyError
    assert there.sent == [
        (2, {"loss": 2.0}),
        (4, {"loss": 4.0}),
        (6, {"loss": 6.0}),
        (6, {"loss": 60.0}),  # more of a step is added to it
        (6, {"protocol": "<pre>&lt;b&gt;</pre>"}),
        (7, {"loss": 70.0}),
    ]
    first, second = there.opened
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["project"], first["resume"], first["config"]) == ("digits", "allow", {"seed": 1})
    assert there.ended == [0, 1]
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [2, 4, 5, 6, 7]


def test_another_project_gets_a_run_of_its_own(tmp_path, service):
    there = service()
    for project in ("one", "two"):
        WandB(tmp_path, project, {}).close(failed=False)
    assert there.opened[0]["id"] != there.opened[1]["id"]


def test_where_the_service_is_not_reached_the_run_is_kept(tmp_path, service, capsys):
    there = service(None)
    with MetricWriter(tmp_path, 0, others=[WandB(tmp_path, "digits", {})]) as writer:
        writer.scalars(1, {"loss": 1.0})
    assert [values["mode"] for values in there.opened] == [None, "offline"]
    assert there.sent == [(1, {"loss": 1.0})]
    out = capsys.readouterr().out
    assert "is not reached (no network: https://***@api)" in out
    assert "`wandb sync`" in out


@pytest.mark.parametrize("faults", [("log",), (None, "offline")])
def test_a_fault_is_said_once_and_costs_the_other_trackers_nothing(
    tmp_path, service, capsys, faults
):
    service(*faults)
    with MetricWriter(tmp_path, 0, others=[WandB(tmp_path, "digits", {})]) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": 1.0})
    assert capsys.readouterr().out.count("nothing more goes to Weights & Biases") == 1
    assert len(list(read_jsonl(tmp_path / "metrics.jsonl"))) == 3


@pytest.mark.skipif(INSTALLED, reason="wandb is installed here")
def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    check_installed("")
    (tmp_path / "wandb").mkdir()  # what another run left, which Python could take for a package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"log.wandb='digits': .*install 'repulsor_jax\[wandb\]'"):
        check_installed("digits")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra wandb")
def test_the_package_itself_offline(tmp_path):
    check_installed("digits")
    code = (
        "import pathlib, sys\n"
        "from repulsor_jax.runtime.wandb_tracker import WandB\n"
        "run = WandB(pathlib.Path(sys.argv[1]), 'digits', {'seed': 1})\n"
        "for step in (1, 2): run.scalars(step, {'flow_loss': 1.0})\n"
        "run.close(failed=False)\n"
    )
    for _ in range(2):
        environment = os.environ | {"WANDB_MODE": "offline"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout
    logs = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2
    assert len({log.name for log in logs}) == 1  # one run
    assert all(b"flow_loss" in log.read_bytes() for log in logs)
