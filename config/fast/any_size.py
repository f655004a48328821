"""The one door for whole images of any size: chooses strips or windows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fast import strips, windows
from fast.memory import MemoryBudget


@torch.no_grad()
def rain_layers(
    network: nn.Module,
    O: Tensor,
    stage_num: int | None = None,
    memory_gib: float = 0.0,
    tick: Callable[[float], object] = lambda share: None,
) -> Iterator[Tensor]:
    """The rain layers R_t (3, H, W), one after another, of one rainy image `O` (3, H, W) in [0, 1].

    As `network.forward` in eval mode, to 1e-5, for all stages or the first `stage_num`, but in the memory that there
    is: `memory_gib` bounds the process, 0 takes what is free. The caller may overwrite a rain layer. `tick` gets the
    share of the work done since its last call. Raises the device's own error if its memory is too small for a few rows,
    OutOfMemory if the computer's is and the disk as well.
    """
    stage_num = stage_num or network.output_num
    memory = MemoryBudget(memory_gib)
    if network.features_halo is None:
        yield from windows.through_all_stages(network, O, stage_num, memory, tick)
        return
    stages: strips.Strips | windows.Windows
    if strips.fit(network, O):
        stages = strips.Strips(network, O, memory)
    else:
        found = windows.at_once(network, O, stage_num)
        if found is not None:
            for R in found:
                yield R
                tick(1 / stage_num)
            return
        stages = windows.Windows(network, O, memory)
    for t in range(stage_num):
        for share in stages.stage(first=t == 0, last=t == stage_num - 1):
            tick(share / stage_num)
        yield stages.rain_layer()
