import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.data import latents as ld
from repulsor_jax.data.writer import write_latent_dataset
from tests.oracles import tiny


def make_batches(count=23, shape=(4, 4, 6), batch=5, seed=0):
    rng = np.random.default_rng(seed)
    latents = (3 * rng.standard_normal((count, *shape)) + np.arange(shape[-1])).astype(np.float32)
    labels = rng.integers(0, 7, count)
    parts = range(0, count, batch)
    batches = [(latents[i : i + batch, None], labels[i : i + batch]) for i in parts]
    return latents, labels, batches


def write(directory, batches, count, num_shards=1, **changes):
    about = tiny.description(scale=0.5, shift=0.25, class_names=tuple("abcdefg"), **changes)
    per_shard = -(-count // num_shards)
    return write_latent_dataset(
        directory, batches, about, num_images=count, images_per_shard=per_shard
    )


def edit(directory, **changes):
    path = directory / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_open_names_what_is_wrong(tmp_path):
    _, _, batches = make_batches()
    with pytest.raises(FileNotFoundError, match="--mode=encode"):
        ld.open_latent_dataset(tmp_path / "d")
    dataset = write(tmp_path / "d", batches, 23, num_shards=2)
    text = (tmp_path / "d" / "dataset.json").read_text()
    for changes, message in [
        ({"format_version": 99}, "format_version 99"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"dtype": "float8"}, "float8"),
        ({"num_images": 24}, "24 records in all"),
        ({"shape": [4, 4, 5]}, r"00000-of-00002\.array_record: found 12 records of 196 bytes"),
    ]:
        edit(tmp_path / "d", **changes)
        with pytest.raises(ValueError, match=message):
            ld.open_latent_dataset(tmp_path / "d")
        (tmp_path / "d" / "dataset.json").write_text(text)
    for wrong in (
        text.replace('"sha256"', '"sha2&6"', 1),
        text.replace('"skipped": []', '"skipped": 3'),
    ):
        (tmp_path / "d" / "dataset.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"dataset\.json: damaged"):
            ld.open_latent_dataset(tmp_path / "d")
    (tmp_path / "d" / "dataset.json").write_text(text[:50])
    with pytest.raises(ValueError, match=r"dataset\.json"):
        ld.open_latent_dataset(tmp_path / "d")
    (tmp_path / "d" / "dataset.json").write_text(text)

    first, second = (tmp_path / "d" / s.name for s in dataset.shards)
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"00001-of-00002\.array_record: found 0 records"):
        ld.open_latent_dataset(tmp_path / "d")
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"00001-of-00002\.array_record: found 12 records"):
        ld.open_latent_dataset(tmp_path / "d")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00002\.array_record"):
        ld.open_latent_dataset(tmp_path / "d")


def test_verify_finds_one_flipped_bit(tmp_path):
    _, _, batches = make_batches()
    dataset = write(tmp_path / "d", batches, 23, num_shards=2)
    ld.verify(dataset)
    path = tmp_path / "d" / dataset.shards[1].name
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001-of-00002\.array_record: damaged.*encode again"):
        ld.verify(dataset)
    ld.verify(dataset, process_index=0, process_count=2)  # the share of the first process is whole
    with pytest.raises(ValueError, match="damaged"):
        ld.verify(dataset, process_index=1, process_count=2)


def test_shards_of_another_data_set_are_found(tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        write(tmp_path / name, make_batches(seed=seed)[2], 23, num_shards=2)
    dataset = ld.open_latent_dataset(tmp_path / "one")
    name = dataset.shards[0].name
    (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    mixed = ld.open_latent_dataset(tmp_path / "one")  # as many records of the same size
    with pytest.raises(ValueError, match="00000-of-00002.array_record: damaged"):
        ld.verify(mixed)


def test_what_was_verified_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    dataset = write(tmp_path / "d", make_batches()[2], 23, num_shards=2)
    read = []
    digest = ld.file_sha256
    monkeypatch.setattr(ld, "file_sha256", lambda path: read.append(path.name) or digest(path))
    ld.verify(dataset)
    ld.verify(dataset)
    names = [s.name for s in dataset.shards]
    assert sorted(read) == names
    path = tmp_path / "d" / names[1]
    path.write_bytes(path.read_bytes())  # the same bytes, at another time
    ld.verify(dataset)
    assert sorted(read) == [names[0], names[1], names[1]]


def test_decode_records_checks_the_size():
    with pytest.raises(
        ValueError, match="found records of \\[10, 12\\] bytes, expected 12 bytes each"
    ):
        ld.decode_records([bytes(12), bytes(10)], (2, 2), "float16")


def test_latent_format(tmp_path):
    latents, _, batches = make_batches()
    dataset = write(tmp_path / "d", batches, 23, dtype="float32")
    found = ld.latent_format(dataset, "scale")
    assert found.shift.dtype == found.factor.dtype == np.float32
    np.testing.assert_array_equal(found.shift, np.full(6, 0.25))
    np.testing.assert_array_equal(found.factor, np.full(6, 0.5))
    x = jax.device_put(latents.astype(np.float16))
    np.testing.assert_array_equal(ld.normalize(x, found), (np.asarray(x, np.float32) - 0.25) * 0.5)

    found = ld.latent_format(dataset, "statistics")
    normal = ld.normalize(jax.device_put(latents), found)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(normal, (0, 1, 2)), np.zeros(6), atol=1e-5)
    np.testing.assert_allclose(np.std(normal, (0, 1, 2)), np.ones(6), atol=1e-5)
    np.testing.assert_allclose(ld.denormalize(normal, found), latents, atol=1e-5)

    with pytest.raises(ValueError, match="'none'"):
        ld.latent_format(dataset, "none")
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
