import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.autoencoders import get_autoencoder
from repulsor_jax.data.encode import encode_dataset
from repulsor_jax.data.latent_dataset import decode_records, open_latent_dataset
from repulsor_jax.data.sources import open_source


@dataclasses.dataclass
class Images:
    images: list
    class_names = ("a", "b", "c")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 3


class Moments:
    """Halves each side; the mean is the 2x2 block's, the log-variance is constant."""

    name, stochastic, scale = "moments", True, 0.25

    def __init__(self):
        self.traces = []

    def encode(self, images):
        self.traces.append(images.shape)
        b, h, w, c = images.shape
        mean = images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        return jnp.concatenate([mean, jnp.full_like(mean, -3.0)], axis=-1)


def read(dataset):
    source = dataset.open()
    return decode_records(source.__getitems__(range(len(source))), dataset.shape, dataset.dtype)


def encode(source, autoencoder, directory, **options):
    return encode_dataset(
        source,
        autoencoder,
        directory,
        **{"source_name": "s", "split": "train", "batch_size": 4, "progress": False, **options},
    )


def test_digits_with_the_identity(tmp_path, capfd):
    source = open_source("digits", "test")
    dataset = encode(
        source,
        get_autoencoder("identity"),
        tmp_path / "d",
        source_name="digits",
        split="test",
        batch_size=100,
        num_shards=2,
        progress=True,
    )
    assert open_latent_dataset(tmp_path / "d") == dataset
    assert (dataset.source, dataset.split, dataset.autoencoder) == ("digits", "test", "identity")
    assert (dataset.num_records, dataset.shape, dataset.scale) == (497, (8, 8, 1), 1.0)
    batch = read(dataset)
    images = np.stack([source[i][0] for i in range(497)])
    np.testing.assert_allclose(batch["latents"], images / 127.5 - 1, atol=2**-11)
    np.testing.assert_array_equal(batch["labels"], [source[i][1] for i in range(497)])
    # float16 keeps the 256 grey levels apart.
    recovered = np.clip(127.5 * batch["latents"].astype(np.float32) + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(recovered, images)
    assert "497/497" in capfd.readouterr().err


def test_moments_and_one_compiled_shape(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 6, 4, 3), np.uint8)
    autoencoder = Moments()
    dataset = encode(Images(list(images)), autoencoder, tmp_path / "d", dtype="float32")
    assert autoencoder.traces == [(4, 6, 4, 3)]
    assert (dataset.stochastic, dataset.scale) == (True, 0.25)
    assert (dataset.shape, dataset.latent_shape) == ((3, 2, 6), (3, 2, 3))
    latents = read(dataset)["latents"]
    blocks = (images / 127.5 - 1).reshape(10, 3, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(latents[..., :3], blocks, atol=1e-6)
    np.testing.assert_array_equal(latents[..., 3:], np.full((10, 3, 2, 3), -3.0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((8, 6, 3), np.uint8), r"image 5: found uint8 \(8, 6, 3\).*\(6, 4, 3\)"),
        (np.zeros((6, 4, 3), np.float32), "image 5: found float32"),
    ],
)
def test_a_wrong_image_is_named(tmp_path, bad, message):
    images = [np.zeros((6, 4, 3), np.uint8)] * 8
    images[5] = bad
    with pytest.raises(ValueError, match=message):
        encode(Images(images), Moments(), tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_stops_it_before_any_encoding(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "note.txt").write_text("mine")
    autoencoder = Moments()
    with pytest.raises(FileExistsError, match="already holds files"):
        encode(Images([np.zeros((6, 4, 3), np.uint8)]), autoencoder, tmp_path / "d")
    assert autoencoder.traces == []


def test_wrong_batch_size(tmp_path):
    with pytest.raises(ValueError, match="batch size: found 0"):
        encode(Images([np.zeros((6, 4, 3), np.uint8)]), Moments(), tmp_path / "d", batch_size=0)


def test_autoencoder_registry():
    identity = get_autoencoder("identity")
    assert (identity.name, identity.stochastic, identity.scale) == ("identity", False, 1.0)
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1), minval=-1)
    np.testing.assert_array_equal(identity.decode(identity.encode(images)), images)
    with pytest.raises(ValueError, match=r"found 'kl-f8', expected one of \['identity'\]"):
        get_autoencoder("kl-f8")
