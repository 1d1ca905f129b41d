import hashlib
import os
import time

import pytest

from repulsor_jax.files.checksums import contents_sha256, file_sha256, values_sha256


def test_a_file_has_the_sum_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_values_have_one_sum_in_any_order_of_keys():
    assert values_sha256({"a": 1, "b": [2]}) == values_sha256({"b": [2], "a": 1})
    assert values_sha256({"a": 1}) != values_sha256({"a": 2})


def test_contents_of_files_have_one_sum_wherever_they_lie(tmp_path):
    def digest(folder, *contents):
        paths = [tmp_path / folder / str(k) for k in range(len(contents))]
        (tmp_path / folder).mkdir()
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return contents_sha256([*map(str, paths)], tmp_path / f"{folder}.json", title="read")

    found = digest("one", b"abc", b"d")
    each = [hashlib.sha256(content).hexdigest() for content in (b"abc", b"d")]
    assert (
        found == hashlib.sha256("".join(each).encode()).hexdigest() == digest("two", b"abc", b"d")
    )
    assert len({found, digest("three", b"ab", b"cd"), digest("four", b"d", b"abc")}) == 3


def test_a_file_that_changed_is_read_again_also_with_its_old_size_and_time(tmp_path):
    path, note = tmp_path / "x", tmp_path / "made" / "note.json"

    def digest():
        time.sleep(0.05)
        return contents_sha256([str(path)], note, title="read", settled=0.01)

    path.write_bytes(b"one")
    before = os.stat(path)
    first = digest()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest() != first
    path.write_bytes(b"one")
    assert digest() == first
    note.write_text('{"x": [')  # as a full disk may leave it
    assert digest() == first
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        digest()


def test_contents_are_read_once_they_have_settled(tmp_path):
    path, note = tmp_path / "x", tmp_path / "note.json"
    path.write_bytes(b"one")
    first = contents_sha256([str(path)], note, title="read")
    assert not note.exists()
    time.sleep(0.05)
    contents_sha256([str(path)], note, title="read", settled=0.01)
    note.write_text(note.read_text().replace(first, "kept"))
    assert contents_sha256([str(path)], note, title="read") == "kept"
