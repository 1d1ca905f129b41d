"""Writing in shards: what is written, what a restart finds, and what is refused."""

import hashlib
import json
import resource
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from repulsor_jax.data import latents as ld
from repulsor_jax.data import writer as dw
from tests.oracles import tiny


def make_batches(count=23, views=1, shape=(4, 4, 6), batch=5, seed=0):
    rng = np.random.default_rng(seed)
    latents = 3 * rng.standard_normal((count, views, *shape)) + np.arange(shape[-1])
    latents, labels = latents.astype(np.float32), rng.integers(0, 7, count)
    parts = range(0, count, batch)
    return latents, labels, [(latents[i : i + batch], labels[i : i + batch]) for i in parts]


def describe(**changes):
    return tiny.description(**{"scale": 0.5, "class_names": tuple("abcdefg"), **changes})


def write(directory, batches, count=23, images_per_shard=None, **changes):
    return dw.write_latent_dataset(
        directory,
        batches,
        describe(**changes),
        num_images=count,
        images_per_shard=images_per_shard,
    )


@pytest.mark.parametrize(("dtype", "code"), [("float16", "<f2"), ("float32", "<f4")])
@pytest.mark.parametrize("views", [1, 2])
def test_records_are_label_then_latent_in_source_order(tmp_path, dtype, code, views):
    latents, labels, batches = make_batches(views=views)
    dataset = write(tmp_path / "d", batches, 23, 8, dtype=dtype, flipped=views == 2)
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
    latents, _, batches = make_batches(views=2)
    written = write(tmp_path / "d", batches, 23, 12, flipped=True, shift=0.25, image_size=32)
    dataset = ld.open_latent_dataset(tmp_path / "d")
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == sorted(
        ["dataset.json", *(s.name for s in dataset.shards)]
    )


def test_stochastic_statistics_are_of_the_posterior_mean(tmp_path):
    latents, _, batches = make_batches()
    dataset = write(tmp_path / "d", batches, stochastic=True, dtype="float32")
    assert (dataset.shape, dataset.latent_shape) == ((4, 4, 6), (4, 4, 3))
    means = latents[..., :3].astype(np.float64)
    np.testing.assert_allclose(dataset.mean, means.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, means.std((0, 1, 2, 3)), rtol=1e-12)


def shard_batches(writer, k, latents, labels):
    rows = writer.rows(k)
    return [dw.Batch(latents[rows.start : rows.stop], labels[rows.start : rows.stop])]


def test_goes_on_with_what_is_missing_and_ends_with_the_same_bytes(tmp_path):
    latents, labels, batches = make_batches()
    write(tmp_path / "whole", batches, 23, 5)
    options = {"num_images": 23, "images_per_shard": 5}
    first = dw.open_writer(tmp_path / "d", describe(), **options)
    assert first.missing() == [0, 1, 2, 3, 4]
    first.write(3, shard_batches(first, 3, latents, labels))

    def interrupted():
        yield dw.Batch(latents[5:7], labels[5:7])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.write(1, interrupted())
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="4 of 5 shards are not finished"):
        first.finish()
    # Killed after the shard's file and before its summary: it is written again.
    name = "data-00003-of-00005.array_record"
    (first.folder / f"{name}.json").unlink()
    (first.folder / f".{name}.0000").write_bytes(b"left by a kill")

    again = dw.open_writer(tmp_path / "d", describe(), **options)
    assert again.missing(0, 2) == [0, 2, 4]
    assert again.missing(1, 2) == [1, 3]
    for k in again.missing():
        again.write(k, shard_batches(again, k, latents, labels))
    again.finish()
    assert tiny.files(tmp_path / "d") == tiny.files(tmp_path / "whole")
    assert not again.folder.exists()


@pytest.mark.parametrize("left", ["everything", "dataset.json and shards"])
def test_killed_while_finishing(tmp_path, left):
    latents, labels, batches = make_batches()
    write(tmp_path / "whole", batches, 23, 12)
    writer = dw.open_writer(tmp_path / "d", describe(), num_images=23, images_per_shard=12)
    for k in range(2):
        writer.write(k, shard_batches(writer, k, latents, labels))
    (writer.folder / "dataset.json").write_bytes((tmp_path / "whole/dataset.json").read_bytes())
    if left != "everything":
        for path in writer.folder.glob("*.json"):
            if path.name != "dataset.json":
                path.unlink()
    again = dw.open_writer(tmp_path / "d", describe(), num_images=23, images_per_shard=12)
    assert again.missing() == []
    again.finish()
    assert tiny.files(tmp_path / "d") == tiny.files(tmp_path / "whole")


