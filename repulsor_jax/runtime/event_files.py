"""Writes the numbers, texts and pictures of a run to TensorBoard's event files."""

import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2


class EventFiles:
    """A `Tracker` (`metrics.py`); events that a full disk refuses are kept and written later.

    They are written here and not by `SummaryWriter`, whose thread ends when the disk is full: its
    queue then blocks the training loop.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._events: EventsWriter | None = None
        self._kept: list[event_pb2.Event] = []

    def rewind(self, step: int) -> None:
        """Tells TensorBoard to hide what this and other files have after a step."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one event per number."""
        for name, value in values.items():
            self._add(event_pb2.Event(step=step, summary=summary.scalar(name, value)))

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a text, as it stands."""
        shown = summary.text(name, f"```\n{text}\n```")
        self._add(event_pb2.Event(step=step, summary=shown))

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Adds a picture file."""
        picture = np.asarray(Image.open(path).convert("RGB"))
        shown = summary.image(name, picture, dataformats="HWC")
        self._add(event_pb2.Event(step=step, summary=shown))

    def _add(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._kept.append(event)

    def flush(self) -> None:
        """Writes all kept events, and waits until the disk has them."""
        try:
            if self._events is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                suffix = f".{os.getpid()}.{time.time_ns()}"
                self._events = EventsWriter(str(self._folder / "events"), suffix)
            for event in self._kept:
                self._events.write_event(event)
            self._events.flush()
            self._kept.clear()
        except OSError:  # the file may end in a torn event: the next attempt opens another
            self._events = None

    def close(self, *, failed: bool) -> None:
        """Writes all kept events and closes the file."""
        self.flush()
        if self._events is not None:
            self._events.close()
