"""All settings: one dataclass, the checks of one against another, and how checkpoints store them.

The defaults are the paper's S-DSEN; presets and the command line (`--name value`) change them. Relative paths here and
in presets start at the repository, those of a command line at the caller's working directory.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import presets
from base import options
from base.console import log
from base.errors import BadArgument
from base.files import ROOT
from base.options import option
from networks.coarse2fine import Coarse2FineSettings
from networks.php import PHPSettings
from synthesis.styles import STYLES

LONGEST = 200  # bytes of a run's name, of which files have more
MOST = 1000  # channels, layers or stages, so that a mistyped number does not fill the memory

_network = partial(option, group="Model")
_data = partial(option, group="Data")
_training = partial(option, group="Training")
_advanced = partial(_training, usual=False)
_output = partial(option, group="Output")
_hardware = partial(option, group="Hardware")


@dataclass(frozen=True)
class Settings(Coarse2FineSettings, PHPSettings):
    network: str = _network(
        "dsen",
        "dsen (DSEN, S-DSEN and the CNN), coarse2fine, or php (intensity-aware)",
        choices=("dsen", "coarse2fine", "php"),
    )
    channel: int = _network(10, "regular channels per layer (paper: 10 in DSEN, 20 in the CNN)", minimum=2)
    depth: int = _network(7, "layers, of which depth - 3 are residual (paper: 7)", minimum=1)
    stage_num: int = _network(8, "stages, which share their weights (paper: 1, 2, 4, 6 and 8)", minimum=1)
    group: str = _network("p4", "symmetry of the convolutions; z2: ordinary convolutions", choices=("p4", "z2"))
    aggregation: str = _network(
        "conv", "how orientations are merged: conv (5x5 over all) or pooling", choices=("max", "mean")
    )
    use_se: bool = _network(True, "squeeze-and-excitation after the aggregation (paper: true)")
    link: str = _network("concat", "between stages: concat (self-refining), add (SC) or none", choices=("add", "none"))

    data_dir: str = _data("", "folder with train, val and test; empty: the built-in set", path=True)
    rain: str = _data("", "style of synthetic rain, new in every step; empty: the stored rain", choices=[*STYLES])
    clean_dir: str = _data("", "clean images for synthetic rain; empty: the ground truth of data_dir/train", path=True)
    more_data: tuple[str, ...] = _data((), "more folders of joined pairs to train on", path=True)
    exclude: tuple[str, ...] = _data(
        (), "folders of pairs, such as test sets, whose backgrounds are left out", path=True
    )
    aug_data: str = _data(
        "none",
        "rotate: by up to 30 degrees (paper: DA); quarter_turns (paper: C4DA); flip; scale: rotate, flip and resize",
        choices=("rotate", "quarter_turns", "flip", "scale"),
    )
    patch_size: int = _data(64, "side of the training crops, pixels (paper: 64)", minimum=1)
    batch_size: int = _data(64, "crops per step (paper: 64)", minimum=1)
    num_workers: int = _hardware(
        -1, "processes that prepare crops; 0: a thread; -1: automatic", minimum=-1, usual=False
    )
    cache_gib: float = _hardware(16.0, "memory for decoded training images, GiB", minimum=0, usual=False)

    steps: int = _training(20000, "training steps (paper: learning rate falls at 15000 and 17500)", minimum=1)
    epochs: int = _advanced(0, "length in epochs, which milestones then count too; 0: use steps", minimum=0)
    optimizer: str = _advanced("adam", "adam (paper) or soap (requirements-soap.txt)", choices=("adam", "soap"))
    lr: float = _training(5e-4, "initial learning rate (paper: 5e-4)", minimum=0)
    schedule: str = _training(
        "steps", "learning rate: steps (divide by 10 at milestones) or cosine", choices=("cosine",)
    )
    milestones: tuple[int, ...] = _training((15000, 17500), "steps at which lr is divided by 10 (paper: 15000 17500)")
    warmup: int = _advanced(0, "steps of linear warm-up to lr (paper: 0)", minimum=0)
    clip_norm: float = _advanced(0.0, "largest gradient norm; 0: no clipping (paper)", minimum=0)
    loss: str = _training(
        "mse",
        "mse (paper), l1, charbonnier: R_t against O - B; ssim: 1 - SSIM of O - R_t and B; ssim_l1; coarse2fine; php",
        choices=("mse", "l1", "charbonnier", "ssim", "ssim_l1", "coarse2fine", "php"),
    )
    loss_stages: str = _advanced(
        "all", "all: sum over the stages (paper); last: the last stage alone", choices=("all", "last")
    )
    average: float = _training(0.0, "decay of the weights' moving average, which is then tested; 0: off", minimum=0)
    accumulate: int = _hardware(1, "parts in which a batch is computed: same gradients, less memory", minimum=1)
    checkpoint_activations: bool = _hardware(
        False, "recompute activations for the gradients: less memory, more time", usual=False
    )
    compile: str = _hardware(
        "auto", "torch.compile; auto: long trainings on a CUDA GPU", choices=("on", "off"), usual=False
    )
    cuda_graphs: str = _hardware(
        "auto", "replay steps, and images of one size, as CUDA graphs", choices=("on", "off"), usual=False
    )
    seed: int = _training(0, "seed of the initial weights, the crops and their rain", minimum=0)
    val_images: int = _advanced(10, "validation pairs, spread over val; 0: all", minimum=0)
    log_steps: int = _advanced(50, "steps between log lines and points of the curves", minimum=1)
    save_steps: int = _training(500, "steps between validations, each with a checkpoint step_N", minimum=1)
    save_minutes: float = _advanced(5.0, "minutes after which latest.pth is also written", minimum=0)

    run: str = _output("", "name of the run and its folders; default: the preset's")
    model_dir: str = _output("models", "folder of the checkpoints", path=True)
    log_dir: str = _output("logdir", "folder of TensorBoard events, logs and scores", path=True)
    show_dir: str = _output("showdir", "folder of the restored images and their pages", path=True)
    device: str = _hardware("auto", "auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N")
    precision: str = _hardware(
        "auto", "auto: CUDA GPUs train in bf16, test in fp16; else float32", choices=("float32", "bf16", "fp16")
    )
    memory_gib: float = _hardware(0.0, "limit on the memory when restoring, GiB (CPU); 0: what is free", minimum=0)
    mirror: bool = _output(False, "average with the restored mirror image: twice the time, a little better")
    log_level: str = _output(
        "info", "lowest level of printed messages", choices=("debug", "info", "warning", "error"), usual=False
    )

    @property
    def model_path(self) -> Path:
        return Path(self.model_dir) / self.run

    @property
    def log_path(self) -> Path:
        return Path(self.log_dir) / self.run


FIELDS = options.read_options(Settings)
NETWORK_FIELDS = [name for name, field in FIELDS.items() if field.group.startswith("Model")]  # what fixes the network


def read_overrides(words: list[str]) -> dict[str, Any]:
    """The settings of a command line, `--name value`; `--run ""` is no setting: the run has the preset's name."""
    values = options.read_words(FIELDS, words)
    if empty := [name for name in ("model_dir", "log_dir", "show_dir") if values.get(name) == ""]:
        raise BadArgument(f"--{empty[0]} is empty: name a folder or leave it out")
    return {name: value for name, value in values.items() if name != "run" or value}


