"""The page of a run: what is in it, that nothing from outside acts in it, and how large it is."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from repulsor_jax.evaluation import page as page_lib
from repulsor_jax.evaluation.page import Page, make_page
from repulsor_jax.files.webpage import document
from repulsor_jax.runtime.preemption import Preempted

ABOUT = {
    "model": "DiT, 4 blocks",
    "data": "20 images of 2 classes: cat, dog",
    "total_steps": 400,
    "versions": {"jax": "0.10.2"},
    "config": {"seed": 7},
}
EVIL = '$\\frac{$</script><img src=x onerror="alert(1)"><script>alert(2)</script>'


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, **about):
    """A run of which every kind of file is there."""
    for name in ("samples", "evaluations", "hangs"):
        (folder / name).mkdir()
    rows = [{"step": s, "loss": 2.0 - s / 200, "seconds_per_step": 3.0} for s in (100, 200)]
    rows += [{"step": 200, "fid_50": 12.5, "diagnostics/block_0/isotropy": 0.5}]
    write_lines(folder / "metrics.jsonl", rows)
    session = {"began": "2026-01-01 10:00:00 UTC", "first_step": 0}
    record = {"about": ABOUT | about, "sessions": [session, session | {"first_step": 100}]}
    (folder / "run.json").write_text(json.dumps(record))
    refused = {"time": "11:00", "event": "refused", "step": 150, "batch": 161, "loss": "nan"}
    write_lines(folder / "events.jsonl", [refused | {"grad_norm": "123.456789"}])
    note = "warning: DAMAGED: step 150: state is cut"
    write_lines(folder / "resumes.jsonl", [{"time": "12:00", "step": 100, "notes": [note]}])
    hang = "2026-01-01 13:00:00: process 0 of 1 has been in phase 'save' of step 9 for 30.0 minutes"
    (folder / "hangs" / "process_0.txt").write_text(f"{hang}\nThread 0x1: secret_function\n")
    for step in (100, 200):
        picture = Image.fromarray(np.full((8, 8), step, np.uint8))
        picture.save(folder / f"samples/train_{step:08d}.png")
    evaluation = {
        "metrics": {"fid": 12.5},
        "protocol": {"step": 200, "num_samples": 50, "solver": "heun", "num_steps": 12},
        "reference": {"name": "test", "digest": "abcdef0123"},
        "features": {"name": "inception", "digest": "0123456789"},
        "warnings": ["few samples"],
    }
    (folder / "evaluations" / "step_200.json").write_text(json.dumps(evaluation))


class Shown(html.parser.HTMLParser):
    """The text of a page, its elements, and the names of all their attributes."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def test_the_page_has_what_the_run_has_written(tmp_path):
    write_run(tmp_path)
    path = make_page(tmp_path)
    assert path == tmp_path / "report.html"
    text = Shown(path.read_text()).text
    for expected in (
        *("not running", "step 200 of 400", "it ended without a word", "DiT, 4 blocks", "cat, dog"),
        *("step 100", "loss", "fid 50", "12.50", "heunx12", "few samples", "isotropy of tokens"),
        *("DAMAGED: step 150", "123.46", "161", "phase 'save'", "0.10.2", '"seed": 7'),
    ):
        assert expected in text
    assert "secret_function" not in text  # stacks stay in their file
    assert path.read_text().count("data:image/png;base64,") == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".report")] == []


def test_time_that_is_left_is_that_of_the_steps_at_the_last_speed(tmp_path):
    write_run(tmp_path)
    text = Shown(page_lib.write_page(tmp_path, running=True).read_text()).text
    assert "step 200 of 400, 10 min left" in text  # 200 steps of 3 s


@pytest.mark.parametrize("lost", ["run.json", "metrics.jsonl"])
def test_a_page_of_what_is_there(tmp_path, lost):
    write_run(tmp_path)
    (tmp_path / lost).unlink()
    for name in ("events.jsonl", "resumes.jsonl", "evaluations/step_200.json"):
        (tmp_path / name).unlink()
    (tmp_path / "samples" / "train_00000100.png").write_bytes(b"no picture")
    make_page(tmp_path)
    assert (tmp_path / "report.html").read_text().count("data:image") == 1


