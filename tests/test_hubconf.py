"""hubconf.py in a fresh process, in a folder whose modules have the names of this repository's."""

import os
import re
import subprocess
import sys

import pytest

from base.files import ROOT

THEIRS = ("model", "settings", "main", "base", "runs", "groupy")
PROGRAM = f"""
import io, sys
import torch
import {", ".join(THEIRS)}

path, modules = list(sys.path), {{name: sys.modules[name] for name in {THEIRS}}}
derain = torch.hub.load({str(ROOT)!r}, "sdsen", weights="rain800_fast", source="local")
again = torch.hub.load({str(ROOT)!r}, "sdsen", weights="rain800_fast", source="local")
assert sys.path == path
assert all(sys.modules[name] is module and module.MINE for name, module in modules.items())
new = [name for name in sys.modules if getattr(sys.modules[name], "__file__", None) and {str(ROOT)!r} in
       sys.modules[name].__file__ and ".venv" not in sys.modules[name].__file__]
assert new and {{name.partition("_")[0] for name in new}} == {{"sdsen"}}, new

image = torch.rand(1, 3, 20, 30)
restored = derain(image)
assert restored.shape == image.shape and (restored - image).abs().mean() > 0.01
assert type(derain) is type(again) and torch.equal(again(image), restored)
file = io.BytesIO()
torch.save(derain, file)
file.seek(0)
assert torch.equal(torch.load(file, weights_only=False)(image), restored)
try:
    torch.hub.load({str(ROOT)!r}, "sdsen", weights="mine", source="local")
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_it_leaves_the_callers_modules_alone(tmp_path):
    for name in THEIRS:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "MissingFile\n"), done.stderr


def _readme() -> str:
    """The lines that README.md shows."""
    (lines,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "PATH/TO/THIS/REPOSITORY" in lines
    return lines.replace("PATH/TO/THIS/REPOSITORY", str(ROOT))


@pytest.mark.slow
def test_the_readmes_lines_need_only_what_is_named():
    """Also, `torch.hub.list` shows each callable of the file without an underscore."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("hubconf", {str(ROOT / "hubconf.py")!r})
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
print(*[name for name in dir(hub) if callable(getattr(hub, name)) and name[0] != "_"])
{_readme()}
assert restored.shape == (1, 3, 48, 64)
for name in ("skimage", "tensorboardX", "tensorboard", "matplotlib", "onnx", "onnxruntime"):
    assert name not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "sdsen\n"), done.stderr
