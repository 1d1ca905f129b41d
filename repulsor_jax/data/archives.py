"""Images in a folder, or in a tar or zip archive of one, by random access."""

import bz2
import dataclasses
import errno
import functools
import gzip
import io
import lzma
import os
import pathlib
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from repulsor_jax.data import listing
from repulsor_jax.data.preprocess import MAX_FILE_BYTES
from repulsor_jax.files import atomic
from repulsor_jax.files.untrusted import most_expanded, parse_json, read_json, refuse_pointer

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")

_COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"\xfd7zXZ\x00": lzma, b"BZh": bz2}
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # a member, or the end of an empty one
# Errors of zipfile on damaged files; all but the first on headers that no zip program writes.
_BAD_ZIP = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError),
    *(ValueError, struct.error, OverflowError, zlib.error, EOFError),
)
_BLOCK = tarfile.BLOCKSIZE
_MAX_TAR_HEADER = 2**20  # bytes of a long name, or of a header of the PAX kind


@dataclasses.dataclass(frozen=True)
class ImageFolder(listing.Listing):
    """Images as files below `root`; see `open_image_folder`."""

    root: str

    def __getitem__(self, index: int) -> listing.Item:
        """Returns the file's bytes; OSError if it cannot be read."""
        path = os.path.join(self.root, self.names[index])
        with open(path, "rb", buffering=0) as file:
            check_size(os.fstat(file.fileno()).st_size, path)
            return listing.Item(file.read(), int(self.labels[index]), path)

    def files(self) -> list[str]:
        """See `ImageSource`."""
        return [f"{self.root}/{self.names[i]}" for i in range(len(self))]

    def signature(self) -> str:
        """See `ImageSource`; asks the file system for every file's size."""
        return listing.source_signature("folder", self, listing.file_sizes(self.root, self.names))


def open_image_folder(path: str, split: str) -> ImageFolder:
    """Opens the images in `path/split`, or in `path` itself if the split is ".".

    Images are the files with one of `IMAGE_SUFFIXES`, in any letter case. They stand in
    `class/**/image`, with labels in sorted order of the class names, or all directly inside as the
    one class "unlabelled". Items are sorted by class, then by path. Links are followed, hidden
    files and folders left out; other files are left out too, with a warning. A dataset.json of
    labels takes the place of the class folders, see `listing.labelled`.

    Raises:
      ValueError: no such folder or unreadable, no image, images both in class folders and
        outside, a class folder without any, or labels that are not those of the images.
    """
    root = listing.find_folder(path, split, "folder")
    files, items = listing.scan(root, IMAGE_SUFFIXES), None
    if files.names and listing.LABELS in files.others:
        items = listing.labelled(root, files.names, read_json(os.path.join(root, listing.LABELS)))
    items = items or listing.arrange(root, files, "image")
    return ImageFolder(**vars(items), root=root)


@dataclasses.dataclass(frozen=True)
class ImageArchive(listing.Listing):
    """Images as members of an archive; see `open_image_archive`."""

    archive: str  # the file as it was given
    path: str  # the file with the bytes, the decompressed copy of a compressed tar
    changed: int  # the time of its last change, ns
    is_zip: bool
    title: str  # precedes a member's name in messages: "name.tar:" and the folder in the archive
    places: np.ndarray  # int64 [N], the offset of the data in a tar, the index in a zip's directory
    sizes: np.ndarray  # int64 [N], bytes

    def __getitem__(self, index: int) -> listing.Item:
        """Returns the member's bytes; OSError if they cannot be read or are damaged."""
        name = self.title + self.names[index]
        place, size = int(self.places[index]), int(self.sizes[index])
        check_size(size, name)
        if os.stat(self.path).st_mtime_ns != self.changed:
            raise OSError(errno.EIO, f"{self.path} changed since it was opened", name)
        data = _read_member(self.path, self.changed, self.is_zip, place, size, name)
        return listing.Item(data, int(self.labels[index]), name)

    def files(self) -> list[str]:
        """See `ImageSource`."""
        return [self.archive]

    def signature(self) -> str:
        """See `ImageSource`; known since the archive was opened."""
        return listing.source_signature("archive", self, self.sizes)


def _read_member(path: str, changed: int, is_zip: bool, place: int, size: int, name: str) -> bytes:
    try:
        if is_zip:
            archive = _open_zip(path, changed)
            with archive.open(archive.infolist()[place]) as member:
                data = member.read(size)  # no more, so that a zip bomb is not inflated
        else:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, place)
        if len(data) != size:
            raise EOFError(f"{len(data):,} bytes instead of {size:,}")
    except _BAD_ZIP as error:
        raise OSError(errno.EIO, f"damaged: {error}", name) from error
    return data


def check_size(size: int, name: str) -> None:
    """Raises OSError for a file of an image that is too large to be one."""
    if size > MAX_FILE_BYTES:
        problem = f"refused, as it has {size:,} bytes, more than {MAX_FILE_BYTES:,}"
        raise OSError(errno.EFBIG, problem, name)


