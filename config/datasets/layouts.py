"""What downloads look like: the folders of each data set, and which images are clean or rainy, training or test."""

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from base.errors import BadArgument
from base.images import SUFFIXES, survey

SPLITS = ("train", "val", "test")  # the folders of a data set
BOTH_FOLDERS = "two folders of clean and of rainy images are taken by convert.py folders --clean DIR --rainy DIR"


class Layout(NamedTuple):
    """Patterns of a data set's folder names, in lower case. The files' contents tell what they hold."""

    folder: str  # matches folders of this set and of no other, in a download that holds several sets
    train_folder: str = "$^"  # matches folders that hold the training set without "train" in their names
    test_folder: str = "$^"  # matches folders that hold the test set without "test" in their names
    rainy: str = "$^"  # matches its rainy folders, where those of other sets hold a rain layer
    part: str = "$^"  # matches the folders that divide a split


RAIN, END = "(?<![a-z])(?:rain|train|test)+[-_]?", "(?![a-z0-9])"  # around a number; "part1200px" is no set's
HEAVY, LIGHT = "(train|test)_heavy$|heavy_(train|test)$|^heavy$", "(train|test)_light$|light_(train|test)$|^light$"
DENSITY = "(rain_)?(heavy|medium|light)"
SPA_FOLDER = "spa(net|[-_]?data)?|real_rain_streaks.*|real_world(_rain|_gt)?|real_test_1000"
LAYOUTS = {
    "rain800": Layout(f"(rain|zhang)[-_]?800{END}|id-?cgan"),
    "rain100h": Layout(f"(?<![0-9])100[-_]?h{END}|(train|test)_?h$|{HEAVY}", test_folder="rain[-_]?100[-_]?h"),
    "rain100l": Layout(f"(?<![0-9])100[-_]?l{END}|(train|test)_?l$|{LIGHT}", test_folder="rain[-_]?100[-_]?l"),
    "rain200h": Layout(f"(?<![0-9])200[-_]?h{END}|{HEAVY}"),
    "rain200l": Layout(f"(?<![0-9])200[-_]?l{END}|{LIGHT}"),
    "rain12": Layout(f"rain_?12{END}", test_folder=".*"),
    "rain1200": Layout(f"{RAIN}1200{END}|did-?(mdn|data)|^{DENSITY}$", part=DENSITY),
    "rain1400": Layout(f"{RAIN}(1400|12600){END}|ddn|rainy_image_dataset"),
    "rain13k": Layout(f"{RAIN}13k{END}"),  # its test sets are the others
    "test100": Layout(f"(?<![a-z])test[-_]?100{END}"),
    "test2800": Layout(f"{RAIN}2800{END}"),
    "spa": Layout(f"^({SPA_FOLDER})$", train_folder="real_world(_rain|_gt)?", part=".*"),  # .*: a folder for each scene
    "rainds_syn": Layout("rainds[-_]?syn", rainy="rainstreaks?"),
    "rainds_real": Layout("rainds[-_]?real", rainy="rainstreaks?"),
    "own": Layout("$^"),  # any other set
    "joined": Layout("$^"),  # the same
    "folders": Layout("$^"),  # any two folders
}
# Real rain has no ground truth; streak and region are the rain layers in the releases of Rain100H and Rain100L.
NO_PAIR_FOLDER = re.compile("streak|region|mask|nature|raindrop|^(test[-_ ]?)?real([-_ ]?(only|internet|images?))?$")
NO_PAIR_FILE = re.compile("rain[-_ ]?(streak|region|mask)")
CLEAN = "norain|clean|cleansample|gt|hq|ground[-_]?truth|background|target|label"
RAINY = "rainy|rain|rainysample|lq|input|in|rainy[-_]image"
FOLDER = {"clean": f"(real_world_)?({CLEAN})s?", "rainy": f"(real_world_)?({RAINY}|rainstreak)s?"}
FILE = {  # "norain-1", "001_GT", "rain-1", "001_in"
    role: rf"({words})([-_ ].*|\d.*)|.*[-_ ]({words})" for role, words in (("clean", CLEAN), ("rainy", RAINY))
}
# Whole words, as in "rain_train", "RainTrainH", "trainset" and "Test100", but not in "LightRain", "strain", "latest".
SPLIT_WORD = re.compile("(?<![a-z])(?:rain)?(train|val|test)(?:idation|id|ing|set|data|h|l)?(?![a-z])")


class Found(NamedTuple):
    path: Path
    parts: tuple[str, ...]  # names of the folders between the download and the image
    role: str  # "clean", "rainy"; "" where neither the folder nor the name tells
    clean: Path | None = None  # of a rainy image in a list of pairs: its partner


