"""Archives of runs: what goes in comes out again, and what is refused of an archive from elsewhere."""

import io
import os
import pickle
import zipfile
from contextlib import nullcontext

import pytest
import torch

import model
from base.errors import DamagedFile, Mismatch, NotWritable, Occupied
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

    def archive(self, path, *names):
        return packing.Archive(path, [find_row(name) for name in names], self.overrides)

    def pack(self, path, *names):
        self.archive(path, *names).write()

    def take(self, path):
        packing.take(path, self.overrides)

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


def checkpoint_bytes(name=PAPER, **changes):
    """A checkpoint that can be unpacked, with some fields changed."""
    run = find_run(find_row(name), {})
    fields = {"step": 4, "settings": run.settings, "optimizer": {"state": {}, "param_groups": [{}]}, **changes}
    path = io.BytesIO()
    values = {name: fields.get(name) for name in ("network", "step", "optimizer", "random", "best_psnr")}
    settings = fields["settings"] and vars(fields["settings"])
    torch.save({"format": 1, **values, "network": {}, "settings": settings}, path)
    return path.getvalue()


def test_a_run_comes_out_as_it_went_in(here, there, archive):
    here.make_run(PAPER, 4, best=2)
    here.make_run(SHORT, 6, best=4)
    here.pack(archive, PAPER, SHORT)
    logs = {"train.log", "tables.log", "settings.json"}
    with zipfile.ZipFile(archive) as file:
        assert set(file.namelist()) == {
            *(f"{PAPER}/{name}" for name in {"latest.pth", *logs}),
            *(f"{SHORT}/{name}" for name in {"latest.pth", "best.pth", *logs}),
        }
    there.take(archive)
    old, new = here.files(), there.files()
    assert new == {name: old[name] for name in new}
    assert len(new) == 9
    there.take(archive)
    assert there.files() == new


def test_a_run_that_is_further_stays_and_one_that_is_behind_is_replaced(here, there, archive):
    here.make_run(PAPER, 4)
    here.make_run(SHORT, 4, best=4)
    here.pack(archive, PAPER, SHORT)
    further = there.make_run(PAPER, 5, best=5)
    behind = there.make_run(SHORT, 3, best=3)
    there.take(archive)
    assert (there.step(PAPER), there.step(SHORT)) == (5, 4)
    assert packing.run_files(further)["train.log"].read_text().endswith("at 5")
    assert packing.run_files(behind)["train.log"].read_text().endswith("at 4")
    assert checkpoints.load(packing.run_files(behind)["best.pth"]).step == 4


def test_the_best_checkpoint_of_a_replaced_run_goes_with_it(here, there, archive):
    here.make_run(PAPER, 4)
    here.pack(archive, PAPER)
    run = there.make_run(PAPER, 3, best=3)
    there.take(archive)
    assert checkpoints.find(PAPER, run.settings.model_path.parent) == run.latest


def test_a_run_of_another_recipe_is_not_replaced(here, there, archive):
    here.make_run(SHORT, 4)
    here.make_run(PAPER, 4)
    here.pack(archive, SHORT, PAPER)
    there.make_run(PAPER, 3, batch_size=8)
    before = there.files()
    with pytest.raises(Mismatch):
        there.take(archive)
    assert there.files() == before


def test_a_run_in_training_is_not_touched(here, there, archive):
    here.make_run(PAPER, 4)
    here.make_run(SHORT, 4)
    here.pack(archive, SHORT, PAPER)
    run = there.make_run(PAPER, 3)
    before = there.files()
    with open(packing.run_files(run)["train.log"], "ab") as file:
        assert lock(file)
        with pytest.raises(Occupied):
            there.take(archive)
        assert there.files() == before
    there.take(archive)
    assert there.step(PAPER) == 4


def packed_steps(archive):
    return {run.name: checkpoint.step for run, _, checkpoint in packing.read(archive, {})}


