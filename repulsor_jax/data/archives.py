"""Images in a folder, or in a tar or zip archive of one, by random access."""

import bz2
import dataclasses
import errno
import gzip
import lzma
import os
import pathlib
import secrets
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from repulsor_jax.data.listing import (
    Files,
    Item,
    Names,
    arrange,
    digest,
    file_sizes,
    find_folder,
    is_hidden,
    scan,
    shorten,
    suffix,
)
from repulsor_jax.data.preprocess import MAX_FILE_BYTES

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
)

_COMPRESSIONS: dict[bytes, tuple[str, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
    b"BZh": ("bzip2", bz2.BZ2File),
}
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # a member, or the end of an empty one
_ZIP_HEADER = struct.Struct("<4s22xHH")  # of a member: start, lengths of name and extra fields
_BLOCK = tarfile.BLOCKSIZE
_MAX_TAR_HEADER = 2**20  # bytes of a long name, or of a header of the PAX kind
# A compressed tar of images grows by 10 % or so; of raw pixels in flat colours, tenfold.
_MAX_EXPANSION, _ALWAYS_EXPANDED = 200, 2**30


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images as files below `root`; see `open_folder`."""

    root: str
    class_names: Sequence[str]
    names: Names
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        """Returns the file's bytes; OSError if it cannot be read."""
        path = os.path.join(self.root, self.names[index])
        with open(path, "rb", buffering=0) as file:
            _check_size(os.fstat(file.fileno()).st_size, path)
            return Item(file.read(), int(self.labels[index]), path)

    def signature(self) -> str:
        """See `ImageSource`; asks the file system for every file's size."""
        sizes = file_sizes(self.root, self.names)
        return digest("folder", self.class_names, self.names, self.labels, sizes)


def open_folder(path: str, split: str) -> ImageFolder:
    """Opens the images in `path/split`, or in `path` itself if the split is ".".

    Images are the files named .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff, .ppm or .pgm, in
    any letter case. They stand in `class/**/image`, with labels in sorted order of the class
    names, or all directly inside as the one class "unlabelled". Items are sorted by class, then
    by path. Links are followed, hidden files and folders left out; other files are left out too,
    with a warning.

    Raises:
      ValueError: no such folder or unreadable, no image, images both in class folders and
        outside, or a class folder without any.
    """
    root = find_folder(path, split, "folder")
    listing = arrange(root, scan(root, IMAGE_SUFFIXES), "image")
    return ImageFolder(root, listing.class_names, listing.names, listing.labels)


class _Place(NamedTuple):
    """Where a member's bytes are in the archive's file.

    Attributes:
      offset: of the data in a tar, of the local header in a zip.
      stored: bytes in the archive.
      size: bytes of the member.
      method: 0 for bytes as they are, 8 for deflate (zip's numbers).
      crc: CRC-32 of the member; 0 in a tar, which has none.
    """

    offset: int
    stored: int
    size: int
    method: int = 0
    crc: int = 0


@dataclasses.dataclass(frozen=True)
class ImageArchive:
    """Images as members of an archive; see `open_archive`.

    Attributes:
      file: the file with the bytes, the decompressed copy of a compressed tar.
      is_zip: the file is a zip, otherwise a tar.
      title: what leads to a member in messages, "name.tar:" and the folder in the archive.
      class_names: label k is `class_names[k]`.
      names: paths below that folder.
      labels: int32 `[N]`.
      places: int64 `[N, 5]`, the `_Place` of each image.
    """

    file: "_RandomFile"
    is_zip: bool
    title: str
    class_names: Sequence[str]
    names: Names
    labels: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        """Returns the member's bytes; OSError if they cannot be read or are damaged."""
        name = self.title + self.names[index]
        place = _Place(*self.places[index].tolist())
        _check_size(place.size, name)
        read = self._read_zipped if self.is_zip else self._read_plain
        return Item(read(place, name), int(self.labels[index]), name)

    def signature(self) -> str:
        """See `ImageSource`; known since the archive was opened."""
        sizes = self.places[:, _Place._fields.index("size")]
        return digest("archive", self.class_names, self.names, self.labels, sizes)

    def _read_plain(self, place: _Place, name: str) -> bytes:
        return self.file.read(place.offset, place.stored, name)

    def _read_zipped(self, place: _Place, name: str) -> bytes:
        header = self.file.read(place.offset, _ZIP_HEADER.size, name)
        start, name_length, extra_length = _ZIP_HEADER.unpack(header)
        if start != _ZIP_STARTS[0]:
            raise OSError(errno.EIO, "damaged: no zip header where the archive says", name)
        # These extra fields need not be those of the archive's directory.
        offset = place.offset + _ZIP_HEADER.size + name_length + extra_length
        data = self.file.read(offset, place.stored, name)
        if place.method == zipfile.ZIP_DEFLATED:
            try:
                # One byte more than it should be, so that a bomb does not go off.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.size + 1)
            except zlib.error as error:
                raise OSError(errno.EIO, f"damaged: {error}", name) from error
        if len(data) != place.size or zlib.crc32(data) != place.crc:
            raise OSError(errno.EIO, "damaged: its size or CRC-32 is not the recorded one", name)
        return data


def _check_size(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(
            errno.EFBIG, f"refused, as it has {size:,} bytes, more than {MAX_FILE_BYTES:,}", name
        )


class _RandomFile:
    """A file read at any position, by any thread; a pickled copy opens it anew."""

    def __init__(self, path: str):
        self.path = path
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None}

    def read(self, offset: int, size: int, name: str) -> bytes:
        file = self._file  # held here, so that another thread cannot have it closed
        if file is None:
            file = self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  # see __del__
        data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(
                errno.EIO, f"{self.path} ends early: it changed since it was opened", name
            )
        return data

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def open_archive(
    path: str, split: str, *, cache_dir: str | os.PathLike[str] | None = None
) -> ImageArchive:
    """Opens the images in a tar, zip or compressed tar, by the rules of `open_folder`.

    The kind is known by the content, whatever the name. Nothing is extracted: members are read
    where they are, so their names only serve as labels. A compressed tar (gzip, xz, bzip2) is
    decompressed once to a plain tar in `cache_dir`, and reused while the archive keeps its size
    and time of change. A tar in a tar counts as a folder of its name without ".tar": so reads
    `ILSVRC2012_img_train.tar` as it is distributed, with the split ".". Of members with the same
    name the last one counts, as for `tar`. Links and devices are left out, with the other files.

    Args:
      path: the archive.
      split: folder in the archive, "." for all of it. If it is not at the top, the only folder at
        the top that holds a folder of this name will do ("train" finds "mydata/train").
      cache_dir: where to decompress to; only needed for a compressed tar.

    Raises:
      ValueError: not an archive, one that ends early or is damaged, a member whose name leads out
        of it (absolute or with ".."), a compressed one that grows 200-fold, beyond 1 GiB, no such
        split, or see `open_folder`.
    """
    if not path or not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "not found"
        raise ValueError(
            f"archive: {path or 'no path'} {kind}; expected a .tar, .tar.* or .zip file"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(_BLOCK)
        compressed = [value for magic, value in _COMPRESSIONS.items() if start.startswith(magic)]
        is_zip = start.startswith(_ZIP_STARTS)
        tar_path = path
        if compressed:
            tar_path = _decompress(path, *compressed[0], cache_dir)
        members = _list_zip(path) if is_zip else _list_tar(path, tar_path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror or error}") from error
    prefix = _find_prefix(path, members, split)
    files = members.below(prefix)
    title = f"{os.path.basename(path)}:{prefix}"
    listing = arrange(f"{path}:{prefix}".removesuffix(":"), files, "image")
    found = (members.places[prefix + listing.names[i]] for i in range(len(listing.names)))
    return ImageArchive(
        file=_RandomFile(os.path.abspath(tar_path)),
        is_zip=is_zip,
        title=title,
        class_names=listing.class_names,
        names=listing.names,
        labels=listing.labels,
        places=np.array(list(found), np.int64),
    )


class _Members:
    """The members of an archive as they are found.

    Attributes:
      archive: for messages.
      places: by name, of the images.
      folders: every folder, also those that only show in the names of their members.
      others: the members left out.
    """

    def __init__(self, archive: str):
        self.archive = archive
        self.places: dict[str, _Place] = {}
        self.folders: set[str] = set()
        self.others: set[str] = set()

    def path(self, name: str) -> str:
        """The name without "./" and the like; ValueError if it leads out of the archive."""
        parts = name.split("/")
        if name.startswith("/") or ".." in parts:
            raise ValueError(
                f"{self.archive}: found a member named {name!r}, which leads out of the archive; "
                "expected relative names without '..': is this archive from a source you trust?"
            )
        return "/".join(part for part in parts if part not in ("", "."))

    def add_folder(self, path: str) -> None:
        if not is_hidden(path):
            while path and path not in self.folders:
                self.folders.add(path)
                path = path.rpartition("/")[0]

    def add(self, path: str, place: _Place | None) -> None:
        """Notes a file, at None one that is a link or the like."""
        if is_hidden(path):
            return
        self.add_folder(path.rpartition("/")[0])
        # Of one name the last counts, also where its kind differs.
        self.places.pop(path, None)
        self.others.discard(path)
        if place is not None and suffix(path) in IMAGE_SUFFIXES:
            self.places[path] = place
        else:
            self.others.add(path)

    def below(self, prefix: str) -> Files:
        """The members in a folder ("" or "a/b/"), as paths below it."""
        cut = len(prefix)
        folders = {f[cut:] for f in self.folders if f.startswith(prefix) and "/" not in f[cut:]}
        return Files(
            [name[cut:] for name in self.places if name.startswith(prefix)],
            sorted(folders),
            [name[cut:] for name in self.others if name.startswith(prefix)],
        )


def _find_prefix(path: str, members: _Members, split: str) -> str:
    """The folder of a split in the archive, "" or with a slash at the end."""
    split = "/".join(part for part in split.split("/") if part not in ("", "."))
    if not split:
        return ""
    if split in members.folders:
        return f"{split}/"
    tops = sorted(folder for folder in members.folders if "/" not in folder)
    found = [f"{top}/{split}/" for top in tops if f"{top}/{split}" in members.folders]
    if len(found) != 1:
        several = f", but {shorten(found)}" if found else ""
        raise ValueError(
            f"{path}: no folder {split!r} at the top of the archive{several}; the folders at the "
            f'top are {shorten(tops)}: give one of them as the split, "a/b" for a folder in '
            'a folder, or "." for all of the archive'
        )
    return found[0]


def _list_zip(path: str) -> _Members:
    members = _Members(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (
        # The last three of headers that no zip program writes.
        *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError),
        *(ValueError, struct.error, OverflowError),
    ) as error:
        raise ValueError(
            f"{path}: ends early or is damaged, a zip's directory at its end is missing or wrong "
            f"({error}): fetch it again"
        ) from error
    end = os.path.getsize(path)
    for entry in entries:
        # Some programs for Windows write backslashes.
        name = members.path(entry.filename.replace("\\", "/"))
        if entry.is_dir():
            members.add_folder(name)
        elif entry.flag_bits & 1:
            raise ValueError(f"{path}: {name} is encrypted: make a zip without a password")
        elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {name} is compressed by method {entry.compress_type}, expected 0 (as "
                "it is) or 8 (deflate): make the zip again, best without compression"
            )
        elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            members.add(name, None)
        elif not 0 <= entry.header_offset <= end - entry.compress_size:
            raise ValueError(f"{path}: damaged, {name} would reach beyond its end: fetch it again")
        else:
            place = _Place(
                entry.header_offset,
                entry.compress_size,
                min(entry.file_size, MAX_FILE_BYTES + 1),  # which is refused when it is read
                entry.compress_type,
                entry.CRC,
            )
            members.add(name, place)
    return members


def _list_tar(path: str, tar_path: str) -> _Members:
    """Lists the tar at `tar_path`, in messages `path`."""
    members = _Members(path)
    size = os.path.getsize(tar_path)
    title = f"list {os.path.basename(path)}"
    with (
        open(tar_path, "rb") as file,
        tqdm(total=size, desc=title, unit="B", unit_scale=True, delay=2) as bar,
    ):
        for name, entry in _walk_tar(file, path, 0, size):
            bar.update(max(0, entry.offset_data - bar.n))
            member = members.path(name)
            if not (entry.isreg() and suffix(member) == "tar") or is_hidden(member):
                _add_tar_entry(members, member, entry)
                continue
            folder, end = member[: -len(".tar")], entry.offset_data + entry.size
            members.add_folder(folder)
            for inner, inner_entry in _walk_tar(file, f"{path}:{member}", entry.offset_data, end):
                bar.update(max(0, inner_entry.offset_data - bar.n))
                _add_tar_entry(members, f"{folder}/{members.path(inner)}", inner_entry)
    return members


def _add_tar_entry(members: _Members, name: str, entry: tarfile.TarInfo) -> None:
    if entry.isdir():
        members.add_folder(name)
    elif entry.isreg() and not entry.issparse():
        members.add(name, _Place(entry.offset_data, entry.size, entry.size))
    else:
        members.add(name, None)


def _walk_tar(
    file: BinaryIO, where: str, start: int, end: int
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yields the members of the plain tar at [start, end) of the file, with offsets in the file.

    `tarfile` takes a damaged header, or no more bytes, for the end of the archive: only where a
    block of zeros stands, as tar writes it at the end, is it the end. It reads headers whole, of
    any size that they say they have: so it gets no more than `_MAX_TAR_HEADER` bytes at once.
    """
    early = f"{where}: ends early or is damaged"
    file.seek(start)
    try:
        headers: Any = _Headers(file, where)
        with tarfile.TarFile(fileobj=headers, mode="r") as tar:
            while (entry := tar.next()) is not None:
                if entry.size < 0 or entry.offset_data + entry.size > end:
                    raise ValueError(f"{early}, in the member {entry.name}: fetch it again")
                yield entry.name, entry
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold them all
            last = tar.offset
    except (tarfile.TarError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{early}, or is no archive of a known kind (.tar, .tar.gz, .tar.xz, .tar.bz2, .zip): "
            f"{error}"
        ) from error
    file.seek(last)
    if last + _BLOCK > end or file.read(_BLOCK) != bytes(_BLOCK):
        raise ValueError(
            f"{early}: found no end-of-archive mark at byte {last - start:,}, expected a block of "
            "zeros: fetch it again, or make it again with tar"
        )


class _Headers:
    """A file of which `tarfile` reads the headers."""

    def __init__(self, file: BinaryIO, where: str):
        self._file, self._where = file, where
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_TAR_HEADER:
            raise ValueError(
                f"{self._where}: found a header of {size:,} bytes, expected at most "
                f"{_MAX_TAR_HEADER:,}: is this archive from a source you trust?"
            )
        return self._file.read(size)


def _decompress(
    path: str,
    method: str,
    opener: Callable[[BinaryIO], Any],
    cache_dir: str | os.PathLike[str] | None,
) -> str:
    """Returns the path of the decompressed copy in `cache_dir`, made if it is not there yet."""
    if cache_dir is None:
        raise ValueError(
            f"{path}: a tar compressed with {method} is read from a decompressed copy; found no "
            "cache_dir to put it in: give one, or decompress it yourself"
        )
    status = os.stat(path)
    name = os.path.basename(path).partition(".")[0]
    target = pathlib.Path(cache_dir, f"{name}-{status.st_size:x}-{status.st_mtime_ns:x}.tar")
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.incomplete-{secrets.token_hex(4)}")
    title = f"decompress {os.path.basename(path)}"
    try:
        with (
            open(path, "rb") as file,
            open(temporary, "wb") as copy,
            tqdm(total=status.st_size, desc=title, unit="B", unit_scale=True, delay=2) as bar,
        ):
            stream = opener(file)
            most = max(_ALWAYS_EXPANDED, _MAX_EXPANSION * status.st_size)
            while chunk := _read_chunk(stream, path, method):
                if copy.tell() + len(chunk) > most:
                    raise ValueError(
                        f"{path}: refused, as its {status.st_size:,} bytes become more than "
                        f"{most:,}: if you trust it, decompress it yourself"
                    )
                copy.write(chunk)
                bar.update(file.tell() - bar.n)
        temporary.rename(target)
    except OSError as error:  # a full disk is not named in it
        problem = f"decompressing it to {target.parent} failed: {error.strerror}"
        raise OSError(error.errno, problem) from error
    finally:
        temporary.unlink(missing_ok=True)
    return str(target)


def _read_chunk(stream: Any, path: str, method: str) -> bytes:
    try:
        return stream.read(1 << 20)
    except (EOFError, lzma.LZMAError, zlib.error, OSError, MemoryError) as error:
        raise ValueError(
            f"{path}: ends early or is damaged, {method} says: {error}: fetch it again"
        ) from error