def find_images(
    set_name: str, root: Path, others: Container[Path], split: str = "", replaced: Container[str] = ()
) -> tuple[dict[str, list[Found]], list[str]]:
    """The images of one set in an unpacked download by split, and a line for each folder in which files are ignored.

    Folders that are surely of the set are preferred to others. `others` are resolved folders that are not searched, the
    splits in `replaced` are ignored. Raises BadArgument where two places of the download may hold the same split.
    """
    found: dict[tuple[str, int], list[Found]] = defaultdict(list)  # by (split, how surely of the set)
    ignored: list[str] = []
    for folder, parts in _walk(root, others, ignored):
        images, no_images = survey(folder)
        where, sure, reason = split_of(set_name, root, parts, split)
        reason = reason or ("another folder is given" if where in replaced else "")
        pairs = [path for path in images if not reason and not NO_PAIR_FILE.match(path.stem.lower())]
        found[where, sure] += [Found(path, parts, role_of(path, parts)) for path in pairs]
        ignored += left_out(dict.fromkeys(set(images) - set(pairs), reason or "by name no pair"))
        for path in (path for path in no_images if set_name == "spa" and path.suffix == ".txt"):
            where, _, reason = split_of(set_name, root, (*parts, path.stem), split)
            if not reason and where not in replaced and (listed := _read_list(path, ignored)):
                found[where, 2] += listed
                no_images[path] = ""
        ignored += left_out({path: why for path, why in no_images.items() if why and not path.is_dir()})
    result = {}
    surest = max((sure for (_, sure), images in found.items() if images), default=0)
    for (where, sure), images in found.items():
        if sure < surest:
            ignored += left_out(dict.fromkeys((i.path for i in images), f"not surely of {set_name}, unlike others"))
        elif images and not where:
            for place in (shlex.quote(str(place)) for place in _places(set_name, images)):
                ignored.append(f"{place}: training or test? Its name does not say: --train {place} or --test {place}")
        elif images:
            result[where] = images = [i for i in images if i.clean] or images  # lists tell all pairs
            known = {path for image in images for path in (image.path, image.clean)}
            unlisted = (image.path for image in found[where, sure] if image.path not in known)
            ignored += left_out(dict.fromkeys(unlisted, "in no list"))
            if len(places := _places(set_name, images)) > 1 and not split:
                either = " or ".join(map(str, places))
                choice = f"choose with --{where} DIR" if len({i.role for i in images} - {""}) != 1 else BOTH_FOLDERS
                raise BadArgument(f"the {where} pairs of {set_name} may be in {either}: {choice}")
    return result, ignored


def _walk(root: Path, others: Container[Path], ignored: list[str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each folder under `root`, links included, but `others`, and the names that lead there."""

    def report(error: OSError) -> None:
        ignored.append(f"{error.filename}: {error.strerror}")

    for name, subfolders, _ in os.walk(root, onerror=report, followlinks=True):
        subfolders[:] = sorted(sub for sub in subfolders if sub[0] != "." and sub != "__MACOSX")
        folder = Path(name)
        parts, resolved = folder.relative_to(root).parts, folder.resolve()
        is_loop = resolved in {parent.resolve() for parent in folder.parents[: len(parts)]}
        if is_loop or (resolved in others and parts):
            subfolders.clear()
            ignored += [f"{folder}: a link to a folder above it"] if is_loop else []
        else:
            yield folder, parts


def split_of(set_name: str, root: Path, parts: tuple[str, ...], split: str = "") -> tuple[str, int, str]:
    """What a folder of a download holds: (split, how surely it is of the set, why it is ignored, if it is).

    The innermost name that tells decides. The split is `split` if given, and "" where no name tells. It is of the set
    for sure (2) if no other set has such folders, maybe (1) if others have, and 0 if it is not named after any set.
    """
    layout, inner = LAYOUTS[set_name], parts[::-1]
    names = [*inner, *(() if split else [root.resolve().name])]
    exempt = re.compile(f"({layout.folder})|{layout.rainy}")
    if any(NO_PAIR_FOLDER.search(name) and not exempt.fullmatch(name) for name in map(str.lower, inner)):
        return "", 0, "by its folder no pairs"
    sets: set[str] = set()
    for name in names:  # `Rain200H/rain_data_train_Heavy`: the outer name decides between two sets
        fitting = {key for key, each in LAYOUTS.items() if re.search(each.folder, name.lower())}
        sets = (sets & fitting or sets) if sets else fitting
    if sets and set_name not in sets and layout.folder != "$^":
        return "", 0, f"of {' or '.join(sorted(sets))}"
    words = (set(SPLIT_WORD.findall(re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())) for name in names)
    splits = [*(word for found in words if len(found) == 1 for word in found), ""]
    if splits[0] not in ("", split) and (split or splits[0] == "val"):
        return "", 0, f"by its folder for {splits[0]}"
    for pattern, where in ((layout.train_folder, "train"), (layout.test_folder, "test")):
        if any(re.fullmatch(pattern, name.lower()) for name in names):
            splits.insert(-1, where)
    return split or splits[0], (2 if len(sets) == 1 else 1) if set_name in sets else 0, ""


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
    lines = path.read_text("utf-8-sig", "replace").splitlines()
    rows = [[word.removeprefix("/") for word in line.split()] for line in lines]
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
    lines = []
    for (folder, reason), names in groups.items():
        count = f"{len(names)} {'entry' if len(names) == 1 else 'entries'}"
        lines.append(f"{folder}: {count} ({reason}): {', '.join(names[:3])}{', ...' if names[3:] else ''}")
    return lines
