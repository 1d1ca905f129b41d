import dataclasses
import hashlib
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from repulsor_jax.data import latent_dataset as ld


def make_batches(count=23, shape=(4, 4, 6), batch=5, seed=0):
    rng = np.random.default_rng(seed)
    latents = (3 * rng.standard_normal((count, *shape)) + np.arange(shape[-1])).astype(np.float32)
    labels = rng.integers(0, 7, count)
    parts = range(0, count, batch)
    return latents, labels, [(latents[i : i + batch], labels[i : i + batch]) for i in parts]


def write(directory, batches, count, **changes):
    meta = {
        "num_records": count,
        "stochastic": False,
        "autoencoder": "identity",
        "scale": 0.5,
        "source": "digits",
        "split": "train",
        "class_names": [str(k) for k in range(7)],
    }
    return ld.write_latent_dataset(directory, batches, **{**meta, **changes})


def edit(directory, **changes):
    path = directory / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("dtype", "code"), [("float16", "<f2"), ("float32", "<f4")])
def test_records_are_label_then_latent_in_source_order(tmp_path, dtype, code):
    latents, labels, batches = make_batches()
    dataset = write(tmp_path / "d", batches, 23, dtype=dtype, num_shards=3)
    assert [s.records for s in dataset.shards] == [7, 8, 8]
    found = []
    for shard in dataset.shards:
        reader = ArrayRecordReader(str(tmp_path / "d" / shard.name))
        found += reader.read_all()
        reader.close()
    expected = [
        struct.pack("<i", y) + x.astype(code).tobytes()
        for x, y in zip(latents, labels, strict=True)
    ]
    assert found == expected

    source = dataset.open()
    decoded = ld.decode_records(source.__getitems__([22, 0, 9]), dataset.shape, dtype)
    np.testing.assert_array_equal(decoded["latents"], latents[[22, 0, 9]].astype(code))
    np.testing.assert_array_equal(decoded["labels"], labels[[22, 0, 9]])
    assert decoded["latents"].dtype == dtype
    assert decoded["labels"].dtype == np.int32
    assert decoded["latents"].flags.c_contiguous
    assert decoded["latents"].flags.writeable


def test_metadata(tmp_path):
    latents, _, batches = make_batches()
    written = write(tmp_path / "d", batches, 23, num_shards=2)
    dataset = ld.open_latent_dataset(tmp_path / "d")
    assert dataset == written
    assert (dataset.shape, dataset.latent_shape) == ((4, 4, 6), (4, 4, 6))
    stored = latents.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, stored.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, stored.std((0, 1, 2)), rtol=1e-12)
    content = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert content["format_version"] == 1
    assert content["source"] == "digits"
    assert content["class_names"] == [str(k) for k in range(7)]
    for shard in content["shards"]:
        data = (tmp_path / "d" / shard["name"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    ld.verify(dataset)


def test_stochastic_statistics_are_of_the_posterior_mean(tmp_path):
    latents, _, batches = make_batches()
    dataset = write(tmp_path / "d", batches, 23, stochastic=True, dtype="float32")
    assert (dataset.shape, dataset.latent_shape) == ((4, 4, 6), (4, 4, 3))
    means = latents[..., :3].astype(np.float64)
    np.testing.assert_allclose(dataset.mean, means.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, means.std((0, 1, 2)), rtol=1e-12)


def test_a_complete_data_set_is_never_touched(tmp_path):
    _, _, batches = make_batches()
    write(tmp_path / "d", batches, 23)
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    with pytest.raises(FileExistsError, match="never overwritten"):
        write(tmp_path / "d", batches, 23)
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_interrupted_one_leaves_nothing(tmp_path):
    _, _, batches = make_batches()

    def interrupted():
        yield from batches[:3]
        assert not (tmp_path / "d").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", interrupted(), 23)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "d").mkdir()  # an empty directory is free to take
    write(tmp_path / "d", batches, 23)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "record 13: the latents are not finite"),
        (np.inf, "record 13: the latents are not finite"),
        (7e4, "record 13: a latent of 70000 overflows float16"),
    ],
)
def test_bad_latents_name_the_record(tmp_path, value, message):
    latents, _, batches = make_batches()
    latents[13, 2, 1, 0] = value
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "d", batches, 23)
    assert list(tmp_path.iterdir()) == []


