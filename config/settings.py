"""Every knob of the program: one dataclass, its checks, and the command line that overrides it.

The defaults are the paper's S-DSEN. A preset (presets.py) changes a few of them, the command line (`--name value`)
changes any. A relative path in this file or in a preset starts at the repository; one that is typed on the command line
starts at the caller's working directory, as everywhere in a shell.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import presets
from base.console import Parser
from base.errors import UserError
from base.files import ROOT
from synthesis.styles import STYLES


def setting(default: Any, text: str, *, choices: Sequence[str] = (), minimum: float | None = None, path: bool = False):
    """A field of `Settings` with its description and the values that it may take."""
    metadata = {"text": text, "choices": choices, "minimum": minimum, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


NETWORKS = ("dsen", "coarse2fine", "php")  # model.CLASSES


@dataclass(frozen=True)
class Settings:
    # What is built: see model.DSEN, coarse2fine.Coarse2Fine and php.PHP, which say what each of these is.
    network: str = setting("dsen", "which network is built", choices=NETWORKS)
    channel: int = setting(10, "regular channels of every layer (paper: 10 in DSEN, 20 in the CNN)", minimum=2)
    depth: int = setting(
        7,
        "layers, of which depth - 3 are P4ConvP4 layers with a residual (paper: 7); coarse2fine: of a block",
        minimum=1,
    )
    stage_num: int = setting(8, "stages, which share their weights (paper: 1, 2, 4, 6 and 8)", minimum=1)
    group: str = setting("p4", "symmetry of the convolutions; z2 makes them ordinary ones", choices=("p4", "z2"))
    aggregation: str = setting(
        "conv", "gathering of the orientations: 5x5 convolution or orientation pooling", choices=("conv", "max", "mean")
    )
    use_se: bool = setting(True, "squeeze-and-excitation block behind the aggregation (paper: true)")
    link: str = setting(
        "concat", "link from a stage to the next: concat is self-refining, add is SC", choices=("concat", "add", "none")
    )

    dilated: bool = setting(True, "coarse2fine: layer l of a stage is dilated by 2^(l-1)")
    inner_dense: bool = setting(True, "coarse2fine: dense connections within a stage")
    outer_dense: bool = setting(True, "coarse2fine: a stage gets the images of all stages before it")
    refined: bool = setting(True, "coarse2fine: refine the last image; php: add the details by a second sub-network")
    block: str = setting(
        "php",
        "php: what a level is built of",
        choices=("concatenation", "parallel", "hierarchical", "standard", "non_local"),
    )
    pooling: str = setting("contrast", "php: pooling of the rainy image for the levels", choices=("max", "none"))

    # What it is trained on.
    data_dir: str = setting("", "folder with train, val and test; empty: the built-in set", path=True)
    rain: str = setting(
        "",
        "style of rain, drawn afresh on every clean crop of the training; empty: the rain of the pairs as stored",
        choices=tuple(STYLES),
    )
    clean_dir: str = setting(
        "", "folder of clean images that rain is drawn on; empty: the clean halves in data_dir/train", path=True
    )
    more_data: tuple[str, ...] = setting((), "further folders of joined pairs that are trained on", path=True)
    exclude: tuple[str, ...] = setting(
        (), "folders of joined pairs, such as test sets, whose backgrounds are not trained on", path=True
    )
    aug_data: str = setting(
        "none",
        "turning of the training pairs: by -30..30 degrees (paper: DA), by quarter turns (paper: C4DA), left to right; "
        "scale: by -30..30 degrees, left to right and to 0.7..1.4 of the size",
        choices=("none", "rotate", "quarter_turns", "flip", "scale"),
    )
    patch_size: int = setting(64, "side of the training crops, pixels (paper: 64)", minimum=1)
    batch_size: int = setting(64, "crops in a step (paper: 64)", minimum=1)
    num_workers: int = setting(
        -1,
        "processes that make the crops; 0: a thread makes the next step's during a step; -1: a thread, but processes "
        "where a CUDA GPU would wait for drawn rain",
        minimum=-1,
    )
    cache_gib: float = setting(16.0, "decoded training images kept in memory, GiB; the rest is decoded anew", minimum=0)

    # How it is trained.
    steps: int = setting(20000, "steps of training in all (paper: learning rate falls at 15000 and 17500)", minimum=1)
    epochs: int = setting(
        0, "passes over the training images; steps and milestones are then counted in these; 0: in steps", minimum=0
    )
    optimizer: str = setting(
        "adam",
        "adam (paper), or soap: Adam in the eigenvectors of the gradients' covariance, which learns more in a step",
        choices=("adam", "soap"),
    )
    lr: float = setting(5e-4, "first learning rate (paper: 5e-4)", minimum=0)
    schedule: str = setting(
        "steps",
        "of the learning rate: divided by 10 at each milestone (paper), or a cosine that ends at a hundredth",
        choices=("steps", "cosine"),
    )
    milestones: tuple[int, ...] = setting((15000, 17500), "steps at which lr is divided by 10 (paper: 15000 17500)")
    warmup: int = setting(0, "steps over which the learning rate rises to lr (paper: 0)", minimum=0)
    clip_norm: float = setting(0.0, "largest norm of a gradient, longer ones are shortened; 0: off (paper)", minimum=0)
    loss: str = setting(
        "mse",
        "mse, l1 or charbonnier of R_t against O - B; ssim is 1 - SSIM of O - R_t against B; ssim_l1 their sum (paper: "
        "mse); coarse2fine and php are those of these networks",
        choices=("mse", "l1", "charbonnier", "ssim", "ssim_l1", "coarse2fine", "php"),
    )
    loss_stages: str = setting("all", "stages whose losses are summed (paper: all)", choices=("all", "last"))
    vgg_weights: str = setting(
        "", "loss coarse2fine: file of torchvision's VGG-16; empty: the one in torchvision's cache, if any", path=True
    )
    lowpass_sigma: float = setting(1.7, "loss php: of the filter of X^c's ground truth, pixels; 0: off", minimum=0)
    colour_weight: float = setting(0.1, "loss php: of the colour's term", minimum=0)
    segmentation_weight: float = setting(
        0.05, "loss php: of the segmentation's term, where there are labels", minimum=0
    )
    average: float = setting(
        0.0,
        "decay of a moving average of the weights, which is then what is validated and tested; 0: off (paper)",
        minimum=0,
    )
    accumulate: int = setting(
        1, "parts of a batch that go through a device one after another: the same gradients in less memory", minimum=1
    )
    checkpoint_activations: bool = setting(
        False, "keep no activations within a stage, but repeat it for its gradients: less memory, more time"
    )
    compile: str = setting(
        "auto",
        "torch.compile in training; auto: on a CUDA GPU where enough steps are left to make up for compiling",
        choices=("on", "off"),
    )
    cuda_graphs: str = setting(
        "auto",
        "CUDA graphs: capture the kernels of a training step, or of images of one size, once and replay them, which "
        "saves launch overhead; auto: on CUDA GPUs, in training not with several processes, accumulate or "
        "checkpoint_activations",
        choices=("on", "off"),
    )
    seed: int = setting(0, "seed of the initial weights, the crops and their rain", minimum=0)
    val_images: int = setting(10, "validation pairs scored at each validation, spread over val; 0: all", minimum=0)
    log_steps: int = setting(50, "steps between two lines of the log and points of the curves", minimum=1)
    save_steps: int = setting(500, "steps between two validations, each with a checkpoint step_N", minimum=1)
    save_minutes: float = setting(5.0, "minutes after which the checkpoint `latest` is written in any case", minimum=0)

    # Where things lie, and on what it runs.
    run: str = setting("", "name of the run's folders in model_dir, log_dir and show_dir; empty: the preset's name")
    model_dir: str = setting("models", "folder of the checkpoints", path=True)
    log_dir: str = setting("logdir", "folder of the TensorBoard events, logs and scores", path=True)
    show_dir: str = setting("showdir", "folder of the derained images and the gallery", path=True)
    device: str = setting("auto", "auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N")
    precision: str = setting(
        "auto",
        "compute precision; a stage's first convolution and last layers always use float32; fp16: inference only; "
        "auto: on CUDA GPUs bf16 in training (Ampere or newer), fp16 in test and show (Volta or newer), else float32",
        choices=("float32", "bf16", "fp16"),
    )
    memory_gib: float = setting(0.0, "memory that deraining an image may take, GiB; 0: what is free (CPU)", minimum=0)
    mirror: bool = setting(
        False, "derain the mirrored image as well and take the mean: twice the time for a little more PSNR and SSIM"
    )
    log_level: str = setting("info", "least level that is printed", choices=("debug", "info", "warning", "error"))

    @property
    def model_path(self) -> Path:
        return Path(self.model_dir) / self.run

    @property
    def log_path(self) -> Path:
        return Path(self.log_dir) / self.run


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
TYPES = typing.get_type_hints(Settings)
NETWORK_FIELDS = (  # what fixes the network
    "network channel depth stage_num group aggregation use_se link "
    "dilated inner_dense outer_dense refined block pooling"
).split()


def resolve(preset: str = "sdsen", overrides: dict[str, Any] | None = None) -> Settings:
    """Defaults, then the preset, then the overrides. Raises UserError on an unknown name or an impossible value."""
    if preset not in presets.PRESETS:
        raise UserError(f"unknown preset {preset!r}{_nearest(preset, presets.PRESETS)}")
    own = override(Settings(), {"run": preset, **presets.PRESETS[preset].differences})
    return override(own, overrides or {})


def override(settings: Settings, overrides: dict[str, Any]) -> Settings:
    """A copy of `settings` with some values changed, checked. Raises UserError as `resolve` does."""
    for name, value in overrides.items():
        if name not in FIELDS:
            raise UserError(f"unknown setting {name!r}{_nearest(name, FIELDS)}")
        _check_value(name, value)
    settings = dataclasses.replace(settings, **overrides)
    settings = dataclasses.replace(settings, **map_paths(settings, lambda path: str(ROOT / path)))
    if settings.epochs and "steps" in overrides and "epochs" not in overrides:
        raise UserError(f"this training counts {settings.epochs} epochs: say --epochs, or --epochs 0 with --steps")
    if settings.network == "dsen" and settings.depth < 4:
        raise UserError(f"depth must be at least 4 in DSEN, got {settings.depth}")
    if settings.loss in NETWORKS and settings.loss != settings.network:
        raise UserError(f"loss {settings.loss} is that of the network {settings.loss}, not of {settings.network}")
    if settings.group == "z2" and settings.aggregation != "conv":
        raise UserError("aggregation max and mean pool orientations, which ordinary convolutions (group z2) lack")
    if settings.clean_dir and not settings.rain:
        raise UserError("clean_dir is for images that rain is drawn on: name its style with --rain")
    if settings.loss.startswith("ssim") and settings.patch_size < 11:
        raise UserError(
            f"loss {settings.loss} needs crops of at least 11x11, the size of its window, got {settings.patch_size}"
        )
    if list(settings.milestones) != sorted({*settings.milestones} - {0}):
        raise UserError(f"milestones must be rising steps from 1 on, got {settings.milestones}")
    if settings.average >= 1:
        raise UserError(f"average is a decay below 1, as 0.999, got {settings.average}")
    if settings.run in (".", "..") or set(settings.run) & set("/\\"):
        raise UserError(f"run is the name of a folder, without slashes, got {settings.run!r}")
    return settings


def map_paths(settings: Settings, function: Callable[[str], str]) -> dict[str, Any]:
    """The settings that are paths, with `function` of each path; those that are empty stay so."""
    values = {name: getattr(settings, name) for name, field in FIELDS.items() if field.metadata["path"]}
    return {
        name: tuple(map(function, value)) if isinstance(value, tuple) else value and function(value)
        for name, value in values.items()
    }


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as a checkpoint stores them: paths in the repository are relative to it, so that it can move."""

    def in_root(path: str) -> str:
        return Path(path).relative_to(ROOT).as_posix() if Path(path).is_relative_to(ROOT) else path

    return {**dataclasses.asdict(settings), **map_paths(settings, in_root)}


