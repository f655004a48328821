"""The built-in set: its split by photograph, that it is the same every time, and what an interrupted build leaves."""

import cv2
import numpy as np
import pytest

from base.errors import UserError
from base.images import list_images, read_pair
from datasets import builtin


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "builtin"
    builtin.make_builtin(folder)
    return folder


@pytest.fixture
def few(monkeypatch):
    """A set of three photographs, one rendering each, so that a build takes a moment."""
    monkeypatch.setattr(builtin, "SPLIT", {"train": ("coins.png",), "val": ("coffee.png",), "test": ("chelsea.png",)})
    monkeypatch.setattr(builtin, "RENDERINGS", {"train": 1, "val": 1, "test": 1})
    monkeypatch.setattr(builtin, "LONGEST_SIDE", 60)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_split_by_photograph(built):
    for split, names in builtin.list_split().items():
        assert sorted(path.name for path in list_images(built / split)) == sorted(names)
    photographs = [{name.rsplit("_x", 1)[0] for name in names} for names in builtin.list_split().values()]
    assert len(set.union(*photographs)) == sum(map(len, photographs)) == 11
    assert sum(path.stat().st_size for path in built.rglob("*.png")) < 40e6


def test_no_clean_half_is_in_two_splits(built):
    seen = {}
    for path in sorted(built.rglob("*.png")):
        B, O = read_pair(path)
        assert B.shape == O.shape
        assert max(B.shape) <= builtin.LONGEST_SIDE
        assert (O >= B).all()
        assert (O > B).mean() > 0.02  # the white parts of a photograph take no rain
        seen.setdefault(B.tobytes(), set()).add(path.parent.name)
    assert len(seen) == 11
    assert all(len(splits) == 1 for splits in seen.values())


def test_colours_are_in_the_order_of_cv2(built):
    B, _ = read_pair(built / "val" / "coffee_x1.png")
    assert B[..., 2].mean() > B[..., 0].mean() + 50  # a red cup


def test_second_call_does_nothing(built, monkeypatch):
    monkeypatch.setattr(builtin, "_draw_pairs", lambda folder: pytest.fail("built again"))
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    builtin.make_builtin(built)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


@pytest.mark.usefixtures("few")
def test_builds_are_alike(tmp_path):
    builtin.make_builtin(tmp_path / "one")
    builtin.make_builtin(tmp_path / "two" / "deep")
    assert contents(tmp_path / "one") == contents(tmp_path / "two" / "deep")
    assert len(contents(tmp_path / "one")) == 4  # three pairs and the version


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("full"), OSError(28, "No space left on device")])
def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch, error):
    calls = []

    def stop(path, image):
        calls.append(path)
        if len(calls) == 2:
            raise error
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "write_image", stop)
        with pytest.raises((KeyboardInterrupt, UserError)):
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
    with pytest.raises(UserError, match="isn't the built-in set"):
        builtin.make_builtin(folder)
    assert contents(folder) == before


@pytest.mark.usefixtures("few")
def test_missing_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "SPLIT", {"train": ("no_such.png",)})
    with pytest.raises(UserError, match=r"no_such\.png is missing"):
        builtin.make_builtin(tmp_path / "builtin")
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        builtin.make_builtin(tmp_path / "builtin")
    assert list(tmp_path.iterdir()) == []


def test_photographs_are_read_without_loading_scikit_image(tmp_path):
    assert (builtin._photograph_folder() / "chelsea.png").is_file()
    image = builtin._shrink(np.zeros((1000, 300, 3), np.uint8))
    assert image.shape == (400, 120, 3)
    assert builtin._shrink(image) is image
