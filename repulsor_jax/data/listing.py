"""Lists the files of a data set and reads class labels off their paths.

The rule for folders and archives, images and latents: `class/**/file`, where the class is the
first component of the path, or all files directly inside and no class.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from repulsor_jax.files.untrusted import has_controls, printable


class Item(NamedTuple):
    """One labelled image."""

    image: bytes | np.ndarray  # an encoded image's bytes, or pixels, uint8 [H, W, C]
    label: int  # index into the source's class names
    name: str  # for messages: a path, an archive and its member, or a data set and its index


@dataclasses.dataclass(frozen=True)
class Names:
    """Strings by index, packed: millions of them cost a worker process little to receive."""

    text: bytes
    ends: np.ndarray

    @classmethod
    def pack(cls, names: Iterable[str]) -> "Names":
        """Packs paths, which may hold bytes that are not UTF-8."""
        encoded = [os.fsencode(name) for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"index {index} out of range for {len(self.ends)} items")
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]])


@dataclasses.dataclass(frozen=True)
class Listing:
    """The items of a data set in order of class, then name."""

    class_names: tuple[str, ...]  # sorted, or "unlabelled" alone
    names: Names  # paths below the root, "/" between components
    labels: np.ndarray  # int32 [N], indices into class_names

    def __len__(self) -> int:
        return len(self.names)


class Files(NamedTuple):
    """Paths below a root, "/" between components."""

    names: list[str]  # the wanted files
    folders: list[str]  # directly below the root
    others: list[str]  # the files left out


def is_hidden(path: str) -> bool:
    """Whether a path below the root, or a folder on it, begins with a dot or is macOS's own."""
    return path.startswith((".", "__MACOSX")) or "/." in path


def suffix(name: str) -> str:
    """The part after the last dot, in lower case."""
    return name.rpartition(".")[2].lower()


def find_folder(path: str, split: str, kind: str) -> str:
    """Returns the folder of a split, `path/split`, or `path` for "."; ValueError without one."""
    if os.path.isabs(split) or ".." in split.replace("\\", "/").split("/"):
        raise ValueError(f"{kind}: found the split {split!r}, which leads out of {path}")
    if not os.path.isdir(path):
        found = "is a file, not a folder" if os.path.exists(path) else "not found"
        raise ValueError(f"{kind}: {path or 'no path'} {found}; expected the folder of the data")
    root = os.path.join(path, split) if split not in ("", ".") else path
    if not os.path.isdir(root):
        raise ValueError(
            f"{kind}: no split {split!r}, as {root} is not a folder; {path} holds the folders "
            f'{shorten(subfolders(path))}: give one of them as the split, or "." for {path} itself'
        )
    return root


def subfolders(path: str) -> list[str]:
    """Sorted names of the folders directly in a folder, but for hidden ones."""
    return sorted(e.name for e in _entries(path) if _is_folder(e))


def scan(root: str, suffixes: Collection[str]) -> Files:
    """Lists the files below a folder whose `suffix` is one of `suffixes`, in no set order.

    Links to files and folders are followed, hidden ones left out. Nothing is opened, and on usual
    file systems no file is asked for more than its name. A folder that cannot be read, or a link
    back to a folder that holds it, is a ValueError.
    """
    files = Files([], [], [])

    def visit(folder: str, below: str, parents: frozenset[tuple[int, int]]) -> None:
        entries = _entries(folder)
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            raise ValueError(f"{folder}: a link to a folder that holds it: remove the link")
        for entry in entries:
            if _is_folder(entry):
                if not below:
                    files.folders.append(entry.name)
                visit(entry.path, f"{below}{entry.name}/", parents | {identity})
            else:
                is_wanted = suffix(entry.name) in suffixes and _is_file(entry)
                (files.names if is_wanted else files.others).append(below + entry.name)

    visit(root, "", frozenset())
    return files


def arrange(where: str, files: Files, what: str) -> Listing:
    """Sorts files into classes by the first component of their paths; messages call one `what`.

    Raises:
      ValueError: no file, files both in class folders and outside, a class without files, or a
        class whose name holds control characters.
    """
    if not files.names:
        others = f"; found other files, such as {min(files.others)}" if files.others else ""
        raise ValueError(
            f"{where}: found no {what}, expected folders of them, one for each class, or all of "
            f"them directly inside{others}"
        )
    classes: dict[str, list[str]] = {}
    for name in files.names:
        classes.setdefault(name.partition("/")[0] if "/" in name else "", []).append(name)
    class_names = sorted(classes)
    flat = classes.get("", [])
    if flat and len(class_names) > 1:
        raise ValueError(
            f"{where}: found both {min(flat)} directly inside and {min(classes[class_names[1]])} "
            "in a folder; expected every file in a folder of its class, or none"
        )
    if not flat and (empty := sorted(set(files.folders) - classes.keys())):
        raise ValueError(
            f"{where}: found no {what} in {shorten(empty)}; expected at least one in each class "
            "folder: add them, or remove the folder"
        )
    if odd := [name for name in class_names if has_controls(name)]:
        raise ValueError(
            f"{where}: found the class name {odd[0]!r}, which holds control characters: rename it"
        )
    if files.others:
        others = f"{len(files.others)} files that are not {what}s by their name or kind"
        message = f"{where}: left out {others}, such as {min(files.others)}"
        logging.warning("%s", printable(message))
    names = Names.pack(name for c in class_names for name in sorted(classes[c]))
    counts = [len(classes[c]) for c in class_names]
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    return Listing(("unlabelled",) if flat else tuple(class_names), names, labels)


def source_signature(kind: str, listing: Listing, sizes: np.ndarray) -> str:
    """SHA-256 in hex of a source's kind, items and their sizes in bytes; no contents are read."""
    names = listing.names
    found = hashlib.sha256(json.dumps([kind, list(listing.class_names), len(names)]).encode())
    for part in (names.text, names.ends, listing.labels, sizes):
        found.update(part if isinstance(part, bytes) else part.astype("<i8").tobytes())
    return found.hexdigest()


def file_sizes(root: str, names: Names) -> np.ndarray:
    """Sizes of files below a folder, int64 `[N]`; -1 for one that cannot be reached."""
    sizes = np.full(len(names), -1, np.int64)
    for i in range(len(names)):
        with contextlib.suppress(OSError):  # reading it will say why
            sizes[i] = os.stat(f"{root}/{names[i]}").st_size
    return sizes


def shorten(names: Collection[str], limit: int = 10) -> str:
    """Some names for a message: "['a', 'b']", and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{list(names)[:limit]}{more}"


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise ValueError(f"{folder}: the folder cannot be read: {error.strerror}") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: "os.DirEntry[str]") -> bool:
    """False for pipes and devices; a broken link counts as a file, which cannot be read."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()
