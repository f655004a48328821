"""Whole images through a network: the restored image of every stage, its scores, and validation by them."""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from base import ranks
from base.console import Interrupt, Progress, Stopped, log
from base.devices import autocast, compute_dtype, pick_device
from base.errors import NotFinite, UserError
from cal_ssim import METRICS, scores, to_8bit
from dataset import read_whole
from fast.any_size import rain_layers
from fast.graphs import replaying
from runs import checkpoints
from settings import Settings, override, resolve

# Settings that are the command's, not those of the training that the checkpoint records.
COMMAND_FIELDS = ("model_dir", "log_dir", "show_dir", "device", "precision", "cuda_graphs", "mirror")
NEARLY_INPUT = 0.5  # levels of 255; a result whose mean change is below has lost hardly any rain
PREVIEW_SIDE, PREVIEW_COLUMNS = 320, 4  # of the picture of a validation: pixels of an image, images in a row
BAND = 20  # above each image, for its name, pixels
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Opened(NamedTuple):
    network: nn.Module  # in eval mode, on its device
    settings: Settings
    path: Path  # the checkpoint's file
    step: int

    @property
    def run(self) -> str:
        """The run's name; empty where the file is no state of a run."""
        return self.path.parent.name if re.fullmatch("best|latest|step_[0-9]+", self.path.stem) else ""

    @property
    def name(self) -> str:
        return self.run or self.path.stem


def open_network(preset: str | None, name: str | None, overrides: dict[str, Any]) -> Opened:
    """The network of checkpoint `name`, or without it of the run that `overrides` or `preset` (default sdsen) names.

    It is rebuilt from the settings in the checkpoint and gets the averaged weights if there are any. A checkpoint of
    the published code holds no settings: there `preset` and `overrides` describe the network.
    Raises MissingFile where there is no such checkpoint, Mismatch where it holds another network than `preset`.
    """
    settings = requested = resolve(preset or "sdsen", overrides)
    find, word = (checkpoints.find, name) if name else (checkpoints.find_run, requested.run)
    path = ranks.from_first(lambda: find(word, Path(requested.model_dir)))
    checkpoint = ranks.from_first(lambda: checkpoints.load(path))
    if checkpoint.settings:
        own = {field: getattr(requested, field) for field in COMMAND_FIELDS}
        settings = override(checkpoint.settings, {**own, **overrides})
        if preset:
            checkpoints.check_network(path, settings, requested, may_differ=set())
    network = checkpoints.build(settings, checkpoint, path, average=True)
    network.cuda_graphs = settings.cuda_graphs != "off"
    return Opened(network.to(pick_device(settings.device)).eval(), settings, path, checkpoint.step)


@dataclass(frozen=True)
class Restoring:
    """How an image is restored: the settings of the same names, and `check`, which may end it by an error."""

    memory_gib: float = 0.0  # bound on the process's memory; 0: what is free
    precision: str = "auto"
    mirror: bool = False  # take the mean with the restored mirror image
    check: Callable[[], object] = lambda: None  # called after each part of the work, such as `Interrupt.check`

    @classmethod
    def of(cls, settings: Settings) -> "Restoring":
        return cls(settings.memory_gib, settings.precision, settings.mirror)


DEFAULT = Restoring()


def restore(network: nn.Module, O: Tensor, how: Restoring = DEFAULT, stage_num: int | None = None) -> Iterator[Tensor]:
    """One rainy image `O` (3, H, W) in [0, 1] -> O - R_t, (3, H, W) in [0, 1], after each stage t.

    `stage_num` stops after so many stages. An image whose activations leave float16's range is computed in float32. The
    progress of an image that takes long is shown. Raises NotFinite where a stage's output is not.
    """

    def tick(share: float) -> None:
        how.check()
        bar.update(share)

    bar = Progress(desc="this image", total=1.0, delay=3, bar_format=BAR)
    stages_of = partial(_with_mirror if how.mirror else rain_layers, network, O, stage_num, how.memory_gib, tick)
    stages = stages_of()
    precision, half = how.precision, compute_dtype(how.precision, O.device) == torch.float16
    with bar:
        for done in itertools.count():
            with autocast(precision, O.device):  # around the network alone, not around the caller's work
                R = next(stages, None)
            if R is None:
                return
            if half and not R.isfinite().all():
                log.warning("the activations leave float16's range, so this image is computed in float32")
                bar.reset()
                stages = itertools.islice(stages_of(), done, None)
                half, precision = False, "float32"
                R = next(stages)
            if not R.isfinite().all():
                raise NotFinite(f"stage {done + 1} of the network gives values that are not finite: take other weights")
            R = R.to(O.dtype)  # autocast may have made it 16 bits, on MPS
            yield torch.sub(O, R, out=R).clamp_(0, 1)


def _with_mirror(
    network: nn.Module, O: Tensor, stage_num: int | None, memory_gib: float, tick: Callable[[float], object]
) -> Iterator[Tensor]:
    """The means of the rain layers of `O` and, mirrored back, of its mirror image, which are all kept meanwhile."""
    mirrored, upright = (
        rain_layers(network, image, stage_num, memory_gib, lambda share: tick(share / 2)) for image in (O.flip(-1), O)
    )
    for R, other in zip(upright, list(mirrored), strict=True):
        yield R.add_(other.flip(-1)).div_(2)


