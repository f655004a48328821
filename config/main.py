"""Train a network, test it, or list the presets.

    python main.py -a train -p sdsen --data_dir DATA
    python main.py -a test -p sdsen
    python main.py -a export -m sdsen
    python main.py -a models
    python main.py -a tables --run dsen_rain800
    python main.py -a tilt -m cnn dsen
    python main.py -a stages -m sdsen

`python main.py -h` lists every setting.
"""

import csv
import hashlib
import io
import itertools
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.torch_version import TorchVersion
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import cal_ssim
import losses
import model
from base import ranks
from base.console import Interrupt, in_terminal, log, run_script, set_up_log
from base.devices import autocast, compute_dtype, describe, is_out_of_memory, pick_device
from base.errors import UserError
from base.files import lock, write_bytes
from base.images import write_image
from cal_ssim import METRICS
from dataset import CropDataset, data_path, list_pairs, read_whole, training_batches
from fast import graphs
from fast.graphs import Replay
from paper import command, stages, tilt
from presets import PRESETS
from runs import checkpoints
from runs.checkpoints import Checkpoint
from runs.curves import NoCurves, open_curves
from runs.restore import NEARLY_INPUT, how_to_restore, open_network, score_pairs
from settings import FIELDS, NETWORK_FIELDS, Settings, describe_settings, make_parser, override, read_overrides, resolve

COMPILE_STEPS = 5000  # left in a run from which on torch.compile pays: measured on an H200, docs/SPEED.md
PIECE_PIXELS = 2**13  # of the crops that go through the network at once on the CPU: two of 64x64


# ---------------------------------------------------------------- training


def learning_rate(settings: Settings, step: int) -> float:
    """Adam's learning rate in a step, counted from 0: divided by 10 at each milestone (section 3.1), or a cosine."""
    rate = settings.lr * min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.schedule == "cosine":
        return rate * (0.505 + 0.495 * math.cos(math.pi * step / settings.steps))
    return rate * 0.1 ** sum(step >= milestone for milestone in settings.milestones)


def in_steps(settings: Settings, images: int) -> Settings:
    """Settings whose `steps` and `milestones` are counted in steps, where they were in epochs, of `images` each."""
    if not settings.epochs:
        return settings
    each = math.ceil(images / settings.batch_size)
    milestones = tuple(each * epoch for epoch in settings.milestones)
    return replace(settings, epochs=0, steps=each * settings.epochs, milestones=milestones)


# SOAP turns a convolution's gradient (out, in, 4, 5, 5) by three matrices: of `out`, of `in` with the orientations, and
# of the filter's pixels. Sides that follow one another are merged up to this size.
LARGEST_SIDE = 99


