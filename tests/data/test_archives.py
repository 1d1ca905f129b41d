"""Folders and archives: what is found, in which order, and what is refused."""

import bz2
import errno
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import re
import resource
import tarfile
import zipfile

import pytest

from repulsor_jax.data.preprocess import read_images
from repulsor_jax.data.sources import open_source

# Sources hand out bytes as they are, so that these need not be images.
TREE = {
    "train/dog/b.JPEG": b"dog b",
    "train/dog/a.png": b"dog a",
    "train/cat/deep/er/1.jpg": b"cat deep",
    "train/cat/2.jpg": b"cat two",
    "train/cat food/1.webp": b"cat food",
    "train/cat/.hidden.jpg": b"hidden",
    "train/.git/x.jpg": b"hidden",
    "test/dog/1.gif": b"test dog",
}
# By class, then by name: "cat food" would come first if whole paths were sorted.
CLASSES = ["cat", "cat food", "dog"]
ITEMS = [
    (b"cat two", 0, "cat/2.jpg"),
    (b"cat deep", 0, "cat/deep/er/1.jpg"),
    (b"cat food", 1, "cat food/1.webp"),
    (b"dog a", 2, "dog/a.png"),
    (b"dog b", 2, "dog/b.JPEG"),
]


def write_tree(root, tree):
    for name, data in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_bytes(tree, tar_format=tarfile.GNU_FORMAT):
    """A tar of the tree; a value that is a `TarInfo` is a member without data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, data in tree.items():
            entry = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.name = name
            if isinstance(data, bytes):
                entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data) if isinstance(data, bytes) else None)
    return file.getvalue()


def tar_member(kind, target=""):
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


def zip_bytes(tree, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return file.getvalue()


KINDS = {
    "x.tar": tar_bytes,
    "x.pax.tar": lambda tree: tar_bytes(tree, tarfile.PAX_FORMAT),
    "x.tar.gz": lambda tree: gzip.compress(tar_bytes(tree)),
    "x.tar.xz": lambda tree: lzma.compress(tar_bytes(tree)),
    "x.tar.bz2": lambda tree: bz2.compress(tar_bytes(tree)),
    "x.zip": zip_bytes,
    "deflated.zip": lambda tree: zip_bytes(tree, zipfile.ZIP_DEFLATED),
}


def open_archive(tmp_path, data, split="train", name="x.tar"):
    path = tmp_path / name
    path.write_bytes(data)
    return open_source("archive", split, path=str(path), cache_dir=tmp_path / "cache")


def found(source, lead):
    """Images, labels and names without their common start, which they must have."""
    items = [source[i] for i in range(len(source))]
    assert all(item.name.startswith(lead) and type(item.label) is int for item in items)
    return [(item.image, item.label, item.name.removeprefix(lead)) for item in items]


def test_folder(tmp_path, caplog):
    write_tree(tmp_path, TREE)
    write_tree(tmp_path, {"train/cat/notes.txt": b"", "train/list.csv": b""})
    with caplog.at_level(logging.WARNING):
        source = open_source("folder", "train", path=str(tmp_path))
    assert list(source.class_names) == CLASSES
    assert found(source, f"{tmp_path}/train/") == ITEMS
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out 2 files" in message
    assert "cat/notes.txt" in message
    assert found(open_source("folder", "test", path=str(tmp_path)), f"{tmp_path}/test/dog/") == [
        (b"test dog", 0, "1.gif")
    ]
    # Without a split of its own: its folders are the classes.
    whole = open_source("folder", ".", path=str(tmp_path))
    assert list(whole.class_names) == ["test", "train"]
    assert len(whole) == 6
    for index in (5, -1):
        with pytest.raises(IndexError, match="out of range for 5 items"):
            source[index]


def test_folder_with_a_name_that_is_not_utf8(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    try:
        with open(name, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    source = pickle.loads(pickle.dumps(open_source("folder", ".", path=str(tmp_path))))
    assert source[0].image == b"x"
    assert os.fsencode(source[0].name) == name


def test_links_in_a_folder(tmp_path):
    write_tree(tmp_path / "store", {"one.jpg": b"one", "many/2.jpg": b"two"})
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    (root / "cat/1.jpg").symlink_to(tmp_path / "store/one.jpg")
    (root / "dog").symlink_to(tmp_path / "store/many")
    (root / "cat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "cat/round.jpg").symlink_to(root / "cat/round.jpg")
    os.mkfifo(root / "cat/pipe.jpg")  # reading it would wait for ever
    source = open_source("folder", ".", path=str(root))
    assert [source[i].image for i in (0, 3)] == [b"one", b"two"]
    images, labels = read_images(source, [1, 2], 0)
    assert str(images[0]) == f"{root}/cat/gone.jpg: cannot be read: {os.strerror(errno.ENOENT)}"
    assert str(images[1]) == f"{root}/cat/round.jpg: cannot be read: {os.strerror(errno.ELOOP)}"
    assert labels.tolist() == [-1, -1]
    assert len(source.signature()) == 64
    (root / "cat/loop").symlink_to(root)
    with pytest.raises(ValueError, match="root/cat/loop: a link to a folder that holds it"):
        open_source("folder", ".", path=str(root))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_and_folder(tmp_path):
    write_tree(tmp_path, {"cat/1.jpg": b"one"})
    (tmp_path / "cat/1.jpg").chmod(0)
    images, _ = read_images(open_source("folder", ".", path=str(tmp_path)), [0], 0)
    assert str(images[0]) == f"{tmp_path}/cat/1.jpg: cannot be read: Permission denied"
    (tmp_path / "cat").chmod(0)
    with pytest.raises(ValueError, match="cat: the folder cannot be read: Permission denied"):
        open_source("folder", ".", path=str(tmp_path))
    (tmp_path / "cat").chmod(0o700)


FOLDER_ERRORS = [
    ({"a/train/x.jpg": b""}, "train", r"no split 'train'.*holds the folders \['a'\]"),
    ({"a.jpg": b"", "cat/b.jpg": b""}, ".", "both a.jpg directly inside and cat/b.jpg in a folder"),
    ({"cat/b.jpg": b"", "dog/notes.txt": b""}, ".", r"found no image in \['dog'\]"),
    ({"cat/.b.jpg": b"", "notes.txt": b""}, ".", "found no image, .* such as notes.txt"),
    ({"cat/b.jpg": b""}, "cat/b.jpg", "cat/b.jpg is not a folder"),
    ({}, ".", "not found; expected the folder"),
]


@pytest.mark.parametrize(("tree", "split", "message"), FOLDER_ERRORS)
def test_folder_errors(tmp_path, tree, split, message):
    write_tree(tmp_path / "root", tree)
    with pytest.raises(ValueError, match=message):
        open_source("folder", split, path=str(tmp_path / "root"))


NUMBERED = {f"0000{k // 2}/img{k}.png": b"%d" % k for k in range(4)}
LABELS = {"labels": [[name, int(name[-5]) % 2] for name in sorted(NUMBERED)]}


@pytest.mark.parametrize("kind", ["folder", "x.tar", "x.zip", "x.tar.gz"])
def test_labels_of_a_dataset_json_beside_the_images(tmp_path, kind):
    """As StyleGAN, EDM and REPA write them: the folders are running numbers, and no classes."""

    def opened(labels, **more):
        tree = {**NUMBERED, "dataset.json": json.dumps(labels).encode(), **more}
        if kind != "folder":
            return open_archive(tmp_path, KINDS[kind](tree), ".", kind)
        write_tree(tmp_path / "root", tree)
        return open_source("folder", ".", path=str(tmp_path / "root"))

    source = opened(LABELS)
    assert source.class_names == ("0", "1")
    assert [(source[i].image, source[i].label) for i in range(4)] == [
        (b"0", 0),
        (b"1", 1),
        (b"2", 0),
        (b"3", 1),
    ]
    assert not source.doubt
    none = opened({"labels": None})
    assert none.class_names == ("unlabelled",)
    assert "no labels" in none.doubt
    assert opened({"name": "another file"}).class_names == ("00000", "00001")
    first, *others = LABELS["labels"]
    wrong = {
        r"dataset\.json\.labels\.0\.1: expected a valid integer": [[first[0], [0, 1]], *others],
        r"labels\.0: .*rename it if the folders are the classes": ["cat", "dog"],
        r"00000/img0\.png has no label in .*dataset\.json": others,
        r"9\.png is not there, though it has one": [["9.png", 0], *LABELS["labels"]],
        "found 2 different labels from 0 to 7, but not 1": [
            [name, 7 * label] for name, label in LABELS["labels"]
        ],
    }
    for message, labels in wrong.items():
        with pytest.raises(ValueError, match=message):
            opened({"labels": labels})


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    tree = {f"{k}/x.jpg": b"%d" % k for k in (0, 1, 2, 9, 10)}
    source = open_source("folder", ".", path=str(write_tree(tmp_path, tree)))
    assert source.class_names == ("0", "1", "2", "9", "10")
    assert source[4].image == b"10"
    assert "'9' has the label 3" in source.doubt
    mixed = write_tree(tmp_path / "mixed", {f"{name}/x.jpg": b"" for name in ("10", "9", "a")})
    assert open_source("folder", ".", path=str(mixed)).class_names == ("10", "9", "a")


@pytest.mark.parametrize(
    ("tree", "doubt"),
    [
        (["cat/1.jpg", "cat/deep/2.jpg", "dog/deep/3.jpg"], ""),
        (["1/a.jpg", "0/a.jpg", "2/a.jpg"], ""),
        (
            ["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"],
            r"train/cat/1\.jpg, and the classes are \['train', 'val'\].*deeper, \['cat', 'dog'\]",
        ),
        (["mypets/cat/1.jpg", "mypets/dog/1.jpg"], r"classes are \['mypets'\]"),
        (["1.jpg", "2.jpg"], "no class folders: all 2 images have the one class 'unlabelled'"),
        (["1/a.jpg", "2/a.jpg"], "the class folders are numbers, but '1' has the label 0"),
    ],
)
def test_classes_that_look_wrong(tmp_path, tree, doubt):
    root = write_tree(tmp_path / "root", dict.fromkeys(tree, b""))
    for source in (
        open_source("folder", ".", path=str(root)),
        open_archive(tmp_path, zip_bytes(dict.fromkeys(tree, b"")), ".", "x.zip"),
    ):
        assert re.search(doubt, source.doubt) if doubt else not source.doubt


def test_a_path_that_is_no_folder():
    for path, message in ((__file__, "is a file, not a folder"), ("", "no path not found")):
        with pytest.raises(ValueError, match=message):
            open_source("folder", ".", path=path)


def test_folder_signature(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_tree(one, TREE)
    write_tree(two, dict(reversed(TREE.items())))

    def signature(root):
        return open_source("folder", "train", path=str(root)).signature()

    assert signature(one) == signature(two)
    os.utime(two / "train/dog/a.png", (0, 0))
    (two / "train/dog/a.png").write_bytes(b"A dog")  # the same size: contents are not read
    assert signature(one) == signature(two)
    dog = two / "train/dog"
    changes = {
        "a size": lambda: (dog / "a.png").write_bytes(b"a dog, longer"),
        "a name": lambda: (dog / "a.png").rename(dog / "aa.png"),
        "a file more": lambda: (dog / "c.png").write_bytes(b""),
        "a file less": lambda: (dog / "c.png").unlink() or (dog / "b.JPEG").unlink(),
        "a class": lambda: dog.rename(two / "train/dogs"),
    }
    signatures = {signature(one)}
    for change in changes.values():
        change()
        signatures.add(signature(two))
    assert len(signatures) == 1 + len(changes)
    # Joined, these names are the same.
    write_tree(tmp_path / "three/train", {"x.jpg": b"", "y.jpgz.jpg": b""})
    write_tree(tmp_path / "four/train", {"x.jpgy.jpg": b"", "z.jpg": b""})
    assert signature(tmp_path / "three") != signature(tmp_path / "four")


@pytest.mark.parametrize("name", KINDS)
def test_archive(tmp_path, name, caplog):
    tree = {**TREE, "train/list.csv": b"", "other/list.txt": b""}
    with caplog.at_level(logging.WARNING):
        source = open_archive(tmp_path, KINDS[name](tree), name=name)
    assert list(source.class_names) == CLASSES
    assert found(source, f"{name}:train/") == ITEMS
    # A pickled copy opens the file again, also after the first was used.
    copy = pickle.loads(pickle.dumps(source))
    assert found(copy, f"{name}:train/") == ITEMS
    assert copy.signature() == source.signature()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out 1 files" in message
    assert "list.csv" in message
    assert os.listdir(tmp_path) == [name] or sorted(os.listdir(tmp_path)) == ["cache", name]
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize("name", ["x.tar", "x.pax.tar", "x.zip"])
def test_where_an_archive_begins(tmp_path, name):
    long = "a" * 150
    tree = {f"./data/train/{long}/{long}.jpg": b"long", "README.jpg": b"", "data/x.txt": b""}
    source = open_archive(tmp_path, KINDS[name](tree), name=name)
    assert found(source, f"{name}:data/train/") == [(b"long", 0, f"{long}/{long}.jpg")]
    assert len(open_archive(tmp_path, KINDS[name](tree), "data/train", name)) == 1
    flat = open_archive(tmp_path, KINDS[name]({"./b.jpg": b"b", "a.jpg": b"a"}), ".", name)
    assert list(flat.class_names) == ["unlabelled"]
    assert found(flat, f"{name}:") == [(b"a", 0, "a.jpg"), (b"b", 0, "b.jpg")]
    both = {"one/train/cat/1.jpg": b"", "two/train/cat/1.jpg": b""}
    with pytest.raises(ValueError, match=r"no folder 'train'.*but \['one/train', 'two/train'\]"):
        open_archive(tmp_path, KINDS[name](both), name=name)
    with pytest.raises(ValueError, match=r"no folder 'val'.*at the top are \['one', 'two'\]"):
        open_archive(tmp_path, KINDS[name](both), "val", name)


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_archive_errors(tmp_path, name):
    """Those of `arrange` are the folder's; an empty class folder is a member of its own."""
    folder = tar_member(tarfile.DIRTYPE) if name == "x.tar" else b""
    empty = {"cat/b.jpg": b"", "dog" if name == "x.tar" else "dog/": folder}
    with pytest.raises(ValueError, match=rf"{name}: found no image in \['dog'\]"):
        open_archive(tmp_path, KINDS[name](empty), ".", name)
    with pytest.raises(ValueError, match="found no image, .* such as cat/x.txt"):
        open_archive(tmp_path, KINDS[name]({"cat/x.txt": b""}), ".", name)
    with pytest.raises(ValueError, match=r"member named 'cat/\.\./\.\./e.jpg', which leads out"):
        open_archive(tmp_path, KINDS[name]({"cat/../../e.jpg": b""}), ".", name)