def test_another_job_is_not_gone_on_with(tmp_path):
    options = {"num_images": 23, "images_per_shard": 5}
    dw.open_writer(tmp_path / "d", describe(image_size=32), **options)
    with pytest.raises(ValueError, match=r"begun with other settings: image_size was 32 and is 64"):
        dw.open_writer(tmp_path / "d", describe(image_size=64), **options)
    with pytest.raises(ValueError, match="signature was None and is 'x'"):
        dw.open_writer(
            tmp_path / "d", describe(image_size=32), **options, settings={"signature": "x"}
        )


def test_skipped_images_are_listed(tmp_path):
    latents, labels, _ = make_batches(6)
    writer = dw.open_writer(tmp_path / "d", describe(), num_images=8, images_per_shard=4)
    bad = [ld.Skipped(1, "b.jpg", "empty"), ld.Skipped(2, "c.jpg", "empty")]
    writer.write(0, [dw.Batch(latents[:2], labels[:2], bad)])
    writer.write(1, [dw.Batch(latents[2:], labels[2:])])
    dataset = writer.finish()
    assert (dataset.num_images, dataset.skipped) == (6, tuple(bad))
    assert ld.open_latent_dataset(tmp_path / "d") == dataset

    none = dw.open_writer(tmp_path / "none", describe(), num_images=2, images_per_shard=4)
    none.write(0, [dw.Batch(latents[:0], labels[:0], bad)])
    with pytest.raises(ValueError, match=r"none of the 2 images could be read; the first: b\.jpg"):
        none.finish()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path):
    latents, labels, _ = make_batches(shape=(32, 32, 8))
    writer = dw.open_writer(tmp_path / "d", describe(), num_images=23, images_per_shard=23)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this: what the system says then is not "no space", but goes one way.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: .*data-00000-of-00001.*goes on"):
            writer.write(0, shard_batches(writer, 0, latents, labels))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in writer.folder.iterdir()] == ["job.json"]
    assert writer.missing() == [0]

    def failing():
        yield dw.Batch(latents[:2], labels[:2])
        raise RuntimeError("the device ran out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):  # not a matter of the disk
        writer.write(0, failing())


def test_a_complete_data_set_is_never_touched(tmp_path):
    _, _, batches = make_batches()
    write(tmp_path / "d", batches)
    before = tiny.files(tmp_path / "d")
    with pytest.raises(FileExistsError, match="never overwritten"):
        write(tmp_path / "d", batches)
    assert tiny.files(tmp_path / "d") == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "image 13: the latents are not finite"),
        (7e4, "image 13: its latents overflow float16"),
    ],
)
def test_bad_latents_name_the_image(tmp_path, value, message):
    latents, _, batches = make_batches()
    latents[13, 0, 2, 1, 0] = value
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "d", batches)
    assert list(tmp_path.iterdir()) == []


def test_wrong_labels_counts_and_shapes(tmp_path):
    latents, labels, batches = make_batches()
    with pytest.raises(ValueError, match="shard 0: found 23 images and 0 skipped, expected 24"):
        write(tmp_path / "d", batches, 24)
    with pytest.raises(ValueError, match="more images than the 22"):
        write(tmp_path / "d", batches, 22)
    with pytest.raises(ValueError, match="bfloat16"):
        write(tmp_path / "d", batches, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"image \d+: found label 6, expected 0 to 5"):
        write(tmp_path / "d", batches, class_names=tuple("abcdef"))
    with pytest.raises(ValueError, match="batch from image 5: found latents"):
        write(tmp_path / "d", [batches[0], (latents[:, :, :2], labels)], 28)
    with pytest.raises(ValueError, match="batch from image 0: found latents"):
        write(tmp_path / "d", batches, flipped=True)
    with pytest.raises(ValueError, match="even number"):
        write(tmp_path / "d", [(latents[..., :5], labels)], stochastic=True)
    assert list(tmp_path.iterdir()) == []
