"""The curves on a disk that takes no more, and without tensorboardX."""

import os

import numpy as np
import pytest

from base.errors import NotWritable
from runs import curves
from runs.curves import Curves


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_full_disk_is_one_error(tmp_path, monkeypatch):
    points = Curves(tmp_path, 0)
    points.add(1, {"a": 1.0})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(points.writer, "_writer", full)
        with pytest.raises(NotWritable):
            points.add(2, {"a": 1.0, "b": 2.0})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == size


def test_without_tensorboardx_there_is_a_line_and_no_file(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(curves, "Event", None)
    monkeypatch.setattr(curves.log, "warning", lines.append)
    nothing = Curves(tmp_path, 0)
    nothing.add(1, {"a": 1.0})
    nothing.add_picture(1, "picture", np.zeros((2, 2, 3), np.uint8))
    nothing.close()
    assert len(lines) == 1
    assert not list(tmp_path.iterdir())