def test_zip_from_windows_and_from_a_mac(tmp_path):
    tree = {"cat\\1.jpg": b"one", "__MACOSX/cat/._1.jpg": b"", "__MACOSX/": b"", "cat/": b""}
    # zipfile itself would not write them: backslashes go in afterwards.
    data = zip_bytes({name.replace("\\", "|"): value for name, value in tree.items()})
    source = open_archive(tmp_path, data.replace(b"cat|1", b"cat\\1"), ".", "x.zip")
    assert found(source, "x.zip:cat/") == [(b"one", 0, "1.jpg")]
    evil = zip_bytes({"..|1.jpg": b""}).replace(b"..|", b"..\\")
    with pytest.raises(ValueError, match="which leads out of the archive"):
        open_archive(tmp_path, evil, ".", "x.zip")


def test_links_and_devices_of_an_archive_are_left_out(tmp_path, caplog):
    tree = {
        "cat/1.jpg": b"one",
        "cat/2.jpg": tar_member(tarfile.SYMTYPE, "/etc/passwd"),
        "cat/3.jpg": tar_member(tarfile.LNKTYPE, "cat/1.jpg"),
        "cat/4.jpg": tar_member(tarfile.CHRTYPE),
        "cat/5.jpg": tar_member(tarfile.FIFOTYPE),
    }
    with caplog.at_level(logging.WARNING):
        source = open_archive(tmp_path, tar_bytes(tree), ".")
    assert found(source, "x.tar:cat/") == [(b"one", 0, "1.jpg")]
    assert "left out 4 files that are not images by their name or kind" in caplog.text
    link = zipfile.ZipInfo("cat/2.jpg")
    link.external_attr = 0o120777 << 16
    source = open_archive(tmp_path, zip_bytes({"cat/1.jpg": b"one", link: b"x"}), ".", "x.zip")
    assert len(source) == 1


