"""The shell scripts, each in a copied tree of its own: what they remove, refuse and serve."""

import pty
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from base.files import ROOT

SCRIPTS = ["explore.sh", "config/tensorboard.sh", "config/clean.sh"]


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts with something in logdir, showdir and models; the path has a space and a quote."""
    root = tmp_path / "it's a tree"
    for name in SCRIPTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in (
        "logdir/README.md", "logdir/run/events.out.tfevents.1", "logdir/.hidden",
        "showdir/README.md", "showdir/index.html", "showdir/run/a b.png", "showdir/run/page/1/0.jpg",
        "models/README.md", "models/shipped.pth", "models/own.pth", "models/run/best.pth", "models/zoo/kept.pth",
        "models/zoo/step_1.pth",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def track(root: Path, *names: str) -> None:
    """Make a git repository of `root` that tracks the scripts and `names`."""
    for words in (["init", "-q"], ["add", "-f", *SCRIPTS, *names]):
        subprocess.run(["git", *words], cwd=root, check=True, capture_output=True)


def run(root: Path, script: str, *words: str, **options) -> subprocess.CompletedProcess:
    """Run a script away from its folder and without a terminal."""
    options = {"stdin": subprocess.DEVNULL, "timeout": 20, **options}
    return subprocess.run([root / script, *words], cwd="/", capture_output=True, text=True, **options)


def files(root: Path) -> set[str]:
    places = [root / name for name in ("logdir", "showdir", "models")]
    return {str(p.relative_to(root)) for place in places for p in place.rglob("*") if p.is_file() or p.is_symlink()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves(script):
    assert (ROOT / script).stat().st_mode & 0o111
    done = run(ROOT, script, "--help")
    assert done.returncode == 0
    assert Path(script).name in done.stdout.splitlines()[0]
    assert done.stderr == ""


# ---------------------------------------------------------------- clean.sh


def test_clean_clears_logs_and_pages_but_no_checkpoint(tree):
    track(tree, "logdir/README.md", "showdir/README.md")
    checkpoints = {name for name in files(tree) if name.startswith("models")}
    done = run(tree, "config/clean.sh")
    assert done.returncode == 0
    assert files(tree) == {"logdir/README.md", "showdir/README.md", *checkpoints}
    assert {"removed logdir/.hidden", "removed logdir/run", "removed showdir/run"} <= set(done.stdout.splitlines())


def test_clean_all_keeps_what_git_tracks(tree):
    track(tree, "models/shipped.pth", "models/zoo/kept.pth")
    assert run(tree, "config/clean.sh", "--all", "--yes").returncode == 0
    assert files(tree) == {
        "logdir/README.md", "showdir/README.md", "models/README.md", "models/shipped.pth", "models/zoo/kept.pth"
    }  # fmt: skip


@pytest.mark.parametrize("checkout", ["none", "new", "of somebody else"])
def test_clean_all_without_the_list_of_git_keeps_the_weights_on_top(tree, checkout):
    if checkout != "none":
        subprocess.run(["git", "init", "-q"], cwd=tree if checkout == "new" else tree.parent, check=True)
    assert run(tree, "config/clean.sh", "--yes", "--all").returncode == 0
    assert files(tree) == {
        "logdir/README.md", "showdir/README.md", "models/README.md", "models/shipped.pth", "models/own.pth"
    }  # fmt: skip


def test_clean_all_asks(tree):
    before = files(tree)
    done = run(tree, "config/clean.sh", "--all")
    assert done.returncode == 1
    assert "--yes" in done.stderr
    assert files(tree) == before

    def answer(text):
        ours, terminal = pty.openpty()
        with open(ours, "wb", buffering=0) as keyboard, open(terminal, "rb", buffering=0) as screen:
            keyboard.write(text)
            return run(tree, "config/clean.sh", "--all", stdin=screen)

    assert answer(b"y\n").returncode == 1
    assert files(tree) == before
    assert answer(b"yes\n").returncode == 0
    assert "models/run/best.pth" not in files(tree)


def test_clean_removes_links_and_not_what_they_point_to(tree, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.png").write_text("precious")
    (tree / "showdir/folder").symlink_to(outside)
    (tree / "showdir/run/file").symlink_to(outside / "precious.png")
    (tree / "logdir/broken").symlink_to(outside / "missing")
    assert run(tree, "config/clean.sh").returncode == 0
    assert (outside / "precious.png").read_text() == "precious"
    assert {name for name in files(tree) if not name.startswith("models")} == {"logdir/README.md", "showdir/README.md"}


def test_clean_refuses_a_folder_that_is_a_link(tree, tmp_path):
    (tree / "showdir").rename(tmp_path / "elsewhere")
    (tree / "showdir").symlink_to(tmp_path / "elsewhere")
    before = files(tree)
    done = run(tree, "config/clean.sh")
    assert done.returncode == 1
    assert str(tree / "showdir") in done.stderr
    assert files(tree) == before
    assert (tmp_path / "elsewhere/index.html").is_file()


def test_clean_refuses_an_unknown_argument(tree):
    before = files(tree)
    done = run(tree, "config/clean.sh", "--al")
    assert done.returncode == 1
    assert "--al" in done.stderr
    assert files(tree) == before


# ---------------------------------------------------------------- explore.sh and tensorboard.sh


def test_explore_serves_the_page_to_this_machine_only(tree):
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # no DISPLAY: no browser is opened
    with socket.create_server(("127.0.0.1", 8000)) if _free(8000) else socket.socket():  # 8000 is taken, by whomever
        server = subprocess.Popen(
            [tree / "explore.sh"],
            cwd="/",
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Tests that run in a shell's background would hand on to it that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            address = server.stdout.readline().split()[0]
            port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)[1])
            assert port > 8000
            assert _fetch(address) == b"showdir/index.html"
            with pytest.raises(OSError, match="refused"):  # a server on all addresses would answer here too
                socket.create_connection(("127.0.0.2", port), timeout=5)
        finally:
            server.send_signal(signal.SIGINT)
            errors = server.communicate(timeout=10)[1]
    assert server.returncode == 0
    assert errors == ""


def test_explore_without_a_page_names_what_makes_one(tree):
    (tree / "showdir/index.html").unlink()
    done = run(tree, "explore.sh")
    assert done.returncode == 1
    assert "config/show.py" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("port", ["http", "0x50", "123456", "-1"])
def test_a_port_that_is_no_number_is_refused(tree, port):
    for script in ("explore.sh", "config/tensorboard.sh"):
        done = run(tree, script, port)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert port in done.stderr


def test_tensorboard_gets_logdir_and_this_machine_only(tree, tmp_path):
    program = tree / ".venv/bin/tensorboard"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    done = run(tree, "config/tensorboard.sh", "6100")
    assert done.stdout.splitlines() == ["--logdir", f"{tree}/logdir", "--host", "127.0.0.1", "--port", "6100"]


def test_tensorboard_that_is_missing_takes_one_line(tree, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(shutil.which(name))
    done = run(tree, "config/tensorboard.sh", env={"PATH": str(tools)})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def _free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _fetch(address: str) -> bytes:
    """The answer of a server that may still be starting."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(100):
        try:
            return opener.open(address, timeout=5).read()
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(f"{address} does not answer")