def resolve(preset: str = "sdsen", overrides: dict[str, Any] | None = None) -> Settings:
    """Defaults, then the preset, then the overrides. Raises BadArgument on an unknown name or an impossible value."""
    if preset not in presets.PRESETS:
        raise BadArgument(f"unknown preset {preset!r}{options.nearest(preset, presets.PRESETS)} (list: -a models)")
    own = override(Settings(), {"run": preset, **presets.PRESETS[preset].differences})
    return override(own, overrides or {})


def override(settings: Settings, overrides: dict[str, Any]) -> Settings:
    """A copy of `settings` with some values changed, checked. Raises BadArgument as `resolve` does."""
    for name, value in overrides.items():
        options.find(FIELDS, name).check(value)
    s = dataclasses.replace(settings, **overrides)
    s = dataclasses.replace(s, **map_paths(s, lambda path: str(ROOT / path)))
    counts = {"steps", "epochs"} & {*overrides}
    conflicts = {
        "training counts epochs: set --epochs, or --epochs 0 with --steps": s.epochs and counts == {"steps"},
        f"depth must be at least 4 in DSEN, got {s.depth}": s.network == "dsen" and s.depth < 4,
        f"loss {s.loss} is not for network {s.network}": s.loss in ("coarse2fine", "php") and s.loss != s.network,
        "aggregation max and mean pool orientations: not group z2": s.group == "z2" and s.aggregation != "conv",
        "clean_dir needs a style of synthetic rain: --rain": s.clean_dir and not s.rain,
        f"loss {s.loss} needs patch_size 11 or more": s.loss.startswith("ssim") and s.patch_size < 11,
        f"milestones must rise, got {s.milestones}": list(s.milestones) != sorted(m for m in {*s.milestones} if m > 0),
        f"average must be below 1, such as 0.999, got {s.average}": s.average >= 1,
        f"run is a folder's name, got {s.run!r}": s.run in (".", "..") or re.search(r"[/\\\0-\x1f]", s.run),
        f"run is a folder's name of at most {LONGEST} bytes": len(s.run.encode(errors="surrogatepass")) > LONGEST,
        f"channel, depth and stage_num are at most {MOST}": max(s.channel, s.depth, s.stage_num) > MOST,
        "numbers must be below 2^63": any(type(value) is int and value >= 2**63 for value in overrides.values()),
    }
    for message, is_conflict in conflicts.items():
        if is_conflict:
            raise BadArgument(message)
    return s


def map_paths(settings: Settings, function: Callable[[str], str]) -> dict[str, Any]:
    """The settings that are paths, with `function` applied to each path that is not empty."""
    values = {name: getattr(settings, name) for name, field in FIELDS.items() if field.path}
    return {
        name: tuple(map(function, value)) if isinstance(value, tuple) else value and function(value)
        for name, value in values.items()
    }


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as a checkpoint stores them: paths in the repository are relative to it, so that it can move."""
    paths = map_paths(settings, lambda path: path.removeprefix(f"{ROOT}{os.sep}"))
    return {**dataclasses.asdict(settings), **paths}


def from_dict(values: dict[str, Any]) -> Settings:
    """The settings that a checkpoint stores. Names and choices that this version lacks give way to the defaults."""
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if known.get("rain") == "rain100h_stepped":
        known["rain"] = "rain100h"
    known = {name: value for name, value in known.items() if name in FIELDS}
    gone = [name for name, value in known.items() if isinstance(value, str) and not FIELDS[name].has_choice(value)]
    for name in gone:
        log.warning(f"warning: the checkpoint's {name} {known.pop(name)!r} does not exist here: the default is used")
    if "rain" not in known:
        known.pop("clean_dir", None)  # which is nothing without a style
    return override(Settings(), known)


def describe_settings(settings: Settings) -> dict[str, str]:
    """The settings that differ from the defaults, as text."""
    usual = override(Settings(), {})
    changed = [name for name in FIELDS if getattr(settings, name) != getattr(usual, name)]
    return {name: options.as_text(getattr(settings, name)) for name in changed}
