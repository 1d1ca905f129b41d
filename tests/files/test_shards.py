import errno
import zipfile

import numpy as np
import pytest

from repulsor_jax.files.shards import Shards, fill, job_name, one_late, whole_batches

SQUARES = np.arange(23)[:, None] ** 2


def make(made, batch=3, stop_at=None):
    """A job that squares numbers in batches, notes which it made, and may break off."""

    def produce(parts):
        for part in parts:
            for first in range(part.start, part.stop, batch):
                rows = range(first, min(first + batch, part.stop))
                if stop_at in rows:
                    raise KeyboardInterrupt
                made.extend(rows)
                yield {"square": SQUARES[rows.start : rows.stop], "number": np.array(rows)}

    return produce


def run(shards, *arguments, **options):
    return fill(shards, make(*arguments, **options), title="test")


def files(shards):
    return {path.name: path.read_bytes() for path in shards.folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """Shards of an undisturbed job."""
    shards = Shards(tmp_path / "whole", 23, 6)
    run(shards, [])
    return shards


def test_all_items_come_back_in_order(whole):
    assert len(whole) == 4
    assert whole.names() == ["square", "number"]
    assert [len(part) for part in whole.read("square")] == [6, 6, 6, 5]
    np.testing.assert_array_equal(np.concatenate(list(whole.read("square"))), SQUARES)
    assert whole.missing() == []
    made = []
    assert run(whole, made) == 0
    assert made == []
    whole.remove()
    assert not whole.folder.exists()


@pytest.mark.parametrize("stop_at", [0, 5, 6, 14, 22])
def test_a_stopped_job_goes_on_and_ends_with_the_same_bytes(tmp_path, whole, stop_at):
    shards = Shards(tmp_path / "stopped", 23, 6)
    with pytest.raises(KeyboardInterrupt):
        run(shards, [], stop_at=stop_at)
    (shards.folder).mkdir(exist_ok=True)
    (shards.folder / ".00000018-00000023.npz.0123abcd").write_bytes(b"left by a kill")
    made = []
    run(shards, made)
    assert made == list(range(stop_at // 6 * 6, 23))  # whole shards are not made again
    assert files(shards) == files(whole)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: b"", lambda data: flip(data, len(data) // 3)]
)
def test_a_damaged_shard_is_made_again(whole, damage):
    before = files(whole)
    path = sorted(whole.folder.iterdir())[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}: damaged"):
        list(whole.read("square"))
    assert whole.missing() == [1]
    made = []
    run(whole, made)
    assert made == list(range(6, 12))
    assert files(whole) == before


def test_trouble_with_the_disk_is_no_damage(whole, monkeypatch):
    def testzip(archive):
        raise OSError(errno.EIO, "cannot read now")

    before = files(whole)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", testzip)
    with pytest.raises(OSError, match="cannot read now"):
        whole.missing()
    assert files(whole) == before


def flip(data, at):
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def test_shards_of_another_size_are_not_taken_for_these(whole):
    assert Shards(whole.folder, 23, 7).missing() == [0, 1, 2, 3]


def test_a_shard_holds_all_its_items(tmp_path):
    with pytest.raises(ValueError, match="square: found 3 items, expected 6"):
        Shards(tmp_path, 23, 6).write(0, [{"square": SQUARES[:3]}])
    assert not list(tmp_path.iterdir())


def test_one_late_asks_for_the_next_before_it_yields():
    asked = []

    def numbers():
        for k in range(3):
            asked.append(k)
            yield k

    seen = []
    for k in one_late(numbers()):
        seen.append((k, len(asked)))
    assert seen == [(0, 2), (1, 3), (2, 3)]


def test_whole_batches():
    assert [whole_batches(1024, b) for b in (64, 100, 700, 2000)] == [1024, 1000, 700, 2000]


def test_one_late_yields_what_precedes_an_error():
    def numbers():
        yield 0
        yield 1
        raise ValueError("two")

    found = one_late(numbers())
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(found)


def test_the_name_of_a_job_does_not_depend_on_the_order_of_keys():
    assert job_name({"a": 1, "b": 2.5}) == job_name({"b": 2.5, "a": 1}) != job_name({"a": 1})
