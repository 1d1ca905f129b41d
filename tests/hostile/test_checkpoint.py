"""Hostile files in a checkpoint; whoever can write them can make digests, too."""

import gc
import json

import jax
import numpy as np
import pytest

from repulsor_jax.checkpoints.checkpointer import Checkpointer, CheckpointError
from repulsor_jax.config import ConfigError
from repulsor_jax.files.checksums import values_sha256
from repulsor_jax.inference import run as run_lib
from tests.oracles import tiny

CONTROLS = "c\x1b[31mat"
CONTENTS = ["[" * 10**6, '{"a":' * 10**5, "[]", "3", "9" * 10**5, "\x00"]
ARRAY = {"shape": [4], "dtype": "float32", "fingerprint": ""}
RECORDS = [
    ("latents", {"class_names": [CONTROLS]}),
    ("latents", {"class_names": []}),
    ("latents", {"shift": "0"}),
    ("latents", {"autoencoder": ["identity"]}),
    ("config", {"model": {}}),
    ("config", {"flow": [1]}),
    ("config", {"optimizer": {"ema_decay": None}}),
    ("manifest", {"arrays": 3}),
    ("manifest", {"arrays": {"ema_params/a": ARRAY | {"shape": "4"}}}),
    ("manifest", {"arrays": {"ema_params/a": ARRAY | {"dtype": CONTROLS}}}),
    ("manifest", {"arrays": {"ema_params/a": ARRAY | {"shape": [-4]}}}),
    ("manifest", {"arrays": {"ema_params/a": ARRAY | {"dtype": "O"}}}),
    ("manifest", {"arrays": {"ema_params/a": ARRAY | {"more": 1}}}),
    ("manifest", {"records": []}),
    ("manifest", {"step": "2"}),
    ("manifest", {"format": None}),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The checkpoints of a run, and a function that reads the only one as sampling does."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    params = {"a": jax.numpy.arange(4.0)}
    latents = {"autoencoder": "identity", "weights_sha256": "", "shift": [0.0], "factor": [1.0]}
    latents["class_names"] = ["cat"]
    with Checkpointer(folder) as checkpointer:
        config = tiny.config_dict().to_dict()
        checkpointer.save(2, {"ema_params": params}, {"next_index": 2}, config, latents)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )

    def read():
        with Checkpointer(folder, read_only=True) as checkpointer:
            run_lib.read_records(checkpointer, 2)
            return checkpointer.restore_ema(abstract, 2)[0]

    np.testing.assert_array_equal(read()["a"], params["a"])
    return folder, read


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_content_of_any_file(run):
    folder, read = run
    refused = 0
    for k, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
        whole = file.read_bytes()
        # All contents in place of JSON, each once in place of arrays.
        is_json = whole[:1] == b"{"
        for content in CONTENTS if is_json else [CONTENTS[k % len(CONTENTS)]]:
            file.write_text(content)
            message = ""
            try:
                read()
            except (CheckpointError, ConfigError) as error:
                message = str(error)
            assert not message or str(folder) in message
            assert len(message) < 800
        file.write_bytes(whole)
        refused += bool(message)
    gc.collect()  # orbax leaves coroutines
    assert refused >= 6  # metadata of step, state, config, latents, arrays; the arrays themselves


@pytest.mark.parametrize(("item", "changes"), RECORDS, ids=lambda value: str(value)[:60])
def test_values_of_records(run, item, changes):
    folder, read = run
    file, manifest = (folder / "2" / name / "metadata" for name in (item, "manifest"))
    whole = {path: path.read_text() for path in (file, manifest)}
    values = json.loads(whole[file]) | changes
    about = values if item == "manifest" else json.loads(whole[manifest])
    if item != "manifest":
        file.write_text(json.dumps(values))
        about["records"][item] = values_sha256(values)
    del about["digest"]
    manifest.write_text(json.dumps(about | {"digest": values_sha256(about)}))
    message = r"checkpoints/2/manifest[.:]" if item == "manifest" else r"checkpoints/2\.\w+"
    try:
        with pytest.raises(ValueError, match=message) as error:
            read()
    finally:
        for path, text in whole.items():
            path.write_text(text)
    assert "\x1b" not in str(error.value)
    assert "was changed" not in str(error.value)
