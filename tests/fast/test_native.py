"""The compiled code against winograd.py in torch, and what happens where there is no compiler."""

import os
import subprocess
import sys
import time

import pytest
import torch

from base.files import ROOT
from fast import native, winograd

compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture
def in_torch(monkeypatch):
    """A function that calls another one without the compiled code."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            return function(*arguments).clone()

    return call


@pytest.fixture
def one_thread():
    """One thread at first; afterwards as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("channels", [8, 9, 16, 40, 83])
@pytest.mark.parametrize("images", [(), (3,)], ids=["one-image", "images"])
def test_a_band_has_the_same_values_and_rows(images, channels, in_torch):
    generator = torch.Generator().manual_seed(channels)
    band = torch.randn(*images, 12 + 4, 4, 5 + 2, channels, generator=generator)
    found = winograd.transform_windows(band).clone()
    wanted = in_torch(winograd.transform_windows, band)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()

    def rows(values):
        out = torch.full((*images, 12, 4, 5, channels), 7.0)
        winograd.transform_back(values.clone(), out)
        return out

    assert (rows(found) - in_torch(rows, found)).abs().max() < 1e-5 * rows(found).abs().max()


@compiled
@pytest.mark.parametrize("memory", ["channels-last", "channels-first"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 9), (16, 16), (21, 34)])
@pytest.mark.parametrize(
    ("channels", "results"), [((8,), (9,)), ((40, 40), (40,)), ((17, 8, 30), (8, 64)), ((20,), (83,))]
)
def test_a_convolution_and_its_gradient_are_those_in_torch(channels, results, height, width, memory, in_torch):
    generator = torch.Generator().manual_seed(height)
    shapes = [(5, height, width, count) for count in (*channels, sum(results))]
    *inputs, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    if memory == "channels-first":
        *inputs, gradient = (x.movedim(-1, 1).contiguous().movedim(1, -1) for x in (*inputs, gradient))
    matrices = torch.randn(64, sum(channels), sum(results), generator=generator)
    bias = torch.randn(sum(results), generator=generator)

    def convolve():
        return torch.cat(winograd._convolve(inputs, matrices, bias, *results), 1)

    for found, wanted in (
        (convolve(), in_torch(convolve)),
        (winograd._matrices_gradient(inputs, gradient), in_torch(winograd._matrices_gradient, inputs, gradient)),
    ):
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@compiled
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("results", [8, 16, 24, 32, 40, 48, 120])
@pytest.mark.parametrize("tiles", [1, 7, 8, 19])
def test_the_products_are_those_in_torch(tiles, results, add):
    generator = torch.Generator().manual_seed(tiles)
    values = winograd.work.values("test", 2, 1, tiles, 12).normal_(generator=generator)
    matrices = torch.randn(64, 12, results, generator=generator)
    product = winograd.work.values("product", 2, 1, tiles, results)
    winograd.work.kept["product"].fill_(7.0)
    product.normal_(generator=generator)
    wanted = values.double().reshape(64, -1, 12) @ matrices.double()
    if add:
        wanted += product.double().reshape(wanted.shape)
    memory = winograd.work.kept["product"].clone()
    native.multiply(values, matrices, product, add)
    assert (product.reshape(wanted.shape) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    between = torch.ones_like(winograd.work.kept["product"]).bool()
    between.as_strided(product.shape, product.stride()).fill_(False)
    assert torch.equal(winograd.work.kept["product"][between], memory[between])  # nothing is written beyond the rows


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_and_change_nothing(threads, one_thread):
    generator = torch.Generator().manual_seed(0)
    band = torch.randn(2, 36, 4, 9, 40, generator=generator)
    x, gradient = torch.randn(2, 3, 36, 40, 16, generator=generator)
    matrices = torch.randn(64, 16, 24, generator=generator)

    def results():
        values = winograd.transform_windows(band).clone()
        return values, *winograd._convolve([x], matrices, None, 8, 16), winograd._matrices_gradient([x], gradient)

    *wanted, wanted_gradient = results()
    torch.set_num_threads(threads)
    *found, found_gradient = results()
    assert all(map(torch.equal, found, wanted))
    # A sum over all tiles, of which each thread adds up its own.
    assert (found_gradient - wanted_gradient).abs().max() < 1e-5 * wanted_gradient.abs().max()


@compiled
def test_the_64_values_lie_in_different_lines_of_the_cache():
    values = winograd.work.values("test", 2, 16, 16, 40)
    addresses = [values[i, j].data_ptr() for i in range(8) for j in range(8)]
    assert len({address // 64 % 64 for address in addresses}) == 64
    assert values.view(64, -1, 40).data_ptr() == values.data_ptr()


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"], ids=["none", "broken"])
def test_without_a_compiler_a_line_says_so_and_the_result_is_the_same(compiler, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "config")!r})
import logging; logging.basicConfig(level="INFO")
import torch, model
from fast import native
torch.manual_seed(0)
O = torch.rand(3, 21, 30)
with torch.no_grad():
    R = list(model.build("sdsen_s2").eval().each_stage(O))[-1]
torch.save((native.library() is None, R), sys.argv[1])
"""
    results = []
    for name, environment in (("with", {}), ("without", {"CXX": compiler})):
        file = tmp_path / name
        command = [sys.executable, "-c", code, str(file)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        results.append((*torch.load(file), done.stderr.count("no C++ compiler that works")))
    (missing, wanted, lines), (without, found, said) = results
    assert (without, said) == (True, 1)
    assert lines == missing
    assert (found - wanted).abs().max() < 1e-5


@compiled
def test_the_compiled_code_is_faster_than_torch(in_torch, one_thread):
    """Vectors that are wider than the processor's registers make it four times as slow.

    In CPU time, as other programs may keep the cores busy, and on one thread, as threads that wait for each other take
    it too.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 64, 40, generator=generator)
    matrices = torch.randn(64, 40, 40, generator=generator)

    def seconds():
        begin = time.process_time()
        winograd._convolve([x], matrices, None, 40)
        return torch.tensor(time.process_time() - begin)

    compiled_and_not = [(seconds(), in_torch(seconds)) for _ in range(7)]
    assert min(c for c, _ in compiled_and_not) < min(t for _, t in compiled_and_not)


@compiled
def test_half_a_file_is_never_left(tmp_path, monkeypatch):
    source = tmp_path / "winograd.cpp"
    source.write_bytes(native.SOURCE.read_bytes())
    monkeypatch.setattr(native, "SOURCE", source)
    make = native.library.__wrapped__
    assert make() is not None
    [made] = (tmp_path / "__pycache__").iterdir()
    times = made.stat().st_mtime_ns
    assert make() is not None
    assert made.stat().st_mtime_ns == times  # not compiled again
    source.write_text("this is no C++")
    assert make() is None
    assert list((tmp_path / "__pycache__").iterdir()) == [made]
