"""`-a export --format onnx`: a network and its weights as one ONNX file, which runs without PyTorch and this code."""

import copy
import hashlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from base.console import log
from base.devices import autocast
from base.errors import BadArgument, MissingFile, Occupied
from base.files import write_bytes
from fast.convolution import FilterLayer, Pair
from model import Aggregation
from runs.restore import open_network

OPSET = 18
FOLDED = 2**22  # numbers that an operation on weights may give to be computed here, not when the file is run
PRECISIONS = {"auto": "float32", "float32": "float32", "fp16": "fp16"}
SOURCE = "S-DSEN, https://arxiv.org/abs/1811.04761"
LICENCE = "MIT"
SIGNATURE = "image (N, 3, H, W), RGB in [0, 1] -> derained, the same"


class PlainConv2d(nn.Conv2d):
    """A layer's folded filters (O, I, k, k): feature maps (N, I_k, H, W), orientations in the channels, side by side.

    With zeros around the image and constant channels as in `fast.convolution.conv2d`, but for any H and W in one graph.
    """

    def __init__(self, filters: Tensor, bias: Tensor | None, padding: Pair):
        outputs, inputs, kernel, _ = filters.shape
        super().__init__(inputs, outputs, kernel, padding=padding, bias=bias is not None)
        self.weight, self.bias = nn.Parameter(filters), None if bias is None else nn.Parameter(bias)

    def forward(self, *inputs: Tensor, constant: Tensor | None = None) -> Tensor:
        x = torch.cat(inputs, 1)
        if constant is None:
            return super().forward(x)
        known, rest = self.weight[:, : -len(constant)], self.weight[:, -len(constant) :]
        summed = (rest * constant[:, None, None]).sum(1, keepdim=True)  # (O, 1, k, k)
        ones = torch.ones_like(x[:1, :1])
        return F.conv2d(x, known, self.bias, padding=self.padding) + F.conv2d(ones, summed, padding=self.padding)


class PlainAggregation(Aggregation):
    """The pooling of orientations that lie in the channels: (N, C * 4, H, W) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(1, (-1, 4)))


def plain(network: nn.Module) -> nn.Module:
    """A copy with ordinary convolutions for group convolutions, and feature maps (N, C * 4, H, W) throughout."""
    network = copy.deepcopy(network)
    for name, layer in [*network.named_modules()]:
        if isinstance(layer, FilterLayer):
            network.set_submodule(name, PlainConv2d(*layer.make_filters(), layer.padding))
        elif isinstance(layer, Aggregation):
            network.set_submodule(name, PlainAggregation(layer.kind))
    return network


class Graph(nn.Module):
    """What the file computes: RGB images (N, 3, H, W) in [0, 1] -> O - R of a stage, the same."""

    def __init__(self, network: nn.Module, stage_num: int, precision: str):
        super().__init__()
        self.network, self.stage_num, self.precision = plain(network), stage_num, precision

    def forward(self, image: Tensor) -> Tensor:
        O = image.flip(1)  # the networks take BGR
        with autocast(self.precision, O.device):
            R = self.network(O, self.stage_num)[-1]
        return (O - R).clamp(0, 1).flip(1)


def to_onnx(network: nn.Module, stage_num: int, precision: str, metadata: dict[str, str]) -> bytes:
    """The content of an ONNX file: `image` (N, 3, H, W), RGB float32 in [0, 1] -> `derained`, the same.

    `network` is on the CPU in eval mode, `precision` float32 or fp16. Raises MissingFile without the packages.
    """
    if TorchVersion(torch.__version__) < "2.6":
        raise MissingFile(f"format onnx needs PyTorch 2.6 or newer, not {torch.__version__}: pip install -U torch")
    try:
        import onnx  # extras, which take two seconds to import
        import onnxscript
    except ModuleNotFoundError:
        raise MissingFile("format onnx needs some packages: pip install -r requirements-onnx.txt") from None
    shapes = {"image": {axis: torch.export.Dim(name) for axis, name in ((0, "N"), (2, "H"), (3, "W"))}}
    options: dict[str, Any] = {"input_names": ["image"], "output_names": ["derained"], "opset_version": OPSET}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        graph, example = Graph(network, stage_num, precision).eval(), torch.zeros(2, 3, 20, 24)
        program = torch.onnx.export(graph, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **options)
        assert program is not None
        onnxscript.optimizer.optimize(program.model, input_size_limit=FOLDED, output_size_limit=FOLDED)
    model = program.model_proto
    values = (model.graph.input, model.graph.output, model.graph.node, model.graph.initializer)
    for value in itertools.chain(*values):  # without the names and paths of the program's files
        del value.metadata_props[:]
    del model.graph.value_info[:]
    model.producer_name, model.doc_string = "S-DSEN", f"{SIGNATURE}. {LICENCE}"
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def export_onnx(names: list[str], overrides: dict[str, Any], stage_num: int | None) -> None:
    """`-a export --format onnx`: a checkpoint as a file of model_dir, up to stage `stage_num` (default: the last).

    `--run` is the file's name, the checkpoint's by default. `--precision fp16` computes as CUDA GPUs do here: in 16
    bits, except each stage's first and last layers. Raises Occupied where the file exists and `--run` is not given.
    """
    if strange := overrides.keys() - {"run", "model_dir", "precision", "log_level"}:
        raise BadArgument(f"--format onnx takes --run, --stages, --precision and --model_dir, not --{min(strange)}")
    if len(names) > 1:
        raise BadArgument("--format onnx takes one checkpoint: -a export without it writes the mean of several")
    precision = PRECISIONS.get(overrides.get("precision", "auto"))
    if precision is None:
        raise BadArgument(f"--format onnx has --precision float32 and fp16, not {overrides['precision']}")
    opened = open_network(None, names[0], {"device": "cpu", **overrides})
    last: Any = opened.network.output_num
    stage_num = last if stage_num is None else stage_num
    if stage_num not in range(1, last + 1):
        raise BadArgument(f"{opened.path} has stages 1 to {last}, not {stage_num}")
    path = Path(opened.settings.model_dir) / f"{overrides.get('run') or opened.name}.onnx"
    if path.is_file() and "run" not in overrides:
        raise Occupied(f"{path} exists: name the file with --run, which may replace one")
    log.info(f"{opened.path}, {stage_num} stage(s), {precision}: this takes half a minute")
    metadata = {
        "name": path.stem,
        "source": SOURCE,
        "licence": LICENCE,
        "weights": opened.path.name,
        "weights_sha256": hashlib.sha256(opened.path.read_bytes()).hexdigest(),
        "stages": str(stage_num),
        "precision": precision,
    }
    write_bytes(path, to_onnx(opened.network, stage_num, precision, metadata))
    log.info(f"{path}, {path.stat().st_size / 1e6:.1f} MB, opset {OPSET}: {SIGNATURE}")