def test_of_members_with_one_name_the_last_counts(tmp_path):
    file = tmp_path / "x.tar"
    for data in (b"first", b"the second"):
        with tarfile.open(file, "a") as tar:
            entry = tarfile.TarInfo("cat/1.jpg")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    source = open_source("archive", ".", path=str(file))
    assert found(source, "x.tar:cat/") == [(b"the second", 0, "1.jpg")]


def nested():
    return {
        "n02.tar": tar_bytes({"n02_1.JPEG": b"two one", "n02_2.JPEG": b"two two"}),
        "n01.tar": tar_bytes({"n01_9.JPEG": b"one nine", "._n01.JPEG": b"hidden"}),
        "._n03.tar": b"hidden",
    }


def test_tar_of_class_tars(tmp_path):
    source = open_archive(tmp_path, tar_bytes(nested()), ".")
    assert list(source.class_names) == ["n01", "n02"]
    assert found(source, "x.tar:") == [
        (b"one nine", 0, "n01/n01_9.JPEG"),
        (b"two one", 1, "n02/n02_1.JPEG"),
        (b"two two", 1, "n02/n02_2.JPEG"),
    ]


def test_tar_of_class_tars_with_a_bad_one(tmp_path):
    block = tarfile.BLOCKSIZE
    inner = nested()["n02.tar"]
    # Two members of a header and a block of data each: cut after the first, and within the second.
    for size in (2 * block, 3 * block + 3):
        tree = {**nested(), "n02.tar": inner[:size]}
        with pytest.raises(ValueError, match="x.tar:n02.tar: ends early or is damaged"):
            open_archive(tmp_path, tar_bytes(tree), ".")
    evil = {"n01.tar": tar_bytes({"../../1.jpg": b""})}
    with pytest.raises(ValueError, match="which leads out of the archive"):
        open_archive(tmp_path, tar_bytes(evil), ".")


