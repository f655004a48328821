"""What downloads look like: which images are clean or rainy, training or test, and a pair; how pairs are named."""

import contextlib
import hashlib
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from base.errors import BadArgument, Mismatch, UserError
from base.images import list_images, read_image, read_pair, to_bgr8


class Layout(NamedTuple):
    """How a data set is distributed; the patterns are of folder names in lower case."""

    joined: bool  # one file holds both halves; else two files, paired by name
    folder: str  # matches folders of this set and of no other, in a download that holds several sets
    test_folder: str = "$^"  # matches folders that hold the test set without "test" in their names


LAYOUTS = {
    "rain800": Layout(True, "rain800|id-?cgan"),
    "rain100h": Layout(False, "100h|(train|test)_?(h|heavy)$", "rain100h"),
    "rain100l": Layout(False, "100l|(train|test)_?(l|light)$", "rain100l"),
    "rain12": Layout(False, "rain12$", ".*"),
    "rain1200": Layout(True, "1200|did-?mdn|^rain_(heavy|medium|light)$"),
    "rain1400": Layout(False, "1400|rainy_image_dataset"),
    "joined": Layout(True, "$^"),  # any other set of joined files
    "folders": Layout(False, "$^"),  # any two folders
}
# Real rain has no ground truth; streak and region are the rain layers in the releases of Rain100H and Rain100L.
NO_PAIR_FOLDER = re.compile("streak|region|mask|nature|(^|[-_ ])real")
NO_PAIR_FILE = re.compile("rain[-_ ]?(streak|region|mask)")
CLEAN, RAINY = "norain|clean|gt|ground[-_]?truth|background|target|label", "rainy|rain|input|in|rainy[-_]image"
FOLDER = "({0})s?"
FILE = r"({0})([-_ ].*|\d.*)|.*[-_ ]({0})"  # "norain-1", "001_GT", "rain-1", "001_in"
AFFIX = r"^({0})([-_ ]|(?=\d))|[-_ ]({0})$|(?<=\d)x2$".format(f"{CLEAN}|{RAINY}")
SAMPLE = 100  # joined files of a split that vote on the clean side


class Found(NamedTuple):
    path: Path
    parts: tuple[str, ...]  # names of the folders between the download and the image
    role: str  # "clean", "rainy"; "" where neither the folder nor the name tells


@dataclass
class Pair:
    rainy: Path
    clean: Path | None  # None where `rainy` is a joined file
    parts: tuple[str, ...]
    name: str  # of the file to write, without its suffix
    clean_left: bool = True  # of a joined file: whether its left half is the clean one


def find_images(set_name: str, root: Path, data_dir: Path, split: str = "") -> tuple[dict[str, list[Found]], list[str]]:
    """The images of one set in an unpacked download by split, and a line for everything that is ignored."""
    found, ignored = defaultdict(list), []
    for name, subfolders, _ in os.walk(root):
        folder, parts = Path(name), Path(name).relative_to(root).parts
        searched = (sub for sub in subfolders if sub[0] != "." and sub != "__MACOSX")
        subfolders[:] = sorted(sub for sub in searched if (folder / sub).resolve() != data_dir)
        where = split_of(set_name, root, parts, split)
        images = [path for path in list_images(folder) if path.name[0] != "."]
        pairs = [path for path in images if where and not NO_PAIR_FILE.match(path.stem.lower())]
        if pairs:
            found[where] += [Found(path, parts, role_of(path, parts)) for path in pairs]
        if len(pairs) < len(images):
            ignored.append(
                f"{folder}: {len(images) - len(pairs)} images, by name no pairs of {set_name} (--train, --test)"
            )
    return found, ignored


def split_of(set_name: str, root: Path, parts: tuple[str, ...], split: str = "") -> str:
    """What a folder of a download holds: `split` if given, else as the innermost name tells; "" if it is ignored."""
    names = [part.lower() for part in parts]
    sets = [key for key, layout in LAYOUTS.items() if any(re.search(layout.folder, name) for name in names)]
    if any(NO_PAIR_FOLDER.search(name) for name in names) or (sets and set_name not in sets):
        return ""
    names = [*reversed(names), root.resolve().name.lower()]
    splits = [word for name in names for word in ("train", "test") if word in name]
    splits += ["test"] * any(re.fullmatch(LAYOUTS[set_name].test_folder, name) for name in names)
    return split or "".join(splits[:1])


def role_of(path: Path, parts: tuple[str, ...]) -> str:
    """Clean, rainy or "". The innermost folder that tells decides: `rain/X2/norain-1x2.png` is rainy."""
    for name, pattern in (*((part, FOLDER) for part in reversed(parts)), (path.stem, FILE)):
        for role, words in (("clean", CLEAN), ("rainy", RAINY)):
            if re.fullmatch(pattern.format(words), name.lower()):
                return role
    return ""


