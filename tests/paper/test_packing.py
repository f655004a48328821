"""Archives of runs: what goes in comes out again, and what is refused of an archive from elsewhere."""

import io
import os
import zipfile
from contextlib import nullcontext

import pytest
import torch

import model
from base.errors import DamagedFile, Mismatch, MissingFile, NotWritable, Occupied
from base.files import lock
from paper import packing
from paper.rows import all_rows, find_row, find_run
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import override

PAPER, SHORT = "cnn_rain800", "cnn_rain800_short"


class Place:
    """A machine: folders of its own, with runs that are made without training."""

    def __init__(self, folder):
        self.folder = folder
        self.overrides = {"model_dir": str(folder / "models"), "log_dir": str(folder / "log")}

    def run(self, name):
        return find_run(find_row(name), self.overrides)

    def make_run(self, name, step, best=None, **changes):
        """The files that a training leaves at a step; `best` is the step of its best checkpoint."""
        run = self.run(name)
        settings = override(run.settings, changes)
        network = {"weight": torch.full((3,), float(step))}
        for file, at in (("latest", step), ("step_2", 2), ("best", best)):
            if at is not None:
                checkpoint = Checkpoint(network, at, settings, optimizer={"state": {}, "param_groups": [{}]})
                checkpoints.save(settings.model_path / f"{file}.pth", checkpoint)
        settings.log_path.mkdir(parents=True, exist_ok=True)
        for file in ("train.log", "tables.log", "settings.json", "events.out.tfevents.1"):
            (settings.log_path / file).write_text(f"{file} of {name} at {step}")
        return run

    def pack(self, path, *names):
        packing.pack(path, map(self.run, names))

    def take(self, path):
        return [run.name for run in packing.take(path, self.overrides)]

    def files(self):
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}

    def step(self, name):
        return self.run(name).step


@pytest.fixture
def here(tmp_path):
    return Place(tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    return Place(tmp_path / "there")


@pytest.fixture
def archive(tmp_path):
    return tmp_path / "runs.zip"


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)


def checkpoint_bytes(**values):
    """A checkpoint of a row's run at step 4, with some values changed or added."""
    settings = vars(find_run(find_row(PAPER), {}).settings)
    buffer = io.BytesIO()
    torch.save({"format": 1, "network": {}, "step": 4, "settings": settings, **values}, buffer)
    return buffer.getvalue()


def test_a_run_comes_out_as_it_went_in(here, there, archive):
    here.make_run(PAPER, 4)
    here.make_run(SHORT, 6, best=4)
    here.pack(archive, PAPER, SHORT, "dsen_rain800")  # of which the last has no run
    logs = {"train.log", "tables.log", "settings.json"}
    with zipfile.ZipFile(archive) as file:
        assert set(file.namelist()) == {
            *(f"{PAPER}/{name}" for name in {"latest.pth", *logs}),
            *(f"{SHORT}/{name}" for name in {"latest.pth", "best.pth", *logs}),
        }
    assert set(there.take(archive)) == {PAPER, SHORT}
    old, new = here.files(), there.files()
    assert new == {name: old[name] for name in new}
    assert len(new) == 9
    there.take(archive)
    assert there.files() == new


def test_a_checkpoint_is_read_first_and_written_last(here, there, archive, monkeypatch):
    """So that one that is cut off, or read during a training, has the files that belong to it, or later ones."""
    here.make_run(PAPER, 4, best=2)
    here.pack(archive, PAPER)
    written, write = [], packing.write_bytes
    monkeypatch.setattr(packing, "write_bytes", lambda path, data: (written.append(path.name), write(path, data)))
    there.take(archive)
    with zipfile.ZipFile(archive) as file:
        packed = [name.partition("/")[2] for name in file.namelist()]
    assert packed[:2] == ["latest.pth", "best.pth"]
    assert written == packed[::-1]


def test_a_run_that_is_as_far_stays_and_one_that_is_behind_is_replaced(here, there, archive):
    for name, step in ((PAPER, 4), (SHORT, 4), ("dsen_rain800", 4)):
        here.make_run(name, step, best=step)
    here.pack(archive, PAPER, SHORT, "dsen_rain800")
    for name, step in ((PAPER, 5), (SHORT, 3), ("dsen_rain800", 4)):
        there.make_run(name, step, best=2)
    there.take(archive)
    assert [there.step(name) for name in (PAPER, SHORT, "dsen_rain800")] == [5, 4, 4]
    best = [checkpoints.load(there.run(name).file("best.pth")).step for name in (PAPER, SHORT, "dsen_rain800")]
    assert best == [2, 4, 2]
    assert [there.run(name).file("train.log").read_text()[-4:] for name in (PAPER, SHORT)] == ["at 5", "at 4"]


