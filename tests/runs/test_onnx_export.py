"""Networks as ONNX files: the outputs of PyTorch in onnxruntime at any size, plain convolutions, and the example."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections import deque

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import model
import onnx_files
from base.errors import BadArgument, MissingFile, Occupied
from base.files import ROOT
from commands import call
from runs.onnx_export import to_onnx
from runs.restore import open_network, restore, restore_8bit
from settings import resolve

FAST = ROOT / "models" / "rain800_fast.pth"
SIZES = [(1, 1, 1), (1, 2, 3), (2, 4, 9), (1, 17, 33), (1, 321, 481)]  # N, H, W
SMALL = {"channel": 2, "depth": 4, "stage_num": 2}
PRESETS = {  # and settings that make them small
    **{name: SMALL for name in ("sdsen", "mdsen_sc", "mcnn_sr")},
    "dsen_maxpool": {"channel": 2, "depth": 4, "use_se": False},
    "coarse2fine": {"channel": 4, "depth": 2, "stage_num": 2},
    "php_hierarchical": {"refined": False},
}


def run(content, image):
    """What the file makes of RGB images (N, 3, H, W)."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["derained"], {"image": image.numpy()})[0])


def derained(network, image, stage_num=None):
    """The same by PyTorch."""
    with torch.no_grad():
        return torch.stack([deque(restore(network, O, stage_num=stage_num), 1)[0] for O in image.flip(1)]).flip(1)


def random_image(number, height, width):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of `rain800_fast`, by the command."""
    folder = tmp_path_factory.mktemp("models")
    call("-a", "export", "-m", FAST, "--format", "onnx", "--model_dir", folder)
    return folder / "rain800_fast.onnx"


@pytest.mark.slow
def test_the_file_of_pretrained_weights_has_pytorchs_outputs_at_every_size(exported):
    network = open_network(None, str(FAST), {"device": "cpu"}).network
    for size in SIZES:
        image = random_image(*size)
        assert (run(exported.read_bytes(), image) - derained(network, image)).abs().max() < 1e-4


@pytest.mark.slow
def test_the_file_says_what_it_is(exported):
    file = onnx.load(exported)
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    wanted = {"name": "rain800_fast", "licence": "MIT", "weights": "rain800_fast.pth", "stages": "1"}
    assert wanted.items() <= metadata.items()
    assert metadata["weights_sha256"] == hashlib.sha256(FAST.read_bytes()).hexdigest()
    assert [entry.version for entry in file.opset_import] == [18]
    sizes = [axis.dim_param or axis.dim_value for axis in file.graph.input[0].type.tensor_type.shape.dim]
    assert (file.graph.input[0].name, sizes) == ("image", ["N", 3, "H", "W"])
    assert str(ROOT).encode() not in exported.read_bytes()  # no folder of a machine


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_network_is_plain_convolutions_of_stored_filters(preset):
    torch.manual_seed(0)
    network = model.build(resolve(preset, PRESETS[preset])).eval()
    content = to_onnx(network, network.output_num, "float32", {})
    graph = onnx.load_from_string(content).graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) >= 3
    assert {node.input[1] for node in convolutions} <= {stored.name for stored in graph.initializer}
    for size in SIZES[:-1]:
        image = random_image(*size)
        assert (run(content, image) - derained(network, image)).abs().max() < 1e-4


@pytest.mark.slow
def test_fewer_stages_are_the_first_ones(tmp_path):
    call("-a", "export", "-m", FAST.with_name("photographs.pth"), "--format", "onnx", "--stages", 1, "--run", "one",
         "--model_dir", tmp_path)  # fmt: skip
    network, image = open_network(None, "photographs", {"device": "cpu"}).network, random_image(1, 20, 31)
    found = run((tmp_path / "one.onnx").read_bytes(), image)
    assert (found - derained(network, image, 1)).abs().max() < 1e-4
    assert (found - derained(network, image)).abs().max() > 1e-2


@pytest.mark.slow
def test_16_bits_are_close_on_a_photograph_and_half_as_large(exported):
    network = open_network(None, str(FAST), {"device": "cpu"}).network
    content = to_onnx(network, 1, "fp16", {})
    assert len(content) < 0.6 * exported.stat().st_size
    photo = cv2.imread(str(ROOT / "docs" / "pictures" / "chelsea.jpg"))[-120:, :160, ::-1].transpose(2, 0, 1)[None]
    image = torch.from_numpy(photo / np.float32(255))
    assert 0 < (run(content, image) - derained(network, image)).abs().max() < 1 / 255


@pytest.mark.slow
def test_the_documented_example_needs_neither_pytorch_nor_this_repository(exported, tmp_path):
    (example,) = re.findall(r"```python\n(import cv2\n.*?)```", (ROOT / "docs" / "USE.md").read_text(), re.DOTALL)
    photo = cv2.imread(str(ROOT / "docs" / "pictures" / "chelsea.jpg"))[-100:, :90]
    cv2.imwrite(str(tmp_path / "photo.jpg"), photo)
    shutil.copy(exported, tmp_path / "photographs.onnx")
    code = f"import sys; sys.modules['torch'] = None\n{example}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, check=True)
    network = open_network(None, str(FAST), {"device": "cpu"}).network
    O = torch.from_numpy(cv2.imread(str(tmp_path / "photo.jpg")).transpose(2, 0, 1).copy())
    wanted = restore_8bit(network, O, torch.device("cpu"))[-1].numpy().transpose(1, 2, 0)
    assert np.abs(cv2.imread(str(tmp_path / "derained.png")).astype(int) - wanted).max() <= 1


@pytest.mark.slow
def test_the_benchmark_compares_files_and_weights(exported, capsys):
    onnx_files.main(["-m", str(FAST), "--onnx", str(exported), "--sizes", "9x8", "2x3", "--repeats", "1"])
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    differences = [float(row[2]) for row in rows if row[0].strip() == exported.name and len(row) == 4]
    assert len(differences) == 2
    assert max(differences) < 255e-4


@pytest.mark.parametrize(
    "words",
    [
        "-a export -m rain800_fast --format onnx --stages 2",
        "-a export -m rain800_fast --format onnx --stages 0",
        "-a export -m rain800_fast --format onnx --precision bf16",
        "-a export -m rain800_fast --format onnx --stage_num 1",
        "-a export -m rain800_fast rain800 --format onnx --run both",
        "-a export -m rain800_fast --stages 1 --run one",
        "-a test -m rain800_fast --format onnx",
    ],
)
def test_what_export_does_not_take(words):
    with pytest.raises(BadArgument):
        call(*words.split())


def test_a_file_is_not_replaced_unless_it_is_named(tmp_path):
    (tmp_path / "rain800_fast.onnx").write_text("mine")
    with pytest.raises(Occupied):
        call("-a", "export", "-m", FAST, "--format", "onnx", "--model_dir", tmp_path)
    assert (tmp_path / "rain800_fast.onnx").read_text() == "mine"


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_export_without_its_packages(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingFile, match=r"requirements-onnx\.txt"):
        call("-a", "export", "-m", FAST, "--format", "onnx", "--model_dir", tmp_path)
