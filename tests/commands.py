"""What several test files need to run main.py in this process and to read what it wrote."""

import csv

import torch
from tensorboardX.proto.event_pb2 import Event

import main
from runs import checkpoints

SMALL = "--channel 2 --depth 4 --patch_size 16 --batch_size 2 --stage_num 2 --device cpu".split()
LONG = "--log_steps 1 --save_steps 2 --val_images 2 --lr 1e-3".split()
TINY = "--patch_size 16 --batch_size 2 --device cpu".split()
OTHERS = {  # the networks of the other two papers
    "coarse2fine": "-p coarse2fine --stage_num 2 --depth 2 --channel 4".split(),
    "php": "-p php --epochs 0 --milestones 3".split(),
}


def call(*words):
    return main.main([str(word) for word in words])


def read(tmp_path, name, run="sdsen"):
    return checkpoints.load(tmp_path / "model_dir" / run / f"{name}.pth")


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def files(folder):
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def events(folder):
    """The TensorBoard events of a run."""
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def scalars(folder):
    """{tag: [(step, value), ...]} of the TensorBoard events of a run."""
    curves = {}
    for event in events(folder):
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def flat(values, name=""):
    """An optimizer's state, lists in it too, as one level of names and tensors."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {inner: value for key, part in items for inner, value in flat(part, f"{name}/{key}").items()}
    return {name: torch.as_tensor(values)}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def same_state(a, b):
    """Bit for bit: network, optimizer, random state, step."""
    first, second = (flat(checkpoint.optimizer["state"]) for checkpoint in (a, b))
    same = same_weights(a.network, b.network) and same_weights(first, second)
    return same and a.step == b.step and torch.equal(a.random["cpu"], b.random["cpu"])