def make_optimizer(network: nn.Module, lr: float, kind: str = "adam") -> torch.optim.Optimizer:
    """`kind` adam (section 3.1), on a CUDA GPU in one kernel; or soap, Adam in the gradients' own coordinates.

    Those are the eigenvectors of the gradients' covariance (Vyas et al., SOAP, 2024, algorithm 3).
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if kind == "adam":
        on_gpu = next(network.parameters()).device.type == "cuda"
        return torch.optim.Adam(parameters, lr=lr, fused=True if on_gpu else None)  # None: PyTorch's choice
    from pytorch_optimizer.optimizer.soap import SOAP  # takes a second, and few trainings need it

    # Merging fails where nothing would be left to merge with.
    large = [parameter for parameter in parameters if parameter.numel() > LARGEST_SIDE]
    small = [parameter for parameter in parameters if parameter.numel() <= LARGEST_SIDE]
    return SOAP(
        [{"params": large, "merge_dims": True}, {"params": small}],
        lr=lr,
        betas=(0.95, 0.99),
        shampoo_beta=0.98,
        weight_decay=0,
        precondition_frequency=5,
        max_precondition_dim=LARGEST_SIDE,
    )


class Outcome(NamedTuple):
    """Of one forward and backward pass, all without gradients."""

    loss: Tensor  # (), this pass's share of the step's
    terms: dict[str, Tensor]  # of the loss, each ()
    rain_layers: list[Tensor]  # of every stage, (N, 3, H, W)


def add_gradients(
    network: nn.Module,
    criterion: nn.Module,
    settings: Settings,
    O: Tensor,
    B: Tensor,
    labels: Tensor | None = None,
    share: float = 1.0,
) -> Outcome:
    """Add the gradients of `share` times the loss on rainy crops `O` and clean crops `B` to the parameters'."""
    O, B = (x.contiguous(memory_format=torch.channels_last) for x in (O, B))  # as the rain layers are, and gradients
    with autocast(settings.precision, O.device, training=True):
        rain_layers = network(O)
        terms = criterion(rain_layers, O, B, labels)
    loss = share * terms.pop("loss")
    (loss * ranks.count()).backward()
    terms = {name: term.detach() for name, term in terms.items()}
    return Outcome(loss.detach(), terms, [R.detach() for R in rain_layers])


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    O: Tensor,
    B: Tensor,
    settings: Settings,
    scored: bool,
    criterion: nn.Module | None = None,
    labels: Tensor | None = None,
    recorded: Replay | None = None,
) -> dict[str, float]:
    """One step of the optimiser on rainy crops `O` and clean crops `B`, both (N, 3, H, W) in [0, 1].

    `criterion` is the loss, `losses.build`'s if None; it may take the pixels' `labels` (N, H, W). Returns `loss`, and
    where `scored`, the loss's other terms, `stage_t/psnr` and `stage_t/ssim`. A loss that is not finite leaves the
    weights as they were. The crops go through the network in the parts that `accumulate` asks for, on the CPU at most a
    few at a time; their gradients add up to the batch's. Or they go at once through `recorded`: see `record_step`.

    Of several ranks, each has its part of the batch, `network` is DistributedDataParallel, whose gradients are the mean
    over the ranks, and the results are those of the whole batch.
    """
    criterion = criterion or losses.build(settings)
    batch = settings.batch_size if ranks.count() > 1 else len(O)
    count = len(O) if recorded else math.ceil(len(O) / settings.accumulate)
    if O.device.type == "cpu" and not recorded:  # fewer crops at a time take less memory, and are faster
        count = min(count, max(1, PIECE_PIXELS // (O.shape[2] * O.shape[3])))
    all_labels = [None] * math.ceil(len(O) / count) if labels is None else labels.split(count)
    parts = list(zip(O.split(count), B.split(count), all_labels, strict=True))
    result: dict[str, float] = defaultdict(float)
    loss = O.new_zeros(())
    if not recorded:
        optimizer.zero_grad(set_to_none=True)
    for index, (rainy, clean, classes) in enumerate(parts):
        share = len(rainy) / batch
        if recorded:
            outcome = recorded(*(x for x in (rainy, clean, classes) if x is not None))
        else:
            is_last = index == len(parts) - 1
            with nullcontext() if is_last or ranks.count() == 1 else network.no_sync():
                outcome = add_gradients(network, criterion, settings, rainy, clean, classes, share)
        loss += outcome.loss
        if scored:
            for name, value in _step_scores(outcome, rainy, clean):
                result[name] += share * value
    (total,) = ranks.total([loss.item()])
    if not np.isfinite(total):
        return {"loss": total}
    ranks.average_gradients(criterion)
    if settings.clip_norm:
        nn.utils.clip_grad_norm_([*network.parameters(), *criterion.parameters()], settings.clip_norm)
    optimizer.step()
    if scored:
        result = dict(zip(result, ranks.total(list(result.values())), strict=True))
    return {"loss": total, **result}


def recording_obstacles(settings: Settings, device: torch.device) -> list[str]:
    """What keeps a step from becoming a CUDA graph."""
    found = {
        f"the device is {device}": device.type != "cuda",
        "several processes share a batch": ranks.count() > 1,
        "accumulate takes a batch in parts": settings.accumulate > 1,
        "checkpoint_activations repeats stages": settings.checkpoint_activations,
    }
    return [text for text, is_so in found.items() if is_so]


def record_step(
    network: nn.Module, criterion: nn.Module, settings: Settings, O: Tensor, B: Tensor, labels: Tensor | None = None
) -> Replay | None:
    """Forward and backward pass of a whole batch as a CUDA graph, for `train_step`; None where that can't be made."""
    parameters = [p for p in (*network.parameters(), *criterion.parameters()) if p.requires_grad]

    def step(*batch: Tensor) -> Outcome:
        for parameter in parameters:
            parameter.grad = None
        return add_gradients(network, criterion, settings, *batch)

    return graphs.record(step, [x for x in (O, B, labels) if x is not None], parameters)


@torch.no_grad()
def _step_scores(outcome: Outcome, O: Tensor, B: Tensor) -> Iterator[tuple[str, float]]:
    for name, term in outcome.terms.items():
        yield name, term.item()
    for t, R in enumerate(outcome.rain_layers, 1):
        restored = (O - R).clamp(0, 1)
        yield f"stage_{t}/psnr", cal_ssim.psnr(restored, B).mean().item()
        if min(B.shape[-2:]) >= cal_ssim.WINDOW:
            yield f"stage_{t}/ssim", cal_ssim.ssim(restored, B).mean().item()


def validate(
    network: nn.Module, paths: list[Path], device: torch.device, settings: Settings, criterion: nn.Module | None = None
) -> tuple[dict, np.ndarray | None]:
    """Scores of whole validation pairs, and rank 0's first: O, every stage, B, side by side, as (H, W, 3) uint8 BGR.

    Returns `psnr` and `ssim` of the last stage, `psnr_input`, and `stage_t/loss`, `stage_t/psnr`, `stage_t/ssim`, all
    of the 8-bit images that would be saved.
    """
    mosaic, criterion = [], criterion or losses.build(settings)

    def each(path, O, restored, B, rows):
        if not mosaic:
            mosaic.extend(image.cpu() for image in (O, *restored, B))
        O, B, *restored = (image[None].float() / 255 for image in (O, B, *restored))
        with torch.no_grad():
            terms = criterion([O - image for image in restored], O, B)
        return [terms[f"stage_{t}/loss"].item() for t in range(1, len(restored) + 1)]

    table, found = score_pairs(network, paths, device, each, *how_to_restore(settings))
    table = table.mean(0)  # (1 + stages, METRICS)
    result = {}
    for t, (row, loss) in enumerate(zip(table[1:], np.mean(found, 0), strict=True), 1):
        result |= {f"stage_{t}/loss": loss, f"stage_{t}/psnr": row[0], f"stage_{t}/ssim": row[1]}
    result |= {"psnr": table[-1][0], "ssim": table[-1][1], "psnr_input": table[0][0]}
    if not mosaic:  # there are more ranks than pairs
        return result, None
    scale = min(1.0, 320 / max(mosaic[0].shape[1:]))
    mosaic = np.hstack([np.moveaxis(image.numpy(), 0, 2) for image in mosaic])
    return result, cv2.resize(mosaic, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


class Trainer:
    """A network in training: its state, its files, and the loop over the steps."""

    def __init__(self, settings: Settings, start: Checkpoint | None, source: Path | None):
        """From the beginning, or from checkpoint `start`, which was read from `source`. Writes nothing yet."""
        self.device = pick_device(settings.device)
        if settings.precision == "fp16":
            raise UserError("precision fp16 is for test and show: its range is too small for gradients; train in bf16")
        if settings.batch_size < ranks.count():
            raise UserError(f"batch_size {settings.batch_size} is too small for {ranks.count()} processes")
        torch.manual_seed(settings.seed)
        self.network = model.build(settings)
        if start:
            checkpoints.load_weights(self.network, start, source)
        self.network.to(self.device)
        self.network.checkpoint_activations = settings.checkpoint_activations
        self.network.cuda_graphs = settings.cuda_graphs != "off"
        folder = data_path(settings)
        self.dataset = CropDataset(folder / "train", settings)
        self.asked = settings  # what the checkpoints hold
        self.settings = self.dataset.settings = settings = in_steps(settings, len(self.dataset.paths))
        self.criterion = losses.build(settings, self.dataset.labelled).to(self.device)
        self.optimizer = make_optimizer(nn.ModuleList([self.network, self.criterion]), settings.lr, settings.optimizer)
        self.step, self.best_psnr, self.seconds, self.started = 0, None, 0.0, time.monotonic()
        self.recorded: Replay | None = None  # the step, as a CUDA graph
        self.records = self._can_record()
        self.averaged = None
        if settings.average:
            self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
        if start:
            self._resume(start, source)
        paths = list_pairs(folder / "val")
        count = min(settings.val_images or len(paths), len(paths))
        self.parallel = self._parallel()
        self.validation = [paths[i] for i in np.linspace(0, len(paths) - 1, count).astype(int)]
        for path in self.validation:  # a file that can't be read is told now, not in the middle of the training
            read_whole(path)
        log.info(f"validation on {count} of the {len(paths)} whole pairs in {folder / 'val'}, the same ones every time")

    def _resume(self, start: Checkpoint, source: Path) -> None:
        if start.optimizer is None:
            log.info(f"begins with the weights of {source}")
            return
        self.step, self.best_psnr, self.seconds = start.step, start.best_psnr, start.seconds
        if (start.criterion or {}).keys() != self._criterion_state().keys():
            was = "with" if start.criterion else "without"
            raise UserError(f"{source} was trained {was} labels, which is another loss: name another run with --run")
        if start.optimizer:
            if "fused" in self.optimizer.defaults:
                for group in start.optimizer.get("param_groups", []):
                    group["fused"] = self.optimizer.defaults["fused"]  # the training may have begun on another device
            try:
                self.optimizer.load_state_dict(start.optimizer)
            except (ValueError, KeyError):
                raise UserError(f"{source} holds an optimiser's state that is not that of this network") from None
        if start.criterion:
            self.criterion.load_state_dict(start.criterion, strict=False)
        if self.averaged and start.average:
            self.averaged.module.load_state_dict(start.average)
            self.averaged.n_averaged += 1  # else the first step would overwrite it
        if start.random:
            torch.set_rng_state(start.random["cpu"])
            if self.device.type == "cuda" and "cuda" in start.random:
                torch.cuda.set_rng_state(start.random["cuda"], self.device)
        log.info(f"goes on at step {self.step} of {source}")

    def _parallel(self) -> nn.Module:
        """What `train_step` trains: the network itself, or, of several ranks, each one's copy of it."""
        if ranks.count() == 1:
            return self.network
        # Where a parameter takes no part (the connections' filters in a single stage), nobody must wait for it.
        self.network.requires_grad_(True)
        sum(R.sum() for R in self.network(torch.zeros(1, 3, 16, 16, device=self.device))).backward()
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.optimizer.zero_grad()
        return DistributedDataParallel(self.network, gradient_as_bucket_view=True)

    def save(self, *names: str) -> None:
        """Write the checkpoint under each name in the run's folder. Raises UserError where weights are not finite."""
        self._check_weights()
        if not ranks.is_first():
            return
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = Checkpoint(
            self.network.state_dict(),
            self.step,
            self.asked,
            self.optimizer.state_dict(),
            random,
            self.best_psnr,
            seconds=self.seconds + time.monotonic() - self.started,
            device=describe(self.device),
            average=self.averaged.module.state_dict() if self.averaged else None,
            criterion=self._criterion_state(),
        )
        for name in names:
            checkpoints.save(self.settings.model_path / f"{name}.pth", state)

    def _criterion_state(self) -> dict[str, Tensor]:
        """What the loss has learnt; what it was given, such as VGG's features, is not saved."""
        return {name: p.detach() for name, p in self.criterion.named_parameters() if p.requires_grad}

    def run(self) -> None:
        """Train to the last step, or until Ctrl-C or SIGTERM; checkpoint, log and curves go to the run's folders.

        Of several ranks, the first one writes.
        """
        settings = self.settings
        self.curves, log_file = NoCurves(), logging.NullHandler()
        if ranks.is_first():
            write_bytes(settings.log_path / "settings.json", json.dumps(asdict(self.asked), indent=2).encode())
            log_file = logging.FileHandler(settings.log_path / "train.log")
            log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            self._claim(log_file)
            self.curves = open_curves(settings.log_path, self.step)
        log.addHandler(log_file)
        try:
            self._log_start()
            self.network.train()
            self._compile()
            terminal = in_terminal()
            bar = tqdm(total=settings.steps, initial=self.step, unit="step", disable=not terminal, dynamic_ncols=True)
            with Interrupt() as interrupt, bar, logging_redirect_tqdm([log] if terminal else []):
                self._loop(bar, interrupt)
        except RuntimeError as error:
            if not ranks.is_lost(error):
                raise
            raise UserError(f"{ranks.ENDED}; {self._last_good()}, and the same command goes on from it") from None
        finally:
            self.curves.close()
            log.removeHandler(log_file)
            log_file.close()

    def _claim(self, log_file: logging.FileHandler) -> None:
        """Lock the log as long as this process lives. Raises UserError where another process trains this run."""
        if not lock(log_file.stream):
            raise UserError(
                f"run {self.settings.run} is in training already, by another process: {self.settings.log_path}"
            )

    def _log_start(self) -> None:
        settings = self.settings
        half = compute_dtype(settings.precision, self.device, training=True) != torch.float32
        log.info(
            f"run {settings.run}: {model.count_parameters(self.network)} parameters on {self.device} in "
            f"{'bf16' if half else 'float32'}, steps {self.step} to {settings.steps}"
        )
        if ranks.count() > 1:
            log.info(
                f"{ranks.count()} processes share each batch: {settings.batch_size} crops in all, "
                f"{len(ranks.part(settings.batch_size))} here; learning rate {settings.lr:g}, as for one process"
            )

    def _compile(self) -> None:
        """Compile the network where that is asked for, or on a GPU pays."""
        asked = self.settings.compile == "on"
        long = self.device.type == "cuda" and self.settings.steps - self.step >= COMPILE_STEPS
        if not (asked or (self.settings.compile == "auto" and long)):
            return
        if TorchVersion(torch.__version__) < "2.5":  # which would compile anew in every step
            if asked:
                raise UserError(f"--compile on needs PyTorch 2.5 or newer, this is {torch.__version__}")
            return
        log.info("compiling the network, which makes the first step slow; --compile off does without")
        # Where nobody asked for it and there is no compiler, the network runs as it is.
        torch._dynamo.config.suppress_errors = not asked
        self.network.compile()

    def _can_record(self) -> bool:
        """Whether a step may become a CUDA graph. Raises UserError where that is asked for, and it can't."""
        obstacles = recording_obstacles(self.settings, self.device)
        if obstacles and self.settings.cuda_graphs == "on":
            raise UserError(f"--cuda_graphs on records a step of one pass on one CUDA GPU, but {', '.join(obstacles)}")
        return self.settings.cuda_graphs != "off" and not obstacles

    def _loop(self, bar: tqdm, interrupt: Interrupt) -> None:
        settings = self.settings
        batches = training_batches(self.dataset, self.step, self.device)
        saved_at = lap_at = time.monotonic()
        lap_steps, waited = 0, 0.0  # since the last line of the log: steps, seconds spent waiting for crops
        stopped = False
        # All ranks stop behind the same step, whichever was asked to.
        while self.step < settings.steps and not (stopped := any(ranks.total([interrupt.asked]))):
            fetch_at = time.monotonic()
            O, B, *labels = (x.to(self.device, non_blocking=True) for x in next(batches))
            O, B = O.float() / 255, B.float() / 255
            waited += time.monotonic() - fetch_at
            rate = learning_rate(settings, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            scored = (self.step + 1) % settings.log_steps == 0
            result = self._train_step(O, B, scored, *labels)
            if not np.isfinite(result["loss"]):
                raise self._not_finite(f"the loss is {result['loss']} in step {self.step + 1}")
            if self.averaged:
                self.averaged.update_parameters(self.network)
            self.step += 1
            lap_steps += 1
            bar.update()
            if scored:
                seconds = time.monotonic() - lap_at
                self._log_training(result, rate, lap_steps, seconds, waited)
                bar.set_postfix(loss=f"{result['loss']:.5f}", psnr=f"{result[self._last('psnr')]:.2f}")
                lap_steps, waited, lap_at = 0, 0.0, time.monotonic()
            if self.step % settings.save_steps == 0 or self.step == settings.steps:
                pause_at = time.monotonic()
                self._validate_and_save()
                saved_at = time.monotonic()
                lap_at += saved_at - pause_at
            elif time.monotonic() - saved_at > 60 * settings.save_minutes:
                self.save("latest")
                saved_at = time.monotonic()
        if stopped:
            self.save("latest")
            log.info(f"stopped at step {self.step}; the same command goes on from {self._path('latest')}")

    def _train_step(self, O: Tensor, B: Tensor, scored: bool, labels: Tensor | None = None) -> dict[str, float]:
        """`train_step`, with one line about a full memory."""
        settings = self.settings
        try:
            if self.records and self.recorded is None:
                self.recorded = record_step(self.network, self.criterion, settings, O, B, labels)
                self.records = self.recorded is not None
            return train_step(
                self.parallel, self.optimizer, O, B, settings, scored, self.criterion, labels, self.recorded
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise UserError(
            f"the memory of {self.device} is too small for batch_size {settings.batch_size} in {settings.accumulate} "
            f"part(s): --accumulate {2 * settings.accumulate} gives the same gradients in half of it, "
            f"--checkpoint_activations true takes less too, --batch_size {max(1, settings.batch_size // 2)} is another "
            f"training; {self._last_good()}"
        )

    def _last(self, name: str) -> str:
        return f"stage_{self.network.output_num}/{name}"

    def _path(self, name: str) -> Path:
        return self.settings.model_path / f"{name}.pth"

    def _check_weights(self) -> None:
        """A step may have spoilt the weights though its loss was finite: they must not replace a good checkpoint."""
        parameters = itertools.chain(self.network.parameters(), self.criterion.parameters())
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise self._not_finite(f"the weights are not finite after step {self.step}")

    def _not_finite(self, what: str) -> UserError:
        rate = self.optimizer.param_groups[0]["lr"]
        return UserError(f"{what} at learning rate {rate:g}: lower --lr; {self._last_good()}")

    def _last_good(self) -> str:
        last = self._path("latest")
        return f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint of this run yet"

    def _log_training(self, result: dict, rate: float, steps: int, seconds: float, waited: float) -> None:
        if not ranks.is_first():
            return
        images = steps * self.settings.batch_size / seconds
        result = {**result, "lr": rate, "images_per_second": images, "wait_share": waited / seconds}
        self.curves.add(self.step, {f"train/{name}": value for name, value in result.items()})
        left = timedelta(seconds=round((self.settings.steps - self.step) * seconds / steps))
        log.info(
            f"step {self.step}/{self.settings.steps}  loss {result['loss']:.6f}  "
            f"psnr {result[self._last('psnr')]:.2f} dB  lr {rate:g}  {images:.1f} images/s  "
            f"waiting for data {waited / seconds:.1%}  left {left}"
        )

    def _validate_and_save(self) -> None:
        self._check_weights()
        started = time.monotonic()
        network = self.averaged.module if self.averaged else self.network
        result, mosaic = validate(network, self.validation, self.device, self.settings, self.criterion)
        names = ["latest", f"step_{self.step}"]
        if self.best_psnr is None or result["psnr"] > self.best_psnr:
            self.best_psnr = float(result["psnr"])
            names.insert(0, "best")  # before `latest`, so that a kill between the two repeats this validation
        if not ranks.is_first():
            return
        self.curves.add(self.step, {f"val/{name}": value for name, value in result.items()})
        self.curves.add_picture(self.step, "val/preview", mosaic)
        write_image(self.settings.log_path / "preview.png", mosaic)
        stages = ", ".join(f"{result[f'stage_{t}/psnr']:.2f}" for t in range(1, network.output_num + 1))
        log.info(
            f"validation at step {self.step}: psnr by stage {stages} dB (input {result['psnr_input']:.2f}), "
            f"ssim {result[self._last('ssim')]:.4f}, {time.monotonic() - started:.1f} s"
        )
        self.save(*names)


def train(preset: str | None, name: str | None, overrides: dict[str, Any]) -> None:
    """`-a train`: begin a run, or go on with it where it has a checkpoint."""
    settings = resolve(preset or "sdsen", overrides)
    run, _, file = (name or "").partition("/")
    own = Path(settings.model_dir) / run / "latest.pth"
    if run and file in ("", "latest", "latest.pth") and not preset and "run" not in overrides and own.is_file():
        name, settings = None, override(settings, {"run": run})  # it goes on with the run that -m names
    latest = settings.model_path / "latest.pth"
    source, start = ranks.from_first(lambda: _find_start(settings, latest, name))
    if start and start.settings:
        old = start.settings
        if start.optimizer is None:  # weights alone: a new training begins, which takes nothing but the network
            network = {field: getattr(old, field) for field in NETWORK_FIELDS}
            old = override(resolve(preset or "sdsen"), network)
        settings = override(old, {"run": settings.run, "model_dir": settings.model_dir, **overrides})
        if start.optimizer is not None and settings.optimizer != old.optimizer:
            raise UserError(
                f"{source} holds the state of {old.optimizer}, not of {settings.optimizer}: "
                "export it and begin with its weights"
            )
        wanted = resolve(preset, overrides) if preset else settings
        changed = [n for n in FIELDS if getattr(settings, n) != getattr(old, n)]
        for field in NETWORK_FIELDS:
            # All stages have the same weights, so that their number may change, but not unasked.
            if getattr(wanted, field) != getattr(old, field) and not (field == "stage_num" and field in overrides):
                raise UserError(
                    f"{source} was trained with {field} {getattr(old, field)}, not {getattr(wanted, field)}: "
                    f"name another run with --run{', or say --stage_num' * (field == 'stage_num')}"
                )
        if source != latest or {"data_dir", "val_images", "stage_num"} & set(changed):
            start.best_psnr = None  # it was another validation's
        if changed:
            values = (f"{n} {getattr(old, n)!r} is now {getattr(settings, n)!r}" for n in changed)
            log.info("other than in the checkpoint: " + ", ".join(values))
    log.info("settings:\n" + describe_settings(settings))
    trainer = Trainer(settings, start, source)
    steps = trainer.settings.steps
    if trainer.step >= steps:
        more = "epochs" if settings.epochs else "steps"
        log.info(f"run {settings.run} has had its {steps} steps; more with --{more}")
        return
    trainer.run()


def _find_start(settings: Settings, latest: Path, name: str | None) -> tuple[Path, Checkpoint | None]:
    """The file and checkpoint that a training starts from: the one that is named, or the run's own, or none."""
    source = checkpoints.find(name, Path(settings.model_dir)) if name else latest
    if name and latest.is_file() and not source.samefile(latest):
        raise UserError(f"run {settings.run} has a checkpoint of its own, {latest}: name another run with --run")
    return source, checkpoints.load(source) if source.is_file() else None


# ---------------------------------------------------------------- test


def test(preset: str | None, name: str | None, overrides: dict[str, Any]) -> None:
    """`-a test`: scores of a checkpoint on the whole test images, by stage, and a CSV with a row an image."""
    network, settings, path, step = open_network(preset, name, overrides)
    folder = data_path(settings) / "test"
    paths = list_pairs(folder)
    device = pick_device(settings.device)
    log.info(f"{path} (step {step}) on the {len(paths)} pairs of {folder}, {device}")
    mine = len(ranks.share(paths))
    bar = tqdm(total=mine, unit="image", disable=not in_terminal(), dynamic_ncols=True)
    done = itertools.count(1)

    def each(path, O, restored, B, rows):
        bar.update()
        if bar.disable and (number := next(done)) % 20 == 0:
            log.info(f"{number} of {mine} images")
        change = (restored[-1].float() - O.float()).abs().mean().item()
        values = [f"{row[metric]:.6f}" for row in rows for metric in METRICS]
        return [path.name, O.shape[1], O.shape[2], f"{change:.4f}", *values], change

    with bar:
        table, found = score_pairs(network, paths, device, each, *how_to_restore(settings))
    if not ranks.is_first():
        return
    means, rows, changes = np.nanmean(table, 0), *zip(*found, strict=True)
    log.info(f"{'':10}" + "".join(f"{metric:>10}" for metric in METRICS))
    places = ["input", *(f"stage_{t}" for t in range(1, table.shape[1]))]
    for label, row in zip(places, means, strict=True):
        log.info(f"{label:10}" + "".join(f"{value:10.4f}" for value in row))
    if np.mean(changes) < NEARLY_INPUT:
        log.warning(f"warning: the output is nearly the input, {np.mean(changes):.2f} of 255 levels apart on average")
    text = io.StringIO()
    columns = [f"{metric}_{place}" for place in places for metric in METRICS]
    csv.writer(text, lineterminator="\n").writerows([["image", "height", "width", "change", *columns], *rows])
    where = Path(settings.log_dir) / path.parent.name if path.parent.name == settings.run else Path(settings.log_dir)
    csv_path = where / f"test_{path.stem}.csv"
    write_bytes(csv_path, text.getvalue().encode())
    log.info(f"8-bit RGB, and Y of rgb2ycbcr, means over {len(paths)} images; each image's scores: {csv_path}")


# ---------------------------------------------------------------- export, models


def export(names: list[str], overrides: dict[str, Any]) -> None:
    """`-a export`: what using a trained network takes, as one small file in model_dir that `-m` takes by its name.

    Of several checkpoints, all of one architecture, it gets the mean of their weights and the settings of the first.

    Of the settings that can be typed, `run` is that name, `data_dir` what it is tested on by itself, and `stage_num`
    with how many of its stages: those that validation found best.
    """
    strange = overrides.keys() - {"run", "data_dir", "stage_num", "model_dir", "log_level"}
    if strange:
        raise UserError(f"-a export takes --run, --data_dir, --stage_num and --model_dir, not --{min(strange)}")
    settings = resolve(overrides=overrides)
    source, *others = (checkpoints.find(name, Path(settings.model_dir)) for name in names)
    if others and not overrides.get("run"):
        raise UserError("the mean of several checkpoints needs a name: --run NAME")
    own = source.stem if source.parent == Path(settings.model_dir) else source.parent.name
    path = Path(settings.model_dir) / f"{overrides.get('run', own)}.pth"
    if path.is_file() and not overrides.get("run"):
        raise UserError(f"{path} is there already: name another with --run, or this one to replace it")
    changes = {name: value for name, value in overrides.items() if name in ("data_dir", "stage_num")}
    if "stage_num" in changes:
        open_network(None, str(source), changes)  # raises UserError where its stages don't share all weights
    step = checkpoints.export(source, path, changes, others).step
    data = path.read_bytes()
    log.info(f"{' + '.join(map(str, [source, *others]))} (step {step}): {len(data) / 1000:.0f} kB")
    log.info(f"{hashlib.sha256(data).hexdigest()}  {path.name}")


def models() -> None:
    """`-a models`: the presets with their parameters, cost and row of the paper."""
    log.info(f"{'preset':27}{'parameters':>10}{'stages':>8}{'MACs/pixel':>12}  row of the paper")
    for name, preset in PRESETS.items():
        network = model.build(name)
        log.info(
            f"{name:27}{model.count_parameters(network):>10}{network.output_num:>8}"
            f"{network.macs_per_pixel():>12}  {preset.row}"
        )


def main(arguments: list[str]) -> int:
    parser = make_parser("Train, test and list the networks of S-DSEN.")
    actions = ["train", "test", "export", "models", "tables", "tilt", "stages"]
    parser.add_argument("-a", "--action", required=True, choices=actions)
    parser.add_argument("-p", "--preset", help="a network of the paper: see -a models; default sdsen")
    parser.add_argument(
        *("-m", "--model"),
        nargs="+",
        help="a checkpoint: a run's name, a name in model_dir, or a file; -a tilt: several; -a export: their mean",
    )
    if "tables" in arguments and {"-h", "--help"} & set(arguments):
        return command.main(["--help"])
    known, words = parser.parse_known_args(arguments)
    if known.action in ("models", "tables") and (known.preset or known.model):
        raise UserError(f"-a {known.action} takes no -p and no -m")
    if known.action == "tables":
        set_up_log()
        return command.main(words)
    overrides = read_overrides(words)
    set_up_log(overrides.get("log_level", "info"))
    if known.action == "models":
        if overrides:
            raise UserError("-a models takes no other argument")
        models()
        return 0
    names = known.model or []
    if known.action in ("export", "tilt", "stages") and (known.preset or not names):
        raise UserError(f"-a {known.action} is about checkpoints: name them with -m, without -p")
    if known.action not in ("tilt", "export") and len(names) > 1:
        raise UserError(f"-m takes one checkpoint, got {' '.join(names)}")
    name = names[0] if names else None
    if known.action == "export":
        export(names, overrides)
        return 0
    with ranks.joined():
        if known.action == "train":
            train(known.preset, name, overrides)
        elif known.action == "test":
            test(known.preset, name, overrides)
        elif known.action == "tilt":
            tilt.measure(names, overrides)
        else:
            stages.measure(name, overrides)
    return 0


if __name__ == "__main__":
    run_script(main)
