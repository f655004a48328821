"""Images of a download become pairs: by name or as joined files; their names, the validation set, the clean side."""

import contextlib
import filecmp
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np

from base.console import command_line, log
from base.errors import BadArgument, Mismatch, Occupied, UserError
from base.files import write_bytes
from base.images import list_images, read_image, read_pair, to_bgr8, write_image
from datasets.layouts import CLEAN, RAINY, SPLITS, Found, place_of

# In front of or behind the number; RainDS has names of two kinds, "rd-rain-1" and "pie-rd-rain-1", SPA-Data "1gt".
AFFIX = r"^(pie-|)(?:{0}|rd-rain|rd)(?:[-_ ]|(?=\d))|[-_ ](?:{0})$|(?<=\d)(?:x2|gt)$".format(f"{CLEAN}|{RAINY}")
SAMPLE = 100  # joined files of a split that vote on the clean side
SAME_PICTURE = 0.5  # likeness; in Rain800 and Rain100H pairs reach at least 0.67, halves of a photograph 0.39 at most
OTHER_PICTURE = 0.3  # a pair below that is none; 99 % of the halves of photographs are
NO_RAIN = 0.1  # mean difference of the halves, grey levels; in Rain800 and Rain100H it is at least 3


@dataclass
class Pair:
    rainy: Path
    clean: Path | None  # None where `rainy` is a joined file
    parts: tuple[str, ...]
    name: str  # of the file to write, without its suffix
    clean_left: bool = True  # of a joined file: whether its left half is the clean one


def are_joined(images: list[Found]) -> bool:
    """Whether files are joined pairs: most have no partner by name, and most halves show one picture."""
    pairs, left_out = pair_by_name(images)
    if images and 2 * len(left_out) <= len(images):
        return False
    return show_pairs([image.path for image in images], otherwise=not pairs)


