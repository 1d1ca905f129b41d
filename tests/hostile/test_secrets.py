"""Secrets are neither taken nor shown, and messages obey no name."""

import pathlib
import re

import pytest

from repulsor_jax import config as config_lib
from repulsor_jax import main
from repulsor_jax.autoencoders import weights
from repulsor_jax.files.untrusted import printable
from tests.oracles import tiny


@pytest.mark.parametrize(
    "text",
    [
        "https://me:hunter2hunter2@host/x.tar",
        "https://hunter2hunter2@host/x",
        "https://host/x.tar?X-Amz-Signature=hunter2hunter2&a=1",
        "https://host/x?access_token=hunter2hunter2",
        "hf_hunter2hunter2hunter2hunter2",
        "ghp_hunter2hunter2hunter2hunter2",
    ],
)
def test_secrets_are_neither_taken_nor_shown(text):
    for key in ("data.source_path", "data.autoencoder_weights", "evaluation.reference"):
        with pytest.raises(config_lib.ConfigError, match=f"config.{key}: found a pass") as error:
            tiny.config(**{key: text})
        assert "hunter2" not in str(error.value)
    shown = printable(f"error: {text}: 404 for url {text!r}")
    assert "hunter2" not in shown
    assert "***" in shown


def test_what_is_no_secret():
    for text in (
        "s3://bucket/a@b/c",
        "/data/user@host/images",
        "gs://bucket/train?generation=17",
        "org/name",
        "runs/hf_cache/token=3",
        "0123456789abcdef0123456789abcdef01234567",
    ):
        assert printable(text) == text
        assert tiny.config(**{"data.source_path": text}).data.source_path == text


def test_errors_of_the_hub_show_no_secret(monkeypatch):
    def download(repository, allow_patterns):
        assert all(pattern.endswith((".safetensors", ".json")) for pattern in allow_patterns)
        url = "https://me:hunter2@mirror/a?token=hunter2"
        raise OSError(f"401 for url: {url}, hf_hunter2hunter2hunter2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="401 for url: https://") as error:
        weights.locate("x", "org/name", "", ["config.json", "x.safetensors"])
    assert "hunter2" not in str(error.value)


def test_messages_do_not_obey_a_name(capsys):
    with pytest.raises(SystemExit):
        main._stop("error: a\x1b]0;title\x07 b\u202e \udcff, café\r at https://me:pw@host", 1)
    assert capsys.readouterr().err == (
        "error: a\\x1b]0;title\\x07 b\\u202e \\udcff, café\\r at https://***@host\n"
    )


def test_no_configuration_asks_for_a_secret():
    package = pathlib.Path(main.__file__).parent
    flags = [re.findall(r'DEFINE_\w+\(\s*"(\w+)"', p.read_text()) for p in package.rglob("*.py")]
    asked = f"{tiny.config_dict().to_dict()} {flags}".lower()
    assert "workdir" in asked
    words = ("token(?!s)", "secret", "password", "credential", "api_key")
    assert not [word for word in words if re.search(word, asked)]
    assert asked.count("wandb") == 1  # log.wandb, the name of a project; its key is not ours
