"""Turn a downloaded rain data set into data_dir/{train,val,test}/NAME.png|.jpg, one image per pair.

The ground truth is on the left, the rainy image on the right.

    python config/convert.py rain800 ~/Downloads/rain800 --data_dir data/rain800
    python config/convert.py own --train PAIRS --data_dir data/mine

SOURCE may hold several sets: folders of the other sets are left out and listed. The files' contents tell whether they
are joined pairs or rainy and clean images with equal names. Exit status: 0 all converted; 1 some pairs left out, named
in data_dir/convert_report.txt; 2 nothing done. A second run completes an interrupted one.
"""

import base.openmp  # noqa: F401

import argparse
import contextlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from base.console import Parser, Progress, log, run_script, set_up_log
from base.errors import BadArgument, BadName, DamagedFile, Mismatch, MissingFile, Occupied, OutOfMemory, UserError
from base.files import ROOT, write_bytes
from base.images import list_images, read_pair, shared_backgrounds, survey, thumbnail
from datasets import layouts, pairing
from datasets.layouts import LAYOUTS, SPLITS, Found
from datasets.pairing import Pair, log_next_step, read_checked, read_download, write_pair

SHARED = "validation backgrounds that are also trained on"
SHOWN = 10  # lines of each section of the report that are also logged

Report = dict[str, list[str]]  # lines by title
Thumbnails = dict[str, dict[str, np.ndarray]]  # of clean halves: {split: {"split/file": (1024,)}}


