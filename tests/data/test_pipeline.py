import json

import numpy as np
import pytest

from repulsor_jax.autoencoders import get_autoencoder
from repulsor_jax.data.latents import LatentDataset
from repulsor_jax.data.pipeline import (
    DamagedDataError,
    rescale_position,
    training_iterator,
)
from repulsor_jax.evaluation.image_sets import latent_images
from tests.oracles import latent_sets

COUNT = 22


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Record i holds the value i and the label i."""
    latents = np.broadcast_to(np.arange(COUNT)[:, None, None, None], (COUNT, 2, 2, 3))
    return write(tmp_path_factory.mktemp("latents") / "d", latents[:, None])


def write(directory, latents):
    names = tuple(str(i) for i in range(COUNT))
    about = {"class_names": names, "flipped": latents.shape[1] == 2}
    return latent_sets.write(directory, latents, np.arange(COUNT), 8, **about)


def labels(iterator, steps):
    return [next(iterator)["labels"].tolist() for _ in range(steps)]


def shares(dataset, process_count, **options):
    """An iterator for each process, with an equal share of the rows in process order."""
    options = {"global_batch_size": 8, "seed": 3, **options}
    size = options["global_batch_size"] // process_count
    return [
        training_iterator(dataset, rows=np.arange(r * size, (r + 1) * size), **options)
        for r in range(process_count)
    ]


def global_batches(iterators, steps):
    return [np.concatenate([next(it)["labels"] for it in iterators]).tolist() for _ in range(steps)]


def test_batches(dataset):
    for batch in (next(it) for it in shares(dataset, 2)):
        assert batch["latents"].shape == (4, 2, 2, 3)
        assert batch["latents"].dtype == np.float16
        assert batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(
            batch["latents"], np.broadcast_to(batch["labels"][:, None, None, None], (4, 2, 2, 3))
        )


@pytest.mark.parametrize("batch", [8, 64])  # 64 rows span three epochs of 22 records
def test_each_epoch_is_a_permutation_fixed_by_seed_and_epoch(dataset, batch):
    rows = np.concatenate(global_batches(shares(dataset, 1, global_batch_size=batch), 11))
    for epoch, found in enumerate(rows[: len(rows) // COUNT * COUNT].reshape(-1, COUNT)):
        expected = np.random.default_rng((3, epoch)).permutation(COUNT)
        np.testing.assert_array_equal(found, expected)
    other = np.concatenate(global_batches(shares(dataset, 1, seed=4), 3))
    assert not np.array_equal(other[:COUNT], rows[:COUNT])


@pytest.mark.parametrize("process_count", [2, 8])
def test_the_global_batch_does_not_depend_on_the_process_count(dataset, process_count):
    expected = global_batches(shares(dataset, 1), 12)  # 96 rows: over four epochs
    assert global_batches(shares(dataset, process_count), 12) == expected


def test_a_process_may_read_any_rows(dataset):
    """As where its devices are not neighbours in the mesh, or share rows with another's."""
    whole = global_batches(shares(dataset, 1), 12)
    rows = np.array([1, 4, 5, 6])
    some = training_iterator(dataset, global_batch_size=8, seed=3, rows=rows)
    assert labels(some, 12) == [[batch[i] for i in (1, 4, 5, 6)] for batch in whole]


def test_threads_do_not_change_the_order(dataset):
    expected = labels(shares(dataset, 1, num_threads=0, prefetch=0)[0], 20)
    assert labels(shares(dataset, 1, num_threads=4, prefetch=8)[0], 20) == expected


