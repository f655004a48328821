"""The curves, previews and settings of a training in TensorBoard's event file."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from base.console import log
from base.errors import NotWritable

try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import image, scalar, text
except ModuleNotFoundError:  # TensorBoard is not needed to train
    Event = None


# Groups of curves for those of the stages. TensorBoard sorts groups by name and opens the first two: eval, train.
STAGES = {"eval": "val_stages", "train": "train_stages"}


class Curves:
    """TensorBoard's event file; without tensorboardX, or a `folder`, nothing is written. Raises NotWritable.

    Not tensorboardX's SummaryWriter: it writes in a thread, and on a full disk the program hangs.
    """

    def __init__(self, folder: Path | None, step: int):
        """`step` is where training resumes; TensorBoard drops later points, which a killed process wrote."""
        self.writer: Any = None
        if folder and Event is None:
            log.warning("tensorboardX is not installed: no curves are written, only the log")
        elif folder:
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self.writer = RecordWriter(str(folder / name))
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, group: str, values: dict[str, float]) -> None:
        """One point of each curve of a group."""
        if self.writer:
            self._write(*(Event(step=step, summary=scalar(_tag(group, name), v)) for name, v in values.items()))

    def add_text(self, step: int, name: str, markdown: str) -> None:
        if self.writer:  # the bytes of a path may be no UTF-8
            self._write(Event(step=step, summary=text(name, markdown.encode(errors="backslashreplace").decode())))

    def add_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 in BGR order."""
        if self.writer:
            self._write(Event(step=step, summary=image(name, picture[..., ::-1].copy(), dataformats="HWC")))

    def _write(self, *events: Any) -> None:
        try:
            for event in events:
                event.wall_time = time.time()
                self.writer.write(event.SerializeToString())
            self.writer.flush()
        except OSError as error:
            with suppress(OSError):  # else Python complains when it frees the file
                self.writer.close()
            raise NotWritable(f"{self.writer.path} can't be written: {error.strerror}") from None


def _tag(group: str, name: str) -> str:
    """`group/name`, or for name `stage_3/psnr`, `val_stages/psnr_3` or `train_stages/psnr_3`."""
    stage, slash, metric = name.removeprefix("stage_").partition("/")
    return f"{STAGES[group]}/{metric}_{stage}" if slash else f"{group}/{name}"
