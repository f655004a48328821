"""Checkpoints: whole or not at all, no code is run, found by name, and the published format."""

import os
import pickle
import resource

import pytest
import torch

import model
from base.errors import BadArgument, DamagedFile, Mismatch, MissingFile, NotWritable
from base.files import ROOT
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import resolve, to_dict

SETTINGS = resolve("dsen", {"channel": 2, "depth": 4, "run": "tiny"})


def make(step=7):
    torch.manual_seed(step)
    network = model.build(SETTINGS)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(1, 3, 8, 8))[0].sum().backward()
    optimizer.step()
    random = {"cpu": torch.get_rng_state()}
    return Checkpoint(network.state_dict(), step, SETTINGS, optimizer.state_dict(), random, 20.5)


def test_round_trip(tmp_path):
    saved = make()
    checkpoints.save(tmp_path / "run" / "latest.pth", saved)
    read = checkpoints.load(tmp_path / "run" / "latest.pth")
    assert (read.step, read.settings, read.best_psnr) == (7, SETTINGS, 20.5)
    assert read.versions["torch"] == str(torch.__version__)
    for name, value in saved.network.items():
        assert torch.equal(read.network[name], value)
    assert torch.equal(read.random["cpu"], saved.random["cpu"])
    assert torch.equal(read.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"])
    assert os.listdir(tmp_path / "run") == ["latest.pth"]


def test_disk_that_takes_no_more_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "latest.pth"
    checkpoints.save(path, make(step=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the system refuses to write on, as a full disk does
    try:
        with pytest.raises(NotWritable):
            checkpoints.save(path, make(step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.load(path).step == 1
    assert os.listdir(tmp_path) == ["latest.pth"]


class Malicious:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_with_code_is_not_run(tmp_path):
    folder = tmp_path / "made by the pickle"
    torch.save({"network": Malicious(folder)}, tmp_path / "zip.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"network": Malicious(folder)}))
    for name in ("zip.pth", "pickle.pth"):
        with pytest.raises(DamagedFile):
            checkpoints.load(tmp_path / name)
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02", None])
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "latest.pth"
    checkpoints.save(path, make())
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(DamagedFile):
        checkpoints.load(path)


@pytest.mark.parametrize("value", [{"state_dict": {}}, [1, 2], torch.zeros(3)])
def test_foreign_file(tmp_path, value):
    torch.save(value, tmp_path / "foreign.pth")
    with pytest.raises(DamagedFile):
        checkpoints.load(tmp_path / "foreign.pth")


def test_newer_format(tmp_path):
    torch.save({"format": checkpoints.FORMAT + 1, "network": {}, "settings": {}, "step": 0}, tmp_path / "new.pth")
    with pytest.raises(DamagedFile):
        checkpoints.load(tmp_path / "new.pth")


def test_a_checkpoint_of_a_network_that_was_growing_has_the_stages_of_that_moment(tmp_path):
    settings = to_dict(resolve("sdsen", {"channel": 2, "depth": 4}))
    torch.save({"format": 1, "network": {}, "settings": settings, "step": 4, "stages": 2}, tmp_path / "growing.pth")
    assert checkpoints.load(tmp_path / "growing.pth").settings.stage_num == 2


def test_another_architecture():
    network = model.build(resolve("dsen", {"channel": 2, "depth": 5}))
    with pytest.raises(Mismatch):
        checkpoints.load_weights(network, make(), "here.pth")
    network = model.build(resolve("dsen", {"channel": 4, "depth": 4}))
    with pytest.raises(Mismatch):
        checkpoints.load_weights(network, make(), "here.pth")


def test_published_checkpoint(tmp_path):
    saved = make(step=1234)
    torch.save({"net": saved.network, "clock": 1234, "opt": saved.optimizer}, tmp_path / "latest")
    read = checkpoints.load(tmp_path / "latest")
    assert (read.step, read.settings) == (1234, None)
    checkpoints.load_weights(model.build(SETTINGS), read, tmp_path / "latest")


def test_find(tmp_path, monkeypatch):
    for name in ("a/latest.pth", "a/best.pth", "a/step_5.pth", "b/latest.pth", "shipped.pth", "b.pth"):
        checkpoints.save(tmp_path / name, make())

    def file(name):
        return str(checkpoints.find(name, tmp_path).relative_to(tmp_path))

    assert file("a") == "a/best.pth"
    with pytest.raises(BadArgument):  # a run of one's own or shipped weights?
        file("b")
    assert file("b/latest") == "b/latest.pth"
    assert file("b.pth") == "b.pth"
    assert file("a/latest") == "a/latest.pth"
    assert file("a/step_5.pth") == "a/step_5.pth"
    assert file("shipped") == "shipped.pth"
    assert file(str(tmp_path / "a" / "latest.pth")) == "a/latest.pth"
    monkeypatch.chdir(tmp_path / "a")
    assert checkpoints.find("step_5.pth", tmp_path).samefile(tmp_path / "a" / "step_5.pth")
    shipped = ROOT / "models" / "photographs.pth"
    assert checkpoints.find("models/photographs.pth", tmp_path) == shipped  # as typed in `config`
    with pytest.raises(MissingFile, match="a, b, shipped"):
        checkpoints.find("c", tmp_path)
    with pytest.raises(MissingFile):
        checkpoints.find("c", tmp_path / "empty")
