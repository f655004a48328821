"""Optimization: learning rate, optimizer, the parts of a batch, and when a step is compiled or recorded."""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

import cal_ssim
from base import ranks
from base.console import log
from base.errors import BadArgument, MissingFile
from settings import Settings

COMPILE_STEPS = 5000  # remaining steps from which torch.compile saves more than it takes
PART_PIXELS = 2**13  # crops that go through the network at once on the CPU, in pixels: two of 64x64
LARGEST_SIDE = 99  # of SOAP's matrices; neighbouring dimensions of a filter are merged up to this size


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step, counted from 0: divided by 10 at each milestone (section 3.1), or a cosine."""
    rate = settings.lr * min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.schedule == "cosine":
        return rate * (0.505 + 0.495 * math.cos(math.pi * step / settings.steps))
    return rate * 0.1 ** sum(step >= milestone for milestone in settings.milestones)


def in_steps(settings: Settings, images: int) -> Settings:
    """Settings whose `steps` and `milestones` count steps; an epoch is one pass over so many training images."""
    if not settings.epochs:
        return settings
    per_epoch = math.ceil(images / settings.batch_size)
    milestones = tuple(per_epoch * epoch for epoch in settings.milestones)
    return replace(settings, epochs=0, steps=per_epoch * settings.epochs, milestones=milestones)


def make_optimizer(network: nn.Module, lr: float, kind: str = "adam") -> torch.optim.Optimizer:
    """`adam` (section 3.1) or `soap`: Adam in the eigenvectors of the gradients' covariance (Vyas et al., 2024).

    Raises MissingFile where SOAP's package is not installed.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if kind == "adam":
        on_gpu = next(network.parameters()).device.type == "cuda"
        return torch.optim.Adam(parameters, lr=lr, fused=True if on_gpu else None)  # None: PyTorch's choice
    try:
        from pytorch_optimizer.optimizer.soap import SOAP  # an extra, which takes a second to import
    except ModuleNotFoundError:
        raise MissingFile("optimizer soap needs a package: pip install -r requirements-soap.txt") from None
    large = [parameter for parameter in parameters if parameter.numel() > LARGEST_SIDE]
    small = [parameter for parameter in parameters if parameter.numel() <= LARGEST_SIDE]  # nothing left to merge
    groups: list[dict[str, Any]] = [{"params": large, "merge_dims": True}, {"params": small}]
    constants: dict[str, Any] = {"betas": (0.95, 0.99), "shampoo_beta": 0.98, "precondition_frequency": 5}
    return SOAP(groups, lr=lr, weight_decay=0, max_precondition_dim=LARGEST_SIDE, **constants)


def resume_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], network: nn.Module, kind: str) -> None:
    """Give an optimizer of `network` the moments and counts of a checkpoint; its constants stay, whatever is stored.

    Raises ValueError where they do not fit, which PyTorch would find out in the middle of a step, or not at all.
    """
    constants = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    trial = make_optimizer(copy.deepcopy(network), constants[0]["lr"], kind)
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()  # after which its state has the right form
    try:
        optimizer.load_state_dict(state)
    except Exception as error:  # whatever PyTorch meets
        raise ValueError(f"{type(error).__name__}: {error}") from None
    for group, own in zip(optimizer.param_groups, constants, strict=True):
        group.update(own)
    found, right = optimizer.state_dict(), trial.state_dict()
    pairs = [(values, right["state"].get(key)) for key, values in found["state"].items()]
    both = zip(found["param_groups"], right["param_groups"], strict=True)
    pairs += [({name: group.get(name) for name in other}, other) for group, other in both]
    if any(_form(values) != _form(others) for values, others in pairs):
        raise ValueError("another form of state")


def _form(value: Any, name: Any = "") -> Any:
    """What a value of an optimizer's state has in common in all steps: all of it but counts and tensors' elements."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, name != "step" or bool((value >= 0).all())
    if isinstance(value, dict):
        return {key: _form(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_form(each) for each in value]
    return (int, True) if name == "step" and type(value) is int and value >= 0 else value


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in an optimizer's state."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for each in values.values() if isinstance(values, dict) else values:
            yield from tensors(each)


class Outcome(NamedTuple):
    """What a forward and backward pass leaves beside the gradients; all detached."""

    loss: Tensor  # (), this part's share of the batch's
    terms: dict[str, Tensor]  # of the loss, each ()
    rain_layers: list[Tensor]  # of every stage, (N, 3, H, W)


def split_batch(settings: Settings, *batch: Tensor) -> list[tuple[Tensor, ...]]:
    """A batch (O, B) or (O, B, labels) in `accumulate` parts; on the CPU more, which take less memory and time."""
    O, *_ = batch
    count = math.ceil(len(O) / settings.accumulate)
    if O.device.type == "cpu":
        count = min(count, max(1, PART_PIXELS // (O.shape[2] * O.shape[3])))
    return list(zip(*(x.split(count) for x in batch), strict=True))


def synchronized(network: nn.Module, is_last: bool) -> AbstractContextManager:
    """Within this, DistributedDataParallel averages gradients over the ranks if this part of the batch is the last."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not is_last else nullcontext()


@torch.no_grad()
def step_scores(outcome: Outcome, O: Tensor, B: Tensor) -> Iterator[tuple[str, float]]:
    """The loss's terms, `stage_t/psnr`, and `stage_t/ssim` unless the crops are smaller than its window."""
    for name, term in outcome.terms.items():
        yield name, term.item()
    for t, R in enumerate(outcome.rain_layers, 1):
        restored = (O - R).clamp(0, 1)
        yield f"stage_{t}/psnr", cal_ssim.psnr(restored, B).mean().item()
        if min(B.shape[-2:]) >= cal_ssim.WINDOW:
            yield f"stage_{t}/ssim", cal_ssim.ssim(restored, B).mean().item()


def compile_network(network: nn.Module, settings: Settings, device: torch.device, steps: int) -> None:
    """Compile the network where `compile` says so, or is `auto` and it pays: on a CUDA GPU with many `steps` left."""
    requested = settings.compile == "on"
    old = TorchVersion(torch.__version__) < "2.5"  # which would compile anew in every step
    if requested and old:
        raise BadArgument(f"--compile on needs PyTorch 2.5 or newer, this is {torch.__version__}")
    pays = settings.compile == "auto" and device.type == "cuda" and steps >= COMPILE_STEPS and not old
    if requested or pays:
        log.info("compiling the network, which makes the first step slow; --compile off does without")
        torch._dynamo.config.suppress_errors = not requested  # auto: without a compiler, the network runs as it is
        network.compile()


def can_record(settings: Settings, device: torch.device) -> bool:
    """Whether a step becomes a CUDA graph. Raises BadArgument where `cuda_graphs` is on and it can't."""
    in_parts = ranks.count() > 1 or settings.accumulate > 1 or settings.checkpoint_activations
    possible = device.type == "cuda" and not in_parts
    if settings.cuda_graphs == "on" and not possible:
        raise BadArgument("--cuda_graphs on needs one CUDA GPU, without --accumulate and --checkpoint_activations")
    return settings.cuda_graphs != "off" and possible
