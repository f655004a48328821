"""What downloads look like: the folders of each data set, and which images are clean or rainy, training or test."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from base.errors import BadArgument
from base.images import SUFFIXES, survey

SPLITS = ("train", "val", "test")  # the folders of a data set


class Layout(NamedTuple):
    """How a data set's folders are called: patterns, in lower case. What its files hold is told by their contents."""

    folder: str  # matches folders of this set and of no other, in a download that holds several sets
    train_folder: str = "$^"  # matches folders that hold the training set without "train" in their names
    test_folder: str = "$^"  # matches folders that hold the test set without "test" in their names
    rainy: str = "$^"  # matches its rainy folders, where those of other sets hold a rain layer
    part: str = "$^"  # matches the folders that divide a split


SPA_FOLDER = "spa(net|[-_]?data)?|real_rain_streaks.*|real_world|real_test_1000"
LAYOUTS = {
    "rain800": Layout("(rain|zhang)_?800|id-?cgan"),
    "rain100h": Layout("100h|(train|test)_?(h|heavy)$|heavy_(train|test)$", test_folder="rain100h"),
    "rain100l": Layout("100l|(train|test)_?(l|light)$|light_(train|test)$", test_folder="rain100l"),
    "rain200h": Layout("200h|(train|test)_heavy$|heavy_(train|test)$"),
    "rain200l": Layout("200l|(train|test)_light$|light_(train|test)$"),
    "rain12": Layout("rain_?12$", test_folder=".*"),
    "rain1200": Layout("1200|did-?(mdn|data)|^rain_(heavy|medium|light)$", part="rain_(heavy|medium|light)"),
    "rain1400": Layout("1400|12600|ddn|rainy_image_dataset"),
    "rain13k": Layout("13k"),  # its test sets are the others
    "test100": Layout("test100$"),
    "test2800": Layout("2800"),
    "spa": Layout(f"^({SPA_FOLDER})$", train_folder="real_world", part=".*"),  # .*: a folder for each scene
    "rainds_syn": Layout("rainds[-_]?syn", rainy="rainstreaks?"),
    "rainds_real": Layout("rainds[-_]?real", rainy="rainstreaks?"),
    "own": Layout("$^"),  # any other set
    "joined": Layout("$^"),  # the same
    "folders": Layout("$^"),  # any two folders
}
# Real rain has no ground truth; streak and region are the rain layers in the releases of Rain100H and Rain100L.
NO_PAIR_FOLDER = re.compile("streak|region|mask|nature|raindrop|(^|[-_ ])real")
NO_PAIR_FILE = re.compile("rain[-_ ]?(streak|region|mask)")
CLEAN = "norain|clean|cleansample|gt|hq|ground[-_]?truth|background|target|label"
RAINY = "rainy|rain|rainysample|lq|input|in|rainy[-_]image"
FOLDER = {"clean": f"({CLEAN})s?", "rainy": f"({RAINY}|rainstreak)s?"}
FILE = {  # "norain-1", "001_GT", "rain-1", "001_in"
    role: rf"({words})([-_ ].*|\d.*)|.*[-_ ]({words})" for role, words in (("clean", CLEAN), ("rainy", RAINY))
}
SPLIT_WORD = re.compile("(?<!s)train|(?<!la)(?<!con)test")  # but not "strain", "latest", "contest"


class Found(NamedTuple):
    path: Path
    parts: tuple[str, ...]  # names of the folders between the download and the image
    role: str  # "clean", "rainy"; "" where neither the folder nor the name tells
    clean: Path | None = None  # of a rainy image in a list of pairs: its partner


def find_images(set_name: str, root: Path, data_dir: Path, split: str = "") -> tuple[dict[str, list[Found]], list[str]]:
    """The images of one set in an unpacked download by split, and a line for each folder in which files are ignored.

    Folders that are named after the set are preferred to others. Raises BadArgument where two places of the download
    may hold the same split.
    """
    found: dict[tuple[str, bool], list[Found]] = defaultdict(list)  # by (split, whether named after the set)
    ignored: list[str] = []
    for folder, parts in _walk(root, data_dir, ignored):
        images, others = survey(folder)
        where, named, reason = split_of(set_name, root, parts, split)
        pairs = [path for path in images if not reason and not NO_PAIR_FILE.match(path.stem.lower())]
        found[where, named] += [Found(path, parts, role_of(path, parts)) for path in pairs]
        ignored += left_out(dict.fromkeys(set(images) - set(pairs), reason or "by name no pair"))
        for path in (path for path in others if set_name == "spa" and path.suffix == ".txt"):
            where, named, reason = split_of(set_name, root, (*parts, path.stem), split)
            found[where, named] += [] if reason else _read_list(path, ignored)
        ignored += left_out({path: why for path, why in others.items() if not path.is_dir()})
    result = {}
    any_named = any(named for (_, named), images in found.items() if images)
    for (where, named), images in found.items():
        if named < any_named:
            ignored += left_out(dict.fromkeys((i.path for i in images), f"not in a folder called {set_name}"))
        elif images and not where:
            for place in _places(set_name, images):
                ignored.append(f"{place}: training or test? Its name does not say: --train {place} or --test {place}")
        elif images:
            result[where] = images = [i for i in images if i.clean] or images  # lists tell all pairs
            known = {path for image in images for path in (image.path, image.clean)}
            others = (image.path for image in found[where, named] if image.path not in known)
            ignored += left_out(dict.fromkeys(others, "in no list"))
            if len(places := _places(set_name, images)) > 1 and not split:
                either = " or ".join(map(str, places))
                raise BadArgument(f"the {where} pairs of {set_name} may be in {either}: choose with --{where} DIR")
    return result, ignored


