"""What all networks and their losses share: what loops, viewer and benches may ask of one, whichever it is."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

COUNTED_SIDE = 64  # of the image on which multiplications are counted, pixels

# A loss maps the rain layers of all stages to named terms: `loss` is what is minimised, `stage_t/loss` stage t's part.
Terms = dict[str, Tensor]


def charbonnier(difference: Tensor, epsilon: float) -> Tensor:
    """Mean of a smooth absolute value: square below `epsilon`, linear above."""
    return (difference.square() + epsilon**2).sqrt().mean()


def by_stage(losses: list[Tensor]) -> Terms:
    return {f"stage_{t}/loss": loss for t, loss in enumerate(losses, 1)}


class Network(nn.Module):
    """A network that derains an image in one or more stages, each of which predicts the rain layer of the whole image.

    A subclass has `forward(O, stage_num=None) -> [R_1, R_2, ..]`: rainy images `O` (N, 3, H, W) in [0, 1] to the rain
    layers of all stages, or of the first `stage_num`, each (N, 3, H, W). Stage t restores O - R_t.
    """

    output_num: int  # rain layers that `forward` returns
    halo: int | None = None  # pixels to each side of one that its last rain layer depends on; None: all of them
    features_halo: int | None = None  # the same of a stage's features, if it can be cut between stages (DSEN)
    stride = 1  # an image that is cut into windows must be cut at multiples of it
    pixel_bytes = 0  # memory that `forward` takes without gradients, per pixel

    cuda_graphs = True  # whether `graphs.replaying` may record it
    checkpoint_activations = False  # recompute parts of it for the gradients, instead of keeping activations

    def check(self, O: Tensor, stage_num: int = 1) -> None:
        """Raise ValueError where `O` is not (N, 3, H, W) with H, W > 0, or there is no rain layer `stage_num`."""
        if O.dim() != 4 or O.shape[1] != 3 or not all(O.shape[2:]):
            raise ValueError(f"{type(self).__name__} expects rainy images of shape (N, 3, H, W), got {tuple(O.shape)}")
        if stage_num not in range(1, self.output_num + 1):
            raise ValueError(f"{type(self).__name__} has outputs 1 to {self.output_num}, got stage_num {stage_num}")

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
        counted, macs = [], self.convolutions()

        def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            counted.append(macs[module] * output.shape[-2] * output.shape[-1])

        hooks = [layer.register_forward_hook(count) for layer in macs]
        with torch.no_grad():
            self(torch.zeros(1, 3, COUNTED_SIDE, COUNTED_SIDE, device=next(self.parameters()).device))
        for hook in hooks:
            hook.remove()
        return round(sum(counted) / COUNTED_SIDE**2)
