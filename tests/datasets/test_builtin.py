"""The built-in set: its pairs, what a second, an interrupted and a newer build leave, missing photographs."""

import hashlib
import os

import cv2
import numpy as np
import pytest

from base.errors import MissingFile, NotWritable, Occupied
from base.images import read_pair
from datasets import builtin


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "builtin"
    builtin.make_builtin(folder)
    return folder


@pytest.fixture
def few(monkeypatch):
    """A set of three photographs, one rendering each, so that a build takes a moment."""
    monkeypatch.setattr(builtin, "SPLIT", {"train": ["coins.png"], "val": ["coffee.png"], "test": ["chelsea.png"]})
    monkeypatch.setattr(builtin, "RENDERINGS", {"train": 1, "val": 1, "test": 1})
    monkeypatch.setattr(builtin, "LONGEST_SIDE", 60)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Means of R over the renderings of each photograph. Versions of OpenCV differ by up to 0.001 here.
RAIN = {
    "train": {
        **{"rocket": 14.9713, "motorcycle_left": 20.7862, "ihc": 15.1213, "camera": 17.1475},
        **{"coins": 16.8619, "brick": 12.2988, "grass": 14.6220, "gravel": 14.9872},
    },
    "val": {"coffee": 15.7371},
    "test": {"astronaut": 9.1223, "chelsea": 16.4150},
}
CLEAN = "b5b819f4f1f57c21195fab01c80a886280415abc71590e395c9b2311fde38427"


def test_pairs_are_those_that_scores_are_published_of(built):
    """The photographs to the last bit, the rain by its mean on each, and which split they are in."""
    digest, rain = hashlib.sha256(), {split: {} for split in RAIN}
    for path in sorted(built.rglob("*.png")):
        B, O = read_pair(path)
        digest.update(B.tobytes())
        assert (O >= B).all()
        rain[path.parent.name].setdefault(path.stem.split("_x")[0], []).append((O - B).mean())
    assert digest.hexdigest() == CLEAN
    for split, means in RAIN.items():
        assert {name: np.mean(values) for name, values in rain[split].items()} == pytest.approx(means, abs=0.003)
        assert {len(values) for values in rain[split].values()} == {6 if split == "train" else 3}
    assert sum(path.stat().st_size for path in built.rglob("*.png")) < 40e6


def test_second_call_does_nothing(built, monkeypatch):
    monkeypatch.setattr(builtin, "_write_pairs", lambda folder: pytest.fail("built again"))
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    builtin.make_builtin(built)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


@pytest.mark.usefixtures("few")
def test_builds_are_alike(tmp_path):
    builtin.make_builtin(tmp_path / "one")
    builtin.make_builtin(tmp_path / "two" / "deep")
    assert contents(tmp_path / "one") == contents(tmp_path / "two" / "deep")
    assert len(contents(tmp_path / "one")) == 4  # three pairs and the version
    assert {max(read_pair(path)[0].shape) for path in (tmp_path / "one").rglob("*.png")} == {60}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt, KeyboardInterrupt), (NotWritable("full"), NotWritable), (OSError(28, "full"), NotWritable)],
)
def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch, error, raised):
    calls = []

    def stop(path, image):
        calls.append(path)
        if len(calls) == 2:
            raise error
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "write_image", stop)
        with pytest.raises(raised):
            builtin.make_builtin(tmp_path / "builtin")
    assert list(tmp_path.iterdir()) == []
    builtin.make_builtin(tmp_path / "builtin")
    assert len(contents(tmp_path / "builtin")) == 4


@pytest.mark.usefixtures("few")
def test_old_version_is_replaced_and_other_things_are_kept(tmp_path, monkeypatch):
    folder = tmp_path / "builtin"
    builtin.make_builtin(folder)
    (folder / "train" / "old.png").write_bytes(b"")
    monkeypatch.setattr(builtin, "VERSION", "next")
    builtin.make_builtin(folder)
    assert len(contents(folder)) == 4
    assert list(tmp_path.iterdir()) == [folder]

    (folder / builtin.MARKER).unlink()  # now it could be anybody's
    before = contents(folder)
    with pytest.raises(Occupied):
        builtin.make_builtin(folder)
    assert contents(folder) == before


@pytest.mark.usefixtures("few")
def test_another_process_that_was_faster_is_no_error(tmp_path, monkeypatch):
    folder, replace = tmp_path / "builtin", os.replace

    def too_late(source, target):
        replace(source, target)
        if target == folder:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(os, "replace", too_late)
    builtin.make_builtin(folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("few")
def test_missing_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "SPLIT", {"train": ["no_such.png"]})
    with pytest.raises(MissingFile, match=r"no_such\.png"):
        builtin.make_builtin(tmp_path / "builtin")
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingFile):
        builtin.make_builtin(tmp_path / "builtin")
    assert list(tmp_path.iterdir()) == []