def test_wrong_labels_counts_and_shapes(tmp_path):
    latents, labels, batches = make_batches()
    with pytest.raises(ValueError, match="found 23 records, expected the 24"):
        write(tmp_path / "d", batches, 24)
    with pytest.raises(ValueError, match="more records than the 22"):
        write(tmp_path / "d", batches, 22)
    with pytest.raises(ValueError, match="num_shards=24"):
        write(tmp_path / "d", batches, 23, num_shards=24)
    with pytest.raises(ValueError, match="bfloat16"):
        write(tmp_path / "d", batches, 23, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"record \d+: found label 6, expected 0 to 5"):
        write(tmp_path / "d", batches, 23, class_names=list("abcdef"))
    with pytest.raises(ValueError, match="batch from record 5: found latents"):
        write(tmp_path / "d", [batches[0], (latents[:, :2], labels)], 28)
    with pytest.raises(ValueError, match="even c"):
        write(tmp_path / "d", [(latents[..., :5], labels)], 23, stochastic=True)


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
        ({"num_records": 24}, "24 records in all"),
        ({"shape": [4, 4, 5]}, r"00000-of-00002\.array_record: found 11 records of 196 bytes"),
    ]:
        edit(tmp_path / "d", **changes)
        with pytest.raises(ValueError, match=message):
            ld.open_latent_dataset(tmp_path / "d")
        (tmp_path / "d" / "dataset.json").write_text(text)
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
    with pytest.raises(ValueError, match=r"00001-of-00002\.array_record: found 11 records"):
        ld.open_latent_dataset(tmp_path / "d")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00002\.array_record"):
        ld.open_latent_dataset(tmp_path / "d")


def test_verify_finds_one_flipped_bit(tmp_path):
    _, _, batches = make_batches()
    write(tmp_path / "d", batches, 23, num_shards=2)
    dataset = ld.open_latent_dataset(tmp_path / "d")
    path = tmp_path / "d" / dataset.shards[1].name
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001-of-00002\.array_record: damaged"):
        ld.verify(dataset)


def test_decode_records_checks_the_size():
    with pytest.raises(ValueError, match="expected 12 bytes each"):
        ld.decode_records([bytes(12), bytes(10)], (2, 2), "float16")


def test_normalization(tmp_path):
    latents, _, batches = make_batches()
    dataset = write(tmp_path / "d", batches, 23, dtype="float32")
    shift, factor = ld.normalization(dataset, "scale")
    assert shift.dtype == factor.dtype == np.float32
    np.testing.assert_array_equal(shift, np.zeros(6))
    np.testing.assert_array_equal(factor, np.full(6, 0.5))
    x = jax.device_put(latents.astype(np.float16))
    np.testing.assert_array_equal(ld.normalize(x, shift, factor), np.asarray(x, np.float32) * 0.5)

    shift, factor = ld.normalization(dataset, "statistics")
    normal = jax.jit(ld.normalize)(latents, shift, factor)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(normal, (0, 1, 2)), np.zeros(6), atol=1e-5)
    np.testing.assert_allclose(np.std(normal, (0, 1, 2)), np.ones(6), atol=1e-5)
    np.testing.assert_allclose(ld.denormalize(normal, shift, factor), latents, atol=1e-5)

    with pytest.raises(ValueError, match="'none'"):
        ld.normalization(dataset, "none")
    constant = dataclasses.replace(dataset, std=(*dataset.std[:5], 0.0))
    with pytest.raises(ValueError, match=r"channels \[5\] are constant"):
        ld.normalization(constant, "statistics")


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
