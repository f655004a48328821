"""The state of a training: its checkpoints, its validations, its log and curves. The loop is in main.py."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import losses
import model
from base import ranks
from base.console import in_terminal, log
from base.devices import compute_dtype, describe, is_out_of_memory, pick_device
from base.errors import BadArgument, LostProcess, Mismatch, NotFinite, NotWritable, Occupied, OutOfMemory
from base.files import lock, write_bytes
from base.images import write_image
from dataset import CropDataset, data_path, list_pairs, read_whole
from runs import checkpoints
from runs.checkpoints import Checkpoint
from runs.curves import Curves
from runs.optimization import can_record, compile_network, in_steps, make_optimizer
from runs.start import Start
from runs.validation import validate
from settings import describe_settings


class Training:
    """A network in training: what its checkpoints hold, and the files of its run, which rank 0 writes."""

    def __init__(self, start: Start):
        """Raises UserError where settings, data and checkpoint do not fit. Writes nothing yet."""
        settings = start.settings
        self.device = pick_device(settings.device)
        if settings.precision == "fp16":
            raise BadArgument("fp16's range is too small for gradients: train in bf16; fp16 is for -a test and show.py")
        if settings.batch_size < ranks.count():
            raise BadArgument(f"batch_size {settings.batch_size} is too small for {ranks.count()} processes")
        torch.manual_seed(settings.seed)
        self.network = model.build(settings)
        if start.checkpoint:
            checkpoints.load_weights(self.network, start.checkpoint, start.source)
        self.network.to(self.device)
        self.network.checkpoint_activations = settings.checkpoint_activations
        self.network.cuda_graphs = settings.cuda_graphs != "off"
        folder = data_path(settings)
        read_labels = losses.label_reader(settings, folder / "train")
        self.dataset = CropDataset(folder / "train", settings, read_labels)
        self.start, self.requested = start, settings  # in epochs or steps: what the checkpoints hold
        self.settings = self.dataset.settings = settings = in_steps(settings, len(self.dataset.paths))
        self.criterion = losses.build(settings, read_labels is not None).to(self.device)
        self.optimizer = make_optimizer(nn.ModuleList([self.network, self.criterion]), settings.lr, settings.optimizer)
        self.can_record = can_record(settings, self.device)
        self.averaged = None
        if settings.average:
            self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
        self.step, self.seconds, self.started = 0, 0.0, time.monotonic()
        self.best_psnr: float | None = None
        if start.checkpoint and start.checkpoint.optimizer is not None:
            self._resume(start.checkpoint, start.source)
        self.parallel = self._parallel()
        self.val_folder, self.saved_at = folder / "val", time.monotonic()
        paths = list_pairs(self.val_folder)
        count = min(settings.val_images or len(paths), len(paths))
        self.validation = [paths[i] for i in np.linspace(0, len(paths) - 1, count).astype(int)]
        for path in self.validation:  # a damaged file is reported now, not in the middle of the training
            read_whole(path)

    def _resume(self, checkpoint: Checkpoint, source: Path) -> None:
        self.step, self.best_psnr, self.seconds = checkpoint.step, checkpoint.best_psnr, checkpoint.seconds
        if (checkpoint.criterion or {}).keys() != self._criterion_state().keys():
            was = "with" if checkpoint.criterion else "without"
            raise Mismatch(f"{source} was trained {was} labels, which is another loss: name another run with --run")
        if "fused" in self.optimizer.defaults:  # the device may be another one than the checkpoint's
            for group in (checkpoint.optimizer or {}).get("param_groups", []):
                group["fused"] = self.optimizer.defaults["fused"]
        try:
            if checkpoint.optimizer:
                self.optimizer.load_state_dict(checkpoint.optimizer)
        except (ValueError, KeyError):
            raise Mismatch(f"{source} holds an optimizer's state that is not that of this network") from None
        if checkpoint.criterion:
            self.criterion.load_state_dict(checkpoint.criterion, strict=False)
        if self.averaged and checkpoint.average:
            self.averaged.module.load_state_dict(checkpoint.average)
            self.averaged.n_averaged += 1  # else the first step would overwrite it
        if checkpoint.random:
            torch.set_rng_state(checkpoint.random["cpu"])
            if self.device.type == "cuda" and "cuda" in checkpoint.random:
                torch.cuda.set_rng_state(checkpoint.random["cuda"], self.device)

    def _criterion_state(self) -> dict[str, Tensor]:
        """The weights that the loss learns; those that are given, such as VGG's, are not saved."""
        return {name: p.detach() for name, p in self.criterion.named_parameters() if p.requires_grad}

    def _parallel(self) -> nn.Module:
        """What `train_step` takes: the network, or, of several ranks, DistributedDataParallel around it."""
        if ranks.count() == 1:
            return self.network
        # No rank must wait for a parameter that has no gradient, as the links' filters with a single stage.
        self.network.requires_grad_(True)
        sum(R.sum() for R in self.network(torch.zeros(1, 3, 16, 16, device=self.device))).backward()
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.optimizer.zero_grad()
        return DistributedDataParallel(self.network, gradient_as_bucket_view=True)

    def path(self, name: str) -> Path:
        """The file of this run's checkpoint `latest`, `best` or `step_N`."""
        return self.settings.model_path / f"{name}.pth"

    def next_crops(self, batches: Iterator) -> tuple[Tensor, ...]:
        """The next batch on the device: O and B, (N, 3, H, W) in [0, 1], and labels (N, H, W) if there are any."""
        started = time.monotonic()
        O, B, *labels = (x.to(self.device, non_blocking=True) for x in next(batches))
        O, B = O.float() / 255, B.float() / 255
        self.waited += time.monotonic() - started
        return O, B, *labels

    def count_step(self, result: dict[str, float]) -> None:
        """Count a step and update the averaged weights. Raises NotFinite where the step's loss is not finite."""
        if not np.isfinite(result["loss"]):
            raise self._not_finite(f"the loss is {result['loss']} in step {self.step + 1}")
        if self.averaged:
            self.averaged.update_parameters(self.network)
        self.step += 1
        self.lap_steps += 1

    # ---------------------------------------------------------------- checkpoints and validation

    def save(self, *names: str) -> None:
        """Write the checkpoint under each name. Raises NotFinite where the weights are not, and keeps the old ones."""
        self._check_weights()
        self.saved_at = time.monotonic()
        if not ranks.is_first():
            return
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint = Checkpoint(
            self.network.state_dict(),
            self.step,
            self.requested,
            self.optimizer.state_dict(),
            random,
            self.best_psnr,
            seconds=self.seconds + time.monotonic() - self.started,
            device=describe(self.device),
            average=self.averaged.module.state_dict() if self.averaged else None,
            criterion=self._criterion_state(),
        )
        for name in names:
            checkpoints.save(self.path(name), checkpoint)

    def save_after(self, minutes: float) -> None:
        """Write `latest` where the last checkpoint is older than this."""
        if time.monotonic() - self.saved_at > 60 * minutes:
            self.save("latest")

    def validate_and_save(self) -> None:
        """Score the validation pairs, by the averaged weights if there are any, and write the checkpoints."""
        self._check_weights()
        started = time.monotonic()
        network = self.averaged.module if self.averaged else self.network
        result, preview = validate(network, self.criterion, self.validation, self.device, self.settings)
        names = ["latest", f"step_{self.step}"]
        if self.best_psnr is None or result["psnr"] > self.best_psnr:
            self.best_psnr = float(result["psnr"])
            names.insert(0, "best")  # before `latest`, so that a kill between the two repeats this validation
        if ranks.is_first() and preview is not None:  # rank 0 has a pair
            self.curves.add(self.step, {f"val/{name}": value for name, value in result.items()})
            self.curves.add_picture(self.step, "val/preview", preview)
            write_image(self.settings.log_path / "preview.png", preview)
            stages = ", ".join(f"{result[f'stage_{t}/psnr']:.2f}" for t in range(1, self.network.output_num + 1))
            log.info(  # paper/tables.py reads this line
                f"validation at step {self.step}: psnr by stage {stages} dB (input {result['psnr_input']:.2f}), "
                f"ssim {result['ssim']:.4f}, {time.monotonic() - started:.1f} s"
            )
        self.save(*names)
        self.lap_started += time.monotonic() - started  # validations don't count as training

    def _check_weights(self) -> None:
        """A step may spoil the weights though its loss is finite."""
        modules = (self.network, self.criterion)
        if not all(parameter.isfinite().all() for module in modules for parameter in module.parameters()):
            raise self._not_finite(f"the weights are not finite after step {self.step}")

    def _not_finite(self, what: str) -> NotFinite:
        rate = self.optimizer.param_groups[0]["lr"]
        return NotFinite(f"{what} at learning rate {rate:g}: lower --lr; {self._last_checkpoint()}")

    def _last_checkpoint(self) -> str:
        latest = self.path("latest")
        return f"last checkpoint: {latest}" if latest.is_file() else "this run has no checkpoint yet"

    # ---------------------------------------------------------------- log and curves

    @contextmanager
    def running(self) -> Iterator[tqdm]:
        """Within this, the run is locked, log and curves go to its folder, and there is a progress bar in a terminal.

        A full memory or a lost process becomes a UserError.
        """
        settings, terminal = self.settings, in_terminal()
        with ExitStack() as stack:
            if ranks.is_first():
                stack.enter_context(self._log_file(settings.log_path))
            self.curves = Curves(settings.log_path if ranks.is_first() else None, self.step)
            stack.callback(self.curves.close)
            self._log_start()
            self._start_lap()
            self.network.train()
            compile_network(self.network, settings, self.device, settings.steps - self.step)
            bar = tqdm(total=settings.steps, initial=self.step, unit="step", disable=not terminal, dynamic_ncols=True)
            stack.enter_context(bar)
            stack.enter_context(logging_redirect_tqdm([log] if terminal else []))
            try:
                yield bar
            except RuntimeError as error:
                if ranks.is_lost(error):
                    raise LostProcess(f"{ranks.ENDED}; {self._last_checkpoint()}") from None
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemory(
                    f"out of memory on {self.device} (batch_size {settings.batch_size}): try --accumulate "
                    f"{2 * settings.accumulate} (same gradients, half the memory) or --checkpoint_activations true; "
                    f"{self._last_checkpoint()}"
                ) from None

    @contextmanager
    def _log_file(self, folder: Path) -> Iterator[None]:
        """Within this, the log also goes to train.log, which is locked. Raises Occupied where it is locked already."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(folder / "train.log")
        except OSError as error:
            raise NotWritable(f"{folder} can't be written: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        try:
            if not lock(handler.stream):  # type: ignore[arg-type]
                raise Occupied(f"another process trains run {self.settings.run} ({folder})")
            write_bytes(folder / "settings.json", json.dumps(asdict(self.requested), indent=2).encode())
            yield
        finally:
            log.removeHandler(handler)
            handler.close()

    def _log_start(self) -> None:
        settings, start = self.settings, self.start
        log.info("settings:\n" + describe_settings(self.requested))
        if start.changes:
            log.info("changed since the checkpoint: " + ", ".join(start.changes))
        if start.checkpoint:
            resumes = start.checkpoint.optimizer is not None
            log.info(f"resumes at step {self.step} of {start.source}" if resumes else f"weights of {start.source}")
        log.info(f"validation on {len(self.validation)} pairs of {self.val_folder}, the same ones every time")
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

    def _start_lap(self) -> None:
        """From one line of the log to the next: steps, and seconds spent waiting for crops."""
        self.lap_started, self.lap_steps, self.waited = time.monotonic(), 0, 0.0

    def log_step(self, result: dict[str, float], rate: float) -> dict[str, str]:
        """Log a scored step, and the speed since the last one; returns what the progress bar shows."""
        settings, seconds = self.settings, time.monotonic() - self.lap_started
        speed, wait_share = self.lap_steps * settings.batch_size / seconds, self.waited / seconds
        left = timedelta(seconds=round((settings.steps - self.step) * seconds / self.lap_steps))
        psnr = result[f"stage_{self.network.output_num}/psnr"]
        values = {**result, "lr": rate, "images_per_second": speed, "wait_share": wait_share}
        self.curves.add(self.step, {f"train/{name}": value for name, value in values.items()})
        if ranks.is_first():
            log.info(
                f"step {self.step}/{settings.steps}  loss {result['loss']:.6f}  psnr {psnr:.2f} dB  lr {rate:g}  "
                f"{speed:.1f} images/s  waiting for data {wait_share:.1%}  left {left}"
            )
        self._start_lap()
        return {"loss": f"{result['loss']:.5f}", "psnr": f"{psnr:.2f}"}

    def log_end(self) -> None:
        """Say where the checkpoint is, and what to do next."""
        run, latest, best = self.settings.run, self.path("latest"), self.path("best")
        if self.step < self.settings.steps:
            log.info(f"stopped at step {self.step}; the same command resumes from {latest}")
            return
        more = "epochs" if self.requested.epochs else "steps"
        log.info(
            f"run {run} has had its {self.settings.steps} steps: {best if best.is_file() else latest}; "
            f"test it with -a test -m {run}, train on with --{more}"
        )