def find_pairs(options: argparse.Namespace, report: Report) -> dict[str, list[Pair]]:
    """The pairs of each split, named, with `--val` of the training pairs as "val". Raises UserError where none is."""
    found: dict[str, list[Found]] = {}
    for role, folder in (("clean", options.clean), ("rainy", options.rainy)) if options.set == "folders" else ():
        images, others = survey(folder)
        found.setdefault(options.split or "train", []).extend(Found(path, (), role) for path in images)
        report["ignored"] += layouts.left_out(others)
    given = {split: folder for split in ("train", "test") if (folder := getattr(options, split))}
    apart = {options.data_dir, *(folder.resolve() for folder in given.values())}
    for split, root in (("", options.source), *given.items()):
        if root:
            images, ignored = layouts.find_images(options.set, root, apart, split, given if not split else ())
            report["ignored"] += [line for line in ignored if line not in report["ignored"]]
            found |= images
    pairs = {split: pair_up(split, images, options, report) for split, images in found.items()}
    roles = {image.role for images in found.values() for image in images}
    for split in given if any(pairs.values()) else [""]:
        if not pairs.get(split):
            text = [f"no pairs found in {given[split]}" if split else "no pairs found", *report["left out"][:1]]
            unknown = [layouts.BOTH_FOLDERS] if found and not roles >= {"clean", "rainy"} else []
            raise MissingFile("; ".join([*text, *report["ignored"][:5], *unknown]))
    if options.drop_shared:
        drop_shared(pairs, options.data_dir, report)
    if pairs.get("train"):
        total = len(pairs["train"])
        count = options.val if options.val is not None else 100 if total >= 200 else min(-(-total // 10), total - 1)
        chosen = pairing.choose_validation(pairs["train"], count, options.seed)
        pairs["val"] = [pair for pair in pairs["train"] if pair.name in chosen]
        pairs["train"] = [pair for pair in pairs["train"] if pair.name not in chosen]
    return pairs


def pair_up(split: str, images: list[Found], options: argparse.Namespace, report: Report) -> list[Pair]:
    """The pairs of one split: joined files, or two files with equal names, as their contents tell."""
    if options.set != "folders" and (options.clean_side or pairing.are_joined(images)):
        given = options.clean_side
        side, is_clear = (given, True) if given else pairing.find_clean_side([image.path for image in images])
        if not is_clear:
            report["warnings"].append(f"{split}: the clean side is a guess: look at the result, or --clean_side")
        pairs = [Pair(i.path, None, i.parts, i.path.stem, clean_left=side == "left") for i in images]
    else:
        pairs, left_out = pairing.pair_by_name(images)
        report["left out"] += left_out
    pairs, copies = pairing.drop_copies(pairs)
    report["ignored"] += copies
    pairing.make_names_unique(pairs)
    return pairs


def drop_shared(pairs: dict[str, list[Pair]], data_dir: Path, report: Report) -> None:
    """Leave out the training pairs that show the background of a test pair, of this call or in `data_dir`."""
    thumbs: Thumbnails = {"train": {}, "test": {} if pairs.get("test") else thumbnails_in(data_dir, "test")}
    for split in thumbs:
        for pair in Progress(pairs.get(split, ()), f"backgrounds of {split}", unit="pair"):
            with contextlib.suppress(UserError):  # reported when this pair is converted
                thumbs[split][str(pair.rainy)] = thumbnail(read_download(pair)[0])
    if not thumbs["train"] or not thumbs["test"]:
        raise BadArgument("--drop_shared compares training with test pairs: convert both, or the test pairs first")
    shared = shared_backgrounds(thumbs["train"], thumbs["test"])
    report["dropped, as they show test backgrounds"] = [f"{name}: {', '.join(same)}" for name, same in shared.items()]
    pairs["train"] = [pair for pair in pairs["train"] if str(pair.rainy) not in shared]


def write_pairs(pairs: dict[str, list[Pair]], data_dir: Path, report: Report) -> Thumbnails:
    """Write the pairs of each split, except those that cannot be read; returns the thumbnails of their clean halves."""
    todo = []
    for split, pair in ((split, pair) for split, group in pairs.items() for pair in group):
        suffix = pair.rainy.suffix.lower().replace("jpeg", "jpg")
        copied = pair.clean is None and pair.clean_left and suffix in (".jpg", ".png")
        todo.append((split, pair, data_dir / split / f"{pair.name}{suffix if copied else '.png'}", copied))
    planned = {target for _, _, target, _ in todo}
    for path in (path for split in pairs for path in list_images(data_dir / split)):
        if path not in planned:
            raise Occupied(f"{path} does not come from these files and options: choose another --data_dir")

    thumbs = defaultdict(dict)
    for split, pair, target, copied in Progress(todo, unit="pair"):
        try:
            clean, rainy = read_checked(pair)
            write_pair(target, clean, rainy, pair.rainy.read_bytes() if copied else None)
        except (MissingFile, DamagedFile, Mismatch, OutOfMemory, BadName) as error:
            report["left out"].append(str(error))
            continue
        thumbs[split][f"{split}/{target.name}"] = thumbnail(clean)
        if pairing.rain_side(clean, rainy) < 0:
            report["warnings"].append(f"{split}/{target.name}: clean and rainy look swapped ({pair.rainy})")
    if not thumbs:
        raise MissingFile(f"none of {len(todo)} pairs can be converted; the first: {report['left out'][0]}")
    return thumbs


def write_report(thumbs: Thumbnails, data_dir: Path, report: Report) -> None:
    """Look for shared backgrounds, write convert_report.txt and show the next command."""
    counts = ", ".join(f"{split} {len(thumbs[split])}" for split in SPLITS if split in thumbs)
    for split in set(SPLITS) - set(thumbs):  # splits in data_dir that are not converted by this call
        thumbs[split] = thumbnails_in(data_dir, split)
    for name, same in shared_backgrounds(thumbs["test"], thumbs["train"] | thumbs["val"]).items():
        report["warnings"].append(f"test background also in training: {name}: {', '.join(same)}")
    for name, same in shared_backgrounds(thumbs["val"], thumbs["train"]).items():
        report[SHARED].append(f"{name}: {', '.join(same)}")
    text, path = [f"pairs: {counts}"], data_dir / "convert_report.txt"
    for title, lines in report.items():
        text += ["", f"{title}: {len(lines)}", *(f"  {line}" for line in lines)]
        if lines:
            more = f"\n  ... all in {path}" if lines[SHOWN:] else ""
            log.info("\n  ".join([f"{title}: {len(lines)}", *lines[:SHOWN]]) + more)
    write_bytes(path, ("\n".join(text) + "\n").encode("utf-8", "backslashreplace"))
    log.info(f"{counts} pairs in {data_dir}")
    log_next_step(data_dir)


def thumbnails_in(data_dir: Path, split: str) -> dict[str, np.ndarray]:
    """Thumbnails of the clean halves in a folder of a data set by "split/file"."""
    thumbs = {}
    for path in list_images(data_dir / split):
        with contextlib.suppress(UserError):
            thumbs[f"{split}/{path.name}"] = thumbnail(read_pair(path)[0])
    return thumbs


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    text = f"one of {', '.join(LAYOUTS)} (own: any other set; joined: the same)"
    parser.add_argument("set", choices=LAYOUTS, metavar="SET", help=text)
    text = "the unpacked download; train and test are found in it"
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help=text)
    for name, text in {
        "train": "the folder of the training pairs, instead of what SOURCE holds",
        "test": "the folder of the test pairs, instead of what SOURCE holds",
        "clean": "folders: the clean images",
        "rainy": "folders: the rainy images",
        "data_dir": "where to write (default: data/SET of the repository)",
    }.items():
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    text = "folders: what these pairs are for (default: train)"
    parser.add_argument("--split", choices=["train", "test"], help=text)
    text = "validation pairs, taken from the training pairs (default: 100, or a tenth of fewer than 200)"
    parser.add_argument("--val", type=int, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of that choice (default: 0)")
    parser.add_argument("--drop_shared", action="store_true", help="leave out training pairs on test backgrounds")
    text = "joined files: the clean half (default: detected)"
    parser.add_argument("--clean_side", choices=["left", "right"], help=text)
    options = parser.parse_args(arguments)
    given = [name for name in ("source", "train", "test", "clean", "rainy") if getattr(options, name)]
    if options.set == "folders" and given != ["clean", "rainy"]:
        parser.error("folders needs --clean DIR and --rainy DIR")
    if (options.set != "folders" and (options.split or not set(given) <= {"source", "train", "test"})) or not given:
        parser.error(
            f"{options.set} needs SOURCE, --train DIR or --test DIR; --clean, --rainy and --split are for `folders`"
        )
    if options.val is not None and options.val < 0:
        parser.error(f"--val must be at least 0, got {options.val}")
    options.data_dir = (options.data_dir or ROOT / "data" / options.set).resolve()
    for path in (getattr(options, name) for name in given):
        if not path.is_dir():
            raise MissingFile(f"{path} is not a folder{': unpack it first' if path.exists() else ''}")
        if path.resolve() == options.data_dir:
            parser.error(f"{path} is both the source and --data_dir")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    set_up_log()
    report: Report = {"ignored": [], SHARED: [], "warnings": [], "left out": []}
    pairs = find_pairs(options, report)
    write_report(write_pairs(pairs, options.data_dir, report), options.data_dir, report)
    return int(bool(report["left out"]))


if __name__ == "__main__":
    run_script(main)