def _walk(root: Path, data_dir: Path, ignored: list[str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each folder under `root`, links included, but `data_dir`, and the names that lead there."""
    seen = {data_dir}

    def report(error: OSError) -> None:
        ignored.append(f"{error.filename}: {error.strerror}")

    for name, subfolders, _ in os.walk(root, onerror=report, followlinks=True):
        subfolders[:] = sorted(sub for sub in subfolders if sub[0] != "." and sub != "__MACOSX")
        folder = Path(name)
        if (resolved := folder.resolve()) in seen:
            subfolders.clear()
        else:
            seen.add(resolved)
            yield folder, folder.relative_to(root).parts


def split_of(set_name: str, root: Path, parts: tuple[str, ...], split: str = "") -> tuple[str, bool, str]:
    """What a folder of a download holds: (split, whether it is named after the set, why it is ignored, if it is).

    The innermost name that tells decides. The split is `split` if given, and "" where no name tells.
    """
    layout, inner = LAYOUTS[set_name], [part.lower() for part in reversed(parts)]
    names = inner if split else [*inner, root.resolve().name.lower()]
    exempt = re.compile(f"({layout.folder})|{layout.rainy}")
    if any(NO_PAIR_FOLDER.search(name) and not exempt.fullmatch(name) for name in inner):
        return "", False, "by its folder no pairs"
    named = ([key for key, each in LAYOUTS.items() if re.search(each.folder, name)] for name in names)
    sets = next(filter(None, named), [])
    if sets and set_name not in sets and layout.folder != "$^":
        return "", False, f"of {' or '.join(sets)}"
    splits = [*(match[0] for name in names for match in SPLIT_WORD.finditer(name)), ""]
    if split and splits[0] not in ("", split):
        return "", False, f"by its folder for {splits[0]}"
    for folder, where in ((layout.train_folder, "train"), (layout.test_folder, "test")):
        if any(re.fullmatch(folder, name) for name in names):
            splits.insert(-1, where)
    return split or splits[0], set_name in sets, ""


def role_of(path: Path, parts: tuple[str, ...]) -> str:
    """Clean, rainy or "". The innermost folder that tells decides: `rain/X2/norain-1x2.png` is rainy."""
    for name, patterns in (*((part, FOLDER) for part in reversed(parts)), (path.stem, FILE)):
        for role, pattern in patterns.items():
            if re.fullmatch(pattern, name.lower()):
                return role
    return ""


def place_of(image: Found, part: str = "$^") -> tuple[str, ...]:
    """The folders of an image without those that only say clean or rainy, or match `part`."""
    neutral = "|".join([*FOLDER.values(), "x2", part])
    return tuple(name.lower() for name in image.parts if not re.fullmatch(neutral, name.lower()))


def _places(set_name: str, images: list[Found]) -> list[Path]:
    """The folders that each may hold all pairs of a split."""
    places = defaultdict(set)
    for image in images:
        places[place_of(image, LAYOUTS[set_name].part)].add(image.path.parent)
    return [Path(os.path.commonpath(folders)) for folders in places.values()]


def _read_list(path: Path, ignored: list[str]) -> list[Found]:
    """The pairs in a list of SPA-Data: a line "/RAINY /CLEAN" for each, in its folder or in one above."""
    rows = [line.replace(" /", " ").removeprefix("/").split() for line in path.read_text(errors="replace").splitlines()]
    rows = [row for row in rows if len(row) == 2 and Path(row[0]).suffix.lower() in SUFFIXES]
    there = []
    for base in (path.parent, *path.parent.parents[:2]):
        there = there or [(base, *row) for row in rows if (base / row[0]).is_file() and (base / row[1]).is_file()]
    if len(there) < len(rows):
        ignored.append(f"{path}: {len(rows) - len(there)} of its {len(rows)} pairs are missing")
    return [Found(base / rainy, Path(rainy).parent.parts, "rainy", base / clean) for base, rainy, clean in there]


def left_out(files: dict[Path, str]) -> list[str]:
    """A line for each folder and reason why files are ignored: how many, and the first of them."""
    groups = defaultdict(list)
    for path in sorted(files):
        groups[path.parent, files[path]].append(path.name)
    return [
        f"{folder}: {len(names)} entries ({reason}): {', '.join(names[:3])}{', ...' if names[3:] else ''}"
        for (folder, reason), names in groups.items()
    ]
