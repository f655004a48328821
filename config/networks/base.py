"""What the loops, the viewer and the benches know of a network, so that none of them asks which one it has."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fast import windows
from groupy import GroupConv2d

COUNTED_SIDE = 64  # of the image that multiplications are counted on, pixels


class Network(nn.Module):
    """A network that derains an image in one or more stages, each of which predicts the rain layer of the whole image.

    A subclass has `forward(O, stage_num=None) -> [R_1, R_2, ..]`: rainy images `O` (N, 3, H, W) in [0, 1] to the rain
    layers of all stages, or of the first `stage_num`, each (N, 3, H, W). O - R_t is what stage t restores.
    """

    output_num: int  # rain layers that `forward` returns
    halo: int | None = None  # pixels to each side of one that its last rain layer depends on; None: all of them
    stride = 1  # an image that is cut into parts must be cut at multiples of it
    pixel_bytes = 0  # memory that `forward` takes without gradients, for each pixel

    def __init__(self):
        super().__init__()
        self.cuda_graphs = True  # whether `graphs.replaying` may record it
        self.checkpoint_activations = False  # repeat parts of it for their gradients, instead of keeping activations

    def repeated(self, part: Callable) -> Callable:
        """`part`, a function of tensors, whose activations are kept only if `checkpoint_activations` is off."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return part
        return lambda *inputs: checkpoint(part, *inputs, use_reentrant=False)

    def at_once(self, images: Tensor, stage_num: int) -> list[Tensor]:
        """`forward` of whole images, which `graphs.replaying` makes faster where they are small."""
        return self(images, stage_num)

    def whole_image(self, O: Tensor) -> Callable[..., Iterator[Tensor]]:
        """The function that `each_stage` takes the image `O` (3, H, W) through the network by."""
        return windows.all_stages

    @torch.no_grad()
    def each_stage(
        self,
        O: Tensor,
        stage_num: int | None = None,
        memory_gib: float = 0.0,
        tick: Callable[[float], object] = lambda share: None,
    ) -> Iterator[Tensor]:
        """The rain layers R_t (3, H, W), one after another, of one rainy image `O` (3, H, W) of any size.

        As `forward` in eval mode, to 1e-5, but in as much memory as there is: `memory_gib` bounds the process, 0 takes
        what is free. A rain layer is the caller's to overwrite. `tick` hears the share of the work done since its last
        call.
        """
        yield from self.whole_image(O)(self, O, stage_num or self.output_num, memory_gib, tick)

    def macs_per_pixel(self) -> int:
        """Multiply-accumulates of the convolutions for each pixel of the image, all stages."""
        counted = 0

        def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            nonlocal counted
            taps = module.weight.numel() * getattr(module, "out_orientations", 1)
            counted += taps * output.shape[-2] * output.shape[-1]

        hooks = [m.register_forward_hook(count) for m in self.modules() if isinstance(m, (nn.Conv2d, GroupConv2d))]
        with torch.no_grad():
            self(torch.zeros(1, 3, COUNTED_SIDE, COUNTED_SIDE, device=next(self.parameters()).device))
        for hook in hooks:
            hook.remove()
        return round(counted / COUNTED_SIDE**2)