def test_a_process_reads_its_own_records_only(dataset, monkeypatch):
    read = []

    class Recorder:
        source = dataset.open()

        def __getitems__(self, indices):
            read.extend(indices)
            return self.source.__getitems__(indices)

    monkeypatch.setattr(LatentDataset, "open", lambda self: Recorder())
    iterator = shares(dataset, 4, num_threads=0, prefetch=0)[2]
    assert read == np.ravel(labels(iterator, 9)).tolist()
    assert len(read) == 9 * 2


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 1), (4, 2)])
def test_resume_on_any_process_count(dataset, before, after):
    iterators = shares(dataset, before)
    global_batches(iterators, 5)
    states = [json.loads(json.dumps(it.get_state())) for it in iterators]
    assert states == [{"next_index": 5}] * before
    expected = global_batches(iterators, 10)
    resumed = shares(dataset, after)
    for iterator in resumed:
        next(iterator)  # an iterator in use can be set back, too
        iterator.set_state(states[0])
    assert global_batches(resumed, 10) == expected


@pytest.mark.parametrize(("before", "after"), [(6, 2), (8, 6), (8, 8), (22, 64)])
def test_another_batch_size_goes_on_at_the_same_sample(dataset, before, after):
    """No sample is left out, and fewer than one batch is read again."""
    read, taken = shares(dataset, 1, global_batch_size=before)[0], 10
    sequence = np.ravel(labels(training_iterator(dataset, global_batch_size=1, seed=3), 400))
    np.testing.assert_array_equal(np.ravel(labels(read, taken)), sequence[: before * taken])
    state, repeated = rescale_position(read.get_state(), before, after)
    resumed = shares(dataset, 1, global_batch_size=after)[0]
    resumed.set_state(state)
    start = before * taken - repeated
    assert 0 <= repeated < after
    assert repeated == 0 or after not in (2, before)
    np.testing.assert_array_equal(np.ravel(labels(resumed, 2)), sequence[start : start + 2 * after])


def test_each_epoch_shows_each_image_once_or_its_mirror_image(tmp_path):
    """Image i has the label i and the value i, its mirror image the value i + 100."""
    values = np.arange(COUNT)[:, None] + np.array([0, 100])
    latents = np.broadcast_to(values[:, :, None, None, None], (COUNT, 2, 2, 2, 3))
    flipped = write(tmp_path / "d", latents)
    assert flipped.num_records == 2 * COUNT
    iterator = training_iterator(flipped, global_batch_size=COUNT, seed=3)
    epochs = [next(iterator) for _ in range(40)]
    chosen = np.empty((40, COUNT), int)
    for epoch, batch in enumerate(epochs):
        assert sorted(batch["labels"]) == list(range(COUNT))
        values = batch["latents"][:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(values % 100, batch["labels"])
        chosen[epoch, batch["labels"]] = values // 100
    # A fair coin, for every image and in every epoch: 880 throws, deviation 1 / sqrt(4 * 880).
    assert abs(chosen.mean() - 0.5) < 4 / np.sqrt(4 * 880)
    assert 0 < chosen.mean(axis=0).min() <= chosen.mean(axis=0).max() < 1
    assert 0 < chosen.mean(axis=1).min() <= chosen.mean(axis=1).max() < 1
    again = training_iterator(flipped, global_batch_size=COUNT, seed=3)
    np.testing.assert_array_equal(next(again)["latents"], epochs[0]["latents"])


def test_a_damaged_record_is_one_clear_error(tmp_path):
    latents = np.random.default_rng(0).standard_normal((COUNT, 1, 16, 16, 3))
    damaged = write(tmp_path / "d", latents)
    path = tmp_path / "d" / damaged.shards[1].name
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    iterator = training_iterator(damaged, global_batch_size=COUNT, seed=0)
    message = rf"/d/{damaged.shards[1].name}: a record is damaged .*config\.data\.verify"
    with pytest.raises(DamagedDataError, match=message):
        next(iterator)
    images = latent_images(damaged, get_autoencoder("identity"))  # as a reference
    assert [len(part) for part in images.read([range(0), range(3)])] == [0, 3]
    with pytest.raises(DamagedDataError, match=message):
        list(images.read([range(COUNT)]))
