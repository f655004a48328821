"""The compiled library: threads, where it is kept, and what happens without a compiler."""

import functools
import logging
import shutil
import tempfile

import pytest
import torch

import model
from base.console import log, set_up_log
from fast import winograd
from fast.any_size import rain_layers

compiled = pytest.mark.skipif(winograd.library() is None, reason="no C++ compiler")


@pytest.fixture
def one_thread():
    """One thread at first; afterwards as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A copy of the source in a folder of its own, for which nothing has been compiled."""
    source = tmp_path / "winograd.cpp"
    source.write_bytes(winograd.SOURCE.read_bytes())
    monkeypatch.setattr(winograd, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return source


@pytest.fixture
def build():
    """A function that looks for the library, as a new process does, and compiles it if need be."""
    return winograd.library.__wrapped__


@pytest.fixture
def compiled_to(monkeypatch):
    """The files that libraries were compiled to: copies of the one that there is, to save time."""
    files, library = [], winograd.library()._name

    def compile_to(_, file):
        files.append(file)
        shutil.copy(library, file)

    monkeypatch.setattr(winograd, "_compile", compile_to)
    return files


@compiled
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_work_and_change_nothing(threads, one_thread):
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 3, 16, 36, 40, generator=generator)
    matrices = torch.randn(64, 16, 24, generator=generator)

    def results():
        pair = [x.permute(0, 2, 3, 1)], gradient.permute(0, 2, 3, 1)
        return *winograd._convolve([x], matrices, None, [8, 16]), winograd.matrices_gradient(*pair)

    *wanted, wanted_gradient = results()
    torch.set_num_threads(threads)
    *found, found_gradient = results()
    assert all(map(torch.equal, found, wanted))
    # A sum over all tiles, of which each thread adds up its own.
    assert (found_gradient - wanted_gradient).abs().max() < 1e-5 * wanted_gradient.abs().max()


REASONS = {
    "no compiler": ("/nowhere/c++", "/nowhere/c++"),
    "no compiler at all": ("false", "false"),
    "source that does not compile": ("", "no_such_type"),
}


@pytest.mark.parametrize("case", REASONS)
def test_without_the_library_one_line_says_why_and_the_result_is_the_same(case, source, monkeypatch, capsys):
    compiler, reason = REASONS[case]
    monkeypatch.setenv("CXX", compiler)
    source.write_text("// first line\nno_such_type x;\n")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    set_up_log("warning")
    torch.manual_seed(0)
    network, O = model.build("sdsen_s2").eval(), torch.rand(3, 21, 30)
    with torch.no_grad():
        wanted = list(rain_layers(network, O)), network(O[None])
    capsys.readouterr()
    monkeypatch.setattr(winograd, "library", functools.cache(winograd.library.__wrapped__))
    with torch.no_grad():
        found = list(rain_layers(network, O)), network(O[None])
    assert winograd.library() is None
    [line] = capsys.readouterr().out.splitlines()
    assert reason in line
    for one, other in zip(found, wanted, strict=True):
        assert all((R - S).abs().max() < 1e-5 for R, S in zip(one, other, strict=True))


@compiled
def test_the_library_is_compiled_once_and_never_left_half_written(source, build):
    assert build() is not None
    [file] = (source.parent / "__pycache__").iterdir()
    written = file.stat().st_mtime_ns
    assert build() is not None
    assert file.stat().st_mtime_ns == written  # not compiled again
    source.write_text("this is no C++")
    assert build() is None
    assert list((source.parent / "__pycache__").iterdir()) == [file]


@compiled
def test_beside_a_source_that_can_not_be_written_it_is_kept_in_the_users_cache(compiled_to, source, build, tmp_path):
    (source.parent / "__pycache__").touch()  # in the way of the folder
    assert build() is not None
    assert build() is not None
    [file] = compiled_to  # not compiled again
    assert file.parent == tmp_path / "cache" / "sdsen"
    assert not file.parent.stat().st_mode & 0o022


@compiled
def test_no_library_is_taken_from_a_folder_that_others_can_write_to(compiled_to, source, build, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (source.parent / "__pycache__").touch()
    folder = tmp_path / "cache" / "sdsen"
    assert build() is not None
    folder.chmod(0o777)
    assert build() is not None
    assert compiled_to[0].parent == folder
    assert compiled_to[1].parent.parent == tmp_path / "temporary"
    assert not list((tmp_path / "temporary").iterdir())  # the folder was for that call alone