def open_image_archive(
    path: str, split: str, *, cache_dir: str | os.PathLike[str] | None = None
) -> ImageArchive:
    """Opens the images in a tar, zip or compressed tar, by the rules of `open_image_folder`.

    The kind is known by the content, whatever the name. Members are read in place, and their names
    only serve as labels. A compressed tar (gzip, xz, bzip2) is decompressed once to a plain tar in
    `cache_dir`, and reused while the archive keeps its size and time of change. A tar in a tar
    counts as a folder of its name without ".tar": so reads `ILSVRC2012_img_train.tar` as it is
    distributed, with the split ".". Of members with the same name the last one counts, as for
    `tar`. Links and devices are left out, with the other files.

    The split is a folder in the archive, "." for all of it. If it is not at the top, the only
    folder at the top that holds a folder of this name will do ("train" finds "mydata/train").

    Raises:
      ValueError: not an archive, one that ends early or is damaged, a member whose name leads out
        of it (absolute or with ".."), a compressed one that grows 200-fold, beyond 1 GiB, no such
        split, or see `open_image_folder`.
    """
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "not found"
        found = f"{path or 'no path'} {kind}"
        raise ValueError(f"archive: {found}; expected a .tar, .tar.* or .zip file")
    try:
        with open(path, "rb") as file:
            start = file.read(_BLOCK)
        refuse_pointer(start, path)
        data_path = path
        for magic, method in _COMPRESSIONS.items():
            if start.startswith(magic):
                data_path = _decompress(path, method, cache_dir)
        data_path = os.path.abspath(data_path)
        changed, end = os.stat(data_path).st_mtime_ns, os.path.getsize(data_path)
        is_zip = start.startswith(_ZIP_STARTS)
        with _Headers(data_path) as tar:
            listed = _list_zip(path, changed) if is_zip else _list_tar(tar, path, 0, end)
            bar = tqdm(listed, desc=f"list {os.path.basename(path)}", unit="file", delay=2)
            members = {m.name: m for m in bar if m.name and not listing.is_hidden(m.name)}
    except OSError as error:
        to = f", or decompressed to {cache_dir}" if cache_dir else ""
        raise ValueError(f"{path}: cannot be read{to}: {error.strerror or error}") from error
    folders = {name for name, member in members.items() if member.kind == "folder"}
    for name in members:  # an archive need not list its folders
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    prefix = _find_prefix(path, folders, split)
    below = {n[len(prefix) :]: m for n, m in members.items() if n.startswith(prefix)}
    files = [n for n, m in below.items() if m.kind == "file"]
    images = [n for n in files if listing.suffix(n) in IMAGE_SUFFIXES]
    others = [n for n in below.keys() - set(images) if below[n].kind != "folder"]
    tops = {n.removeprefix(prefix).partition("/")[0] for n in folders if n.startswith(prefix)}
    title = f"{path}:{prefix}".removesuffix(":")
    about, items = below.get(listing.LABELS), None
    if images and about and about.kind == "file":
        member = f"{title}:{listing.LABELS}"
        check_size(about.size, member)
        content = _read_member(data_path, changed, is_zip, about.place, about.size, member)
        items = listing.labelled(f"{title}:", images, parse_json(content, member))
    items = items or listing.arrange(title, listing.Files(images, list(tops), others), "image")
    chosen = [below[items.names[i]] for i in range(len(items))]
    return ImageArchive(
        **vars(items),
        archive=path,
        path=data_path,
        changed=changed,
        is_zip=is_zip,
        title=f"{os.path.basename(path)}:{prefix}",
        places=np.array([member.place for member in chosen], np.int64),
        sizes=np.array([member.size for member in chosen], np.int64),
    )


class _Member(NamedTuple):
    name: str
    kind: Literal["file", "folder", "other"]
    place: int = 0  # see `ImageArchive`
    size: int = 0


