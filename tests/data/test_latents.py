"""The format of the data set: what opening checks, and what the model gets of a record."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.data import latents as ld
from tests.oracles import tiny
from tests.oracles.latent_sets import edit, random_latents, write

SHARD = r"0000{}-of-00002\.array_record"


@pytest.fixture
def folder(tmp_path):
    """A data set of two shards."""
    write(tmp_path / "d", *random_latents(), 12)
    return tmp_path / "d"


def shard_paths(folder):
    return sorted(folder.glob("*.array_record"))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "found format_version 99"),
        ({"surprise": 1}, r"dataset\.json\.surprise: unknown key"),
        ({"skipped": 3}, r"dataset\.json\.skipped: expected .*restore it"),
        ({"dtype": "float8"}, r"dataset\.json\.dtype: .*float8"),
        ({"std": [1.0]}, "found 1 in std, 6 in mean"),
        ({"num_images": 24}, "found shards of 23 records, expected 24 in all"),
        ({"shape": [4, 4, 5]}, SHARD.format(0) + ": found 12 records of 196 bytes"),
    ],
    ids=str,
)
def test_metadata_that_is_wrong(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        ld.open_latent_dataset(folder)


def test_names_that_are_not_utf8(folder):
    name = b"\xff \xf0\x9f\x98\x80".decode(errors="surrogateescape")
    edit(folder, class_names=[*list("abcdef"), name])
    edit(folder, skipped=[{"index": 3, "name": name, "reason": "empty"}])
    dataset = ld.open_latent_dataset(folder)
    assert dataset.class_names[-1] == dataset.skipped[0].name == name


def test_files_that_are_wrong(folder):
    with pytest.raises(FileNotFoundError, match="--mode=encode"):
        ld.open_latent_dataset(folder.parent / "nowhere")
    first, second = shard_paths(folder)
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=SHARD.format(1) + ": found 0 records"):
        ld.open_latent_dataset(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=SHARD.format(1) + ": found 12 records"):
        ld.open_latent_dataset(folder)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=SHARD.format(1)):
        ld.open_latent_dataset(folder)
    metadata = folder / "dataset.json"
    metadata.write_text(metadata.read_text()[:50])
    with pytest.raises(ValueError, match=r"dataset\.json: found no JSON"):
        ld.open_latent_dataset(folder)


def test_one_flipped_bit_is_found(folder):
    dataset = ld.open_latent_dataset(folder)
    ld.check_files(dataset)
    flip_a_bit(shard_paths(folder)[1])
    with pytest.raises(ValueError, match=SHARD.format(1) + ": damaged.*encode again"):
        ld.check_files(dataset)
    ld.check_files(dataset, process_index=0, process_count=2)  # the share of the first is whole
    with pytest.raises(ValueError, match="damaged"):
        ld.check_files(dataset, process_index=1, process_count=2)


def test_shards_of_another_data_set_are_found(folder, tmp_path):
    write(tmp_path / "other", *random_latents(seed=1), 12)
    path = shard_paths(folder)[0]
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    mixed = ld.open_latent_dataset(folder)  # as many records of the same size
    with pytest.raises(ValueError, match=SHARD.format(0) + ": damaged"):
        ld.check_files(mixed)


def test_intact_files_are_not_read_again_until_they_change(folder):
    dataset = ld.open_latent_dataset(folder)
    ld.check_files(dataset)
    note = folder / ".verified-0-of-1.json"
    before = note.stat().st_mtime_ns
    ld.check_files(dataset)
    assert note.stat().st_mtime_ns == before  # nothing was read, and so nothing noted
    path = shard_paths(folder)[1]
    path.write_bytes(path.read_bytes())  # the same bytes, at another time
    ld.check_files(dataset)
    assert note.stat().st_mtime_ns > before


def test_decode_records_checks_the_size():
    with pytest.raises(ValueError, match=r"found records of \[10, 12\] bytes, expected 12 bytes"):
        ld.decode_records([bytes(12), bytes(10)], (2, 2), "float16")


def test_latent_format(tmp_path):
    latents, labels = random_latents()
    dataset = write(tmp_path / "d", latents, labels, dtype="float32", shift=0.25)
    found = ld.latent_format(dataset, "scale")
    assert found.shift.dtype == found.factor.dtype == np.float32
    np.testing.assert_array_equal(found.shift, np.full(6, 0.25))
    np.testing.assert_array_equal(found.factor, np.full(6, 0.5))
    x = jax.device_put(latents.astype(np.float16))
    np.testing.assert_array_equal(ld.normalize(x, found), (np.asarray(x, np.float32) - 0.25) * 0.5)

    found = ld.latent_format(dataset, "statistics")
    normal = ld.normalize(jax.device_put(latents), found)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(normal, (0, 1, 2, 3)), np.zeros(6), atol=1e-5)
    np.testing.assert_allclose(np.std(normal, (0, 1, 2, 3)), np.ones(6), atol=1e-5)
    np.testing.assert_allclose(ld.denormalize(normal, found), latents, atol=1e-5)

    constant = dataclasses.replace(dataset, std=(*dataset.std[:5], 0.0))
    with pytest.raises(ValueError, match=r"channels \[5\] are constant"):
        ld.latent_format(constant, "statistics")


def test_sample_posterior():
    mean, logvar = np.array([1.0, -2.0, 5.0]), np.array([0.0, np.log(4.0), -100.0])
    moments = np.broadcast_to(np.concatenate([mean, logvar]), (50_000, 2, 6)).astype(np.float16)
    samples = jax.jit(ld.sample_posterior)(jax.random.key(0), moments)
    assert samples.shape == (50_000, 2, 3)
    assert samples.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(samples, (0, 1)), mean, atol=0.03)
    np.testing.assert_allclose(
        np.std(np.asarray(samples, np.float64), (0, 1)), [1, 2, np.exp(-15)], rtol=0.01, atol=1e-6
    )
    other = ld.sample_posterior(jax.random.key(1), moments)
    assert not np.array_equal(samples, other)


def test_the_identity_of_a_data_set_is_its_content(tmp_path):
    def dataset(directory="a", sha256="1", **changes):
        about = dataclasses.asdict(tiny.description(**changes)) | {
            "directory": tmp_path / directory,
            "shape": (4, 4, 2),
            "num_images": 8,
            "mean": (0.0, 0.0),
            "std": (1.0, 1.0),
            "shards": (ld.Shard(name=f"{directory}.array_record", records=8, sha256=sha256),),
        }
        return ld.identity(ld.LatentDataset(**about))

    assert dataset() == dataset("b", source="elsewhere")
    assert json.loads(json.dumps(dataset())) == dataset()
    others = [dataset(sha256="2"), dataset(class_names=("a", "b")), dataset(weights_sha256="x")]
    assert all(other != dataset() for other in others)
