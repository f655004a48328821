"""Whole images of any size through a network: chooses strips or windows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fast import strips, windows
from fast.memory import MemoryBudget

Tick = Callable[[float], object]
COPIES = 4  # of the image: the input of a stage, its rain layer, and the caller's own


@torch.no_grad()
def rain_layers(
    network: nn.Module, O: Tensor, stage_num: int | None = None, memory_gib: float = 0, tick: Tick = lambda share: None
) -> Iterator[Tensor]:
    """The rain layers R_t (3, H, W), one after another, of one rainy image `O` (3, H, W) in [0, 1].

    As `network.forward` in eval mode, to 1e-5, for all stages or the first `stage_num`, but in the memory that there
    is: `memory_gib` bounds the process, 0 takes what is free. The caller may overwrite a rain layer. `tick` gets the
    share of the work done since its last call. Raises the device's own error if its memory is too small for a few rows,
    OutOfMemory if the computer's is and the disk as well.
    """
    network.check(O[None])
    stage_num = stage_num or network.output_num
    by_stage = network.features_halo is not None
    memory = MemoryBudget(memory_gib)
    memory.left -= O.nbytes * (COPIES if by_stage else COPIES - 1 + stage_num)
    if by_stage and strips.fit(network, O):
        yield from _by_stage(network, O, strips.Strips(network, O, memory), stage_num, tick)
        return
    rows = windows.first_rows(network, O, memory)
    if rows >= O.shape[1]:
        found = windows.at_once(network, O, stage_num)
        if found is not None:
            tick(1)
            yield from found
            return
        rows = max(windows.MIN_ROWS, O.shape[1] // 2)
    if by_stage:
        yield from _by_stage(network, O, windows.Windows(network, O, rows, memory), stage_num, tick)
    else:
        yield from windows.through_all_stages(network, O, stage_num, rows, tick)


def _by_stage(
    network: nn.Module, O: Tensor, parts: strips.Strips | windows.Windows, stage_num: int, tick: Tick
) -> Iterator[Tensor]:
    """The same from `parts` of the image, all of which go through a stage before the next stage starts."""
    for t in range(stage_num):
        for share in parts.stage(last=t == stage_num - 1):
            tick(share / stage_num)
        features = parts.features.permute(2, 0, 1)[None]  # (H, W, C) -> (1, C, H, W), channels-last
        means = features.mean((-2, -1)).to(O.device)
        R = torch.empty_like(O)
        for top in range(0, O.shape[1], parts.rows):
            part = features[:, :, top : top + parts.rows].to(O.device)
            R[:, top : top + parts.rows] = network.rain_layer(part, means)[0]
        parts.set_image(O - R)
        yield R
