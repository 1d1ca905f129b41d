"""Lists the files of a data set and reads class labels off their paths.

The rule for folders and archives, images and latents: `class/**/file`, where the class is the
first component of the path, or all files directly inside and no class. A dataset.json of labels
beside them, as StyleGAN, EDM and REPA write it, takes the place of this rule.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from repulsor_jax.files.untrusted import checked, has_controls, parse, printable

UNLABELLED = ("unlabelled",)  # the classes where there are none
LABELS = "dataset.json"


class Item(NamedTuple):
    """One labelled image."""

    image: bytes | np.ndarray  # an encoded image's bytes, or pixels, uint8 [H, W, C]
    label: int  # index into the source's class names
    name: str  # for messages: a path, an archive and its member, or a data set and its index
    label_map: bytes | None = (
        None  # an encoded PNG whose grey values or palette indices are classes
    )


@dataclasses.dataclass(frozen=True)
class Names:
    """Strings by index, packed: millions of them cost a worker process little to receive."""

    text: bytes
    ends: np.ndarray

    @classmethod
    def pack(cls, names: Iterable[str]) -> "Names":
        """Packs paths, which may hold bytes that are not UTF-8, and letters the locale lacks."""
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"index {index} out of range for {len(self.ends)} items")
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].decode("utf-8", "surrogatepass")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The items of a data set in order of class, then name, or as its dataset.json numbers them."""

    class_names: tuple[str, ...]  # sorted, or `UNLABELLED`
    names: Names  # paths below the root, "/" between components
    labels: np.ndarray  # int32 [N], indices into class_names
    # What may be wrong with the classes, for a warning; "" where nothing looks wrong.
    doubt: str = dataclasses.field(default="", kw_only=True)

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

    Classes are in the order of their names, or of their numbers where all names are whole numbers.

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
    are_numbers = all(name.isdecimal() for name in classes)
    class_names = sorted(classes, key=lambda name: (int(name) if are_numbers else 0, name))
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
    doubt = _doubt(where, files.names, class_names, are_numbers, what)
    return Listing(UNLABELLED if flat else tuple(class_names), names, labels, doubt=doubt)


def _doubt(
    where: str, names: Sequence[str], classes: Sequence[str], are_numbers: bool, what: str
) -> str:
    if classes == [""]:
        return (
            f"{where} has no class folders: all {len(names):,} {what}s have the one class "
            f"{UNLABELLED[0]!r}. If this is the folder of one class, give the folder above it"
        )
    if all(name.count("/") > 1 for name in names):
        deeper = sorted({name.split("/")[1] for name in names})
        return (
            f"{where}: every {what} lies in a folder below its class, as {min(names)}, and the "
            f"classes are {shorten(classes)}. If they are one level deeper, {shorten(deeper)}, "
            "give the folder right above them, as config.data.source_path or as the split"
        )
    wrong = [(k, name) for k, name in enumerate(classes) if are_numbers and int(name) != k]
    if wrong:
        label, name = wrong[0]
        return f"{where}: the class folders are numbers, but {name!r} has the label {label}"
    return ""


@checked
class _Labels:
    labels: Annotated[
        tuple[tuple[str, Annotated[int, Field(ge=0)]], ...] | None, Field(min_length=1)
    ]


def labelled(root: str, names: Collection[str], content: Any) -> Listing | None:
    """Files with the labels of a dataset.json in `root`, {"labels": [[file, number], ...]}.

    Returns None where the content is of another kind; with labels null, no file has a class.

    Raises:
      ValueError: labels that are no numbers, a file without a label or a label without a file, or
        a number of 0 to K-1 that does not occur.
    """
    if not (isinstance(content, dict) and "labels" in content):
        return None
    file = os.path.join(root, LABELS)
    try:
        labels = parse(_Labels, {"labels": content["labels"]}, file).labels
    except ValueError as error:
        raise ValueError(
            f'{error}; a {LABELS} beside the files holds {{"labels": [[file, number], ...]}}: '
            "rename it if the folders are the classes"
        ) from error
    if labels is None:
        doubt = f"{file} says that there are no labels: all have the one class {UNLABELLED[0]!r}"
        zeros = np.zeros(len(names), np.int32)
        return Listing(UNLABELLED, Names.pack(sorted(names)), zeros, doubt=doubt)
    numbers = dict(labels)
    check_labelled(root, names, numbers, file)
    ordered = sorted(names)
    return numbered(file, ordered, [numbers[name] for name in ordered])


def check_labelled(
    root: str, names: Collection[str], labelled: Collection[str], where: str
) -> None:
    """Raises ValueError unless each of the files in `root` has a label, and each label a file."""
    found = set(names)
    if alone := sorted(found ^ set(labelled)):
        what = "has no label in" if alone[0] in found else "is not there, though it has one in"
        raise ValueError(
            f"{os.path.join(root, alone[0])} {what} {where} ({len(alone)} such files): "
            "was the copy or the run cut short?"
        )


def numbered(where: str, names: Sequence[str], labels: Sequence[int] | np.ndarray) -> Listing:
    """Files with labels of the classes "0" to "K-1", each of which must occur; else ValueError."""
    numbers = np.asarray(labels)
    found = np.unique(numbers)
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if len(gaps):
        raise ValueError(
            f"{where}: found {len(found)} different labels from {found[0]} to {found[-1]}, but not "
            f"{gaps[0]}; expected each of 0 to K-1: renumber the labels, or complete the data set"
        )
    classes = tuple(map(str, range(len(found))))
    return Listing(classes, Names.pack(names), numbers.astype(np.int32))


def describe_classes(names: Sequence[str]) -> str:
    """How many classes there are, and some of their names: "2 classes: cat, dog"."""
    shown = [*names] if len(names) <= 10 else [*names[:8], "...", names[-1]]
    kind = "class" if len(names) == 1 else "classes"
    return f"{len(names):,} {kind}: {', '.join(name[:40] for name in shown)}"


def class_difference(train: Sequence[str], test: Sequence[str]) -> str:
    """How the classes of two splits differ; "" where they do not, or one split has none."""
    if tuple(train) == tuple(test) or UNLABELLED in (tuple(train), tuple(test)):
        return ""
    only = sorted(set(train) ^ set(test))
    how = f"only one of them has {shorten(only, 5)}" if only else "their order is not the same"
    return f"{describe_classes(train)}, and {describe_classes(test)}; {how}"


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
