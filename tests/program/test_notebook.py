"""The notebook runs from its first cell to its last, and shows what it says."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "colab.ipynb"


def read():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_outputs():
    for cell in read().cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_trains_shows_and_plans(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read()
    tiny = "--config=digits:none --config.model.depth=1 --config.sampling.num_steps=2"
    tiny += " --config.model.hidden_size=16 --config.batch_size=16"
    train = f"{tiny} --config.total_steps=4 --config.log.diagnostics_every_steps=0"
    monkeypatch.setenv("TRAIN", f"{train} --config.evaluation.every_steps=0")
    monkeypatch.setenv("PLAN", f"{tiny} --topology=v5e:2x2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=place).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in outputs)
    assert "step 4/4" in said
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("image/png" in data for data in shown)
    (page,) = [data["text/html"] for data in shown if "text/html" in data]
    assert page.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert "finished" in page
    if "planning needs" not in said:
        assert "v5e:2x2: 4 chips" in said
        assert len(list(tmp_path.glob("runs/plan/plan/*/plan.html"))) == 1