def test_an_archive_is_not_replaced_by_less(here, there, archive):
    here.make_run(PAPER, 4)
    here.make_run(SHORT, 4)
    here.pack(archive, PAPER, SHORT)
    before = archive.read_bytes()
    for name, step in ((PAPER, 3), (SHORT, 4), (PAPER, 6)):  # SHORT is missing; PAPER is behind; then neither
        assert archive.read_bytes() == before
        with pytest.raises(Mismatch):
            there.pack(archive, PAPER)
        there.make_run(name, step)
    there.pack(archive, PAPER)
    assert packed_steps(archive) == {PAPER: 6, SHORT: 4}
    archive.write_text("something else")
    with pytest.raises(DamagedFile):
        there.pack(archive, PAPER)
    assert archive.read_text() == "something else"


def test_an_archive_is_kept_current_but_not_all_the_time(here, archive, monkeypatch):
    kept = here.archive(archive, PAPER)
    kept.keep_current()
    assert not archive.exists()  # there is no checkpoint yet
    here.make_run(PAPER, 1)
    kept.keep_current()
    first = archive.stat().st_mtime_ns
    here.make_run(PAPER, 2)
    kept.keep_current()
    assert archive.stat().st_mtime_ns == first
    monkeypatch.setattr(packing, "SECONDS", 0)
    kept.keep_current()
    second = archive.stat().st_mtime_ns
    assert second > first
    kept.keep_current()  # nothing has changed
    assert archive.stat().st_mtime_ns == second
    assert packed_steps(archive) == {PAPER: 2}


def test_a_full_disk_does_not_stop_the_rows_and_leaves_the_last_archive(here, archive, monkeypatch):
    here.make_run(PAPER, 1)
    kept = here.archive(archive, PAPER)
    kept.write()
    before = archive.read_bytes()
    monkeypatch.setattr(packing, "SECONDS", 0)
    here.make_run(PAPER, 2)

    def replace(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        kept.keep_current()
        assert archive.read_bytes() == before
        with pytest.raises(NotWritable):
            kept.write()
    kept.keep_current()
    assert archive.read_bytes() != before


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
        f"{PAPER}/best.pth",  # which this row does not test
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


def with_code(path):
    buffer = io.BytesIO()
    torch.save({"format": 1, "network": {}, "settings": None, "step": 1, "code": Code(path)}, buffer)
    return buffer.getvalue()


def compressed(data):
    """A checkpoint whose parts are compressed, as PyTorch reads but does not write them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
        new.writestr("archive/data/zeros", bytes(2**20))
    return buffer.getvalue()


CHECKPOINTS = {
    "whole": lambda path: checkpoint_bytes(),
    "text": lambda path: b"no checkpoint",
    "cut off": lambda path: checkpoint_bytes()[:-100],
    "code": with_code,
    "plain pickle": lambda path: pickle.dumps(Code(path)),
    "compressed": lambda path: compressed(checkpoint_bytes()),
    "weights alone": lambda path: checkpoint_bytes(optimizer=None),
    "the published code's": lambda path: checkpoint_bytes(settings=None),
    "no step": lambda path: checkpoint_bytes(step="4"),
    "another network's": lambda path: checkpoint_bytes("dsen_rain800"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_only_a_checkpoint_of_the_rows_network_is_taken(there, archive, tmp_path, kind):
    data = CHECKPOINTS[kind](tmp_path / "made")
    write_zip(archive, {f"{SHORT}/latest.pth": checkpoint_bytes(), f"{PAPER}/latest.pth": data})
    if kind == "whole":
        there.take(archive)
        assert there.step(PAPER) == 4
        return
    with pytest.raises(DamagedFile):
        there.take(archive)
    assert not there.folder.exists()
    assert not (tmp_path / "made").exists()


def test_the_best_checkpoint_is_checked_too(there, archive):
    write_zip(archive, {f"{SHORT}/latest.pth": checkpoint_bytes(), f"{SHORT}/best.pth": b"no checkpoint"})
    with pytest.raises(DamagedFile):
        there.take(archive)
    assert not there.folder.exists()


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
    with pytest.raises(DamagedFile):
        there.take(archive)
    assert not there.folder.exists()


def test_every_preset_of_the_tables_fits_into_an_archive():
    """Weights, and two moments of each, in float32."""
    largest = max(model.count_parameters(model.build(row.preset)) for row in all_rows())
    assert 10 * 3 * 4 * largest < packing.LARGEST
