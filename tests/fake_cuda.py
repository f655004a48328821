"""Fake GPUs: only what is below torch.cuda's Python code is replaced. Tensors stay on the CPU."""

import importlib
from types import SimpleNamespace

import pytest
import torch


class FakeCuda:
    """Cards by their compute capability. `current` is the index of the current one, 0 at first."""

    def __init__(self, *capabilities: tuple[int, int]):
        self.current = 0
        self.cards = [
            SimpleNamespace(name=f"Card {index}", major=major, minor=minor, total_memory=2**34)
            for index, (major, minor) in enumerate(capabilities)
        ]

    def count(self) -> int:
        return len(self.cards)

    def choose(self, index: int) -> None:
        if not 0 <= index < len(self.cards):
            raise RuntimeError("CUDA error: invalid device ordinal")
        self.current = index

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let PyTorch find these cards, with CUDA not yet initialised and TF32 on."""
        importlib.import_module("torch._dynamo")  # optimisers import it, and it needs more than is replaced here
        below = {
            "_cuda_init": lambda: None,
            "_cuda_getDeviceCount": self.count,
            "_cuda_getDevice": lambda: self.current,
            "_cuda_setDevice": self.choose,
            "_cuda_getArchFlags": lambda: None,
        }
        for name, function in below.items():
            patch.setattr(torch._C, name, function, raising=False)
        state = {
            "_cudart": object(),
            "_device_count_nvml": self.count,
            "_get_device_properties": self.cards.__getitem__,
            "default_generators": tuple(torch.Generator() for _ in self.cards),
            "_cached_device_count": None,
            "_initialized": False,
            "_queued_calls": [],
        }
        for name, value in state.items():
            patch.setattr(torch.cuda, name, value, raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        if hasattr(torch, "accelerator"):  # where newer optimisers ask the same
            stream = SimpleNamespace(is_capturing=lambda: False)
            patch.setattr(torch.accelerator, "current_stream", lambda *_: stream)
        patch.setattr(torch.backends.cudnn, "allow_tf32", True)


def keep_on_cpu(patch: pytest.MonkeyPatch) -> list[torch.device]:
    """Leave on the CPU what is sent to a card. Returns the list of these cards, which grows with each call."""
    cards = []

    def wrap(kind: type) -> None:
        move = kind.to

        def to(x, *arguments, **keywords):
            if arguments and isinstance(arguments[0], torch.device) and arguments[0].type == "cuda":
                cards.append(arguments[0])
                arguments = ("cpu", *arguments[1:])
            return move(x, *arguments, **keywords)

        patch.setattr(kind, "to", to)

    wrap(torch.Tensor)
    wrap(torch.nn.Module)
    patch.setattr(torch.Tensor, "pin_memory", lambda x, *_: x)
    return cards