def show_pairs(paths: list[Path], least: float = SAME_PICTURE, otherwise: bool = True) -> bool:
    """Whether at least half of some 20 files have halves alike by more than `least`; `otherwise` if none tells."""
    votes = []
    for path in paths[:: max(1, len(paths) // 20)]:
        with contextlib.suppress(UserError):  # reported where this file is used
            votes.append(likeness(*read_pair(path)) > least)
    return 2 * sum(votes) >= len(votes) if votes else otherwise


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two (H, W, 3) uint8 images, beyond the means of rows and columns; 1 if one is flat."""
    a, b = (
        cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        for image in (first, second)
    )
    a, b = (x - x.mean(0, keepdims=True) - x.mean(1, keepdims=True) + x.mean() for x in (a, b))
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / length) if length > 32**2 else 1.0  # 32: a standard deviation of one grey level


def pair_by_name(images: list[Found]) -> tuple[list[Pair], list[str]]:
    """Pairs of rainy and clean images, and a line for every image without exactly one partner.

    Partners have equal bare stems, or `stem_k` and `stem`. Several rainy images may share one clean image. Folders
    belong together where they differ only in words for clean or rainy.
    """
    clean, pairs, left_out, used = defaultdict(list), [], [], set()
    for image in (image for image in images if image.role == "clean"):
        clean[place_of(image), bare(image.path.stem)].append(image.path)
    for image in (image for image in images if image.role == "rainy"):
        place, short = place_of(image), bare(image.path.stem)
        partners = clean.get((place, short)) or clean.get((place, re.sub(r"_\d+$", "", short)), [])
        partners = [image.clean] if image.clean else partners
        used.update(partners)
        for same in ("name", "stem"):  # "A.png" and "a.png", or "3.jpg" and "3.png", are two images
            partners = [path for path in partners if getattr(path, same) == getattr(image.path, same)] or partners
        if len(partners) == 1:
            pairs.append(Pair(image.path, partners[0], image.parts, short))
        else:
            left_out.append(f"{image.path}: matches {len(partners) or 'no'} clean images")
    left_out += [f"{i.path}: matches no rainy image" for i in images if i.role == "clean" and i.path not in used]
    left_out += [f"{i.path}: neither its folder nor its name says clean or rainy" for i in images if not i.role]
    return pairs, left_out


def bare(stem: str) -> str:
    """A file's stem in lower case without words for clean or rainy: "norain-1x2" and "rain-1" are both "1"."""
    return re.sub(AFFIX, r"\1", stem.lower()) or stem.lower()


def drop_copies(pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """The pairs of one split without those whose files are copies of others with equal names, and a line for each."""
    kept, lines = defaultdict(list), []
    for pair in pairs:
        others = kept[pair.name.lower()]
        if copy := next((other for other in others if _same_files(pair, other)), None):
            lines.append(f"{pair.rainy}: the same pair as {copy.rainy}")
        else:
            others.append(pair)
    return [pair for others in kept.values() for pair in others], lines


def _same_files(a: Pair, b: Pair) -> bool:
    files = [(a.rainy, b.rainy), *([(a.clean, b.clean)] if a.clean and b.clean else [])]
    with contextlib.suppress(OSError):  # reported where this file is read
        return all(filecmp.cmp(*both, shallow=False) for both in files)
    return False


def make_names_unique(pairs: list[Pair]) -> None:
    """Prefix the names of one split by the folders in which they differ (Rain1200: "Rain_Heavy-1"), where needed.

    Names that are still not unique ("3" of `3.jpg` and `3.png`) get a number.
    """
    if len({pair.name.lower() for pair in pairs}) < len(pairs):  # some disks take "A" and "a" for one file
        common = set.intersection(*(set(pair.parts) for pair in pairs))
        taken = set()
        for pair in pairs:
            pair.name = "".join(f"{part}-" for part in pair.parts if part not in common) + pair.name
            name, number = pair.name, 1
            while pair.name.lower() in taken:
                number += 1
                pair.name = f"{name}-{number}"
            taken.add(pair.name.lower())


def choose_validation(pairs: list[Pair], count: int, seed: int) -> set[str]:
    """Names of at most `count` pairs, chosen by hashes of name and `seed`; pairs of one clean file stay together.

    Where all pairs of a file are more than `count`, these are chosen, if others are left.
    """
    if pairs and count >= len(pairs):
        raise BadArgument(f"--val {count} leaves none of the {len(pairs)} training pairs to train on: lower it")
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.clean or pair.rainy].append(pair.name)
    order = sorted(groups.values(), key=lambda names: sha256(os.fsencode(f"{seed}:{min(names)}")).digest())
    chosen: set[str] = set()
    for names in order:
        if len(chosen) + len(names) <= count:
            chosen.update(names)
    return chosen or set(min(order, key=len) if count and len(order) > 1 else ())


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
        raise Mismatch(f"{pair.rainy} and {pair.clean} differ in size")
    return B, O


def read_checked(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """As `read_download`. Raises Mismatch too where these are two pictures, or one without rain."""
    clean, rainy = read_download(pair)
    if likeness(clean, rainy) < OTHER_PICTURE:
        raise Mismatch(f"{pair.rainy}{f' and {pair.clean}' if pair.clean else ': its halves'} show different pictures")
    if cv2.norm(clean, rainy, cv2.NORM_L1) < NO_RAIN * clean.size:
        raise Mismatch(f"{pair.rainy} has no rain: it equals {pair.clean or 'its other half'}")
    return clean, rainy


def write_pair(target: Path, clean: np.ndarray, rainy: np.ndarray, data: bytes | None = None) -> None:
    """Write a pair, byte for byte from `data` if given, unless it exists. Raises Occupied if another picture does."""
    joined, existing = np.concatenate([clean, rainy], axis=1), None
    with contextlib.suppress(UserError):  # a damaged file is replaced
        existing = to_bgr8(read_image(target))
    if existing is None:
        write_image(target, joined) if data is None else write_bytes(target, data)
    elif not np.array_equal(existing, joined):
        raise Occupied(f"{target} is another picture: remove it or choose another folder")


def log_next_step(data_dir: Path) -> None:
    """Show the command that comes next for a data set, and how to add the splits that it lacks."""
    there = {split for split in SPLITS if list_images(data_dir / split)}
    for split in ("train", "test"):
        if split not in there and there - {"test"}:
            command = command_line("convert.py", "own", f"--{split}", "DIR", "--data_dir", str(data_dir))
            log.info(f"no {split} pairs; to add some: {command}")
    if "val" not in there and "train" in there:
        state = f"no pairs in {data_dir / 'val'}, which a training needs: make the data set anew with a larger --val"
        log.info(f"{state}, or add {data_dir / 'train'} to another data set by --more_data")
    if there >= {"train", "val"}:
        log.info(f"next: {command_line('main.py', '-a', 'train', '-p', 'sdsen', '--data_dir', str(data_dir))}")
    elif there == {"test"}:
        log.info(f"next: {command_line('main.py', '-a', 'test', '-m', 'photographs', '--data_dir', str(data_dir))}")
