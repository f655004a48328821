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

import losses
import model
from base import ranks
from base.console import Interrupt, Stopped, command_line, in_terminal, log
from base.devices import compute_dtype, describe, is_out_of_memory, pick_device
from base.errors import (
    BadArgument,
    DamagedFile,
    LostProcess,
    Mismatch,
    NotFinite,
    NotWritable,
    Occupied,
    OutOfMemory,
    UserError,
)
from base.files import lock, write_bytes
from base.images import list_images, write_image
from base.options import as_text
from dataset import CropDataset, data_path, list_pairs, read_whole
from runs import checkpoints
from runs.checkpoints import Checkpoint, Start
from runs.curves import Curves
from runs.optimization import (
    can_record,
    compile_network,
    in_steps,
    learning_rate,
    make_optimizer,
    resume_optimizer,
    tensors,
)
from runs.restore import validate
from settings import FIELDS, describe_settings, resolve

QUIET_SECONDS = 60  # without a terminal, a training shows after so many that it goes on


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
        self.network = checkpoints.build(settings, start.checkpoint, start.source).to(self.device)
        self.network.checkpoint_activations = settings.checkpoint_activations
        self.network.cuda_graphs = settings.cuda_graphs != "off"
        folder = data_path(settings)
        read_labels = losses.label_reader(settings, folder / "train")
        self.dataset = CropDataset(folder / "train", settings, read_labels)
        self.start, self.requested = start, settings  # in epochs or steps: what the checkpoints hold
        self.settings = self.dataset.settings = settings = in_steps(settings, len(self.dataset.paths))
        self.criterion = losses.build(settings, read_labels is not None).to(self.device)
        self.trained = nn.ModuleList([self.network, self.criterion])
        self.optimizer = make_optimizer(self.trained, settings.lr, settings.optimizer)
        self.can_record = can_record(settings, self.device)
        averaging = get_ema_multi_avg_fn(settings.average)
        self.averaged = AveragedModel(self.network, multi_avg_fn=averaging) if settings.average else None
        self.step, self.seconds, self.started = 0, 0.0, time.monotonic()
        self.best_psnr: float | None = None
        if start.checkpoint and start.checkpoint.optimizer is not None:
            self._resume(start.checkpoint, start.source)
        self.owes_validation = ranks.from_first(self._owes_validation)
        self.parallel = self._parallel()
        self.saved_at = self.shown_at = time.monotonic()  # of the last checkpoint, and the last line about steps
        paths = list_pairs(folder / "val")
        count = min(settings.val_images or len(paths), len(paths))
        self.validation = [paths[i] for i in np.linspace(0, len(paths) - 1, count).astype(int)]
        for path in self.validation:  # a damaged file is reported now, not in the middle of the training
            read_whole(path)

    def _resume(self, checkpoint: Checkpoint, source: Path) -> None:
        self.step, self.best_psnr, self.seconds = checkpoint.step, checkpoint.best_psnr, checkpoint.seconds
        own, criterion = self._criterion_state(), checkpoint.criterion or {}
        if criterion.keys() != own.keys():
            was = "with" if criterion else "without"
            raise Mismatch(f"{source} was trained {was} labels, which is another loss: name another run with --run")
        checkpoints.check_weights(own, criterion, source)
        self.criterion.load_state_dict(criterion, strict=False)
        try:
            resume_optimizer(self.optimizer, checkpoint.optimizer or {}, self.trained, self.settings.optimizer)
        except ValueError:
            advice = "start a new training from its -a export"
            raise Mismatch(f"{source} holds an optimizer's state that does not fit this network: {advice}") from None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, max(0, self.step - 1))
        if self.averaged and checkpoint.average:
            checkpoints.load_weights(self.averaged.module, checkpoint, source, average=True)
            self.averaged.n_averaged += 1  # else the first step would overwrite it
        try:
            if checkpoint.random:
                torch.set_rng_state(checkpoint.random["cpu"])
            if checkpoint.random and self.device.type == "cuda" and "cuda" in checkpoint.random:
                torch.cuda.set_rng_state(checkpoint.random["cuda"], self.device)
        except RuntimeError as error:
            raise DamagedFile(f"{source} holds no state of PyTorch's random numbers ({error})") from None
        if not self._is_finite():
            raise NotFinite(f"{source} holds an optimizer's state that is not finite: start from its -a export")

    def _owes_validation(self) -> bool:
        """Whether the step where this run resumes should have been validated, but the program was stopped before."""
        settings, own = self.settings, self.start.source == self.path("latest")
        due = self.step % settings.save_steps == 0 or self.step == settings.steps
        return own and self.step > 0 and due and not self.path(f"step_{self.step}").is_file()

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
        if time.monotonic() - self.shown_at > QUIET_SECONDS and not in_terminal():
            self.shown_at = time.monotonic()
            log.info(f"at step {self.step} of {self.settings.steps}, loss {result['loss']:.6f}")

    def save(self, *names: str) -> None:
        """Write the checkpoint under each name. Raises NotFinite where the weights are not, and keeps the old ones."""
        self._check_weights()
        self.saved_at = time.monotonic()
        if not ranks.is_first():
            return
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        checkpoint = Checkpoint(
            self.network.state_dict(),
            self.step,
            self.requested,
            self.optimizer.state_dict(),
            {"cpu": torch.get_rng_state(), **cuda},
            self.best_psnr,
            seconds=self.seconds + time.monotonic() - self.started,
            device=describe(self.device),
            average=self.averaged.module.state_dict() if self.averaged else None,
            criterion=self._criterion_state(),
        )
        for name in names:
            checkpoints.save(self.path(name), checkpoint)

    def validate_and_save(self, interrupt: Interrupt) -> None:
        """Score the validation pairs, by the averaged weights if there are any, and write the checkpoints.

        After Ctrl-C or SIGTERM nothing is written and the validation is owed. So it is where a pair can't be read, and
        then its error is raised after the state is saved.
        """
        self._check_weights()
        self.owes_validation, started = True, time.monotonic()
        network = self.averaged.module if self.averaged else self.network
        try:
            result, preview = validate(network, self.criterion, self.validation, self.device, self.settings, interrupt)
        except Stopped:
            log.info(f"validation at step {self.step} is given up; it is the first thing when this run resumes")
            return
        except UserError as error:
            if not isinstance(error, NotFinite):
                self.save("latest")
            raise
        self.owes_validation = False
        names = ["latest", f"step_{self.step}"]
        if self.best_psnr is None or result["psnr"] > self.best_psnr:
            self.best_psnr = float(result["psnr"])
            names.insert(0, "best")  # before `latest`, so that a kill between the two repeats this validation
        if ranks.is_first() and preview is not None:  # rank 0 has a pair
            self._log_validation(result, preview, time.monotonic() - started)
        self.save(*names)
        self.lap_started += time.monotonic() - started  # validations don't count as training

    def _log_validation(self, result: dict[str, float], preview: np.ndarray, seconds: float) -> None:
        self.curves.add(self.step, "eval", result)
        self.curves.add_picture(self.step, "eval/preview", preview)
        write_image(self.settings.log_path / "preview.png", preview)
        stages = ", ".join(f"{result[f'stage_{t}/psnr']:.2f}" for t in range(1, self.network.output_num + 1))
        log.info(  # paper/tables.py and bench/trainings.py read this line
            f"validation at step {self.step}: psnr by stage {stages} dB (input {result['psnr_input']:.2f}), "
            f"ssim {result['ssim']:.4f}, {seconds:.2f} s"
        )

    def _check_weights(self) -> None:
        """A step may spoil the weights, or freeze them by an infinite moment, though its loss is finite."""
        if not self._is_finite():
            raise self._not_finite(f"the weights, or the optimizer's state, are not finite after step {self.step}")

    def _is_finite(self) -> bool:
        values = (*self.trained.parameters(), *tensors(dict(self.optimizer.state)))
        return all(tensor.isfinite().all() for tensor in values)

    def _not_finite(self, what: str) -> NotFinite:
        rate = self.optimizer.param_groups[0]["lr"]
        return NotFinite(f"{what} at learning rate {rate:g}: lower --lr; {self._last_checkpoint()}")

    def _last_checkpoint(self) -> str:
        latest = self.path("latest")
        return f"last checkpoint: {latest}" if latest.is_file() else "this run has no checkpoint yet"

    @contextmanager
    def running(self) -> Iterator[tqdm]:
        """Within this, the run is locked and has log and curves; a full memory or lost process becomes a UserError."""
        settings = self.settings
        with ExitStack() as stack:
            if ranks.is_first():
                self._open_log(stack, settings.log_path)
            self.curves = Curves(settings.log_path if ranks.is_first() else None, self.step)
            if self.curves.writer:
                stack.callback(self.curves.writer.close)
            self._log_start()
            self._start_lap()
            self.network.train()
            compile_network(self.network, settings, self.device, settings.steps - self.step)
            bar = tqdm(
                total=settings.steps, initial=self.step, unit="step", disable=not in_terminal(), dynamic_ncols=True
            )
            stack.callback(bar.close)
            try:
                yield bar
            except RuntimeError as error:
                if ranks.is_lost(error):
                    raise LostProcess(f"{ranks.ENDED}; {self._last_checkpoint()}") from None
                if not is_out_of_memory(error):
                    raise
                advice = f"try --accumulate {2 * settings.accumulate} (same gradients, half the memory)"
                raise OutOfMemory(f"out of memory on {self.device}: {advice}; {self._last_checkpoint()}") from None

    def _open_log(self, stack: ExitStack, folder: Path) -> None:
        """Until `stack` ends, the log also goes to train.log, which is locked. Raises Occupied where it is already."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(folder / "train.log", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise NotWritable(f"{folder} can't be written: {error.strerror}") from None
        stack.callback(self._close_log, handler)
        if not lock(handler.stream):  # type: ignore[arg-type]
            raise Occupied(f"another process trains run {self.settings.run} ({folder})")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        write_bytes(folder / "settings.json", json.dumps(asdict(self.requested), indent=2).encode())

    def _close_log(self, handler: logging.FileHandler) -> None:
        log.removeHandler(handler)
        try:
            handler.close()
        except OSError as error:  # the last lines do not fit on the disk; the training is done nevertheless
            log.warning(f"{handler.baseFilename} can't be written: {error.strerror}")

    def _log_start(self) -> None:
        settings, start = self.settings, self.start
        changed = describe_settings(self.requested)
        log.info(
            "\n".join(["settings that are not the defaults:", *(f"  {n} = {value}" for n, value in changed.items())])
        )
        values = {**changed, **{name: as_text(getattr(self.requested, name)) for name in FIELDS}}
        rows = (f"| {name} | {value} |" for name, value in values.items())
        self.curves.add_text(self.step, "settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        if start.changes:
            log.info("changed since the checkpoint: " + ", ".join(start.changes))
        if start.checkpoint:
            log.info(f"starts at step {self.step} with the weights of {start.source}")
        log.info(f"validation on {len(self.validation)} pairs of {self.validation[0].parent}, the same ones every time")
        dtype = str(compute_dtype(settings.precision, self.device, training=True)).removeprefix("torch.")
        size = f"{model.count_parameters(self.network)} parameters"
        log.info(f"run {settings.run}, steps {self.step} to {settings.steps}: {size}, {dtype} on {self.device}")

    def _start_lap(self) -> None:
        """A lap is from one line of the log to the next: its steps, and seconds of waiting for crops."""
        self.lap_started, self.lap_steps, self.waited = time.monotonic(), 0, 0.0
        self.shown_at = self.lap_started

    def log_step(self, result: dict[str, float], rate: float) -> dict[str, str]:
        """Log a scored step, and the speed since the last one; returns what the progress bar shows."""
        settings, seconds = self.settings, time.monotonic() - self.lap_started
        speed, wait_share = self.lap_steps * settings.batch_size / seconds, self.waited / seconds
        left = timedelta(seconds=round((settings.steps - self.step) * seconds / self.lap_steps))
        psnr = result[f"stage_{self.network.output_num}/psnr"]
        self.curves.add(self.step, "train", {**result, "psnr": psnr, "lr": rate})
        self.curves.add(self.step, "train_speed", {"images_per_second": speed, "wait_share": wait_share})
        log.info(
            f"step {self.step}/{settings.steps}  loss {result['loss']:.6f}  psnr {psnr:.2f} dB  lr {rate:g}  "
            f"{speed:.1f} images/s  waiting for data {wait_share:.1%}  left {left}"
        )
        self._start_lap()
        return {"loss": f"{result['loss']:.5f}", "psnr": f"{psnr:.2f}"}

    def log_end(self) -> None:
        """Say where the checkpoint is, and the command that comes next."""
        settings, latest, best = self.settings, self.path("latest"), self.path("best")
        if self.step < settings.steps or self.owes_validation:
            log.info(f"stopped at step {self.step}; the same command resumes from {latest}")
            return
        more, path = "epochs" if self.requested.epochs else "steps", best if best.is_file() else latest
        words = ["-a", "test", "-m", settings.run]
        for name in ("model_dir", "log_dir"):
            if (folder := getattr(settings, name)) != getattr(resolve(), name):
                words += [f"--{name}", folder]
        done = f"{settings.steps} steps are done: {path}; more by --{more};"
        if not settings.data_dir or list_images(Path(settings.data_dir) / "test"):
            log.info(f"{done} to test it:\n{command_line('main.py', *words)}")
        else:
            add = command_line("convert.py", "own", "--test", "DIR", "--data_dir", settings.data_dir)
            log.info(f"{done} {settings.data_dir} has no test pairs; to add some:\n{add}")
