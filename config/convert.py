"""Turn a downloaded rain set into data_dir/{train,val,test}/NAME.png|.jpg, one image a pair: `B` left, `O` right.

    python config/convert.py rain800 ~/Downloads/rain800 --data_dir data/rain800

Exit status: 0 all converted, 1 some file was left out (data_dir/convert_report.txt names every one), 2 nothing done
or stopped, with one line that says why. A second run skips what is there already and finishes what was interrupted.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from base.console import Parser, log, run_script, set_up_log
from base.errors import UserError
from base.files import ROOT, write_bytes
from base.images import list_images, read_image, read_pair, to_bgr8, write_image
from datasets.backgrounds import find_twins, thumbnail


@dataclass(frozen=True)
class Layout:
    """How a set is distributed."""

    joined: bool  # both halves in one file; else two files, paired by name
    folder: str  # what only this set's folders are called, so that a folder of several sets can be given
    test_folder: str = "$^"  # folders that hold the test set though their names don't say so
    only: str = ""  # the one split that the set consists of


LAYOUTS = {
    "rain800": Layout(True, "rain800|id-?cgan"),
    "rain100h": Layout(False, "100h|(train|test)_?(h|heavy)$", "rain100h"),
    "rain100l": Layout(False, "100l|(train|test)_?(l|light)$", "rain100l"),
    "rain12": Layout(False, "rain12$", only="test"),
    "rain1200": Layout(True, "1200|did-?mdn|^rain_(heavy|medium|light)$"),
    "rain1400": Layout(False, "1400|rainy_image_dataset"),
    "joined": Layout(True, "$^"),  # any other set of which each file holds both halves
}
# Real rain has no ground truth; streak and region are the rain alone, which the releases of Rain100H and L add.
NO_PAIR_FOLDER = re.compile("streak|region|mask|nature|(^|[-_ ])real")
NO_PAIR_FILE = re.compile("rain[-_ ]?(streak|region|mask)")
CLEAN, RAINY = "norain|clean|gt|ground[-_]?truth|background|target|label", "rainy|rain|input|in|rainy[-_]image"
ROLE_FOLDERS = {"clean": re.compile(f"({CLEAN})s?"), "rainy": re.compile(f"({RAINY})s?")}
ROLE_NAMES = {  # "norain-1", "001_GT", "rain-1", "001_in"
    role: re.compile(rf"({words})([-_ ].*|\d.*)|.*[-_ ]({words})")
    for role, words in (("clean", CLEAN), ("rainy", RAINY))
}
PREFIX = re.compile(rf"^({CLEAN}|{RAINY})([-_ ]|(?=\d))")
SUFFIX = re.compile(rf"[-_ ]({CLEAN}|{RAINY})$|(?<=\d)x2$")
SAMPLE = 100  # joined files of a split that are looked at to tell the sides
SHOWN = 20  # lines of one kind on the screen; the report holds them all


@dataclass(frozen=True)
class Found:
    """An image of the download; `parts` are the names of the folders between the download and the image."""

    path: Path
    parts: tuple[str, ...]
    role: str  # "clean", "rainy"; "" where neither the folder nor the name tells


@dataclass
class Pair:
    """One pair of the download. `clean` is None where `rainy` is the joined file."""

    rainy: Path
    clean: Path | None
    parts: tuple[str, ...]
    name: str  # of the file to write, without its suffix


def new_report() -> dict[str, list[str]]:
    """What the user must hear of, lines by title; all of it goes to convert_report.txt."""
    return {"ignored": [], "validation backgrounds that are also trained on": [], "warnings": [], "left out": []}


def bare(stem: str) -> str:
    """A file's stem in lower case without what only says clean or rainy: "norain-1x2" and "rain-1" are both "1"."""
    stem = stem.lower()
    return SUFFIX.sub("", PREFIX.sub("", stem)) or stem


def role_of(path: Path, parts: tuple[str, ...]) -> str:
    """Clean, rainy or "". The innermost folder that tells decides: `rain/X2/norain-1x2.png` is rainy."""
    for part in reversed(parts):
        for role, pattern in ROLE_FOLDERS.items():
            if pattern.fullmatch(part.lower()):
                return role
    return next((role for role, pattern in ROLE_NAMES.items() if pattern.fullmatch(path.stem.lower())), "")


