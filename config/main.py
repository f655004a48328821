"""Train and test networks for rain removal.

    -a train    start or resume a training              main.py -a train -p sdsen --data_dir DATA
    -a test     score a run or weights on the test set  main.py -a test -m RUN --data_dir DATA
    -a export   write a run's weights as one file       main.py -a export -m RUN --run NAME
                the same for other programs             main.py -a export -m RUN --format onnx
    -a models   list the presets                        main.py -a models
    -a tables   train the rows of the paper's tables    main.py -a tables --run dsen_rain800
    -a tilt     PSNR by the angle of the rain           main.py -a tilt -m RUN RUN --rain rain800

Settings are given as --name value. `main.py -a ACTION -h` lists those of an action.
"""

import base.openmp  # noqa: F401

import argparse
import csv
import io
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import losses
import model
from base import ranks
from base.console import Interrupt, log, run_script, set_up_log
from base.devices import autocast, pick_device
from base.errors import BadArgument, UserError
from base.files import write_bytes
from base.options import make_parser
from cal_ssim import METRICS
from dataset import data_path, list_pairs
from datasets.loader import training_batches
from fast import graphs
from fast.graphs import Replay
from paper import command, tilt
from presets import PRESETS
from runs.checkpoints import EXPORT_FIELDS, choose_start, export
from runs.onnx_export import export_onnx
from runs.optimization import Outcome, learning_rate, split_batch, step_scores, synchronized
from runs.restore import NEARLY_INPUT, Restoring, open_network, score_pairs
from runs.training import Training
from settings import FIELDS, NETWORK_FIELDS, Settings, read_overrides


def add_gradients(
    network: nn.Module, criterion: nn.Module, settings: Settings, *crops: Tensor, share: float = 1.0
) -> Outcome:
    """Rain layers, loss, gradients: those of `share` times the loss on `crops` (O, B, labels) are added up."""
    O, B, *labels = crops
    O, B = (x.contiguous(memory_format=torch.channels_last) for x in (O, B))  # as the rain layers and gradients are
    with autocast(settings.precision, O.device, training=True):
        rain_layers = network(O)  # one for each stage, (N, 3, H, W)
        terms = criterion(rain_layers, O, B, *labels)
    loss = share * terms.pop("loss")
    (loss * ranks.count()).backward()  # DistributedDataParallel takes the mean over the ranks, not the sum
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
    """One step of the optimizer on rainy crops `O` and clean crops `B`, both (N, 3, H, W) in [0, 1].

    `labels` (N, H, W) are for losses that compare them. Returns `loss`, and where `scored` the loss's other terms,
    `stage_t/psnr` and `stage_t/ssim`. A loss that is not finite leaves the weights as they were. The batch goes through
    the network in parts whose gradients add up, or at once through `recorded`, what `record_step` made.
    With several ranks, each has its part of the batch, and the results are those of the whole batch.
    """
    criterion = criterion or losses.build(settings)
    batch = (O, B) if labels is None else (O, B, labels)
    parts = [batch] if recorded else split_batch(settings, *batch)
    batch_size = settings.batch_size if ranks.count() > 1 else len(O)
    loss, scores = O.new_zeros(()), defaultdict(float)
    optimizer.zero_grad(set_to_none=True)
    for part in parts:
        share = len(part[0]) / batch_size
        with synchronized(network, is_last=part is parts[-1]):
            outcome = recorded(*part) if recorded else add_gradients(network, criterion, settings, *part, share=share)
        loss += outcome.loss
        for name, value in step_scores(outcome, *part[:2]) if scored else ():
            scores[name] += share * value
    (total,) = ranks.total([loss.item()])
    if not math.isfinite(total):
        return {"loss": total}
    ranks.average_gradients(criterion)
    if settings.clip_norm:
        nn.utils.clip_grad_norm_([*network.parameters(), *criterion.parameters()], settings.clip_norm)
    optimizer.step()
    if scored:
        scores = dict(zip(scores, ranks.total(list(scores.values())), strict=True))
    return {"loss": total, **scores}