def test_tar_that_ends_early(tmp_path):
    data = tar_bytes({"cat/1.jpg": b"1" * 700, "cat/2.jpg": b"2" * 700, "cat/3.jpg": b"3"})
    block = tarfile.BLOCKSIZE
    end = 3 * block + 3 * block + 2 * block  # three headers with their data
    assert data[end:].strip(b"\0") == b""
    # One block of zeros says where the end is; tar writes at least two.
    assert len(open_archive(tmp_path, data[: end + block], ".")) == 3
    # Where a member begins, tarfile takes the cut for the end; so it does within a header.
    for size in (end, 6 * block, 6 * block + 100):
        with tarfile.open(fileobj=io.BytesIO(data[:size])) as tar:
            assert len(tar.getnames()) < 4
    for size in (end, end + 10, 6 * block, 6 * block + 100, 4 * block + 9):
        with pytest.raises(ValueError, match="x.tar: ends early or is damaged"):
            open_archive(tmp_path, data[:size], ".")
    damaged = data[: 3 * block] + b"\xff" * block + data[4 * block :]
    with pytest.raises(ValueError, match="ends early or is damaged.* mark at byte 1,536"):
        open_archive(tmp_path, damaged, ".")
    for other in (b"", b"<html>404</html>", bytes(range(256)) * 8, b"\x28\xb5\x2f\xfd zstd"):
        with pytest.raises(ValueError, match="or is no archive of a known kind"):
            open_archive(tmp_path, other, ".")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.xz", "x.tar.bz2", "x.zip"])