def split_of(set_name: str, root: Path, parts: tuple[str, ...], split: str) -> tuple[str, str]:
    """Which split a folder of a download is: ("train" or "test", "") or ("", why the folder is ignored).

    `split` is what the user said. Else the innermost name with "train" or "test" in it decides, `root`'s own last.
    """
    layout, names = LAYOUTS[set_name], [part.lower() for part in parts]
    if any(NO_PAIR_FOLDER.search(name) for name in names):
        return "", "no pairs, by its name"
    for other, its in LAYOUTS.items():
        if any(re.search(its.folder, name) for name in names) and not any(re.search(layout.folder, n) for n in names):
            return "", f"it belongs to {other}"
    names = [*reversed(names), root.resolve().name.lower()]
    told = [word for name in names for word in ("train", "test") if word in name]
    told += ["test"] * any(re.fullmatch(layout.test_folder, name) for name in names)
    split = split or layout.only or "".join(told[:1])
    return split, "" if split else "its name says neither train nor test: --train and --test can name folders"


def find_images(set_name: str, root: Path, data_dir: Path, report: dict, split: str = "") -> dict[str, list[Found]]:
    """Search an unpacked download, any depth, for one set's images by split; `split` says what all of `root` is.

    What is no part of the set's pairs, by its name, goes to `report["ignored"]`.
    """
    found = defaultdict(list)
    for folder, subfolders, _ in os.walk(root):
        folder = Path(folder)
        subfolders[:] = sorted(
            s for s in subfolders if s[0] != "." and s != "__MACOSX" and (folder / s).resolve() != data_dir
        )
        parts = folder.relative_to(root).parts
        everything = [path for path in list_images(folder) if path.name[0] != "."]
        images = [path for path in everything if not NO_PAIR_FILE.match(path.stem.lower())]
        where, reason = split_of(set_name, root, parts, split)
        if len(images) < len(everything):
            report["ignored"].append(f"{folder}: {len(everything) - len(images)} images of the rain alone")
        if images and where:
            joined = LAYOUTS[set_name].joined
            found[where] += [Found(path, parts, "" if joined else role_of(path, parts)) for path in images]
        elif images:
            report["ignored"].append(f"{folder} ({len(images)} images): {reason}")
    return found


def pair_by_name(images: list[Found], report: dict) -> list[Pair]:
    """Pair rainy with clean images: equal stems first, then equal bare stems, then `stem_k` with `stem`.

    Folders are paired where they differ only in what says clean or rainy. Several rainy images may share one clean
    one. What finds no partner, or more than one, goes to `report["left out"]`.
    """

    def place(image: Found) -> tuple[str, ...]:
        neutral = (*ROLE_FOLDERS.values(), re.compile("x2"))
        return tuple(part for part in image.parts if not any(p.fullmatch(part.lower()) for p in neutral))

    clean = defaultdict(lambda: defaultdict(list))  # clean[place][key] = files
    for image in images:
        if image.role == "clean":
            clean[place(image)]["whole", image.path.stem.lower()].append(image.path)
            clean[place(image)]["bare", bare(image.path.stem)].append(image.path)
    pairs, used = [], set()
    for image in (image for image in images if image.role == "rainy"):
        short = bare(image.path.stem)
        keys = (("whole", image.path.stem.lower()), ("bare", short), ("bare", re.sub(r"_\d+$", "", short)))
        candidates = next((clean[place(image)][key] for key in keys if key in clean[place(image)]), [])
        used.update(candidates)
        if len(candidates) == 1:
            pairs.append(Pair(image.path, candidates[0], image.parts, short))
        else:
            several = f"{len(candidates)} clean images fit it, such as {candidates[0]}" if candidates else ""
            report["left out"].append(f"{image.path}: {several or 'no clean image fits it'}")
    for image in images:
        if image.role == "clean" and image.path not in used:
            report["left out"].append(f"{image.path}: no rainy image fits it")
        elif image.role == "":
            report["left out"].append(f"{image.path}: neither its folder nor its name says clean or rainy")
    return pairs


def name_apart(pairs: list[Pair]) -> None:
    """Make the names of one split unlike, by the folders in which they differ (Rain1200: "Rain_Heavy-1")."""
    common = set.intersection(*(set(pair.parts) for pair in pairs)) if pairs else set()
    folders = ["".join(f"{part}-" for part in pair.parts if part not in common) for pair in pairs]
    plain = [pair.name for pair in pairs]
    longer = [folder + name for folder, name in zip(folders, plain, strict=True)]
    longest = [folder + pair.rainy.name.replace(".", "-") for folder, pair in zip(folders, pairs, strict=True)]
    # Compared in lower case, for some disks take "A" and "a" for one file.
    alike = (names for names in (plain, longer, longest) if len({name.lower() for name in names}) == len(names))
    for pair, name in zip(pairs, next(alike, longest), strict=True):
        pair.name = name


