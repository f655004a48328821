"""The rows of the paper's tables: network, data set, recipe and seed of each, and the scores in the paper."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from base.errors import BadArgument, Mismatch
from base.files import ROOT
from presets import PRESETS
from runs import checkpoints
from settings import Settings, resolve

DATA_SETS = {"rain800": "Zhang800", "rain100h": "Rain100H"}  # folder in data/: name in the paper
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults of settings.py
    # For a CPU: an eightieth of the crops, in batches of eight or of four.
    "short": {"epochs": 0, "steps": 2000, "batch_size": 8, "lr": 1e-3, "milestones": (1500, 1750), "clip_norm": 0.1},
    "small": {"epochs": 0, "steps": 4000, "batch_size": 4, "lr": 1e-3, "milestones": (3000, 3700), "clip_norm": 0.1},
}
# (recipe, network): as many steps as take the CPU time of the recipe with DSEN, with crops of the network's own size.
SAME_TIME = {
    ("short", "coarse2fine"): {"steps": 730, "batch_size": 3, "milestones": (550, 640), "clip_norm": 1.0},
    ("short", "php"): {"steps": 4300, "batch_size": 1, "patch_size": 160, "milestones": (3200, 3800), "clip_norm": 1.0},
}
# The settings that make a recipe; a run that was started with other values is another run.
RECIPE_FIELDS = (
    "patch_size batch_size aug_data rain seed epochs lr schedule milestones warmup clip_norm loss loss_stages average"
).split()
# PSNR / SSIM in the S-DSEN paper: on Rain100H, then on Zhang800.
PAPER = {
    "cnn": ("23.36 / 0.7557", "22.88 / 0.8127"),
    "cnn_da": ("22.21 / 0.7055", "24.04 / 0.8044"),
    "cnn_c4da": ("22.74 / 0.7320", "22.49 / 0.7891"),
    "dsen": ("23.60 / 0.7618", "23.39 / 0.8162"),
    "dsen_maxpool": ("22.83 / 0.7359", "22.30 / 0.7916"),
    "dsen_avgpool": ("22.86 / 0.7382", "22.30 / 0.7916"),
    "dsen_wo_se": ("23.46 / 0.7595", "22.53 / 0.8035"),
    "mcnn": ("23.70 / 0.7226", "22.90 / 0.7965"),
    "mcnn_sr": ("26.36 / 0.8395", "23.52 / 0.8362"),
    "mdsen": ("23.98 / 0.7295", "23.48 / 0.8000"),
    "mdsen_sc": ("25.84 / 0.8182", "23.79 / 0.8269"),
    "sdsen": ("27.16 / 0.8589", "23.64 / 0.8379"),
    "sdsen_s2": ("25.04 / 0.8028", "23.53 / 0.8270"),
    "sdsen_s4": ("26.24 / 0.8328", "23.74 / 0.8340"),
    "sdsen_s6": ("26.90 / 0.8520", "23.66 / 0.8364"),
}
TABLES = {
    "Table 1": ("cnn", "cnn_da", "cnn_c4da", "dsen"),
    "Table 2": ("dsen_maxpool", "dsen_avgpool", "dsen_wo_se", "dsen", "mcnn", "mcnn_sr", "mdsen", "mdsen_sc", "sdsen"),
    "Table 3": ("sdsen_s2", "sdsen_s4", "sdsen_s6", "sdsen"),
    "Table 4": ("dsen", "sdsen"),
    "Other networks": ("dsen", "coarse2fine", "php"),
}


class Row(NamedTuple):
    preset: str
    data: str  # a key of DATA_SETS
    recipe: str = "paper"
    seed: int = 0

    @property
    def name(self) -> str:
        """`PRESET_DATA`, with the recipe if it is not the paper's, and the seed if it is not 0."""
        recipe = "" if self.recipe == "paper" else f"_{self.recipe}"
        return f"{self.preset}_{self.data}{recipe}" + (f"_seed{self.seed}" if self.seed else "")

    @property
    def label(self) -> str:
        """The row's name in the paper."""
        return PRESETS[self.preset].row.split(",")[0]

    @property
    def checkpoint(self) -> str:
        """The checkpoint to test: the paper names no validation, so with its recipe it is the last step's."""
        return "latest" if self.recipe == "paper" else "best"

    @property
    def paper_scores(self) -> str:
        """PSNR and SSIM in the S-DSEN paper; "-" where it has no such row."""
        on_rain100h, on_rain800 = PAPER.get(self.preset, ("-", "-"))
        return on_rain100h if self.data == "rain100h" else on_rain800


class Run(NamedTuple):
    """The training of a row, in its folders on this machine."""

    row: Row
    settings: Settings

    @property
    def name(self) -> str:
        return self.row.name

    def file(self, name: str) -> Path:
        """Where a file of the run lies: a checkpoint in its models' folder, any other in its log's."""
        return (self.settings.model_path if name.endswith(".pth") else self.settings.log_path) / name

    @property
    def step(self) -> int:
        """Steps that the run has had. Raises Mismatch where it was started with another recipe."""
        latest = self.file("latest.pth")
        if not latest.is_file():
            return 0
        checkpoint = checkpoints.load(latest)
        for name in RECIPE_FIELDS:
            found, wanted = getattr(checkpoint.settings, name, None), getattr(self.settings, name)
            if found != wanted:
                raise Mismatch(
                    f"{latest} was started with {name} {found}, but {self.name} has {wanted}: move that run away, "
                    f"or resume it with --{name}"
                )
        return checkpoint.step


def parse_name(name: str) -> Row | None:
    """The row of that name; None where there is none."""
    match = re.fullmatch(r"(.+)_(rain800|rain100h)(?:_([a-z]+))??(?:_seed([0-9]+))?", name)
    if not match or match[1] not in PRESETS or (match[3] or "paper") not in RECIPES:
        return None
    row = Row(match[1], match[2], match[3] or "paper", int(match[4] or 0))
    return row if row.name == name else None  # one name for each row: no _seed0, no _paper


def find_row(name: str) -> Row:
    """The row of that name. Raises BadArgument where there is none."""
    if row := parse_name(name):
        return row
    raise BadArgument(
        f"no row is called {name!r}. Names are PRESET_DATA or PRESET_DATA_RECIPE_seedN, such as dsen_rain800; "
        f"presets: {', '.join(PRESETS)}; data: {', '.join(DATA_SETS)}; recipes: {', '.join(RECIPES)}"
    )


def find_run(row: Row, overrides: dict[str, Any]) -> Run:
    """The run of a row, whose settings are changed by `overrides`."""
    own = {"run": row.name, "data_dir": str(ROOT / "data" / row.data), "seed": row.seed}
    recipe = {**RECIPES[row.recipe], **SAME_TIME.get((row.recipe, resolve(row.preset).network), {})}
    return Run(row, resolve(row.preset, {**own, **recipe, **overrides}))


def all_rows() -> list[Row]:
    """The rows of the tables, each once."""
    presets = dict.fromkeys(preset for table in TABLES.values() for preset in table)
    return [Row(preset, data) for data in DATA_SETS for preset in presets]


def rows_with_runs(overrides: dict[str, Any]) -> list[Row]:
    """The rows whose run lies in model_dir."""
    paths = sorted(Path(resolve(overrides=overrides).model_dir).glob("*/latest.pth"))
    return [row for path in paths if (row := parse_name(path.parent.name))]
