"""The names of classes: those of ImageNet, and which classes a person means."""

import importlib.resources
from collections.abc import Sequence


def imagenet_names() -> tuple[str, ...]:
    """Short English names of the 1,000 classes of ILSVRC2012, in the order of their labels.

    As torchvision has them (BSD licence), in its `models/_meta.py`.
    """
    file = importlib.resources.files("repulsor_jax.data") / "imagenet_classes.txt"
    return tuple(file.read_text("utf-8").split("\n")[:-1])


def names_of(num_classes: int) -> tuple[str, ...]:
    """Names where a file of weights has none: ImageNet's for 1,000 classes, else numbers."""
    return imagenet_names() if num_classes == 1_000 else tuple(map(str, range(num_classes)))


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """The names to show: ImageNet's in place of its 1,000 synsets ("n01440764"), else the same.

    The data set's labels are in the order of the synsets, which is that of ILSVRC2012.
    """
    is_imagenet = len(names) == 1_000 and all(n[:1] == "n" and n[1:].isdigit() for n in names)
    return imagenet_names() if is_imagenet else tuple(names)


def find(names: Sequence[str], wanted: Sequence[int | str]) -> tuple[int, ...]:
    """The labels of classes that are given by number or by name, upper and lower case alike.

    Raises:
      ValueError: no class of that number or name, or several of that name; says which there are.
    """
    return tuple(_find(names, readable(names), each) for each in wanted)


def _find(names: Sequence[str], shown: Sequence[str], wanted: int | str) -> int:
    text = str(wanted).strip().casefold()
    given = (names, shown)
    exact = sorted({k for each in given for k, n in enumerate(each) if n.casefold() == text})
    if len(exact) == 1 and isinstance(wanted, str):
        return exact[0]
    if text.isdecimal() and int(text) < len(names):  # a class that is called a number goes first
        return int(text)
    if exact:
        raise ValueError(f"found {wanted!r}, which several classes are called: give one of {exact}")
    near = [f"{k} {n!r}" for k, n in enumerate(shown) if text in n.casefold()]
    hint = f"; of that name in part: {', '.join(near[:10])}" if near else ""
    raise ValueError(
        f"found {wanted!r}, expected a number from 0 to {len(names) - 1}, or a name, as "
        f"{shown[0]!r}{hint}"
    )