def draw_validation(pairs: list[Pair], count: int, seed: int) -> set[str]:
    """Names of `count` validation pairs: a function of the pairs' names and `seed` alone.

    Pairs that share a clean file stay together, so `count` is met only as nearly from below as they allow. The order
    is that of hashes, so a pair that is added later moves at most one other group.
    """
    if pairs and count >= len(pairs):
        raise UserError(f"--val {count} leaves nothing to train on, there are {len(pairs)} training pairs: lower it")
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.clean or pair.rainy].append(pair.name)
    chosen = set()
    for names in sorted(groups.values(), key=lambda names: hashlib.sha256(f"{seed}:{min(names)}".encode()).digest()):
        if len(chosen) + len(names) <= count:
            chosen.update(names)
    return chosen


def rain_side(first: np.ndarray, second: np.ndarray) -> int:
    """Which of two (H, W, 3) uint8 images is the rainy one: -1 first, 1 second, 0 can't tell.

    Streaks add detail, and they are narrow and brighter than what they cover, so the fine part of rainy - clean is
    skewed upwards. Both must agree: of Rain800's 800 pairs 723 come out right, 77 undecided, none wrong. The mean
    brightness isn't asked: 175 of these rainy images are darker than their backgrounds, being dimmed as a whole.
    """
    a, b = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32) for image in (first, second))
    detail = [cv2.norm(cv2.Laplacian(image, cv2.CV_32F), cv2.NORM_L1) for image in (a, b)]
    fine = (b - a) - cv2.blur(b - a, (7, 7))
    skew, gain = np.sign(float((fine * fine * fine).sum())), np.sign(detail[1] - detail[0])
    return int(skew) if skew == gain else 0


