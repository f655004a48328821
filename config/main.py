"""Train a network, test it, or list the presets.

    python main.py -a train -p sdsen --data_dir DATA
    python main.py -a test -p sdsen
    python main.py -a models

`python main.py -h` lists every setting.
"""

import csv
import io
import json
import logging
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import cal_ssim
import checkpoint as checkpoints
import model
import settings as knobs
from cal_ssim import METRICS
from checkpoint import Checkpoint
from common import UserError, log, run_script, set_up_log
from curves import Curves
from dataset import CropDataset, data_path, list_pairs, read_whole, training_batches
from evaluate import NEARLY_INPUT, open_network, pick_device, score_pairs
from image_io import write_bytes, write_image
from presets import PRESETS
from settings import Settings

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of (R, O, B), the mean over the batch
    "mse": lambda R, O, B: F.mse_loss(R, O - B),
    "l1": lambda R, O, B: F.l1_loss(R, O - B),
    "ssim": lambda R, O, B: 1 - cal_ssim.ssim(O - R, B).mean(),
}
PIECE_PIXELS = 2**13  # of the crops that go through the network at once on the CPU: two of 64x64


# ---------------------------------------------------------------- training


def learning_rate(settings: Settings, step: int) -> float:
    """Adam's learning rate in a step, counted from 0: divided by 10 at each milestone (section 3.1)."""
    return settings.lr * 0.1 ** sum(step >= milestone for milestone in settings.milestones)