def test_archive_that_ends_early(tmp_path, name):
    data = KINDS[name]({f"cat/{i}.jpg": os.urandom(500) for i in range(9)})
    for size in (len(data) // 2, len(data) - 8, 12):
        with pytest.raises(ValueError, match=f"{name}: ends early or is damaged"):
            open_archive(tmp_path, data[:size], ".", name)
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_compressed_tar_is_decompressed_once(tmp_path):
    path = tmp_path / "my.data.tar.xz"
    path.write_bytes(lzma.compress(tar_bytes(TREE)))
    with pytest.raises(ValueError, match="compressed with lzma .* give a cache_dir"):
        open_source("archive", "train", path=str(path))
    cache = tmp_path / "new/cache"
    first = open_source("archive", "train", path=str(path), cache_dir=cache)[0]
    (copy,) = cache.iterdir()
    assert copy.read_bytes() == tar_bytes(TREE)
    assert copy.stat().st_mtime_ns == path.stat().st_mtime_ns  # so that of every process is one
    os.utime(copy, (0, 0))
    assert open_source("archive", "train", path=str(path), cache_dir=cache)[0] == first
    assert [file.stat().st_mtime for file in cache.iterdir()] == [0]
    # Another archive under the same name is decompressed anew.
    path.write_bytes(lzma.compress(tar_bytes({"train/cat/1.jpg": b"new"})))
    os.utime(path, (1, 1))
    assert open_source("archive", "train", path=str(path), cache_dir=cache)[0].image == b"new"
    assert len(list(cache.iterdir())) == 2


def test_no_room_to_decompress(tmp_path):
    data = gzip.compress(tar_bytes({"a/1.jpg": bytes(300_000)}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow beyond
    try:
        with pytest.raises(
            ValueError, match=r"x\.tar\.gz: .*decompressed to .*cache: File too large"
        ):
            open_archive(tmp_path, data, name="x.tar.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []


def test_archive_signature(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    signatures = {
        open_archive(tmp_path / folder, KINDS[name](tree), name=name).signature()
        for folder in ("a", "b")
        for name in ("x.tar", "x.tar.gz", "deflated.zip")
        for tree in (TREE, dict(reversed(TREE.items())))
    }
    assert len(signatures) == 1
    for tree in ({**TREE, "train/dog/a.png": b"longer"}, {**TREE, "train/dog/c.png": b"new"}):
        signatures.add(open_archive(tmp_path, tar_bytes(tree)).signature())
    assert len(signatures) == 3


def read_error(source):
    (image,), _ = read_images(source, [len(source) - 1], 0)
    return str(image)


def flipped(data, at, piece):
    return data[:at] + piece + data[at + len(piece) :]


def test_damaged_members_of_a_zip(tmp_path):
    content = bytes(range(200)) * 9
    stored = zip_bytes({"cat/0.jpg": b"", "cat/1.jpg": content})
    deflated = zip_bytes({"cat/1.jpg": content}, zipfile.ZIP_DEFLATED)
    bomb = zip_bytes({"cat/1.jpg": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    size = (10**7).to_bytes(4, "little")
    assert bomb.count(size) == 2  # in the member's header and in the directory
    cases = {
        "Bad CRC-32": flipped(stored, stored.index(content) + 100, b"?"),
        "Error -3": flipped(deflated, deflated.index(b"cat/1.jpg") + 9, b"\xff" * 20),
        "Bad magic number": flipped(stored, stored.index(b"PK\x03\x04", 4), b"??"),
        "Bad CRC-32 ": bomb.replace(size, (100).to_bytes(4, "little")),  # is not inflated
    }
    for message, data in cases.items():
        error = read_error(open_archive(tmp_path, data, ".", "x.zip"))
        assert error.startswith("x.zip:cat/1.jpg: cannot be read: damaged: ")
        assert message.strip() in error


def test_zips_that_cannot_be_read(tmp_path):
    data = zip_bytes({"cat/1.jpg": b"one"}, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="cat/1.jpg is encrypted or compressed by method 12"):
        open_archive(tmp_path, data, ".", "x.zip")
    data = zip_bytes({"cat/1.jpg": b"one"})
    data = flipped(data, data.index(b"PK\x01\x02") + 8, b"\1")  # the flag of an encrypted member
    with pytest.raises(ValueError, match="cat/1.jpg is encrypted"):
        open_archive(tmp_path, data, ".", "x.zip")


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_archive_that_changes_while_it_is_read(tmp_path, name):
    source = open_archive(tmp_path, KINDS[name](TREE), name=name)
    assert source[0].image == b"cat two"
    os.truncate(tmp_path / name, 600)
    error = read_error(source)
    assert error.startswith(f"{name}:train/dog/b.JPEG: cannot be read: ")
    assert "changed since it was opened" in error
    (tmp_path / name).unlink()
    error = read_error(pickle.loads(pickle.dumps(source)))
    assert error == f"{tmp_path}/{name}: cannot be read: {os.strerror(errno.ENOENT)}"


def test_a_path_that_is_no_archive(tmp_path):
    with pytest.raises(ValueError, match="lost.tar not found; expected a .tar"):
        open_source("archive", ".", path=str(tmp_path / "lost.tar"))
    with pytest.raises(ValueError, match="is a folder; expected a .tar"):
        open_source("archive", ".", path=str(tmp_path))
    with pytest.raises(ValueError, match="no path not found"):
        open_source("archive", ".")
