import importlib.util
import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from repulsor_jax.data.preprocess import BadImageError, prepare_image, read_images
from repulsor_jax.data.sources import open_source
from tests.oracles.tiny_images import TinyImages


class TinyUnlabelled(TinyImages):
    wanted = ("image",)


class TinyArrays(TinyImages):
    def image(self, i):
        return np.full((5, 4, 3), i, np.uint8)


class TinyManual(TinyImages):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Register,\nand fetch it."

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(len(str(dl_manager.manual_dir)))}


def test_digits_are_scikit_learns():
    digits = load_digits()
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1300, 497)
    assert list(train.class_names) == list("0123456789")
    order = np.random.RandomState(0).permutation(1797)
    items = [train[i] for i in range(1300)] + [test[i] for i in range(497)]
    for item, row in zip(items, order, strict=True):
        assert item.image.shape == (8, 8, 1)
        assert item.image.dtype == np.uint8
        assert type(item.label) is int
        assert item.label == digits.target[row]
        # 16 levels of 255 / 16: rounding is within half a grey level, and can be undone.
        assert np.abs(item.image[..., 0] - digits.images[row] * 255 / 16).max() <= 0.5
    assert items[1302].name == "digits test[2]"
    assert train.signature() == open_source("digits", "train").signature() != test.signature()


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "digit",
            "train",
            r"found 'digit', expected one of \['archive', 'digits', 'folder', 'tfds:<name>'\]",
        ),
        ("digits:8", "train", "found 'digits:8', expected one of"),
        ("tfds", "train", "found 'tfds', expected one of"),
        ("digits", "train", "digits: found path .*, expected none"),
        ("tfds:no_such_data_set", "train", "does not know 'no_such_data_set'"),
    ],
)
def test_unknown_names_and_splits(tmp_path, name, split, message):
    with pytest.raises(ValueError, match=message):
        open_source(name, split, path=str(tmp_path))


def test_unknown_split_of_digits():
    with pytest.raises(ValueError, match=r"found split 'val', expected one of \['test', 'train'\]"):
        open_source("digits", "val")


def test_tfds(tmp_path):
    source = open_source("tfds:tiny_images", "train", path=str(tmp_path))
    assert len(source) == 6
    assert list(source.class_names) == ["cat", "dog"]
    # tfds shuffles as it writes: each value still stands with its label.
    values = set()
    for i in range(6):
        item = source[i]
        assert item.name == f"tfds:tiny_images train[{i}]"
        assert item.image[:4] == b"\x89PNG"  # as stored: worker processes decode it
        assert type(item.label) is int
        image = prepare_image(item.image, 0, item.name)
        assert image.shape == (5, 4, 3)
        assert item.label == image[0, 0, 0] % 2
        values.add(int(image[0, 0, 0]))
    assert values == set(range(6))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(6)] == [source[i] for i in range(6)]
    other = open_source("tfds:tiny_images", "test", path=str(tmp_path))
    assert copy.signature() == source.signature() != other.signature()
    assert len(open_source("tfds:tiny_images", "test", path=str(tmp_path))) == 3
    assert len(open_source("tfds:tiny_images", "train[:50%]", path=str(tmp_path))) == 3
    with pytest.raises(ValueError, match=r"found split 'val', expected one of \['test', 'train'\]"):
        open_source("tfds:tiny_images", "val", path=str(tmp_path))


def test_tfds_without_labels(tmp_path):
    with pytest.raises(ValueError, match="expected an image and a class label"):
        open_source("tfds:tiny_unlabelled", "train", path=str(tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="tensorflow is installed"
)
def test_tfds_that_needs_tensorflow_to_prepare(tmp_path):
    with pytest.raises(ValueError, match=r"No module named 'tensorflow'.*tfds build tiny_arrays"):
        open_source("tfds:tiny_arrays", "train", path=str(tmp_path))


def test_tfds_that_must_be_fetched_by_hand(tmp_path):
    with pytest.raises(
        ValueError, match=r"tiny_manual.*Register, and fetch it.*source=\"archive\""
    ):
        open_source("tfds:tiny_manual", "train", path=str(tmp_path))


def test_a_damaged_record_of_tfds_is_a_bad_image(tmp_path):
    open_source("tfds:tiny_images", "train", path=str(tmp_path))
    shard = next(tmp_path.glob("tiny_images/*/*train.array_record*"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"PNG") + 20] ^= 1
    shard.write_bytes(data)
    source = open_source("tfds:tiny_images", "train", path=str(tmp_path))
    images, _ = read_images(source, range(6), 0)
    bad = [i for i, image in enumerate(images) if isinstance(image, BadImageError)]
    assert len(bad) == 1
    assert str(images[bad[0]]).startswith(
        f"tfds:tiny_images train[{bad[0]}]: cannot be read: damaged: "
    )
