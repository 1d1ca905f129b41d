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

UNLABELLED = "unlabelled"  # the one class of files without classes


class Item(NamedTuple):
    """One labelled image.

    Attributes:
      image: an encoded image's bytes, or pixels, uint8 `[H, W, C]`.
      label: index into the source's class names.
      name: for messages: a path, an archive and its member, or a data set and its index.
    """

    image: bytes | np.ndarray
    label: int
    name: str


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
    """The items of a data set in order of class, then name.

    Attributes:
      class_names: sorted names of the classes, or `UNLABELLED` alone.
      names: paths below the root, "/" between components.
      labels: int32 `[N]`, indices into `class_names`.
    """

    class_names: tuple[str, ...]
    names: Names
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


class Files(NamedTuple):
    """Paths below a root, "/" between components.

    Attributes:
      names: the wanted files.
      folders: the folders directly below the root.
      others: the files left out.
    """

    names: list[str]
    folders: list[str]
    others: list[str]


def is_hidden(path: str) -> bool:
    """Whether a path below the root, or a folder on it, begins with a dot or is macOS's own."""
    return path.startswith((".", "__MACOSX")) or "/." in path


def suffix(name: str) -> str:
    """The part after the last dot, in lower case."""
    return name.rpartition(".")[2].lower()


def find_folder(path: str, split: str, kind: str) -> str:
    """Returns the folder of a split: `path/split`, or `path` itself for ".".

    Raises:
      ValueError: there is no such folder, or the split leads out of `path`.
    """
    if os.path.isabs(split) or ".." in split.replace("\\", "/").split("/"):
        raise ValueError(
            f"{kind}: found the split {split!r}, which leads out of {path}; expected a folder in it"
        )
    if not os.path.isdir(path):
        found = "is a file, not a folder" if os.path.exists(path) else "not found"
        raise ValueError(
            f"{kind}: {path or 'no path'} {found}; expected the folder of the data set"
        )
    root = os.path.join(path, split) if split not in ("", ".") else path
    if not os.path.isdir(root):
        raise ValueError(
            f"{kind}: no split {split!r}, as {root} is not a folder; {path} holds the folders "
            f'{shorten(subfolders(path))}: give one of them as the split, or "." for {path} itself'
        )
    return root


def subfolders(path: str) -> list[str]:
    """Returns the sorted names of the folders directly in a folder, but for hidden ones.

    Raises:
      ValueError: the folder cannot be read.
    """
    return sorted(e.name for e in _entries(path) if _is_folder(e))


def scan(root: str, suffixes: Collection[str]) -> Files:
    """Lists the files below a folder whose `suffix` is one of `suffixes`, in no set order.

    Links to files and folders are followed, hidden ones left out. Nothing is opened, and on usual
    file systems no file is asked for more than its name.

    Raises:
      ValueError: a folder cannot be read, or a link leads back to a folder that holds it.
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
    """Sorts files into classes by the first component of their paths.

    Args:
      where: for messages: the folder, or the archive and the folder in it.
      files: the files; a warning says how many were left out.
      what: for messages: "image", ".npy file".

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
            f"{where}: found the class name {odd[0]!r}, which holds control characters; it would "
            "go into tables and pictures: rename the folder"
        )
    if files.others:
        message = "%s: left out %d files that are not %ss by their name or kind, such as %s"
        example = printable(min(files.others))
        logging.warning(message, printable(where), len(files.others), what, example)
    names = Names.pack(name for c in class_names for name in sorted(classes[c]))
    counts = [len(classes[c]) for c in class_names]
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    return Listing((UNLABELLED,) if flat else tuple(class_names), names, labels)


def source_signature(kind: str, listing: Listing, sizes: np.ndarray) -> str:
    """SHA-256 in hex that tells one data set from another; no contents are read.

    Args:
      kind: of the source.
      listing: class names, labels, and names without the path of the data set.
      sizes: bytes of each item as stored.
    """
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
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _is_file(entry: "os.DirEntry[str]") -> bool:
    """False for pipes and devices; a broken link counts as a file, which cannot be read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True