def record_step(
    network: nn.Module, criterion: nn.Module, settings: Settings, O: Tensor, B: Tensor, labels: Tensor | None = None
) -> Replay | None:
    """`add_gradients` of a whole batch as a CUDA graph, for `train_step`; None where that fails."""
    parameters = [p for p in (*network.parameters(), *criterion.parameters()) if p.requires_grad]

    def step(*batch: Tensor) -> Outcome:
        for parameter in parameters:
            parameter.grad = None
        return add_gradients(network, criterion, settings, *batch)

    return graphs.record(step, [x for x in (O, B, labels) if x is not None], parameters)


def train_loop(training: Training, bar: tqdm, interrupt: Interrupt) -> None:
    """Train to the last step, or until Ctrl-C or SIGTERM. All ranks stop after the same step."""
    settings, optimizer, criterion = training.settings, training.optimizer, training.criterion
    batches = training_batches(training.dataset, training.step, training.device)
    recorded = None
    if training.owes_validation:
        training.validate_and_save(interrupt)
    while training.step < settings.steps and not any(ranks.total([interrupt.requested])):
        O, B, *labels = training.next_crops(batches)
        rate = learning_rate(settings, training.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if training.can_record and recorded is None:
            recorded = record_step(training.network, criterion, settings, O, B, *labels)
            training.can_record = recorded is not None
        scored = (training.step + 1) % settings.log_steps == 0
        result = train_step(training.parallel, optimizer, O, B, settings, scored, criterion, *labels, recorded=recorded)
        training.count_step(result)
        bar.update()
        if scored:
            bar.set_postfix(training.log_step(result, rate))
        if training.step % settings.save_steps == 0 or training.step == settings.steps:
            training.validate_and_save(interrupt)
        elif time.monotonic() - training.saved_at > 60 * settings.save_minutes:
            training.save("latest")
    if training.step < settings.steps or training.owes_validation:
        training.save("latest")


def train(preset: str | None, name: str | None, overrides: dict[str, Any]) -> None:
    """`-a train`: start a run, or resume it where it has a checkpoint."""
    training = Training(choose_start(preset, name, overrides))
    if training.step >= training.settings.steps and not training.owes_validation:
        training.log_end()
        return
    with training.running() as bar, Interrupt() as interrupt:
        train_loop(training, bar, interrupt)
        training.log_end()


def test(preset: str | None, name: str | None, overrides: dict[str, Any]) -> int:
    """`-a test`: scores of a checkpoint on whole test images, after each stage, and a CSV with a row for each image.

    Pairs that can't be scored are left out and named; the exit status is then 1. Raises UserError if no pair can be.
    """
    opened = open_network(preset, name, overrides)
    network, settings, path, step = opened
    folder, device = data_path(settings) / "test", pick_device(settings.device)
    paths = list_pairs(folder)
    log.info(f"{path} (step {step}) on the {len(paths)} pairs of {folder}, {device}")
    rows: list[Any] = []  # of each pair, what `write_scores` takes or the reason why there is nothing
    for pair in score_pairs(network, paths, device, Restoring.of(settings)):
        if isinstance(pair, UserError):
            rows.append(pair)
            continue
        change = (pair.restored[-1].float() - pair.O.float()).abs().mean().item()
        rows.append((pair.path.name, *pair.O.shape[1:], change, pair.scores))
    rows = ranks.gather(rows)
    if not ranks.is_first():
        return 0
    left_out = [row for row in rows if isinstance(row, UserError)]
    rows = [row for row in rows if not isinstance(row, UserError)]
    if not rows:
        raise left_out[0]
    csv_path = Path(settings.log_dir) / opened.run / f"test_{path.stem}.csv"
    write_scores(csv_path, rows)
    log.info(f"8-bit RGB, and Y of rgb2ycbcr, means over {len(rows)} images; each image's scores: {csv_path}")
    change = np.mean([row[3] for row in rows])
    if change < NEARLY_INPUT:
        log.warning(f"warning: the output is nearly the input, {change:.2f} of 255 levels apart on average")
    for error in left_out:
        log.warning(f"left out, {len(left_out)} of {len(paths)}: {error}")
    return int(bool(left_out))


def write_scores(path: Path, rows: list[tuple[str, int, int, float, np.ndarray]]) -> None:
    """Log mean scores, and write a CSV of images: name, height, width, mean change by the network, scores.

    The scores of an image are (1 + stages, METRICS): those of the input, then after each stage.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nan where all images are smaller than SSIM's window
        means = np.nanmean([row[-1] for row in rows], 0)
    places = ["input", *(f"stage_{t}" for t in range(1, len(means)))]
    log.info(" " * 10 + "".join(f"{metric:>10}" for metric in METRICS))
    for place, values in zip(places, means, strict=True):
        log.info(f"{place:10}" + "".join(f"{value:10.4f}" for value in values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "height", "width", "change", *(f"{metric}_{p}" for p in places for metric in METRICS)])
    for name, height, width, change, scores in rows:
        writer.writerow([name, height, width, f"{change:.4f}", *(f"{value:.6f}" for value in scores.flat)])
    write_bytes(path, text.getvalue().encode(errors="backslashreplace"))


def models() -> None:
    """`-a models`: the presets with their parameters, cost and row of the paper."""
    form = "{:27}{:>10}{:>8}{:>12}  {}"
    log.info(form.format("preset", "parameters", "stages", "MACs/pixel", "row of the paper"))
    for name, preset in PRESETS.items():
        network = model.build(name)
        costs = (model.count_parameters(network), network.output_num, network.macs_per_pixel())
        log.info(form.format(name, *costs, preset.row))


_TESTED = "data_dir run model_dir log_dir mirror log_level device precision memory_gib cuda_graphs".split()
ACTIONS: dict[str, Iterable[str]] = {  # and the settings that its help lists
    "train": [name for name in FIELDS if name != "show_dir"],
    "test": [*NETWORK_FIELDS, *_TESTED],
    "export": [*EXPORT_FIELDS, "precision"],
    "models": [],
    "tables": [],  # see paper/command.py
    "tilt": ["rain", "seed", *_TESTED],
}


def check_arguments(action: str, preset: str | None, names: list[str], words: list[str]) -> None:
    """Raise BadArgument where an action gets what it does not take."""
    if action in ("models", "tables") and (preset or names or (words and action == "models")):
        raise BadArgument(f"-a {action} takes no -p and no -m{', nor any setting' * (action == 'models')}")
    if action in ("export", "tilt") and (preset or not names):
        raise BadArgument(f"-a {action} is about checkpoints: name them with -m, without -p")
    if action not in ("export", "tilt") and len(names) > 1:
        raise BadArgument(f"-m takes one checkpoint, got {' '.join(names)}")
    if action == "tilt" and len({*names}) < len(names):
        raise BadArgument(f"-m names a checkpoint twice: {' '.join(names)}")


def main(arguments: list[str]) -> int:
    actions = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    actions.add_argument("-a", "--action", nargs="?")
    action = actions.parse_known_args(arguments)[0].action
    if action == "tables" and {"-h", "--help"} & set(arguments):
        return command.main(["--help"])
    shown = ACTIONS.get(action, FIELDS)
    parser = make_parser({name: FIELDS[name] for name in FIELDS if name in shown}, __doc__)
    parser.add_argument("-a", "--action", required=True, choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    group = parser.add_argument_group("Model")
    group.add_argument("-p", "--preset", help="a row of a paper's table (list: -a models); default: sdsen")
    text = "a run (its best state), RUN/latest, RUN/step_N, pretrained weights by name, a file (tilt, export: several)"
    group.add_argument("-m", "--model", nargs="+", help=text)
    group = parser.add_argument_group("Export")
    group.add_argument("--format", choices=("onnx",), help="onnx: a file for other programs (see docs/USE.md)")
    group.add_argument("--stages", type=int, metavar="K", help="with --format: stop after stage K")
    known, words = parser.parse_known_args(arguments)
    names = known.model or []
    check_arguments(known.action, known.preset, names, words)
    if (known.format or known.stages is not None) and not (known.format and known.action == "export"):
        raise BadArgument("--format and --stages are for -a export --format onnx")
    if known.action == "tables":
        set_up_log()
        return command.main(words)
    overrides = read_overrides(words)
    set_up_log(overrides.get("log_level", "info"))
    if known.action == "models":
        models()
    elif known.action == "export":
        export_onnx(names, overrides, known.stages) if known.format else export(names, overrides)
    else:
        with ranks.joined():
            if known.action == "tilt":
                tilt.measure(names, overrides)
            else:
                action = {"train": train, "test": test}[known.action]
                return action(known.preset, names[0] if names else None, overrides) or 0
    return 0


if __name__ == "__main__":
    run_script(main)