def clean_is_left(pairs: list[Pair], split: str, report: dict) -> bool:
    """Vote of about `SAMPLE` evenly spread joined files on the side of the clean background."""
    votes = Counter()
    for pair in pairs[:: max(1, len(pairs) // SAMPLE)]:
        with contextlib.suppress(UserError):  # it is reported when its turn to be converted comes
            votes[rain_side(*read_pair(pair.rainy))] += 1
    left, most, least = votes[1] >= votes[-1], max(votes[1], votes[-1]), min(votes[1], votes[-1])
    side = "left" if left else "right"
    log.info(f"{split}: clean background on the {side}, by {most} files against {least} ({votes[0]} don't tell)")
    if most <= 2 * least:
        report["warnings"].append(f"{split}: the clean side is a guess: look at the result, --clean_side sets it")
    return left


def read_source(pair: Pair, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read a pair as (B, O), each (H, W, 3) uint8. Raises UserError where it is unreadable or the sizes differ."""
    if pair.clean is None:
        image = to_bgr8(read_image(pair.rainy))
        if image.shape[1] % 2:
            raise UserError(f"{pair.rainy}: {image.shape[1]} pixels wide, an odd number, so it is no joined pair")
        halves = np.split(image, 2, axis=1)
        return (halves[0], halves[1]) if left else (halves[1], halves[0])
    clean, rainy = to_bgr8(read_image(pair.clean)), to_bgr8(read_image(pair.rainy))
    if clean.shape != rainy.shape:
        sizes = " but ".join(f"{image.shape[1]}x{image.shape[0]}" for image in (rainy, clean))
        raise UserError(f"{pair.rainy}: its size is {sizes} for its clean image {pair.clean}")
    return clean, rainy


def store(target: Path, clean: np.ndarray, rainy: np.ndarray, data: bytes | None) -> bool:
    """Write a pair, `data` byte for byte where given; returns False where it stands there already.

    Raises UserError where another picture has that name; a file that can't be read is replaced.
    """
    joined, there = np.concatenate([clean, rainy], axis=1), None
    if target.exists():
        with contextlib.suppress(UserError):
            there = to_bgr8(read_image(target))
    if there is not None and np.array_equal(there, joined):
        return False
    if there is not None:
        raise UserError(f"{target} is already there and is another picture: remove it or choose another --data_dir")
    if data is not None:
        write_bytes(target, data)
    else:
        write_image(target, joined)
    return True


def check_data_dir(data_dir: Path, settings: dict, planned: dict[str, set[str]]) -> dict:
    """Raise UserError where `data_dir` holds something else than this conversion; returns its record, updated."""
    path, record = data_dir / "convert.json", {}
    if path.exists():
        try:
            record = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged: remove {data_dir} and convert again") from None
    for key, value in settings.items():
        if record.get(key, value) != value:
            raise UserError(f"{data_dir} was made with {key} {record[key]}, not {value}: choose another --data_dir")
    for split, names in planned.items():
        there = list_images(data_dir / split) if (data_dir / split).is_dir() else []
        strange = [path.name for path in there if path.name not in names]
        if strange:
            raise UserError(
                f"{data_dir / split} holds {len(strange)} images that this conversion doesn't make, such as "
                f"{strange[0]}: choose another --data_dir"
            )
    return {**record, **settings}


def save_text(path: Path, text: str) -> None:
    """Write a text file unless it holds just this already."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_bytes(path, text.encode())


def convert(
    pairs: dict[str, list[Pair]], data_dir: Path, settings: dict, side: str | None, report: dict
) -> dict[str, dict[str, np.ndarray]]:
    """Write the pairs of each split; returns the clean halves' thumbnails, {split: {"split/file": (1024,)}}.

    `side` is where joined files have the clean half, None to find out. A pair that can't be read is reported and
    left out. Raises UserError where `data_dir` holds something else or can't be written, or no pair can be read.
    """
    lefts = {}
    for title, splits in (("training", ("train", "val")), ("test", ("test",))):
        joined = [pair for split in splits for pair in pairs.get(split, []) if pair.clean is None]
        left = side == "left" if side or not joined else clean_is_left(joined, title, report)
        lefts.update(dict.fromkeys(splits, left))
    todo, planned = [], {split: set() for split in pairs}
    for split, pair in ((split, pair) for split, them in pairs.items() for pair in them):
        suffix = pair.rainy.suffix.lower().replace("jpeg", "jpg")
        keep = pair.clean is None and lefts[split] and suffix in (".jpg", ".png")
        todo.append((split, pair, data_dir / split / f"{pair.name}{suffix if keep else '.png'}", keep))
        planned[split].add(todo[-1][2].name)
    record = check_data_dir(data_dir, settings, planned)

    thumbs, written, bar = defaultdict(dict), 0, sys.stderr.isatty()
    for number, (split, pair, target, keep) in enumerate(tqdm(todo, unit="pair", disable=not bar), 1):
        try:
            clean, rainy = read_source(pair, lefts[split])
        except UserError as error:
            report["left out"].append(str(error))
            continue
        if not thumbs:  # before the first image, so that an interrupted run is known too
            save_text(data_dir / "convert.json", json.dumps(record, indent=1) + "\n")
            for leftover in data_dir.glob("*/.*.tmp"):  # of a run that was killed while it wrote
                leftover.unlink()
        written += store(target, clean, rainy, pair.rainy.read_bytes() if keep else None)
        thumbs[split][f"{split}/{target.name}"] = thumbnail(clean)
        if rain_side(clean, rainy) < 0:
            report["warnings"].append(f"{split}/{target.name}: clean and rainy look swapped ({pair.rainy})")
        if not bar and number % max(1, len(todo) // 10) == 0:
            log.info(f"  {number} of {len(todo)} pairs")
    if not thumbs:
        raise UserError(f"none of {len(todo)} pairs can be converted; the first: {report['left out'][0]}")
    log.info(f"{written} pairs written, {sum(map(len, thumbs.values())) - written} were there already")
    return thumbs


def summarise(thumbs: dict[str, dict[str, np.ndarray]], data_dir: Path, report: dict) -> None:
    """Look for shared backgrounds, show the report, write all of it to convert_report.txt, name the next command."""
    counts = ", ".join(f"{split} {len(thumbs[split])}" for split in ("train", "val", "test") if split in thumbs)
    for split in {"train", "val", "test"} - set(thumbs):  # `folders` converts train and test one after the other
        for path in list_images(data_dir / split) if (data_dir / split).is_dir() else []:
            with contextlib.suppress(UserError):
                thumbs[split][f"{split}/{path.name}"] = thumbnail(read_pair(path)[0])
    for name, same in find_twins(thumbs["test"], thumbs["train"] | thumbs["val"]).items():
        report["warnings"].append(f"test background also in training: {name}: {', '.join(same)}")
    twins = "validation backgrounds that are also trained on"
    found = find_twins(thumbs["val"], thumbs["train"])
    report[twins] += [f"{name}: {', '.join(same)}" for name, same in found.items()]
    whole, path = [f"pairs: {counts}"], data_dir / "convert_report.txt"
    for title, lines in report.items():
        whole += ["", f"{title}: {len(lines)}", *(f"  {line}" for line in lines)]
        shown = lines[: 0 if title == twins else SHOWN]
        for line in [f"{title}: {len(lines)}"] * bool(lines) + [f"  {line}" for line in shown]:
            log.info(line)
        if len(lines) > len(shown):
            log.info(f"  {len(lines) - len(shown)} more are named in {path}")
    save_text(path, "\n".join(whole) + "\n")
    log.info(f"{data_dir}: {counts} pairs")
    log.info(f"next: python main.py -a {'train' if thumbs['train'] else 'test'} --data_dir {data_dir}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read and check the command line. Raises UserError."""
    parser = Parser(description=__doc__)
    sets = [*LAYOUTS, "folders"]
    parser.add_argument("set", choices=sets, help="joined: any joined files; folders: any two folders, paired by name")
    parser.add_argument("source", nargs="?", type=Path, help="the unpacked download; train and test are found in it")
    parser.add_argument("--train", type=Path, help="instead of SOURCE: the folder of the training pairs")
    parser.add_argument("--test", type=Path, help="instead of SOURCE: the folder of the test pairs")
    parser.add_argument("--clean", type=Path, help="folders: the clean images")
    parser.add_argument("--rainy", type=Path, help="folders: the rainy images")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="folders: what these pairs are for")
    parser.add_argument("--data_dir", type=Path, help="where the set is written (data/SET of the repository)")
    parser.add_argument("--val", type=int, default=100, help="validation pairs, drawn from the training pairs (100)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (0)")
    parser.add_argument("--clean_side", choices=["left", "right"], help="joined files: the clean half (looked for)")
    chosen = parser.parse_args(arguments)
    given = [name for name in ("source", "train", "test", "clean", "rainy") if getattr(chosen, name)]
    if chosen.set == "folders" and given != ["clean", "rainy"]:
        raise UserError("folders is read from --clean DIR and --rainy DIR (see convert.py --help)")
    if chosen.set != "folders" and given not in (["source"], ["train"], ["test"], ["train", "test"]):
        raise UserError(f"{chosen.set} is read from SOURCE, or --train DIR and --test DIR (see convert.py --help)")
    if chosen.val < 0:
        raise UserError(f"--val {chosen.val}: give 0 or more pairs")
    chosen.data_dir = (chosen.data_dir or ROOT / "data" / chosen.set).resolve()
    for path in (getattr(chosen, name) for name in given):
        if not path.is_dir():
            raise UserError(f"{path} is no folder: {'unpack it first' if path.exists() else 'nothing is there'}")
        if path.resolve() == chosen.data_dir:
            raise UserError(f"{path} is both what is read and --data_dir: choose another --data_dir")
    return chosen


def main(arguments: list[str]) -> int:
    chosen, report, found = parse(arguments), new_report(), {}
    set_up_log()
    if chosen.set == "folders":
        found[chosen.split] = [
            Found(path, (), role) for role in ("clean", "rainy") for path in list_images(getattr(chosen, role))
        ]
    elif chosen.source:
        found = find_images(chosen.set, chosen.source, chosen.data_dir, report)
    for split in ("train", "test"):
        if root := getattr(chosen, split):
            found |= find_images(chosen.set, root, chosen.data_dir, report, split)
    if not any(found.values()):
        why = f" (ignored: {report['ignored'][0]})" if report["ignored"] else ""
        raise UserError(f"{chosen.source or chosen.train or chosen.test or chosen.clean} holds no images{why}")
    pairs = {}
    for split, images in found.items():
        if chosen.set in LAYOUTS and LAYOUTS[chosen.set].joined:
            pairs[split] = [Pair(image.path, None, image.parts, image.path.stem) for image in images]
        else:
            pairs[split] = pair_by_name(images, report)
        name_apart(pairs[split])
    if not any(pairs.values()):
        raise UserError(f"no pair among {sum(map(len, found.values()))} images; the first: {report['left out'][0]}")
    settings = {"set": chosen.set}
    if "train" in pairs:
        settings |= {"val": chosen.val, "seed": chosen.seed}
        names = draw_validation(pairs["train"], chosen.val, chosen.seed)
        pairs["val"] = [pair for pair in pairs["train"] if pair.name in names]
        pairs["train"] = [pair for pair in pairs["train"] if pair.name not in names]
    try:
        summarise(convert(pairs, chosen.data_dir, settings, chosen.clean_side, report), chosen.data_dir, report)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command finishes it") from None
    return int(bool(report["left out"]))


if __name__ == "__main__":
    run_script(main)