def pair_by_name(images: list[Found]) -> tuple[list[Pair], list[str]]:
    """Pairs of rainy and clean images, and a line for every image without exactly one partner.

    Partners have equal bare stems, or `stem_k` and `stem`. Several rainy images may share one clean image. Folders
    belong together where they differ only in words for clean or rainy.
    """
    clean, pairs, left_out, used = defaultdict(list), [], [], set()
    for image in (image for image in images if image.role == "clean"):
        clean[_place(image), bare(image.path.stem)].append(image.path)
    for image in (image for image in images if image.role == "rainy"):
        place, short = _place(image), bare(image.path.stem)
        partners = clean.get((place, short)) or clean.get((place, re.sub(r"_\d+$", "", short)), [])
        used.update(partners)
        if len(partners) == 1:
            pairs.append(Pair(image.path, partners[0], image.parts, short))
        else:
            left_out.append(f"{image.path}: {len(partners) or 'no'} clean images fit it")
    left_out += [f"{i.path}: no rainy image fits it" for i in images if i.role == "clean" and i.path not in used]
    left_out += [f"{i.path}: neither its folder nor its name says clean or rainy" for i in images if not i.role]
    return pairs, left_out


def bare(stem: str) -> str:
    """A file's stem in lower case without words for clean or rainy: "norain-1x2" and "rain-1" are both "1"."""
    return re.sub(AFFIX, "", stem.lower()) or stem.lower()


def _place(image: Found) -> tuple[str, ...]:
    neutral = FOLDER.format(f"{CLEAN}|{RAINY}") + "|x2"
    return tuple(part for part in image.parts if not re.fullmatch(neutral, part.lower()))


def make_names_unique(pairs: list[Pair]) -> None:
    """Prefix the names of one split by the folders in which they differ (Rain1200: "Rain_Heavy-1"), where needed."""
    if len({pair.name.lower() for pair in pairs}) < len(pairs):  # some disks take "A" and "a" for one file
        common = set.intersection(*(set(pair.parts) for pair in pairs))
        for pair in pairs:
            pair.name = "".join(f"{part}-" for part in pair.parts if part not in common) + pair.name


def choose_validation(pairs: list[Pair], count: int, seed: int) -> set[str]:
    """Names of at most `count` pairs, chosen by hashes of name and `seed`; pairs of one clean file stay together."""
    if pairs and count >= len(pairs):
        raise BadArgument(f"--val {count} leaves none of the {len(pairs)} training pairs to train on: lower it")
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.clean or pair.rainy].append(pair.name)
    chosen = set()
    for names in sorted(groups.values(), key=lambda names: hashlib.sha256(f"{seed}:{min(names)}".encode()).digest()):
        if len(chosen) + len(names) <= count:
            chosen.update(names)
    return chosen


def rain_side(first: np.ndarray, second: np.ndarray) -> int:
    """Which of two (H, W, 3) uint8 images is the rainy one: -1 first, 1 second, 0 unknown.

    Streaks add detail, and the fine part of rainy - clean is skewed upwards. Mean brightness does not tell.
    """
    a, b = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32) for image in (first, second))
    detail = [cv2.norm(cv2.Laplacian(image, cv2.CV_32F), cv2.NORM_L1) for image in (a, b)]
    fine = (b - a) - cv2.blur(b - a, (7, 7))
    skew, gain = np.sign(float((fine * fine * fine).sum())), np.sign(detail[1] - detail[0])
    return int(skew) if skew == gain else 0


def find_clean_side(paths: list[Path]) -> tuple[str, bool]:
    """("left" or "right", whether that is clear): the vote of about `SAMPLE` evenly spread joined files."""
    votes = Counter()
    for path in paths[:: max(1, len(paths) // SAMPLE)]:
        with contextlib.suppress(UserError):  # reported when this pair is converted
            votes[rain_side(*read_pair(path))] += 1
    left, right = votes[1], votes[-1]
    return "left" if left >= right else "right", max(left, right) > 2 * min(left, right)


def read_download(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """A pair of the download as (B, O), each (H, W, 3) uint8. Raises UserError where it cannot be read or split."""
    if pair.clean is None:
        left, right = read_pair(pair.rainy)
        return (left, right) if pair.clean_left else (right, left)
    B, O = to_bgr8(read_image(pair.clean)), to_bgr8(read_image(pair.rainy))
    if B.shape != O.shape:
        raise Mismatch(f"{pair.rainy} and {pair.clean} have two sizes")
    return B, O