def test_a_run_of_another_recipe_is_not_replaced(here, there, archive):
    here.make_run(SHORT, 4)
    here.make_run(PAPER, 4)
    here.pack(archive, SHORT, PAPER)
    there.make_run(PAPER, 3, batch_size=8)
    before = there.files()
    with pytest.raises(Mismatch, match="batch_size"):
        there.take(archive)
    assert there.files() == before


def test_a_run_in_training_is_not_touched(here, there, archive):
    here.make_run(PAPER, 4)
    here.make_run(SHORT, 4)
    here.pack(archive, SHORT, PAPER)
    run = there.make_run(PAPER, 3)
    before = there.files()
    with open(run.file("train.log"), "ab") as file:
        assert lock(file)
        with pytest.raises(Occupied):
            there.take(archive)
        assert there.files() == before
    there.take(archive)
    assert there.step(PAPER) == 4


def test_on_a_full_disk_the_last_archive_is_kept(here, archive, monkeypatch):
    here.make_run(PAPER, 1)
    here.pack(archive, PAPER)
    before = archive.read_bytes()
    here.make_run(PAPER, 2)

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(NotWritable):
        here.pack(archive, PAPER)
    assert archive.read_bytes() == before


# ---------------------------------------------------------------- archives from elsewhere


@pytest.mark.parametrize(
    "name",
    [
        "latest.pth",
        "/latest.pth",
        "../latest.pth",
        f"../{PAPER}/latest.pth",
        f"{PAPER}/../latest.pth",
        f"{PAPER}/sub/latest.pth",
        f"{PAPER}//latest.pth",
        f"{PAPER}\\latest.pth",
        f"{PAPER}/step_2.pth",
        f"{PAPER}/latest.pth\n",
        "sdsen/latest.pth",
        f"{PAPER}_seed0/latest.pth",  # a second name of a row
        f"{PAPER}_seed٣/latest.pth",
        f"{PAPER}_paper/latest.pth",
    ],
)
def test_other_names_are_refused_and_nothing_is_written(there, archive, name):
    write_zip(archive, {f"{PAPER}/latest.pth": checkpoint_bytes(), name: checkpoint_bytes()})
    with pytest.raises(DamagedFile):
        there.take(archive)
    assert not there.folder.exists()


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


CHECKPOINTS = {
    "whole": lambda path: checkpoint_bytes(),
    "text": lambda path: b"no checkpoint",
    "cut off": lambda path: checkpoint_bytes()[:-100],
    "code": lambda path: checkpoint_bytes(code=Code(path)),
    "no step": lambda path: checkpoint_bytes(step="four"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_only_a_checkpoint_is_taken_and_no_code_is_run(there, archive, tmp_path, kind):
    data = CHECKPOINTS[kind](tmp_path / "made")
    write_zip(archive, {f"{SHORT}/latest.pth": checkpoint_bytes(), f"{PAPER}/latest.pth": data})
    with pytest.raises(DamagedFile) if kind != "whole" else nullcontext():
        there.take(archive)
    assert there.folder.exists() == (kind == "whole")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("excess", [0, 1])
def test_files_that_unpack_to_too_much_are_refused(there, archive, monkeypatch, excess):
    monkeypatch.setattr(packing, "LARGEST", 2**16)
    write_zip(archive, {f"{PAPER}/latest.pth": checkpoint_bytes(), f"{PAPER}/train.log": bytes(2**16 + excess)})
    with pytest.raises(DamagedFile) if excess else nullcontext():
        there.take(archive)
    assert there.folder.exists() != bool(excess)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut off", "spoilt", "logs alone"])
def test_what_is_no_archive_is_refused(here, there, archive, kind):
    if kind == "folder":
        archive.mkdir()
    elif kind == "text":
        archive.write_text("no archive")
    elif kind == "logs alone":
        write_zip(archive, {f"{PAPER}/train.log": "log"})
    elif kind != "missing":
        here.make_run(PAPER, 4)
        here.pack(archive, PAPER)
        data = bytearray(archive.read_bytes())
        data[len(data) // 2] ^= 255
        archive.write_bytes(data if kind == "spoilt" else data[:-30])
    with pytest.raises(MissingFile if kind == "missing" else DamagedFile):
        there.take(archive)
    assert not there.folder.exists()


def test_every_preset_of_the_tables_fits_into_an_archive():
    """Weights, and two moments of each, in float32."""
    largest = max(model.count_parameters(model.build(row.preset)) for row in all_rows())
    assert 10 * 3 * 4 * largest < packing.LARGEST