def _inside(archive: str, name: str) -> str:
    """A member's name without "./" and the like; ValueError if it leads out of the archive."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise ValueError(
            f"{archive}: found a member named {name!r}, which leads out of the archive: is this "
            "archive from a source you trust?"
        )
    return _plain(name)


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _find_prefix(path: str, folders: set[str], split: str) -> str:
    """The folder of a split in the archive, "" or with a slash at the end."""
    if not (split := _plain(split)):
        return ""
    tops = sorted(folder for folder in folders if "/" not in folder)
    found = [split] if split in folders else sorted({f"{top}/{split}" for top in tops} & folders)
    if len(found) != 1:
        several = f", but {listing.shorten(found)}" if found else ""
        raise ValueError(
            f"{path}: no folder {split!r} at the top of the archive{several}; the folders at the "
            f"top are {listing.shorten(tops)}: give one of them as the split, "
            '"a/b" for a folder in a folder, or "." for all of the archive'
        )
    return f"{found[0]}/"


@functools.lru_cache(maxsize=2)
def _open_zip(path: str, changed: int) -> zipfile.ZipFile:
    """Reads the directory of a zip; each process does it once while the file does not change."""
    return zipfile.ZipFile(path)


def _damaged(archive: str, detail: str) -> ValueError:
    return ValueError(f"{archive}: ends early or is damaged, {detail}: fetch it again")


def _list_zip(path: str, changed: int) -> Iterator[_Member]:
    try:
        entries = _open_zip(os.path.abspath(path), changed).infolist()
    except _BAD_ZIP as error:
        raise _damaged(path, f"in the directory at its end ({error})") from error
    end = os.path.getsize(path)
    for index, entry in enumerate(entries):
        # Some programs for Windows write backslashes.
        name = _inside(path, entry.filename.replace("\\", "/"))
        if entry.is_dir():
            yield _Member(name, "folder")
        elif entry.flag_bits & 1 or entry.compress_type not in (0, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {name} is encrypted or compressed by method {entry.compress_type}, "
                "expected 0 (none) or 8 (deflate): make the zip again, without a password"
            )
        elif not 0 <= entry.header_offset <= end - entry.compress_size:
            raise _damaged(path, f"in the member {name}")
        elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            yield _Member(name, "other")
        else:
            # A larger size is refused when the member is read, and might not fit the array.
            yield _Member(name, "file", index, min(entry.file_size, MAX_FILE_BYTES + 1))


def _list_tar(
    file: io.FileIO, where: str, start: int, end: int, folder: str = ""
) -> Iterator[_Member]:
    """Yields the members of the plain tar at [start, end) of the file, named below a folder.

    At the top, without a folder, the members of an inner tar take its place. `tarfile` stops
    without an error at a damaged header or where the bytes end; only a block of zeros, which tar
    writes, marks the end of an archive.
    """
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, mode="r") as tar:
            while (entry := tar.next()) is not None:
                first, beyond = entry.offset_data, entry.offset_data + entry.size
                if entry.size < 0 or beyond > end:
                    raise _damaged(where, f"in the member {entry.name}")
                name = folder + _inside(where, entry.name)
                if entry.isdir():
                    yield _Member(name, "folder")
                elif not entry.isreg() or entry.issparse():
                    yield _Member(name, "other")
                elif folder or listing.suffix(name) != "tar" or listing.is_hidden(name):
                    yield _Member(name, "file", first, entry.size)
                else:
                    inner = name[: -len(".tar")]
                    yield _Member(inner, "folder")
                    yield from _list_tar(file, f"{where}:{name}", first, beyond, f"{inner}/")
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold them all
            last = tar.offset
    except (tarfile.TarError, RecursionError, OverflowError) as error:
        kinds = ".tar, .tar.gz, .tar.xz, .tar.bz2, .zip"
        raise _damaged(where, f"or is no archive of a known kind ({kinds}): {error}") from error
    file.seek(last)
    if last + _BLOCK > end or file.read(_BLOCK) != bytes(_BLOCK):
        raise _damaged(where, f"found no end-of-archive mark at byte {last - start:,}")


class _Headers(io.FileIO):
    """A tar for `tarfile`, which would read a header of any size that a file claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_TAR_HEADER:
            expected = f"{_MAX_TAR_HEADER:,} at most: is this archive from a source you trust?"
            raise ValueError(f"{self.name}: found a header of {size:,} bytes, expected {expected}")
        return super().read(size)


def _decompress(path: str, method: Any, cache_dir: str | os.PathLike[str] | None) -> str:
    """Returns the decompressed copy in `cache_dir`; the method is the module gzip, lzma or bz2."""
    if cache_dir is None:
        raise ValueError(
            f"{path}: compressed with {method.__name__} and read from a copy: give a cache_dir"
        )
    status, name = os.stat(path), os.path.basename(path)
    stem = f"{name.partition('.')[0]}-{status.st_size:x}-{status.st_mtime_ns:x}"
    target = pathlib.Path(cache_dir, f"{stem}.tar")
    if target.exists():
        return str(target)
    most = most_expanded(status.st_size)
    bar = {"desc": f"decompress {name}", "total": status.st_size, "delay": 2}
    try:
        with (
            open(path, "rb") as file,
            tqdm.wrapattr(file, "read", **bar) as watched,
            method.open(watched) as stream,
            atomic.replacing(target) as temporary,
            temporary.open("wb") as copy,
        ):
            while chunk := stream.read(1 << 20):
                if copy.tell() + len(chunk) > most:
                    raise ValueError(
                        f"{path}: refused, as its {status.st_size:,} bytes become more than "
                        f"{most:,}: if you trust it, decompress it yourself"
                    )
                copy.write(chunk)
            # Two processes that decompress at once have one copy, of one time of change.
            copy.flush()
            os.utime(temporary, ns=(status.st_mtime_ns, status.st_mtime_ns))
    except (EOFError, lzma.LZMAError, zlib.error, MemoryError) as error:
        raise _damaged(path, f"{method.__name__} says: {error}") from error
    return str(target)
