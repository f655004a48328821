"""TensorBoard's curves, through tensorboardX's event writer."""

import os
import time
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

from common import UserError


class Curves:
    """The event file of a run in training.

    Its writer is the one beneath tensorboardX's SummaryWriter, which writes in a thread: on a full disk that thread
    ends with a traceback, and the program hangs. Here a point is on the disk, or a UserError is raised.
    """

    def __init__(self, folder: Path, step: int):
        """`step` is where training goes on; points behind it, which a killed process wrote, are not shown any more."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        except OSError as error:
            raise self._failed(error) from None
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        for name, value in values.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        self._flush()

    def add_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 in BGR order."""
        self._write(Event(step=step, summary=image(name, picture[..., ::-1].copy(), dataformats="HWC")))
        self._flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        try:
            self.writer.write_event(event)
        except OSError as error:
            raise self._failed(error) from None

    def _flush(self) -> None:
        try:
            self.writer.flush()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"the curves in {self.folder} can't be written: {error.strerror}")
