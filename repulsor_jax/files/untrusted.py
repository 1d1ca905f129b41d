"""Text and JSON from elsewhere: names in archives, metadata, errors of libraries."""

import dataclasses
import json
import os
import pathlib
import re
import typing
from typing import IO, Any, TypeVar

import numpy as np
import pydantic
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

# A password in a URL, and the tokens of Hugging Face, GitHub, OpenAI and AWS by their shape.
_IN_URL = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
_IN_QUERY = re.compile(
    r"(?i)(?<=[?&])((?:[\w-]*(?:token|secret|password|signature|credential|api_?key))|sig|key)"
    r"=[^&\s'\"]+"
)
_TOKEN = re.compile(
    r"\b(?:hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA\w{16})"
)
ALWAYS_EXPANDED = 2**30  # bytes to which any compressed file may grow
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file that may hold anything.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, or nested too deeply; names the file.
    """
    return parse_json(pathlib.Path(path).read_bytes(), str(path))


def parse_json(content: bytes, where: str) -> Any:
    """As `read_json`, of bytes that are there already; errors call them `where`."""
    refuse_pointer(content[:64], where)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{where}: found JSON that is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"{where}: found no JSON ({error})") from error


def refuse_pointer(start: bytes, name: object) -> None:
    """Raises ValueError where a file that begins so is a Git LFS pointer, not the file itself."""
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{name}: is a Git LFS pointer, a few lines that stand for the file: fetch the file "
            "itself, by `git lfs pull` in that repository, or from its page"
        )


def array_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an .npy stream, which then stands at the data.

    Raises ValueError where it has no such header; names the array.
    """
    try:
        if np.lib.format.read_magic(stream) == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def most_expanded(size: int) -> int:
    """Bytes to which a compressed file of so many may grow: 1 GiB, or 200-fold.

    A compressed tar of images grows by 10 % or so; of raw pixels in flat colours, tenfold.
    """
    return max(ALWAYS_EXPANDED, 200 * size)


def has_secret(text: str) -> bool:
    """Whether a text holds a password in a URL, or a token of a known shape."""
    return any(pattern.search(text) for pattern in (_IN_URL, _IN_QUERY, _TOKEN))


def printable(text: str) -> str:
    """Makes a message safe to show: secrets become `***`.

    Control characters but newlines, characters that turn the direction of writing, and bytes that
    are not UTF-8 become their escapes.
    """
    text = _IN_QUERY.sub(r"\1=***", _TOKEN.sub("***", _IN_URL.sub("***", text)))
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def has_controls(text: str) -> bool:
    """Whether a text holds characters that move the cursor or turn the direction of writing."""
    return _CONTROLS.search(text) is not None


def is_plain_name(name: str) -> bool:
    """Whether a name can be a file's in the current folder: no path, no control characters."""
    return not has_controls(name) and name not in ("", ".", "..") and not set(name) & set("/\\")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def checked(schema: type[T]) -> type[T]:
    """Makes a class a frozen dataclass that `parse` fills: no other fields, no value converted."""
    config = pydantic.ConfigDict(strict=True, extra="forbid")
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(schema)  # type: ignore[return-value]


def parse(schema: type[T], values: Any, where: str) -> T:
    """Turns plain values into an instance of a class that is `checked`, field by field.

    Values are taken as JSON has them: a whole number is a float where one is wanted and nothing
    else is converted; a list is a tuple. An error calls them `where`: "config", or a file.

    Raises:
      ValueError: names the first field that is wrong, what was found and what is expected.
    """
    try:
        found: T = TypeAdapter(schema).validate_json(json.dumps(values))
        return found
    except TypeError as error:
        raise ValueError(f"{where}: expected plain values ({error})") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key = ".".join([where, *map(str, problem["loc"])])
    if problem["type"] == "unexpected_keyword_argument":
        section: Any = schema
        for name in problem["loc"][:-1]:
            items = [each for each in typing.get_args(section) if dataclasses.is_dataclass(each)]
            section = items[0] if items else typing.get_type_hints(section)[str(name)]
        known = ", ".join(sorted(field.name for field in dataclasses.fields(section)))
        raise ValueError(f"{key}: unknown key; expected one of {known}")
    if problem["type"] == "missing":
        raise ValueError(f"{key}: missing")
    if problem["type"] == "value_error":  # a validator's own words, which say what was found
        raise ValueError(f"{key}: {problem['ctx']['error']}")
    expected = problem["msg"].removeprefix("Input should be ")
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    raise ValueError(f"{key}: expected {expected}, found {shown}")
