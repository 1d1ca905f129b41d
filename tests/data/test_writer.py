"""Writing in shards: what is written, what a restart finds, and what is refused."""

import hashlib
import json
import resource
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from repulsor_jax.data.latents import Skipped, open_latent_dataset
from repulsor_jax.data.writer import Batch
from repulsor_jax.files.shards import fill
from tests.oracles import tiny
from tests.oracles.latent_sets import batches, begin, random_latents, write


@pytest.mark.parametrize(("dtype", "code", "views"), [("float16", "<f2", 1), ("float32", "<f4", 2)])
def test_records_are_label_then_latent_in_source_order(tmp_path, dtype, code, views):
    latents, labels = random_latents(views=views)
    dataset = write(tmp_path / "d", latents, labels, 8, dtype=dtype, flipped=views == 2)
    assert [s.records for s in dataset.shards] == [8 * views, 8 * views, 7 * views]
    assert dataset.num_records == 23 * views
    found = []
    for shard in dataset.shards:
        reader = ArrayRecordReader(str(tmp_path / "d" / shard.name))
        found += reader.read_all()
        reader.close()
    assert found == [
        struct.pack("<i", y) + view.astype(code).tobytes()
        for x, y in zip(latents, labels, strict=True)
        for view in x
    ]


def test_metadata(tmp_path):
    latents, labels = random_latents(views=2)
    written = write(tmp_path / "d", latents, labels, 12, flipped=True, shift=0.25, image_size=32)
    dataset = open_latent_dataset(tmp_path / "d")
    assert dataset == written
    assert (dataset.shape, dataset.latent_shape) == ((4, 4, 6), (4, 4, 6))
    stored = latents.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, stored.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, stored.std((0, 1, 2, 3)), rtol=1e-12)
    content = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert content["format_version"] == 2
    assert (content["num_images"], content["flipped"], content["shift"]) == (23, True, 0.25)
    for shard in content["shards"]:
        data = (tmp_path / "d" / shard["name"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    names = ["dataset.json", *(s.name for s in dataset.shards)]
    assert sorted(tiny.files(tmp_path / "d")) == sorted(names)
    assert list(tmp_path.iterdir()) == [tmp_path / "d"]


def test_stochastic_statistics_are_of_the_posterior_mean(tmp_path):
    latents, labels = random_latents()
    dataset = write(tmp_path / "d", latents, labels, stochastic=True, dtype="float32")
    assert (dataset.shape, dataset.latent_shape) == ((4, 4, 6), (4, 4, 3))
    means = latents[..., :3].astype(np.float64)
    np.testing.assert_allclose(dataset.mean, means.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, means.std((0, 1, 2, 3)), rtol=1e-12)


def test_goes_on_with_what_is_missing_and_ends_with_the_same_bytes(tmp_path):
    latents, labels = random_latents()
    write(tmp_path / "whole", latents, labels, 5)
    first = begin(tmp_path / "d", 23, 5)
    assert first.missing() == [0, 1, 2, 3, 4]

    def stopped(todo):
        yield from batches(latents, labels)(todo[:3])
        yield Batch(latents[15:17], labels[15:17])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(first, stopped, title="test", share=slice(None))
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="2 of 5 shards are not finished"):
        first.finish()
    # A kill after the file of a shard and before its summary: the shard is written again.
    name = "data-00001-of-00005.array_record"
    (first.folder / f"{name}.json").unlink()
    (first.folder / f".{name}.0000").write_bytes(b"left by a kill")

    again = begin(tmp_path / "d", 23, 5)
    for share, missing in ((slice(0, None, 2), [4]), (slice(1, None, 2), [1, 3])):
        assert again.missing(share) == missing
        fill(again, batches(latents, labels), title="test", share=share)
    again.finish()
    assert tiny.files(tmp_path / "d") == tiny.files(tmp_path / "whole")
    assert not again.folder.exists()


@pytest.mark.parametrize("left", ["everything", "dataset.json and shards"])
def test_killed_while_finishing(tmp_path, left):
    latents, labels = random_latents()
    write(tmp_path / "whole", latents, labels, 12)
    writer = begin(tmp_path / "d", 23, 12)
    fill(writer, batches(latents, labels), title="test", share=slice(None))
    if left != "everything":
        for path in writer.folder.glob("*.json"):
            path.unlink()
    (writer.folder / "dataset.json").write_bytes((tmp_path / "whole/dataset.json").read_bytes())
    again = begin(tmp_path / "d", 23, 12)
    assert again.missing() == []
    again.finish()
    assert tiny.files(tmp_path / "d") == tiny.files(tmp_path / "whole")


def test_another_job_is_not_gone_on_with(tmp_path):
    begin(tmp_path / "d", 23, image_size=32)
    with pytest.raises(ValueError, match=r"begun with other settings: image_size was 32 and is 64"):
        begin(tmp_path / "d", 23, image_size=64)


def test_skipped_images_are_listed(tmp_path):
    latents, labels = random_latents(6)
    writer = begin(tmp_path / "d", 8, 4)
    bad = [Skipped(index=k, name=f"{k}.jpg", reason="empty") for k in (1, 2)]
    writer.write(0, [Batch(latents[:2], labels[:2], bad)])
    writer.write(1, [Batch(latents[2:], labels[2:])])
    dataset = writer.finish()
    assert (dataset.num_images, dataset.skipped) == (6, tuple(bad))
    assert open_latent_dataset(tmp_path / "d") == dataset

    none = begin(tmp_path / "none", 2)
    none.write(0, [Batch(latents[:0], labels[:0], bad)])
    with pytest.raises(ValueError, match=r"no image could be read; the first: 1\.jpg"):
        none.finish()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path):
    latents, labels = random_latents(shape=(32, 32, 8))
    writer = begin(tmp_path / "d", 23)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this: the writer fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: .*data-00000-of-00001.*goes on"):
            writer.write(0, batches(latents, labels)([range(23)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in writer.folder.iterdir()] == ["job.json"]
    assert writer.missing() == [0]

    def failing():
        yield Batch(latents[:2], labels[:2])
        raise RuntimeError("the device ran out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):  # does not come from the disk
        writer.write(0, failing())


def test_a_complete_data_set_is_never_touched(tmp_path):
    write(tmp_path / "d", *random_latents())
    before = tiny.files(tmp_path / "d")
    with pytest.raises(FileExistsError, match="never overwritten"):
        begin(tmp_path / "d", 23)
    assert tiny.files(tmp_path / "d") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "d"]


@pytest.mark.parametrize(
    ("change", "description", "message"),
    [
        ({"value": np.nan}, {}, "image 13: the latents are not finite"),
        ({"value": 7e4}, {}, "image 13: the latents overflow float16"),
        ({"count": 22}, {}, "shard 0: found 22 images and 0 skipped, expected 23"),
        ({}, {"class_names": tuple("abcdef")}, r"image \d+: found label 6, expected 0 to 5"),
        ({"second": (4, 2, 6)}, {}, "batch from image 5: found latents"),
        ({}, {"flipped": True}, "batch from image 0: found latents"),
        ({"shape": (4, 4, 5)}, {"stochastic": True}, "even number"),
    ],
)
def test_bad_batches_are_refused(tmp_path, change, description, message):
    latents, labels = random_latents(shape=change.get("shape", (4, 4, 6)))
    latents[13, 0, 2, 1, 0] = change.get("value", 0.0)
    made = list(batches(latents, labels)([range(change.get("count", 23))]))
    if "second" in change:
        made[1] = made[1]._replace(latents=np.zeros((5, 1, *change["second"])))
    writer = begin(tmp_path / "d", 23, **description)
    with pytest.raises(ValueError, match=message):
        writer.write(0, made)
    assert [p.name for p in writer.folder.iterdir()] == ["job.json"]
