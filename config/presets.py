"""The paper's rows as short differences from the defaults of settings.py, which are S-DSEN's with eight stages."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    row: str  # the row of the paper that it stands for
    differences: dict[str, Any]


_DSEN = {"stage_num": 1, "link": "none"}
_CNN = {**_DSEN, "group": "z2", "channel": 20}  # twice the channels keep the parameters about equal, section 3.2

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
}