def train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, O: Tensor, B: Tensor, settings: Settings, scored: bool
) -> dict[str, float]:
    """One step of Adam on rainy crops `O` and clean crops `B`, both (N, 3, H, W) in [0, 1].

    Returns `loss`, the sum over the stages, and where `scored`, `stage_t/loss`, `stage_t/psnr` and `stage_t/ssim`.
    A loss that is not finite leaves the weights as they were. On the CPU the crops go through the network a few at a
    time, and the gradients add up to the batch's: that takes less memory, and is faster.
    """
    count = len(O) if O.device.type != "cpu" else max(1, PIECE_PIXELS // (O.shape[2] * O.shape[3]))
    result: dict[str, float] = defaultdict(float)
    optimizer.zero_grad(set_to_none=True)
    for rainy, clean in zip(O.split(count), B.split(count), strict=True):
        share = len(rainy) / len(O)
        rain_layers = network(rainy)
        losses = [LOSSES[settings.loss](R, rainy, clean) for R in rain_layers]
        loss = share * torch.stack(losses).sum()
        result["loss"] += loss.item()
        if not np.isfinite(result["loss"]):
            return result
        loss.backward()
        if scored:
            for name, value in _stage_scores(rain_layers, losses, rainy, clean):
                result[name] += share * value
    if settings.clip_norm:
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
    optimizer.step()
    return result


@torch.no_grad()
def _stage_scores(rain_layers: list[Tensor], losses: list[Tensor], O: Tensor, B: Tensor) -> Iterator[tuple[str, float]]:
    for t, (R, stage_loss) in enumerate(zip(rain_layers, losses, strict=True), 1):
        restored = (O - R).clamp(0, 1)
        yield f"stage_{t}/loss", stage_loss.item()
        yield f"stage_{t}/psnr", cal_ssim.psnr(restored, B).mean().item()
        if min(B.shape[-2:]) >= cal_ssim.WINDOW:
            yield f"stage_{t}/ssim", cal_ssim.ssim(restored, B).mean().item()


def validate(network: nn.Module, paths: list[Path], device: torch.device, loss_name: str) -> tuple[dict, np.ndarray]:
    """Scores of whole validation pairs, and a mosaic of the first one: O, every stage, B, as (H, W, 3) uint8 BGR.

    Returns `psnr` of the last stage, `psnr_input`, and `stage_t/loss`, `stage_t/psnr`, `stage_t/ssim`, all of the 8-bit
    images that would be saved.
    """
    mosaic, losses = [], []

    def each(path, O, restored, B, rows):
        if not mosaic:
            mosaic.extend([O, *restored, B])
        O, B = O[None].float() / 255, B[None].float() / 255
        losses.append([LOSSES[loss_name](O - image[None].float() / 255, O, B).item() for image in restored])

    table = score_pairs(network, paths, device, each).mean(0)  # (1 + stages, METRICS)
    result = {}
    for t, (row, loss) in enumerate(zip(table[1:], np.mean(losses, 0), strict=True), 1):
        result |= {f"stage_{t}/loss": loss, f"stage_{t}/psnr": row[0], f"stage_{t}/ssim": row[1]}
    scale = min(1.0, 320 / max(mosaic[0].shape[1:]))
    mosaic = np.hstack([np.moveaxis(image.numpy(), 0, 2) for image in mosaic])
    mosaic = cv2.resize(mosaic, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return {"psnr": table[-1][0], "psnr_input": table[0][0], **result}, mosaic


class Interrupt:
    """Ctrl-C and SIGTERM ask for the end of training; the step under way is finished first."""

    def __enter__(self):
        self.asked = False
        self.old = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for name, handler in self.old.items():
            signal.signal(name, handler)


class Trainer:
    """A network in training: its state, its files, and the loop over the steps."""

    def __init__(self, settings: Settings, start: Checkpoint | None, source: Path | None):
        """From the beginning, or from checkpoint `start`, which was read from `source`. Writes nothing yet."""
        self.settings, self.device = settings, pick_device(settings.device)
        torch.manual_seed(settings.seed)
        self.network = model.build(settings)
        if start:
            checkpoints.load_weights(self.network, start, source)
        self.network.to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr)
        self.step, self.best_psnr = 0, None
        if start:
            self._resume(start, source)
        folder = data_path(settings)
        self.dataset = CropDataset(folder / "train", settings)
        paths = list_pairs(folder / "val")
        count = min(settings.val_images or len(paths), len(paths))
        self.validation = [paths[i] for i in np.linspace(0, len(paths) - 1, count).astype(int)]
        for path in self.validation:  # a file that can't be read is told now, not in the middle of the training
            read_whole(path)
        log.info(f"validation on {count} of the {len(paths)} whole pairs in {folder / 'val'}, the same ones every time")

    def _resume(self, start: Checkpoint, source: Path) -> None:
        self.step, self.best_psnr = start.step, start.best_psnr
        if start.optimizer:
            try:
                self.optimizer.load_state_dict(start.optimizer)
            except (ValueError, KeyError):
                raise UserError(f"{source} holds an optimiser's state that is not Adam's of this network") from None
        if start.random:
            torch.set_rng_state(start.random["cpu"])
            if self.device.type == "cuda" and "cuda" in start.random:
                torch.cuda.set_rng_state(start.random["cuda"], self.device)
        log.info(f"goes on at step {self.step} of {source}")

    def save(self, *names: str) -> None:
        """Write the checkpoint under each name in the run's folder. Raises UserError where weights are not finite."""
        self._check_weights()
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = Checkpoint(
            self.network.state_dict(), self.step, self.settings, self.optimizer.state_dict(), random, self.best_psnr
        )
        for name in names:
            checkpoints.save(self.settings.model_path / f"{name}.pth", state)

    def run(self) -> None:
        """Train to the last step, or until Ctrl-C or SIGTERM; checkpoint, log and curves go to the run's folders."""
        settings = self.settings
        write_bytes(settings.log_path / "settings.json", json.dumps(asdict(settings), indent=2).encode())
        self.curves = Curves(settings.log_path, self.step)
        log_file = logging.FileHandler(settings.log_path / "train.log")
        log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(log_file)
        log.info(
            f"run {settings.run}: {model.count_parameters(self.network)} parameters on {self.device}, "
            f"steps {self.step} to {settings.steps}"
        )
        terminal = sys.stderr.isatty()
        bar = tqdm(total=settings.steps, initial=self.step, unit="step", disable=not terminal, dynamic_ncols=True)
        self.network.train()
        try:
            with Interrupt() as interrupt, bar, logging_redirect_tqdm([log] if terminal else []):
                self._loop(bar, interrupt)
        finally:
            self.curves.close()
            log.removeHandler(log_file)

    def _loop(self, bar: tqdm, interrupt: Interrupt) -> None:
        settings = self.settings
        batches = training_batches(self.dataset, self.step, self.device)
        saved_at = lap_at = time.monotonic()
        lap_steps, waited = 0, 0.0  # since the last line of the log: steps, seconds spent waiting for crops
        while self.step < settings.steps and not interrupt.asked:
            fetch_at = time.monotonic()
            O, B = (x.to(self.device, non_blocking=True).float() / 255 for x in next(batches))
            waited += time.monotonic() - fetch_at
            rate = learning_rate(settings, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            scored = (self.step + 1) % settings.log_steps == 0
            result = train_step(self.network, self.optimizer, O, B, settings, scored)
            if not np.isfinite(result["loss"]):
                raise self._not_finite(f"the loss is {result['loss']} in step {self.step + 1}")
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
        if interrupt.asked:
            self.save("latest")
            log.info(f"stopped at step {self.step}; the same command goes on from {self._path('latest')}")

    def _last(self, name: str) -> str:
        return f"stage_{self.settings.stage_num}/{name}"

    def _path(self, name: str) -> Path:
        return self.settings.model_path / f"{name}.pth"

    def _check_weights(self) -> None:
        """A step may have spoilt the weights though its loss was finite: they must not replace a good checkpoint."""
        if not all(parameter.isfinite().all() for parameter in self.network.parameters()):
            raise self._not_finite(f"the weights are not finite after step {self.step}")

    def _not_finite(self, what: str) -> UserError:
        last, rate = self._path("latest"), self.optimizer.param_groups[0]["lr"]
        good = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint of this run yet"
        return UserError(f"{what} at learning rate {rate:g}: lower --lr; {good}")

    def _log_training(self, result: dict, rate: float, steps: int, seconds: float, waited: float) -> None:
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
        result, mosaic = validate(self.network, self.validation, self.device, self.settings.loss)
        self.curves.add(self.step, {f"val/{name}": value for name, value in result.items()})
        self.curves.add_picture(self.step, "val/preview", mosaic)
        write_image(self.settings.log_path / "preview.png", mosaic)
        stages = ", ".join(f"{result[f'stage_{t}/psnr']:.2f}" for t in range(1, self.settings.stage_num + 1))
        log.info(
            f"validation at step {self.step}: psnr by stage {stages} dB (input {result['psnr_input']:.2f}), "
            f"ssim {result[self._last('ssim')]:.4f}, {time.monotonic() - started:.1f} s"
        )
        names = ["latest", f"step_{self.step}"]
        if self.best_psnr is None or result["psnr"] > self.best_psnr:
            self.best_psnr = float(result["psnr"])
            names.append("best")
        self.save(*names)


def train(preset: str | None, name: str | None, overrides: dict[str, Any]) -> None:
    """`-a train`: begin a run, or go on with it where it has a checkpoint."""
    settings = knobs.resolve(preset or "sdsen", overrides)
    latest = settings.model_path / "latest.pth"
    source = checkpoints.find(name, Path(settings.model_dir)) if name else latest
    if name and latest.is_file() and not source.samefile(latest):
        raise UserError(f"run {settings.run} has a checkpoint of its own, {latest}: name another run with --run")
    start = checkpoints.load(source) if source.is_file() else None
    if start and start.settings:
        old = start.settings
        settings = knobs.replace(old, {"run": settings.run, "model_dir": settings.model_dir, **overrides})
        wanted = knobs.resolve(preset, overrides) if preset else settings
        changed = [n for n in knobs.FIELDS if getattr(settings, n) != getattr(old, n)]
        for field in knobs.NETWORK:
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
    log.info("settings:\n" + knobs.describe(settings))
    trainer = Trainer(settings, start, source)
    if trainer.step >= settings.steps:
        log.info(f"run {settings.run} has had its {settings.steps} steps; more with --steps")
        return
    trainer.run()


# ---------------------------------------------------------------- test


def test(preset: str | None, name: str | None, overrides: dict[str, Any]) -> None:
    """`-a test`: scores of a checkpoint on the whole test images, by stage, and a CSV with a row an image."""
    network, settings, path, step = open_network(preset, name, overrides)
    folder = data_path(settings) / "test"
    paths = list_pairs(folder)
    device = pick_device(settings.device)
    log.info(f"{path} (step {step}) on the {len(paths)} pairs of {folder}, {device}")
    bar = tqdm(total=len(paths), unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [f"{metric}_{place}" for place in ["input", *_stages(settings)] for metric in METRICS]
    table.writerow(["image", "height", "width", "change", *columns])
    changes = []

    def each(path, O, restored, B, rows):
        changes.append((restored[-1].float() - O.float()).abs().mean().item())
        values = [f"{row[metric]:.6f}" for row in rows for metric in METRICS]
        table.writerow([path.name, O.shape[1], O.shape[2], f"{changes[-1]:.4f}", *values])
        bar.update()
        if bar.disable and len(changes) % 20 == 0:
            log.info(f"{len(changes)} of {len(paths)} images")

    with bar:
        means = np.nanmean(score_pairs(network, paths, device, each, settings.memory_gib), 0)
    log.info(f"{'':10}" + "".join(f"{metric:>10}" for metric in METRICS))
    for label, row in zip(["input", *_stages(settings)], means, strict=True):
        log.info(f"{label:10}" + "".join(f"{value:10.4f}" for value in row))
    if np.mean(changes) < NEARLY_INPUT:
        log.warning(f"warning: the output is nearly the input, {np.mean(changes):.2f} of 255 levels apart on average")
    where = Path(settings.log_dir) / path.parent.name if path.parent.name == settings.run else Path(settings.log_dir)
    csv_path = where / f"test_{path.stem}.csv"
    write_bytes(csv_path, text.getvalue().encode())
    log.info(f"8-bit RGB, and Y of rgb2ycbcr, means over {len(paths)} images; each image's scores: {csv_path}")


def _stages(settings: Settings) -> list[str]:
    return [f"stage_{t}" for t in range(1, settings.stage_num + 1)]


# ---------------------------------------------------------------- models


def models() -> None:
    """`-a models`: the presets with their parameters, cost and row of the paper."""
    log.info(f"{'preset':14}{'parameters':>11}{'stages':>8}{'MACs/pixel':>12}  row of the paper")
    for name, preset in PRESETS.items():
        network = model.build(name)
        log.info(
            f"{name:14}{model.count_parameters(network):>11}{network.stage_num:>8}"
            f"{model.macs_per_pixel(network):>12}  {preset.row}"
        )


def main(arguments: list[str]) -> None:
    parser = knobs.make_parser("Train, test and list the networks of S-DSEN.")
    parser.add_argument("-a", "--action", required=True, choices=["train", "test", "models"])
    parser.add_argument("-p", "--preset", help="a network of the paper: see -a models; default sdsen")
    parser.add_argument("-m", "--model", help="a checkpoint: a run's name, a name in model_dir, or a file")
    known, words = parser.parse_known_args(arguments)
    overrides = knobs.read_overrides(words)
    set_up_log(overrides.get("log_level", "info"))
    if known.action == "models":
        if known.preset or known.model or overrides:
            raise UserError("-a models takes no other argument")
        models()
    elif known.action == "train":
        train(known.preset, known.model, overrides)
    else:
        test(known.preset, known.model, overrides)


if __name__ == "__main__":
    run_script(main)
