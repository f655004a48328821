"""The curves on a disk that takes no more."""

import subprocess
import sys

import numpy as np

from base.files import ROOT
from runs import curves

WRITE_TOO_MUCH = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from base.console import run_script
from runs.curves import Curves

def main(arguments):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the system refuses to write on, as a full disk does
    curves = Curves(Path(arguments[1]), 0)
    for step in range(10_000):
        curves.add(step, {"a": 1.0, "b": 2.0})

run_script(main)
"""


def test_full_disk_is_one_line(tmp_path):
    command = [sys.executable, "-c", WRITE_TOO_MUCH, str(ROOT / "config"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == f"error: the curves in {tmp_path} can't be written: File too large\n"
    assert 49_000 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 50_000


def test_without_tensorboardx_there_is_a_line_and_no_file(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(curves, "Event", None)
    monkeypatch.setattr(curves.log, "warning", lines.append)
    nothing = curves.open_curves(tmp_path, 0)
    nothing.add(1, {"a": 1.0})
    nothing.add_picture(1, "picture", np.zeros((2, 2, 3), np.uint8))
    nothing.close()
    assert lines == ["tensorboardX is not installed: no curves are written, only the log"]
    assert not list(tmp_path.iterdir())
