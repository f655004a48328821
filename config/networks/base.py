"""The interface of all networks: what loops, viewer and benches may ask of one, whichever it is."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

COUNTED_SIDE = 64  # of the image on which multiplications are counted, pixels


class Network(nn.Module):
    """A network that derains an image in one or more stages, each of which predicts the rain layer of the whole image.

    A subclass has `forward(O, stage_num=None) -> [R_1, R_2, ..]`: rainy images `O` (N, 3, H, W) in [0, 1] to the rain
    layers of all stages, or of the first `stage_num`, each (N, 3, H, W). Stage t restores O - R_t.
    """

    output_num: int  # rain layers that `forward` returns
    halo: int | None = None  # pixels to each side of one that its last rain layer depends on; None: all of them
    features_halo: int | None = (
        None  # the same of a stage's features, in networks that can be cut between stages (DSEN)
    )
    stride = 1  # an image that is cut into windows must be cut at multiples of it
    pixel_bytes = 0  # memory that `forward` takes without gradients, per pixel

    def __init__(self):
        super().__init__()
        self.cuda_graphs = True  # whether `graphs.replaying` may record it
        self.checkpoint_activations = False  # recompute parts of it for the gradients, instead of keeping activations

    def checkpointed(self, part: Callable) -> Callable:
        """`part`, a function of tensors, which keeps no activations if `checkpoint_activations` is on."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return part
        return lambda *inputs: checkpoint(part, *inputs, use_reentrant=False)

    def at_once(self, images: Tensor, stage_num: int) -> list[Tensor]:
        """`forward` of whole images; `graphs.replaying` replaces it by something faster for small ones."""
        return self(images, stage_num)

    def convolutions(self) -> dict[nn.Module, int]:
        """Its convolutions, and the multiply-accumulates of each per pixel of the output."""
        layers = (m for m in self.modules() if isinstance(m, nn.Conv2d) or hasattr(m, "out_orientations"))
        return {layer: layer.weight.numel() * getattr(layer, "out_orientations", 1) for layer in layers}

    def macs_per_pixel(self) -> int:
        """Multiply-accumulates of the convolutions per pixel of the image, all stages."""
        counted = 0

        def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            nonlocal counted
            counted += macs[module] * output.shape[-2] * output.shape[-1]

        macs = self.convolutions()
        hooks = [layer.register_forward_hook(count) for layer in macs]
        with torch.no_grad():
            self(torch.zeros(1, 3, COUNTED_SIDE, COUNTED_SIDE, device=next(self.parameters()).device))
        for hook in hooks:
            hook.remove()
        return round(counted / COUNTED_SIDE**2)
