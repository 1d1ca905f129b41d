"""Text and JSON that others wrote: names in archives, metadata, errors of libraries."""

import json
import os
import pathlib
import re
from typing import Any

# A password in a URL, and the tokens of Hugging Face, GitHub, OpenAI and AWS by their shape.
_IN_URL = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
_IN_QUERY = re.compile(
    r"(?i)(?<=[?&])((?:[\w-]*(?:token|secret|password|signature|credential|api_?key))|sig|key)"
    r"=[^&\s'\"]+"
)
_TOKEN = re.compile(
    r"\b(?:hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA\w{16})"
)
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file that may hold anything.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, or nested too deeply; names the file.
    """
    try:
        return json.loads(pathlib.Path(path).read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path}: found JSON that is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"{path}: found no JSON ({error})") from error


def has_secret(text: str) -> bool:
    """Whether a text holds a password in a URL, or a token of a known shape."""
    return any(pattern.search(text) for pattern in (_IN_URL, _IN_QUERY, _TOKEN))


def printable(text: str) -> str:
    """A message as it may be shown: secrets as `***`, and no character that moves a cursor.

    Control characters, those that turn the direction of writing, and bytes that are not UTF-8
    become escapes, as in `repr`; newlines stay.
    """
    text = _IN_QUERY.sub(r"\1=***", _TOKEN.sub("***", _IN_URL.sub("***", text)))
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def has_controls(text: str) -> bool:
    """Whether a text holds control characters, or such as turn the direction of writing."""
    return _CONTROLS.search(text) is not None


def is_plain_name(name: Any) -> bool:
    """Whether a name is that of a file in the folder at hand: no path, and nothing odd in it."""
    return (
        isinstance(name, str)
        and not has_controls(name)
        and name not in ("", ".", "..")
        and not set(name) & {"/", "\\"}
    )
