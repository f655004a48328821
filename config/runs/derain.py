"""Pretrained weights as a PyTorch module from RGB images to derained ones; hubconf.py gives it to other programs."""

import hashlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from base import devices
from base.errors import DamagedFile, MissingFile
from base.files import ROOT
from networks.base import Network
from runs import checkpoints
from runs.restore import restore
from settings import resolve


class Derain(nn.Module):
    """RGB images (N, 3, H, W) in [0, 1], of any size -> the same without rain, without gradients.

    Computed on the device of the weights, in its usual precision; the result has the images' device and type. Images
    go through one after another, large ones in parts, as `restore` does. Raises ValueError if the shape does not fit.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise ValueError(f"Derain expects images in [0, 1] as floating point numbers, got {images.dtype}")
        self.network.check(images)
        weight, derained = next(self.parameters()), torch.empty_like(images)
        with _exact_float32():
            for image, result in zip(images, derained, strict=True):
                O = image.to(weight).flip(0)  # the networks take BGR
                (last,) = deque(restore(self.network, O), 1)
                result.copy_(last.flip(0))
        return derained


@contextmanager
def _exact_float32() -> Iterator[None]:
    """As `devices.pick_device` makes float32 convolutions, but not in the rest of the caller's program."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def load(weights: str) -> Derain:
    """The pretrained weights of that name, on the fastest device. Raises MissingFile, DamagedFile by their SHA-256."""
    lines = (ROOT / "models" / "SHA256SUMS").read_text().split()
    sums = dict(zip(lines[1::2], lines[::2], strict=True))  # digests by file
    path = ROOT / "models" / f"{weights}.pth"
    if f"{weights}.pth" not in sums:
        raise MissingFile(f"no pretrained weights {weights!r}: there are {', '.join(sums).replace('.pth', '')}")
    if not path.is_file():
        raise MissingFile(f"{path} does not exist: get the repository again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sums[path.name]:
        raise DamagedFile(f"{path} is not the file of models/SHA256SUMS: get the repository again")
    checkpoint = checkpoints.load(path)
    network = checkpoints.build(checkpoint.settings or resolve(), checkpoint, path)
    return Derain(network).to(devices.available()[0]).eval()
