"""TensorBoard's curves, through tensorboardX's record writer."""

import contextlib
import os
import socket
import time
from pathlib import Path

import numpy as np

from base.console import log
from base.errors import NotWritable

try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import image, scalar
except ModuleNotFoundError:  # TensorBoard is not needed to train
    Event = None


def open_curves(folder: Path, step: int) -> "Curves | NoCurves":
    """The curves of a run that starts or resumes at `step`; without tensorboardX none, and a line that says so."""
    if Event is None:
        log.warning("tensorboardX is not installed: no curves are written, only the log")
        return NoCurves()
    return Curves(folder, step)


class NoCurves:
    """Has the methods of `Curves`, and writes nothing."""

    def add(self, step: int, values: dict[str, float]) -> None:
        pass

    def add_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


class Curves:
    """The event file of a run in training. A method that cannot write raises NotWritable.

    tensorboardX's SummaryWriter writes in a thread, which on a full disk ends with a traceback while the program hangs.
    """

    def __init__(self, folder: Path, step: int):
        """`step` is where training resumes; TensorBoard drops later points, which a killed process wrote."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self.writer = RecordWriter(str(folder / name))
        except OSError as error:
            raise self._failed(error) from None
        self._write(
            Event(file_version="brain.Event:2"),
            Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        self._write(*(Event(step=step, summary=scalar(name, value)) for name, value in values.items()))

    def add_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 in BGR order."""
        self._write(Event(step=step, summary=image(name, picture[..., ::-1].copy(), dataformats="HWC")))

    def close(self) -> None:
        self.writer.close()

    def _write(self, *events: Event) -> None:
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
