"""The papers' rows as short differences from the defaults of settings.py, which are S-DSEN's with eight stages."""

from functools import partial
from typing import Any, NamedTuple


class Preset(NamedTuple):
    row: str  # the row of the paper that it stands for
    differences: dict[str, Any]


_DSEN = {"stage_num": 1, "link": "none"}
_CNN = {**_DSEN, "group": "z2", "channel": 20}  # twice the channels keep the parameters about equal, section 3.2

_COARSE2FINE = {  # section IV-A
    **{"network": "coarse2fine", "channel": 16, "depth": 4, "stage_num": 12, "loss": "coarse2fine"},
    **{"patch_size": 100, "batch_size": 10, "lr": 1e-3, "steps": 400000, "milestones": (240000, 320000)},
}
_PHP = {  # section III-D
    **{"network": "php", "loss": "php", "patch_size": 512, "batch_size": 1, "aug_data": "scale"},
    **{"lr": 3e-4, "epochs": 250, "milestones": (150, 200)},
}


def _of(paper: str, defaults: dict[str, Any], row: str, **differences: Any) -> Preset:
    return Preset(f"{paper}: {row}", {**defaults, **differences})


_coarse2fine, _php = partial(_of, "coarse-to-fine", _COARSE2FINE), partial(_of, "intensity-aware", _PHP)
PRESETS = {
    "dsen": Preset("DSEN, tables 1 and 2", _DSEN),
    "dsen_maxpool": Preset("DSEN_maxpool, table 2", {**_DSEN, "aggregation": "max"}),
    "dsen_avgpool": Preset("DSEN_avgpool, table 2", {**_DSEN, "aggregation": "mean"}),
    "dsen_wo_se": Preset("DSEN_w/o_SE, table 2", {**_DSEN, "use_se": False}),
    "cnn": Preset("CNN, table 1", _CNN),
    "cnn_da": Preset("CNN+DA, table 1", {**_CNN, "aug_data": "rotate"}),
    "cnn_c4da": Preset("CNN+C4DA, table 1", {**_CNN, "aug_data": "quarter_turns"}),
    "mcnn": Preset("MCNN, table 2", {**_CNN, "stage_num": 8}),
    "mcnn_sr": Preset("MCNN+SR, table 2", {**_CNN, "stage_num": 8, "link": "concat"}),
    "mdsen": Preset("MDSEN, table 2", {"link": "none"}),
    "mdsen_sc": Preset("MDSEN+SC, table 2", {"link": "add"}),
    "sdsen": Preset("S-DSEN, tables 2 and 4", {}),
    "sdsen_s2": Preset("S-DSEN_s2, table 3", {"stage_num": 2}),
    "sdsen_s4": Preset("S-DSEN_s4, table 3", {"stage_num": 4}),
    "sdsen_s6": Preset("S-DSEN_s6, table 3", {"stage_num": 6}),
    "coarse2fine": _coarse2fine("Ours, tables 1, 3 and 4"),
    "coarse2fine_no_dilation": _coarse2fine("No-dilation, table 3", dilated=False),
    "coarse2fine_no_inner_dense": _coarse2fine("No-inner-dense, table 3", inner_dense=False),
    "coarse2fine_no_outer_dense": _coarse2fine("No-outer-dense, table 3", outer_dense=False),
    "coarse2fine_no_all_dense": _coarse2fine("No-all-dense, table 3", inner_dense=False, outer_dense=False),
    "coarse2fine_no_refinement": _coarse2fine("No-refinement, tables 3 and 4", refined=False),
    "coarse2fine_single": _coarse2fine("single stage, table 4", stage_num=1, refined=False),
    **{f"coarse2fine_s{T}": _coarse2fine(f"{T} stages, figure 10", stage_num=T) for T in range(2, 17) if T != 12},
    # The paper widens the network to about the sizes of two others, and does not say how.
    "coarse2fine_57k": _coarse2fine("as large as DDN (57369), table 2", channel=27, depth=5),
    "coarse2fine_150k": _coarse2fine("as large as RESCAN (149823), table 2", channel=37, depth=7),
    "php": _php("Ours, tables I to IV"),
    "php_acc": _php("L_acc, table III", colour_weight=0.0, segmentation_weight=0.0),
    "php_acc_col": _php("L_acc + L_col, table III", segmentation_weight=0.0),
    "php_standard": _php("Standard Convolution, table IV", block="standard"),
    "php_parallel": _php("Parallel Only, table IV", block="parallel"),
    "php_hierarchical": _php("Hierarchical Only, table IV", block="hierarchical"),
    "php_concatenation": _php("PHP-concatenation, table IV", block="concatenation"),
    "php_non_local": _php("PHP -> Non-local, table IV", block="non_local"),
    "php_no_pooling": _php("w/o. contrast-aware pooling, table IV", pooling="none"),
    "php_max_pooling": _php("-> max-pooling, table IV", pooling="max"),
    "php_unfiltered": _php("X_g^gt -> X^gt, table IV", lowpass_sigma=0.0),
    "php_one_network": _php("w/o. X, table IV", refined=False),
    "php_wo_s": _php("w/o. S, table IV", rain="intensity_wo_s"),
    "php_wo_m": _php("w/o. M, table IV", rain="intensity_wo_m"),
    "php_wo_l": _php("w/o. L, table IV", rain="intensity_wo_l"),
}