def from_dict(values: dict[str, Any]) -> Settings:
    """The settings that a checkpoint stores; names that this version does not know are left aside."""
    known = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in FIELDS}
    return override(Settings(), known)


def describe_settings(settings: Settings) -> str:
    """The settings as lines of `name = value`."""
    return "\n".join(f"  {name} = {_text(getattr(settings, name))}" for name in FIELDS)


def parse(text: list[str], name: str) -> Any:
    """The value of setting `name` from its words on the command line. Raises UserError on a wrong type."""
    if name not in FIELDS:
        raise UserError(f"unknown setting --{name}{_nearest(name, FIELDS, '--')}")
    kind, is_path = TYPES[name], FIELDS[name].metadata["path"]
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(map(_absolute if is_path else int, filter(None, text)))
        (word,) = text
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[word.lower()]
        if is_path and word:
            return _absolute(word)
        return kind(word)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "one whole number", float: "one number", str: "one word"}
        raise UserError(
            f"--{name} takes {wanted.get(kind, 'whole numbers')}, got {' '.join(text) or 'nothing'!r}"
        ) from None


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())


def read_overrides(words: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value` and `--name value value` as a dict; the last of a name counts.

    Raises UserError on anything else.
    """
    values: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, rest = word[2:].partition("=")
            values[name] = [rest] if equals else []
        elif name is None:
            raise UserError(f"{word!r} stands alone: settings are given as --name value")
        else:
            values[name].append(word)
    overrides = {name: parse(text, name) for name, text in values.items()}
    for name, value in overrides.items():
        _check_value(name, value)
    return overrides


def make_parser(description: str) -> Parser:
    """An argument parser whose help lists every setting; settings themselves are read by `read_overrides`."""
    lines = []
    for name, field in FIELDS.items():
        choices = f" [{', '.join(field.metadata['choices'])}]" if field.metadata["choices"] else ""
        lines.append(f"  --{name} {_text(field.default) or chr(39) * 2}{choices}\n        {field.metadata['text']}")
    return Parser(description=description, epilog="settings and their defaults:\n" + "\n".join(lines))


def _check_value(name: str, value: Any) -> None:
    kind, metadata = TYPES[name], FIELDS[name].metadata
    expected = tuple if isinstance(kind, types.GenericAlias) else kind
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise UserError(f"{name} must be of type {expected.__name__}, got {value!r}")
    if expected is tuple and any(type(item) is not typing.get_args(kind)[0] for item in value):
        raise UserError(f"{name} must be {'paths' if metadata['path'] else 'whole numbers'}, got {value!r}")
    if metadata["choices"] and value not in (FIELDS[name].default, *metadata["choices"]):
        raise UserError(f"{name} can't be {value!r}{_nearest(value, metadata['choices'])}")
    if metadata["minimum"] is not None and not metadata["minimum"] <= value < float("inf"):
        raise UserError(f"{name} must be at least {metadata['minimum']}, got {value}")


def _nearest(word: str, known: typing.Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(str(word), list(known), 1, 0.5)
    if close:
        return f"; the nearest is {prefix}{close[0]}"
    return "; there are " + ", ".join(prefix + name for name in known)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