def test_no_page_where_no_run_is(tmp_path):
    assert make_page(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_text_from_outside_does_nothing(tmp_path):
    """Names of classes, metrics, files and events that mean harm are text and no more."""
    write_run(tmp_path, data=f"2 classes: {EVIL}", model="\x1b[31m\u202ered", config={EVIL: EVIL})
    calm = Shown(make_page(tmp_path).read_text())
    (tmp_path / "evil").mkdir()
    rows = [{"step": s, EVIL: float(s), f"diagnostics/{EVIL}/{EVIL}": 1.0} for s in (1, 2, 3)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": EVIL, "step": EVIL, "policy": [EVIL], "loss": {}}) + "\n")
    with (tmp_path / "resumes.jsonl").open("a") as file:
        file.write(json.dumps({"time": EVIL, "step": {}, "notes": [EVIL, 7, None]}) + "\n")
    (tmp_path / "hangs" / "process_1.txt").write_text(f"2026-01-01 00:00: process {EVIL}\n")
    (tmp_path / "evaluations" / "evil.json").write_text(
        json.dumps({"metrics": {"fid": EVIL}, "protocol": {"step": EVIL}})
    )
    record = json.loads((tmp_path / "evaluations" / "step_200.json").read_text())
    record["protocol"]["solver"], record["warnings"] = EVIL, [EVIL]
    (tmp_path / "evaluations" / "step_200.json").write_text(json.dumps(record))
    text = make_page(tmp_path).read_text()
    shown = Shown(text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("<script>") == text.count("</script>") == 1
    assert not [name for name in shown.attributes if name.startswith("on")]
    assert shown.tags.count("img") == calm.tags.count("img") == 2
    assert "onerror" in shown.text
    assert "files that hold no evaluation: evil.json" in shown.text


def test_the_browser_is_told_to_run_no_other_script_and_to_ask_for_nothing():
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', document("t", "b"))[1]
    assert "default-src 'none'" in policy
    assert "img-src data:;" in policy
    # SHA-256 of no bytes, in base64, as `openssl dgst -sha256 -binary /dev/null | base64` has it
    assert "script-src 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='" in policy


@pytest.mark.parametrize("odd", [b"[]", b"{", b'{"about": 3, "sessions": {"a": 1}}', b"\xff"])
def test_a_record_that_is_none_is_as_absent(tmp_path, odd):
    (tmp_path / "run.json").write_bytes(odd)
    write_lines(tmp_path / "metrics.jsonl", [{"step": "x"}, {"step": 1, "loss": "y"}, {"loss": 1}])
    assert "step 0" in Shown(make_page(tmp_path).read_text()).text


def test_a_long_run_has_a_small_page(tmp_path):
    """100,000 lines, 28 blocks, and grids as large as those of 64 images of 256 pixels."""
    rng = np.random.default_rng(0)
    values = rng.random((100_000, 4)).tolist()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, row in enumerate(values, start=1):
            names = ("loss", "flow_loss", "grad_norm", "images_per_second")
            file.write(json.dumps({"step": step} | dict(zip(names, row, strict=True))) + "\n")
            if step % 200 == 0:
                keys = [
                    f"diagnostics/block_{b}/{n}" for b in range(28) for n in ("isotropy", "rank")
                ]
                looked = dict(zip(keys, rng.random(len(keys)).tolist(), strict=True))
                file.write(json.dumps({"step": step} | looked) + "\n")
    (tmp_path / "samples").mkdir()
    noise = Image.fromarray(rng.integers(0, 255, (1032, 1032, 3), np.uint8))
    file = io.BytesIO()
    noise.save(file, format="PNG", compress_level=1)
    for step in range(1, 31):  # 3 MB each
        (tmp_path / f"samples/train_{step:08d}.png").write_bytes(file.getvalue())
    path = make_page(tmp_path)
    assert path.stat().st_size < 3e6
    assert path.read_text().count("<figure>") == 12


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_page_takes_one_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    clock, made = Clock(), []

    def write(workdir, running):
        made.append(clock.now)
        clock.now += 2.0

    monkeypatch.setattr(page_lib, "write_page", write)
    with Page(tmp_path, enabled=True, clock=clock) as page:
        page.start(ABOUT, 0)
        for clock.now in (3.0, 100.0, 203.0, 204.0, 410.0):
            page.refresh()
    assert made == [0.0, 203.0, 410.0, 412.0]  # the last at the end


@pytest.mark.parametrize(
    ("error", "state", "how"),
    [
        (None, "finished", None),
        (
            Preempted("told to stop: saved step 5 of 9"),
            "stopped",
            "told to stop: saved step 5 of 9",
        ),
        (KeyboardInterrupt(), "stopped", "interrupted"),
        (OSError("gs://user:pass@bucket is away"), "failed", "OSError: gs://***@bucket is away"),
    ],
)
def test_how_a_run_ended_stays_in_its_record(tmp_path, error, state, how):
    for first_step in (0, 5):
        try:
            with Page(tmp_path, enabled=True) as page:
                page.start(ABOUT, first_step)
                assert "running" in (tmp_path / "report.html").read_text()
                if error:
                    raise error
        except BaseException as raised:
            assert raised is error  # noqa: PT017 - the one that was raised goes on
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert [s["first_step"] for s in sessions] == [0, 5]
    assert [(s["state"], s.get("how")) for s in sessions] == [(state, how)] * 2
    shown = Shown((tmp_path / "report.html").read_text()).text
    assert state in shown
    assert (how or "") in shown


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    with Page(tmp_path, enabled=True) as page:
        page.start(ABOUT, 0)
    assert "warning: report.html is not written (IsADirectoryError" in capsys.readouterr().out


def test_other_processes_write_none(tmp_path):
    with Page(tmp_path, enabled=False) as page:
        page.start(ABOUT, 0)
        page.refresh()
    assert list(tmp_path.iterdir()) == []
