"""OpenMP's waiting is set before torch is loaded, wherever a program starts."""

import os
import subprocess
import sys

import pytest

from base import openmp
from base.files import ROOT

SCRIPTS = [
    *(
        path
        for folder in ("config", "bench")
        for path in sorted((ROOT / folder).glob("*.py"))
        if "__main__" in path.read_text()
    ),
    ROOT / "tests" / "conftest.py",
]
PROBE = """
import os, runpy, sys

class Probe:  # ends where torch is first imported
    def find_spec(name, *_):
        if name == "torch":
            show()

def show():
    print({name: os.environ.get(name) for name in sys.argv[2:]})
    sys.exit()

sys.meta_path.insert(0, Probe)
runpy.run_path(sys.argv[1], run_name="imported")
show()
"""


def variables(path, **own):
    """The variables that say how OpenMP waits, when the script at `path` imports torch, or after its imports."""
    environment = {name: value for name, value in os.environ.items() if name not in openmp.VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("config", "bench", "tests"))
    command = [sys.executable, "-c", PROBE, path, *openmp.VARIABLES]
    done = subprocess.run(command, env={**environment, **own}, capture_output=True, text=True, check=True)
    return {name: value for name, value in eval(done.stdout).items() if value is not None}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_it_is_set_when_torch_is_imported(path):
    assert {"main.py", "show.py", "bench.py", "conftest.py"} <= {script.name for script in SCRIPTS}
    found = variables(path)
    if path.name == "report.py":  # imports nothing but the standard library
        assert not found
    else:
        assert found == {"GOMP_SPINCOUNT": "3000"}


@pytest.mark.parametrize("name", sorted(openmp.VARIABLES))
def test_the_users_own_way_is_kept(name):
    assert variables(ROOT / "config" / "main.py", **{name: "7"}) == {name: "7"}
