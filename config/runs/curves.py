"""TensorBoard's curves, through tensorboardX's record writer."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from base.console import log
from base.errors import NotWritable

try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import image, scalar
except ModuleNotFoundError:  # TensorBoard is not needed to train
    Event = None


class Curves:
    """The event file of a training; without tensorboardX, or a `folder`, nothing is written.

    tensorboardX's SummaryWriter writes in a thread, which on a full disk ends with a traceback while the program hangs.
    A method of this class that cannot write raises NotWritable.
    """

    def __init__(self, folder: Path | None, step: int):
        """`step` is where training resumes; TensorBoard drops later points, which a killed process wrote."""
        self.folder = folder
        self.writer: Any = None
        if folder and Event is None:
            log.warning("tensorboardX is not installed: no curves are written, only the log")
        if not folder or Event is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self.writer = RecordWriter(str(folder / name))
        except OSError as error:
            raise self._failed(error) from None
        start = SessionLog(status=SessionLog.START)
        self._write([Event(file_version="brain.Event:2"), Event(step=step + 1, session_log=start)])

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        if self.writer:
            self._write([Event(step=step, summary=scalar(name, value)) for name, value in values.items()])

    def add_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 in BGR order."""
        if self.writer:
            self._write([Event(step=step, summary=image(name, picture[..., ::-1].copy(), dataformats="HWC"))])

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def _write(self, events: list) -> None:
        try:
            for event in events:
                event.wall_time = time.time()
                self.writer.write(event.SerializeToString())
            self.writer.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # else Python complains when it frees the file
                self.writer.close()
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> NotWritable:
        return NotWritable(f"the curves in {self.folder} can't be written: {error.strerror}")