def restore_8bit(network: nn.Module, O: Tensor, device: torch.device, how: Restoring = DEFAULT) -> list[Tensor]:
    """As `restore`, for 8-bit images: (3, H, W) uint8 -> (3, H, W) uint8 on `device` after each stage, as saved."""
    return [to_8bit(image) for image in restore(network, O.to(device).float() / 255, how)]


class ScoredPair(NamedTuple):
    path: Path
    O: Tensor  # (3, H, W) uint8, as are the others; all on the network's device
    restored: list[Tensor]  # after each stage
    B: Tensor
    scores: np.ndarray  # (1 + stages, METRICS): of the rainy input, then after each stage

    def pictures(self) -> dict[str, Tensor]:
        """The images by their names."""
        stages = {f"stage {t}": image for t, image in enumerate(self.restored, 1)}
        return {"input": self.O, **stages, "ground truth": self.B}


def score_pairs(
    network: nn.Module, paths: list[Path], device: torch.device, how: Restoring = DEFAULT
) -> Iterator[ScoredPair | UserError]:
    """This rank's share of the pairs, restored and scored on `device` one after another; the reason where one can't be.

    The network is in eval mode meanwhile. `ranks.gather` puts the results of all ranks in the order of `paths`.
    """
    was_training = network.training
    network.eval()
    try:
        with replaying(network, device):
            for path in Progress(ranks.share(paths), unit="image"):
                try:
                    pair = _score_pair(network, path, device, how)
                except NotFinite as error:
                    yield NotFinite(f"{path}: {error}")
                except UserError as error:
                    yield error
                else:
                    yield pair
    finally:
        network.train(was_training)


def _score_pair(network: nn.Module, path: Path, device: torch.device, how: Restoring) -> ScoredPair:
    O, B = (image.to(device) for image in read_whole(path))
    restored, rows = restore_8bit(network, O, device, how), []
    for image in (O, *restored):
        how.check()
        found = scores(image, B)
        rows.append([found[name] for name in METRICS])
    return ScoredPair(path, O, restored, B, np.array(rows))


def validate(
    network: nn.Module,
    criterion: nn.Module,
    paths: list[Path],
    device: torch.device,
    settings: Settings,
    interrupt: Interrupt,
) -> tuple[dict[str, float], np.ndarray | None]:
    """Scores of whole validation pairs, and rank 0's first one as a picture.

    Returns `psnr` and `ssim` of the last stage, `psnr_input`, and `stage_t/loss`, `stage_t/psnr`, `stage_t/ssim`, all
    of the 8-bit images that would be saved, and the same on every rank. The picture is None where a rank has no pair.
    Raises on every rank: Stopped where one is interrupted, or the first pair's error that can't be scored.
    """
    preview, rows = None, list[Any]()
    how = replace(Restoring.of(settings), check=interrupt.check)
    with suppress(Stopped):
        for pair in score_pairs(network, paths, device, how):
            if isinstance(pair, ScoredPair):
                preview = _labelled(pair.pictures()) if preview is None else preview
                rows.append((pair.scores, _stage_losses(criterion, pair)))
            else:
                rows.append(pair)
    if any(ranks.total([interrupt.requested])):
        raise Stopped
    rows = ranks.gather(rows)
    if wrong := [row for row in rows if isinstance(row, UserError)]:
        raise wrong[0]
    means, losses = (np.mean(values, 0) for values in zip(*rows, strict=True))
    result = {"psnr": means[-1][0], "ssim": means[-1][1], "psnr_input": means[0][0]}
    for t, (row, loss) in enumerate(zip(means[1:], losses, strict=True), 1):
        result |= {f"stage_{t}/loss": loss, f"stage_{t}/psnr": row[0], f"stage_{t}/ssim": row[1]}
    return result, preview


@torch.no_grad()
def _stage_losses(criterion: nn.Module, pair: ScoredPair) -> list[float]:
    O, B, *restored = (image[None].float() / 255 for image in (pair.O, pair.B, *pair.restored))
    terms = criterion([O - image for image in restored], O, B)
    return [terms[f"stage_{t}/loss"].item() for t in range(1, len(restored) + 1)]


def _labelled(images: dict[str, Tensor]) -> np.ndarray:
    """Images (3, H, W) uint8, made smaller where they are large, in rows, each below its name: (H', W', 3) uint8."""
    parts = []
    for label, image in images.items():
        scale = min(1.0, PREVIEW_SIDE / max(image.shape[1:]))
        picture = np.moveaxis(image.cpu().numpy(), 0, 2)
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        band = np.full((BAND, picture.shape[1], 3), 255, np.uint8)
        cv2.putText(band, label, (3, BAND - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        parts.append(np.vstack([band, picture]))
    parts += [np.full_like(parts[0], 255)] * (-len(parts) % min(PREVIEW_COLUMNS, len(parts)))
    rows = [np.hstack(parts[i : i + PREVIEW_COLUMNS]) for i in range(0, len(parts), PREVIEW_COLUMNS)]
    return np.vstack(rows)
