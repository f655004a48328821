"""What is timed: this code and the plain published forward pass (reference.py), with the same weights and inputs."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import losses
import model
import reference
from base.devices import autocast
from fast import graphs, winograd
from main import record_step, train_step
from runs.optimization import can_record, make_optimizer
from runs.restore import Restoring, restore
from settings import Settings, override

SIDES = ("reference", "this code")
KINDS = ("inference", "images", "training")  # of sizes (H, W), (N, H, W), and (N, patch)
_REPLAYING = ExitStack()  # contexts that last as long as the program


@dataclass(frozen=True)
class Variant:
    """A way to compute."""

    settings: dict[str, Any] = field(default_factory=dict)
    plain: bool = False  # the reference
    compiler: bool = True  # Winograd's method in C++
    only_on: str = ""  # the one device type that it is for


VARIANTS = {
    "this code": Variant(),
    "float32": Variant({"precision": "float32"}),
    "float32 without a C++ compiler": Variant({"precision": "float32"}, compiler=False, only_on="cpu"),
    "bf16": Variant({"precision": "bf16"}),
    "bf16, torch.compile": Variant({"precision": "bf16", "compile": "on"}),
    "bf16, --cuda_graphs off": Variant({"precision": "bf16", "cuda_graphs": "off"}, only_on="cuda"),
    "bf16, --accumulate 4": Variant({"precision": "bf16", "accumulate": 4}),
    "bf16, --checkpoint_activations true": Variant({"precision": "bf16", "checkpoint_activations": True}),
    "reference": Variant({"precision": "float32"}, plain=True),
    "reference, bf16": Variant({"precision": "bf16"}, plain=True),
}
STEPS = {  # the variants of a training step that may be the fastest on a device
    "cpu": ("this code",),
    "cuda": ("bf16, --cuda_graphs off", "bf16", "bf16, torch.compile"),
}


def variants_for(device: torch.device) -> list[str]:
    """The names of the variants that mean something on a device."""
    return [name for name, variant in VARIANTS.items() if variant.only_on in ("", device.type)]


def make(kind: str, name: str, settings: Settings, device: torch.device, size: tuple[int, ...]) -> Callable[[], Any]:
    """A function that computes a kind the variant's way, on inputs of `size`, always the same ones.

    It returns [B_1, ..., B_T], each (3, H, W), for inference; [R_1, ..., R_T], each (N, 3, H, W), for images; and the
    loss for a training step.
    """
    variant = VARIANTS[name]
    settings = override(settings, variant.settings)
    run = {"inference": _inference, "images": _images, "training": _training}[kind](variant, settings, device, size)

    def run_variant() -> Any:
        with ExitStack() as stack:
            if kind != "training":
                stack.enter_context(torch.no_grad())
            if not variant.compiler:
                stack.enter_context(mock.patch.object(winograd, "library", return_value=None))
            if variant.plain:
                stack.enter_context(autocast(settings.precision, device))
            return run()

    return run_variant


def _network(variant: Variant, settings: Settings, device: torch.device) -> tuple[torch.nn.Module, torch.Generator]:
    """The network, with the same weights at each call, and a generator for its inputs."""
    torch.manual_seed(0)
    network = model.build(settings)
    if variant.plain:
        network = reference.build(settings, network.state_dict())
    return network.to(device), torch.Generator().manual_seed(0)


def _inference(variant: Variant, settings: Settings, device: torch.device, size: tuple[int, int]) -> Callable:
    network, generator = _network(variant, settings, device)
    O = torch.rand(3, *size, generator=generator).to(device)
    if variant.plain:
        return lambda: reference.restore(network.eval(), O)
    _REPLAYING.enter_context(graphs.replaying(network.eval(), device))  # as commands do with images of one size
    return lambda: list(restore(network, O, Restoring(precision=settings.precision)))


def _images(variant: Variant, settings: Settings, device: torch.device, size: tuple[int, int, int]) -> Callable:
    network, generator = _network(variant, settings, device)
    number, height, width = size
    O = torch.rand(number, 3, height, width, generator=generator).to(device)
    if variant.plain:
        return lambda: network.eval()(O)
    _REPLAYING.enter_context(graphs.replaying(network.eval(), device))

    def run() -> list[Tensor]:
        with autocast(settings.precision, device):
            return network.at_once(O, network.output_num)

    return run


def _training(variant: Variant, settings: Settings, device: torch.device, size: tuple[int, int]) -> Callable:
    network, generator = _network(variant, settings, device)
    number, patch = size
    B = torch.rand(number, 3, patch, patch, generator=generator)
    O = (B + 0.2 * torch.rand(B.shape, generator=generator)).clamp(0, 1).to(device)
    B = B.to(device)
    network.train()
    if variant.plain:
        adam = torch.optim.Adam(network.parameters(), lr=settings.lr)
        return lambda: reference.train_step(network, adam, O, B)
    optimizer = make_optimizer(network, settings.lr)
    network.checkpoint_activations = settings.checkpoint_activations
    if settings.compile == "on":
        torch.compiler.reset()  # else it stops compiling the same function for one network more
        network.compile()
    records = can_record(settings, device)
    # In the first step, as in a training.
    recorded = cache(lambda: record_step(network, losses.build(settings), settings, O, B) if records else None)
    return lambda: train_step(network, optimizer, O, B, settings, scored=False, recorded=recorded())["loss"]
