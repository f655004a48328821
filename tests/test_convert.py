"""The converter: every layout that the sets are distributed in, and the folder that it writes."""

import shlex
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import convert
from base.errors import BadArgument, MissingFile, Occupied, UserError
from base.images import list_images, read_image, read_pair
from datasets import pairing

HEIGHT, WIDTH = 48, 64


def background(number: int, width: int = WIDTH) -> np.ndarray:
    """A clean picture (HEIGHT, width, 3) of soft shapes, unlike for every number."""
    coarse = np.random.default_rng([number, 0]).uniform(40, 180, (6, 8, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, HEIGHT), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def rainy(number: int, rain: int = 0, width: int = WIDTH) -> np.ndarray:
    """Background `number` under rendering `rain` of bright, steep streaks."""
    generator, layer = np.random.default_rng([number, rain, 1]), np.zeros((HEIGHT, width), np.uint8)
    for _ in range(25):
        x, y = int(generator.integers(0, width)), int(generator.integers(0, HEIGHT))
        cv2.line(layer, (x, y), (x + 3, y + 12), int(generator.integers(40, 75)), 1)
    return cv2.add(background(number, width), np.repeat(layer[..., None], 3, axis=2))


def picture(kind: str) -> np.ndarray:
    """ "B3" a background, "O3.2" its rainy image with rendering 2, "S0" something else; "B3|O3" is joined."""
    if "|" in kind:
        return np.hstack([picture(part) for part in kind.split("|")])
    number, _, rain = kind[1:].partition(".")
    return {"B": background(int(number)), "O": rainy(int(number), int(rain or 0)), "S": background(900)}[kind[0]]


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """Write {relative path: kind of `picture`} under `root`."""
    for name, kind in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / name), picture(kind), [cv2.IMWRITE_JPEG_QUALITY, 97])
    return root


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def report(out: Path) -> dict[str, list[str]]:
    """The lines of convert_report.txt by section, each section as long as its heading says."""
    sections = {}
    for section in (out / "convert_report.txt").read_text().split("\n\n")[1:]:
        heading, *lines = section.strip("\n").split("\n")
        title, _, count = heading.rpartition(": ")
        assert len(lines) == int(count)
        sections[title] = lines
    return sections


def names_of(out: Path, *splits: str) -> set[str]:
    return {path.name for split in splits if (out / split).is_dir() for path in list_images(out / split)}


def numbered(pattern: str, kind: str, count: int = 4, start: int = 0) -> dict[str, str]:
    return {pattern.format(k + 1): kind.format(start + k) for k in range(count)}


OLD_RAIN100 = {
    **numbered("rain_data_train_Heavy/rain/X2/norain-{}x2.png", "O{}"),
    **numbered("rain_data_train_Heavy/norain/norain-{}.png", "B{}"),
    **numbered("rain_data_train_Heavy/rainstreak/norain-{}.png", "S{}"),
    **numbered("rain_data_train_Heavy/rainregion/norain-{}.png", "S{}"),
    **numbered("rain_data_test_Heavy/rain/X2/norain-00{}x2.png", "O{}", 2, 50),
    **numbered("rain_data_test_Heavy/norain/norain-00{}.png", "B{}", 2, 50),
}
NEW_RAIN100 = {
    **numbered("rain_data_train_Light/rain/norain-{}.png", "O{}"),
    **numbered("rain_data_train_Light/norain/norain-{}.png", "B{}"),
    **numbered("rain_data_test_Light/rain/norain-00{}.png", "O{}", 2, 50),
    **numbered("rain_data_test_Light/norain/norain-00{}.png", "B{}", 2, 50),
}
PRENET = {  # all sets in one tree: only the requested one may be taken
    **numbered("train/RainTrainH/rain-{}.png", "O{}"),
    **numbered("train/RainTrainH/norain-{}.png", "B{}"),
    **numbered("train/RainTrainH/rainstreak-{}.png", "S{}"),
    **numbered("train/RainTrainL/rain-{}.png", "S{}"),
    **numbered("test/Rain100H/norain-00{}.png", "B{}", 2, 50),
    **numbered("test/Rain100H/rainy/rain-00{}.png", "O{}", 2, 50),
    **numbered("test/Rain100L/norain-00{}.png", "S{}", 2),
    **numbered("test/Rain12/norain-00{}.png", "S{}", 2),
}
ONE_FOLDER = {
    **numbered("RainTrainL/rain-{}.png", "O{}"),
    **numbered("RainTrainL/norain-{}.png", "B{}"),
    **numbered("Rain100L/rain-00{}.png", "O{}", 2, 50),
    **numbered("Rain100L/norain-00{}.png", "B{}", 2, 50),
}
RAIN1400 = {
    f"rainy_image_dataset/{split}/{name}": kind
    for split, start, count in (("training", 0, 4), ("testing", 50, 2))
    for k in range(count)
    for name, kind in {
        f"ground_truth/{k + 1}.png": f"B{start + k}",
        **{f"rainy_image/{k + 1}_{j}.png": f"O{start + k}.{j}" for j in (1, 2, 3)},
    }.items()
}
RAIN1200 = {
    **numbered("DID-MDN-training/Rain_Heavy/train2018new/{}.png", "O{0}.1|B{0}", 2),
    **numbered("DID-MDN-training/Rain_Medium/train2018new/{}.png", "O{0}.2|B{0}", 2, 10),
    **numbered("DID-MDN-training/Rain_Light/train2018new/{}.png", "O{0}.3|B{0}", 2, 20),
    **numbered("DID-MDN-test/{}.png", "O{0}|B{0}", 2, 50),
}
LEVELS = {
    f"Rain_{level}-{k + 1}": f"{start + k}.{rain}"
    for level, start, rain in (("Heavy", 0, 1), ("Medium", 10, 2), ("Light", 20, 3))
    for k in range(2)
}
RESTORMER = {  # a training set of all sets, and test sets with equal names
    **numbered("train/Rain13K/input/{}.jpg", "O{}"),
    **numbered("train/Rain13K/target/{}.jpg", "B{}"),
    **{
        name: kind
        for start, folder in enumerate(("Test100", "Rain100H", "Rain100L", "Test2800", "Test1200"), 5)
        for name, kind in {
            **numbered(f"test/{folder}/input/{{}}.png", "O{}", 2, 10 * start),
            **numbered(f"test/{folder}/target/{{}}.png", "B{}", 2, 10 * start),
        }.items()
    },
}
RAIN200 = {  # both sets in one folder; H as JORDER-E's, L as in later papers
    **numbered("Rain200H/train/rain/X2/norain-{}x2.png", "O{}"),
    **numbered("Rain200H/train/norain/norain-{}.png", "B{}"),
    **numbered("Rain200H/test/rain/X2/norain-{}x2.png", "O{}", 2, 50),
    **numbered("Rain200H/test/norain/norain-{}.png", "B{}", 2, 50),
    **numbered("Rain200L/train/input/{}.png", "O{}", 4, 20),
    **numbered("Rain200L/train/target/{}.png", "B{}", 4, 20),
    **numbered("Rain200L/test/input/{}.png", "O{}", 2, 60),
    **numbered("Rain200L/test/target/{}.png", "B{}", 2, 60),
}
SPA = {
    **{f"Training/real_world/{k + 1}/rain/{k + 1}_{j}.png": f"O{k}.{j}" for k in range(2) for j in (1, 2)},
    **{f"Training/real_world/{k + 1}/gt/{k + 1}.png": f"B{k}" for k in range(2)},
    "Training/real_world/9/rain/9.png": "S0",  # in no list
    **numbered("Testing/real_test_1000/rain/00{}.png", "O{}", 2, 50),
    **numbered("Testing/real_test_1000/gt/00{}gt.png", "B{}", 2, 50),
    "Testing/Real_Internet/1.jpg": "S0",
}
SPA_LISTS = {
    "Training/real_world.txt": "".join(
        f"/real_world/{k}/rain/{k}_{j}.png /real_world/{k}/gt/{k}.png\n" for k in (1, 2) for j in (1, 2)
    ),
    "Testing/real_test_1000.txt": "/real_test_1000/rain/001.png /real_test_1000/gt/001gt.png\n"
    "/real_test_1000/rain/002.png /real_test_1000/gt/002gt.png\n",
}
RAINDS = {
    **numbered("RainDS_syn/train/gt/norain-{}.png", "B{}"),
    **numbered("RainDS_syn/train/rainstreak/rain-{}.png", "O{}"),
    **numbered("RainDS_syn/train/raindrop/rd-{}.png", "S{}"),
    **numbered("RainDS_syn/train/rainstreak_raindrop/rd-rain-{}.png", "S{}"),
    **numbered("RainDS_syn/test/gt/pie-norain-{}.png", "B{}", 2, 50),
    **numbered("RainDS_syn/test/rainstreak/pie-rain-{}.png", "O{}", 2, 50),
    **{
        f"RainDS_real/{split}_set/{folder}/{k + 1}.png": f"{kind}{start + k}"
        for split, count, start in (("train", 4, 20), ("test", 2, 60))
        for folder, kind in (("gt", "B"), ("rainstreak", "O"), ("raindrop", "S"), ("rainstreak_raindrop", "S"))
        for k in range(count)
    },
}
FOUR, TWO = {str(k + 1): str(k) for k in range(4)}, {f"00{k + 1}": str(50 + k) for k in range(2)}
RENDERED = {f"{k + 1}_{j}": f"{k}.{j}" for k in range(4) for j in (1, 2, 3)}
RENDERED_TEST = {f"{k + 1}_{j}": f"{50 + k}.{j}" for k in range(2) for j in (1, 2, 3)}
LAYOUTS = {
    "rain800": (
        "rain800",
        {
            **numbered("rain/training/{}.png", "B{0}|O{0}"),
            **numbered("rain/test_syn/{}.png", "B{0}|O{0}", 2, 50),
            "rain/test_nature/1.png": "S0",
            "__MACOSX/rain/training/._1.png": "S0",
        },
        FOUR,
        {"1": "50", "2": "51"},
    ),
    "rain100h, first release": ("rain100h", OLD_RAIN100, FOUR, TWO),
    "rain100l, second release": ("rain100l", NEW_RAIN100, FOUR, TWO),
    "rain100h, PReNet's tree": ("rain100h", PRENET, FOUR, TWO),
    "rain100l, one folder": ("rain100l", ONE_FOLDER, FOUR, TWO),
    "rain12, in and GT": (
        "rain12",
        {
            **numbered("input/00{}_in.png", "O{}", 2, 50),
            **numbered("groundtruth/00{}_GT.png", "B{}", 2, 50),
        },
        {},
        TWO,
    ),
    "rain12, one folder": (
        "rain12",
        {
            **numbered("00{}_in.png", "O{}", 2, 50),
            **numbered("00{}_GT.png", "B{}", 2, 50),
        },
        {},
        TWO,
    ),
    "rain12, PReNet's": (
        "rain12",
        {
            **numbered("Rain12/rainy/rain-00{}.png", "O{}", 2, 50),
            **numbered("Rain12/norain-00{}.png", "B{}", 2, 50),
        },
        {},
        TWO,
    ),
    "rain1200": ("rain1200", RAIN1200, LEVELS, {"1": "50", "2": "51"}),
    "rain1400": ("rain1400", RAIN1400, RENDERED, RENDERED_TEST),
    "rain100h in Restormer's tree": ("rain100h", RESTORMER, {}, {"1": "60", "2": "61"}),
    "test100 in Restormer's tree": ("test100", RESTORMER, {}, {"1": "50", "2": "51"}),
    "test2800 in Restormer's tree": ("test2800", RESTORMER, {}, {"1": "80", "2": "81"}),
    "rain1200 in Restormer's tree": ("rain1200", RESTORMER, {}, {"1": "90", "2": "91"}),
    "rain200h, JORDER-E's": ("rain200h", RAIN200, FOUR, {"1": "50", "2": "51"}),
    "rain200l": ("rain200l", RAIN200, {str(k + 1): str(20 + k) for k in range(4)}, {"1": "60", "2": "61"}),
    "rain200h, the release's name": ("rain200h", OLD_RAIN100, FOUR, TWO),
    "rainds_syn": ("rainds_syn", RAINDS, FOUR, {"pie-1": "50", "pie-2": "51"}),
    "rainds_real": ("rainds_real", RAINDS, {str(k + 1): str(20 + k) for k in range(4)}, {"1": "60", "2": "61"}),
    "rain800, separate files": (
        "rain800",
        {
            **numbered("train/rain/{}.png", "O{}"),
            **numbered("train/norain/{}.png", "B{}"),
            **numbered("test/rain/{}.png", "O{}", 2, 50),
            **numbered("test/norain/{}.png", "B{}", 2, 50),
        },
        FOUR,
        {"1": "50", "2": "51"},
    ),
    "rain100h, joined files": (
        "rain100h",
        {**numbered("Rain100H/train/{}.png", "B{0}|O{0}"), **numbered("Rain100H/test/{}.png", "O{0}|B{0}", 2, 50)},
        FOUR,
        {"1": "50", "2": "51"},
    ),
    "own, one kind joined": (
        "own",
        {
            **numbered("train/{}.png", "B{0}|O{0}"),
            **numbered("test/lq/{}.png", "O{}", 2, 50),
            **numbered("test/GT/{}.png", "B{}", 2, 50),
        },
        FOUR,
        {"1": "50", "2": "51"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_exact_pairs(tmp_path, layout):
    set_name, files, training, test = LAYOUTS[layout]
    source, out = lay_out(tmp_path / "download", files), tmp_path / "out"
    val = 0 if not training else 1 if set_name != "rain1400" else 3
    assert run(set_name, source, "--data_dir", out, "--val", val) == 0
    ignored = "\n".join(report(out)["ignored"])
    not_paired = {"rainstreak"} if set_name[:6] != "rainds" else {"raindrop", "rainstreak_raindrop"}
    for folder in ({"rainregion", "test_nature", "RainTrainL"} | not_paired) & {p.name for p in source.rglob("*")}:
        assert f"/{folder}: " in ignored or set_name == "rain100l"
    assert ("RainTrainH" in ignored) == any("/rainstreak-" in name for name in files)
    assert len(names_of(out, "val")) == val
    for splits, expected in ((("train", "val"), training), (("test",), test)):
        written = {path.stem: path for split in splits if (out / split).is_dir() for path in list_images(out / split)}
        assert set(written) == set(expected)
        for stem, which in expected.items():
            clean, rain = read_pair(written[stem])
            np.testing.assert_array_equal(clean, picture("B" + which.partition(".")[0]))
            np.testing.assert_array_equal(rain, picture("O" + which))


def same_pictures(written: Path, expected: str) -> bool:
    """Whether a file shows `expected`, kinds of `picture`, apart from what JPEG changes."""
    return np.abs(read_image(written).astype(int) - picture(expected)).mean() < 3


def test_rain13k_takes_the_training_set_and_the_test_set_that_is_asked_for(tmp_path):
    source, out = lay_out(tmp_path / "Datasets", RESTORMER), tmp_path / "out"
    assert run("rain13k", source, "--data_dir", out, "--val", 1) == 0
    assert names_of(out, "train", "val") == {f"{k}.png" for k in (1, 2, 3, 4)}
    assert names_of(out, "test") == set()
    ignored = "\n".join(report(out)["ignored"])
    assert all(f"{name}/input: 2 " in ignored for name in ("Test100", "Rain100H", "Rain100L", "Test2800", "Test1200"))
    run("rain13k", source, "--test", source / "test/Rain100L", "--data_dir", out, "--val", 1)
    for k in (1, 2):
        assert same_pictures(out / f"test/{k}.png", f"B{69 + k}|O{69 + k}")


def test_lists_of_spa_data_tell_the_pairs(tmp_path):
    source, out = lay_out(tmp_path / "SPA-Data", SPA), tmp_path / "out"
    for name, text in SPA_LISTS.items():
        (source / name).write_text(text)
    with open(source / "Training/real_world.txt", "a") as file:
        file.write("/real_world/8/rain/8.png /real_world/8/gt/8.png\n")
    assert run("spa", source, "--data_dir", out, "--val", 2) == 0
    assert names_of(out, "train", "val") == {f"{k}_{j}.png" for k in (1, 2) for j in (1, 2)}
    assert len({name[0] for name in names_of(out, "val")}) == 1  # both rainy images of a scene
    assert same_pictures(out / "test/002.png", "B51|O51")
    ignored = "\n".join(report(out)["ignored"])
    assert "real_world/9/rain: 1 " in ignored
    assert "Real_Internet: 1 " in ignored
    assert "real_world.txt: 1 " in ignored


def test_spa_data_without_its_lists_is_paired_by_name(tmp_path):
    source = lay_out(tmp_path / "SPA-Data", {name: kind for name, kind in SPA.items() if name.startswith("Testing")})
    assert run("spa", source, "--data_dir", tmp_path / "out") == 0
    assert names_of(tmp_path / "out", "test") == {"001.png", "002.png"}
    assert same_pictures(tmp_path / "out/test/002.png", "B51|O51")


@pytest.mark.parametrize("set_name", ["rain800", "rain1200", "joined", "own"])
def test_separate_files_are_not_cut_in_halves(tmp_path, set_name):
    lay_out(tmp_path, {**numbered("x/rain/{}.png", "O{}"), **numbered("x/norain/{}.png", "B{}")})
    assert run(set_name, "--test", tmp_path / "x", "--data_dir", tmp_path / "out") == 0
    assert all(same_pictures(tmp_path / f"out/test/{k + 1}.png", f"B{k}|O{k}") for k in range(4))


def test_single_pictures_make_no_pairs(tmp_path):
    """Neither a folder of them nor one among joined pairs; pictures of one name that differ are no pair either."""
    lay_out(tmp_path, {**numbered("single/train/{}.png", "B{}"), **numbered("mixed/test/{}.png", "B{0}|O{0}")})
    lay_out(tmp_path, {"mixed/test/9.png": "B9", **numbered("named/test/rain/{}.png", "O{}")})
    lay_out(tmp_path, {**numbered("named/test/norain/{}.png", "B{}"), "named/test/norain/4.png": "B77"})
    with pytest.raises(MissingFile):
        run("own", tmp_path / "single", "--data_dir", tmp_path / "out")
    for name, left_out, count in (("mixed", "9.png", 4), ("named", "4.png", 3)):
        assert run("own", tmp_path / name, "--data_dir", tmp_path / f"{name}_out") == 1
        assert len(names_of(tmp_path / f"{name}_out", "test")) == count
        assert [left_out in line for line in report(tmp_path / f"{name}_out")["left out"]] == [True]


def test_what_can_be_told_by_no_name_is_asked_for(tmp_path):
    plain = lay_out(tmp_path / "mine", {**numbered("rain/{}.png", "O{}"), **numbered("norain/{}.png", "B{}")})
    two = {**numbered("{{}}/test/in/{}.png", "O{}"), **numbered("{{}}/test/gt/{}.png", "B{}")}
    lay_out(tmp_path / "two", {name.format(part): kind for name, kind in two.items() for part in ("a", "b")})
    with pytest.raises(MissingFile, match=f"--train {plain} or --test {plain}"):
        run("own", plain, "--data_dir", tmp_path / "out")
    with pytest.raises(BadArgument, match=r"two/a/test or .*two/b/test.*--test"):
        run("own", tmp_path / "two", "--data_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run("own", "--train", plain, "--test", tmp_path / "two/a", "--data_dir", tmp_path / "out") == 0
    counts = [len(names_of(tmp_path / "out", split)) for split in ("train", "val", "test")]
    assert counts == [3, 1, 4]  # a tenth of few pairs validates, but at least one


def test_training_folder_that_holds_the_test_set_too_gives_the_training_pairs(tmp_path, rain800):
    run("rain800", "--train", rain800, "--data_dir", tmp_path / "out", "--val", 3)
    assert names_of(tmp_path / "out", "train", "val") == {f"{k}.jpg" for k in range(1, 11)}
    assert [str(rain800 / "test") in line for line in report(tmp_path / "out")["ignored"]] == [True]


def test_folders_named_after_the_set_come_before_others(tmp_path):
    named = {name: kind for name, kind in ONE_FOLDER.items() if name.startswith("Rain100L")}
    source = lay_out(tmp_path / "d", {**named, **numbered("other/test/rain/{}.png", "S{}")})
    lay_out(source, numbered("other/test/norain/{}.png", "S{}"))
    assert run("rain100l", source, "--data_dir", tmp_path / "out") == 0
    assert names_of(tmp_path / "out", "test") == {"001.png", "002.png"}
    assert sum("other/test" in line and ": 4 " in line for line in report(tmp_path / "out")["ignored"]) == 2


def test_one_split_of_the_source_can_be_replaced(tmp_path, rain800):
    """Rain800's 100 test pairs, or the 98 that MSPFN and later papers call Test100."""
    lay_out(tmp_path / "Test100", {**numbered("input/{}.png", "O{}", 2, 51), **numbered("target/{}.png", "B{}", 2, 51)})
    run("rain800", rain800, "--data_dir", tmp_path / "hundred", "--val", 3)
    run("rain800", rain800, "--test", tmp_path / "Test100", "--data_dir", tmp_path / "fewer", "--val", 3)
    assert len(names_of(tmp_path / "hundred", "test")) == 3
    assert names_of(tmp_path / "fewer", "test") == {"1.png", "2.png"}
    assert same_pictures(tmp_path / "fewer/test/2.png", "B52|O52")
    assert tree(tmp_path / "hundred/train") == tree(tmp_path / "fewer/train")


def test_training_pairs_on_test_backgrounds_are_dropped_on_request(tmp_path):
    """Rain100H: 1800 training pairs, or the 1254 whose backgrounds the test set does not show."""
    files = {
        **numbered("Rain100H/train/rain/rain-{}.png", "O{}", 6),
        **numbered("Rain100H/train/norain/norain-{}.png", "B{}", 6),
    }
    files |= {
        **numbered("Rain100H/test/rain/rain-{}.png", "O{}.5", 2, 4),
        **numbered("Rain100H/test/norain/norain-{}.png", "B{}", 2, 4),
    }
    source = lay_out(tmp_path / "d", files)
    run("rain100h", source, "--data_dir", tmp_path / "all", "--val", 1)
    assert len(names_of(tmp_path / "all", "train", "val")) == 6
    run("rain100h", source, "--data_dir", tmp_path / "fewer", "--val", 1, "--drop_shared")
    assert names_of(tmp_path / "fewer", "train", "val") == {f"{k}.png" for k in (1, 2, 3, 4)}
    assert [len(lines) for title, lines in report(tmp_path / "fewer").items() if "dropped" in title] == [2]
    train = source / "Rain100H/train"
    run("rain100h", "--test", source / "Rain100H/test", "--data_dir", tmp_path / "later")
    run("rain100h", "--train", train, "--data_dir", tmp_path / "later", "--val", 1, "--drop_shared")
    assert tree(tmp_path / "later/train") == tree(tmp_path / "fewer/train")
    with pytest.raises(BadArgument):
        run("rain100h", "--train", train, "--data_dir", tmp_path / "none", "--drop_shared")


def test_nothing_in_a_folder_is_dropped_without_a_word(tmp_path, rain800):
    (rain800 / "train/info.mat").write_bytes(b"MATLAB")
    (rain800 / "train/0.jpg").symlink_to(rain800 / "gone.jpg")
    (rain800 / "train/.DS_Store").write_bytes(b"x")
    (rain800 / "deep.tar").write_bytes(b"x")
    for name, copied in (("2.jpg", "2.JFIF"), ("3.jpg", "3"), ("4.jpg", "4.jpe")):
        (rain800 / "train" / name).rename(rain800 / "train" / copied)
    lay_out(tmp_path / "elsewhere", {"77.png": "B77|O77"})
    (rain800 / "train/more").symlink_to(tmp_path / "elsewhere")  # a folder of images
    (rain800 / "train/loop").symlink_to(rain800 / "train")
    with pytest.raises(BadArgument):  # two places of the training set
        run("rain800", rain800, "--data_dir", tmp_path / "out")
    assert run("rain800", "--train", rain800, "--data_dir", tmp_path / "out", "--val", 3) == 0
    expected = {"77.png", "2.png", "3.png", "4.png", *(f"{k}.jpg" for k in (1, *range(5, 11)))}
    assert names_of(tmp_path / "out", "train", "val") == expected
    ignored = "\n".join(report(tmp_path / "out")["ignored"])
    assert all(name in ignored for name in ("info.mat", "0.jpg", "deep.tar"))
    assert "DS_Store" not in ignored
    lay_out(tmp_path, {"c/1.png": "B1", "r/1.png": "O1", "r/deep/2.png": "O2"})
    run("folders", "--clean", tmp_path / "c", "--rainy", tmp_path / "r", "--data_dir", tmp_path / "f", "--val", 0)
    assert ["deep" in line for line in report(tmp_path / "f")["ignored"]] == [True]


@pytest.fixture
def rain800(tmp_path) -> Path:
    """Ten training pairs as JPEG, clean on the left, and three test pairs with the clean side on the right."""
    return lay_out(
        tmp_path / "rain800",
        {
            **numbered("train/{}.jpg", "B{0}|O{0}", 10),
            **numbered("test/{}.jpg", "O{0}|B{0}", 3, 50),
        },
    )


def test_jpeg_with_the_clean_side_left_is_copied_and_a_swapped_one_is_swapped_without_loss(tmp_path, rain800):
    out = tmp_path / "out"
    run("rain800", rain800, "--data_dir", out, "--val", 3)
    assert names_of(out, "train", "val") == {f"{k}.jpg" for k in range(1, 11)}
    for split in ("train", "val"):
        for path in list_images(out / split):
            assert path.read_bytes() == (rain800 / "train" / path.name).read_bytes()
    for k in (1, 2, 3):
        source = read_image(rain800 / "test" / f"{k}.jpg")
        np.testing.assert_array_equal(read_image(out / "test" / f"{k}.png"), np.roll(source, WIDTH, axis=1))


def test_side_that_is_given_is_not_looked_for(tmp_path, rain800):
    run("rain800", "--test", rain800 / "test", "--data_dir", tmp_path / "out", "--clean_side", "left")
    assert (tmp_path / "out/test/1.jpg").read_bytes() == (rain800 / "test/1.jpg").read_bytes()


def test_split_depends_on_names_and_seed_alone(tmp_path, rain800):
    chosen = {}
    for label, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("rain800", rain800, "--data_dir", tmp_path / label, "--val", 4, "--seed", seed)
        chosen[label] = names_of(tmp_path / label, "val")
        assert len(chosen[label]) == 4
        assert not chosen[label] & names_of(tmp_path / label, "train")
    assert chosen["a"] == chosen["b"] != chosen["c"]


def test_validation_keeps_the_renderings_of_a_background_together(tmp_path):
    source = lay_out(tmp_path / "download", RAIN1400)
    run("rain1400", source, "--data_dir", tmp_path / "out", "--val", 7)
    groups = {split: {name.split("_")[0] for name in names_of(tmp_path / "out", split)} for split in ("train", "val")}
    assert len(names_of(tmp_path / "out", "val")) == 6  # two whole backgrounds of three
    assert not groups["train"] & groups["val"]


def test_any_two_folders(tmp_path):
    lay_out(tmp_path / "c", {"a.png": "B1", "b.png": "B2", "clean-7.png": "B3", "img_1_gt.png": "B4"})
    lay_out(
        tmp_path / "r",
        {
            "a.png": "O1",
            "b_1.png": "O2.1",
            "b_2.png": "O2.2",
            "rain-7.png": "O3",
            "img_1_in.png": "O4",
            "z.png": "O9",
        },
    )
    options = ("folders", "--clean", tmp_path / "c", "--rainy", tmp_path / "r", "--data_dir", tmp_path / "out")
    assert run(*options, "--split", "test") == 1
    stems = {"a": "1", "b_1": "2.1", "b_2": "2.2", "7": "3", "img_1": "4"}
    assert names_of(tmp_path / "out", "test") == {f"{stem}.png" for stem in stems}
    for stem, which in stems.items():
        np.testing.assert_array_equal(read_pair(tmp_path / "out/test" / f"{stem}.png")[1], picture("O" + which))
    (line,) = report(tmp_path / "out")["left out"]
    assert str(tmp_path / "r/z.png") in line


def test_what_is_left_out_is_named_and_the_rest_converted(tmp_path):
    files = {**NEW_RAIN100, **numbered("rain_data_train_Light/rain/norain-9{}.png", "O{}", 25)}
    source, out = lay_out(tmp_path / "download", files), tmp_path / "out"
    training = source / "rain_data_train_Light"
    lay_out(training, {"norain/norain-70.png": "B70"})
    cv2.imwrite(str(training / "norain/norain-1.png"), background(0, WIDTH + 2))
    damaged = training / "rain/norain-2.png"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    assert run("rain100l", source, "--data_dir", out, "--val", 1) == 1
    assert names_of(out, "train", "val") == {"3.png", "4.png"}
    left_out = report(out)["left out"]
    expected = ["norain/norain-1.png", "rain/norain-2.png", "norain/norain-70.png"]
    expected += [f"rain/norain-9{k}.png" for k in range(1, 26)]
    assert len(left_out) == len(expected) == 28
    assert all(any(str(training / name) in line for line in left_out) for name in expected)


def test_two_clean_images_for_one_rainy_are_not_chosen_between(tmp_path):
    lay_out(tmp_path / "c", {"1.png": "B1", "norain-1.png": "B2", "5.png": "B5"})
    lay_out(tmp_path / "r", {"rain-1.png": "O1", "5.png": "O5"})
    run("folders", "--clean", tmp_path / "c", "--rainy", tmp_path / "r", "--data_dir", tmp_path / "o", "--val", 0)
    assert names_of(tmp_path / "o", "train") == {"5.png"}
    assert {Path(line.strip().partition(":")[0]).name for line in report(tmp_path / "o")["left out"]} == {"rain-1.png"}


def test_odd_width_and_cut_off_jpeg_are_left_out(tmp_path, rain800):
    cv2.imwrite(str(rain800 / "train/1.jpg"), np.hstack([background(0), rainy(0)])[:, :-1])
    (rain800 / "train/2.jpg").write_bytes((rain800 / "train/2.jpg").read_bytes()[:-400])
    assert run("rain800", rain800, "--data_dir", tmp_path / "out", "--val", 3) == 1
    assert names_of(tmp_path / "out", "train", "val") == {f"{k}.jpg" for k in range(3, 11)}
    assert len(report(tmp_path / "out")["left out"]) == 2


def test_swapped_pair_and_shared_backgrounds_are_warned_of(tmp_path, rain800):
    lay_out(rain800, {"train/4.jpg": "O3|B3", "test/2.jpg": "O6.5|B6", "train/9.jpg": "B0|O0.3"})
    out = tmp_path / "out"
    assert run("rain800", rain800, "--data_dir", out, "--val", 3) == 0
    split = {name: split for split in ("train", "val") for name in names_of(out, split)}
    swapped, shared = report(out)["warnings"]
    assert f"{split['4.jpg']}/4.jpg" in swapped
    assert "test/2.png" in shared
    assert f"{split['7.jpg']}/7.jpg" in shared
    assert len(report(out)[convert.SHARED]) == (split["1.jpg"] != split["9.jpg"])


def test_test_set_that_is_converted_later_is_held_against_training(tmp_path):
    lay_out(tmp_path, {**numbered("c/{}.png", "B{}"), **numbered("r/{}.png", "O{}")})
    lay_out(tmp_path, {**numbered("tc/t{}.png", "B{}", 2, 3), **numbered("tr/t{}.png", "O{}.7", 2, 3)})
    out = tmp_path / "out"
    run("folders", "--clean", tmp_path / "c", "--rainy", tmp_path / "r", "--data_dir", out, "--val", 0)
    run("folders", "--clean", tmp_path / "tc", "--rainy", tmp_path / "tr", "--data_dir", out, "--split", "test")
    (warning,) = report(out)["warnings"]
    assert "test/t1.png" in warning
    assert "train/4.png" in warning
    assert names_of(out, "train") == {f"{k}.png" for k in range(1, 5)}


def test_second_run_changes_nothing_and_mends_a_damaged_file(tmp_path, rain800):
    out = tmp_path / "out"
    run("rain800", rain800, "--data_dir", out, "--val", 3)
    before, times = tree(out), {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    run("rain800", rain800, "--data_dir", out, "--val", 3)
    assert tree(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*")} == times
    damaged = out / "test/1.png"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    run("rain800", rain800, "--data_dir", out, "--val", 3)
    assert tree(out) == before


@pytest.mark.parametrize("failing", ["write_bytes", "write_image"])
def test_interrupted_run_is_completed_to_the_unbroken_result(tmp_path, rain800, monkeypatch, failing):
    run("rain800", rain800, "--data_dir", tmp_path / "unbroken", "--val", 3)
    write, calls = getattr(pairing, failing), []

    def interrupted(path: Path, data: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(pairing, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("rain800", rain800, "--data_dir", tmp_path / "out", "--val", 3)
    monkeypatch.undo()
    assert 0 < len(names_of(tmp_path / "out", "train", "val", "test")) < 13
    run("rain800", rain800, "--data_dir", tmp_path / "out", "--val", 3)
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


def test_data_dir_in_the_download_is_not_searched(rain800):
    for _ in range(2):
        assert run("rain800", rain800, "--data_dir", rain800 / "converted", "--val", 3) == 0
    assert len(names_of(rain800 / "converted", "train", "val", "test")) == 13


def test_sets_are_not_mixed(tmp_path, rain800):
    out = tmp_path / "out"
    run("rain800", rain800, "--data_dir", out, "--val", 3)
    other = lay_out(tmp_path / "other", numbered("train/x{}.png", "B{0}|O{0}"))
    same_names = lay_out(tmp_path / "names", numbered("train/{}.jpg", "B{0}|O{0}", 10, 70))
    before = tree(out)
    for options in (
        (rain800, "--val", 2),
        (rain800, "--val", 3, "--seed", 1),
        (rain800, "--val", 3, "--clean_side", "right"),
        (other, "--val", 3),
        (same_names, "--val", 3),
    ):
        with pytest.raises(Occupied):
            run("rain800", *options, "--data_dir", out)
        assert tree(out) == before


def test_refusals(tmp_path, rain800, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, {"nothing/readme/a.png": "S0", "lonely/train/norain-1.png": "B1", "x/train/1.jpg": "B0|O0"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "x/train/1.jpg").write_bytes(b"no image")
    (tmp_path / "set.zip").write_bytes(b"zip")
    for error, *arguments in (
        (MissingFile, "rain800", "missing"),
        (MissingFile, "rain800", "set.zip"),
        (MissingFile, "rain800", "empty"),
        (MissingFile, "rain800", "nothing"),
        (MissingFile, "rain100h", "lonely"),
        (MissingFile, "rain800", "x", "--val", 0),
        (BadArgument, "rain800", "rain800", "--val", 10),
        (BadArgument, "rain800", "rain800", "--val", -1),
        (BadArgument, "rain800", "out"),
        (BadArgument, "folders", "--clean", "empty"),
        (UserError, "rain900", "rain800"),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(error):
            run(*arguments, "--data_dir", "out")
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("options", "action"), [((), "train"), (("--val", 0), ""), (("--val", 0, "no test"), "")])
def test_next_command_is_one_that_these_pairs_allow(tmp_path, rain800, monkeypatch, capsys, options, action):
    monkeypatch.chdir(tmp_path)
    source = [rain800] if "no test" not in options else ["--train", rain800 / "train"]
    run("rain800", *source, "--data_dir", "my set", *(word for word in options if word != "no test"))
    words = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
    if action:
        assert (tmp_path / words[1]).resolve() == convert.ROOT / "config/main.py"
        assert words[2:4] == ["-a", action]
        assert Path(words[-1]).resolve() == tmp_path / "my set"
    else:
        assert "main.py" not in " ".join(words)


def test_paths_start_at_the_working_directory(tmp_path, rain800, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("rain800", rain800.name, "--val", 3, "--data_dir", "out") == 0
    assert [len(names_of(tmp_path / "out", split)) for split in ("train", "val", "test")] == [7, 3, 3]
    assert str(tmp_path / "out") in capsys.readouterr().out  # the next command


def test_progress_is_logged_where_no_bar_is_shown(tmp_path, rain800, monkeypatch):
    lines = []
    monkeypatch.setattr(convert.Progress, "EVERY", 0)
    monkeypatch.setattr(convert.log, "info", lines.append)
    run("rain800", rain800, "--data_dir", tmp_path / "out", "--val", 3)
    assert [f"{k} of 13 pairs" in "\n".join(lines) for k in (1, 12)] == [True, True]


def separate(folder: str, count: int = 4, start: int = 0) -> dict[str, str]:
    return {
        **numbered(f"{folder}/input/{{}}.png", "O{}", count, start),
        **numbered(f"{folder}/target/{{}}.png", "B{}", count, start),
    }


def test_a_validation_folder_is_neither_training_nor_test(tmp_path):
    lay_out(tmp_path / "d", {**separate("train"), **separate("val", 2, 20), **separate("validation", 2, 30)})
    for number, words in enumerate(([tmp_path / "d"], ["--train", tmp_path / "d"])):
        out = tmp_path / f"out{number}"
        assert run("own", *words, "--data_dir", out, "--val", 1) == 0
        assert len(names_of(out, "train", "val")) == 4
        assert names_of(out, "test") == set()
        assert sum("/val" in line for line in report(out)["ignored"]) == 4
    with pytest.raises(MissingFile):
        run("own", "--test", tmp_path / "d", "--data_dir", tmp_path / "none")


def test_rain_in_a_name_does_not_mean_training(tmp_path):
    lay_out(tmp_path / "d", {**separate("test/LightRain", 2, 50), **separate("train/HeavyRain")})
    run("own", tmp_path / "d", "--data_dir", tmp_path / "out")
    assert same_pictures(tmp_path / "out/test/1.png", "B50|O50")
    assert len(names_of(tmp_path / "out", "train", "val")) == 4


def test_folders_that_two_releases_share(tmp_path):
    """The outer folder tells; where none does, folders that are surely of the set come first."""
    shared = separate("Rain200H/rain_data_train_Heavy", 4, 20)
    both = lay_out(tmp_path / "both", {**shared, **separate("Rain100H/rain_data_train_Heavy")})
    loose = lay_out(tmp_path / "loose", {**separate("rain_data_train_Heavy"), **separate("Rain100H", 2, 50)})
    for set_name, source, first in (("rain100h", both, 0), ("rain200h", both, 20), ("rain200h", loose, 0)):
        out = tmp_path / f"{set_name}_{source.name}"
        assert run(set_name, source, "--data_dir", out, "--val", 0) == 0
        assert same_pictures(out / "train/1.png", f"B{first}|O{first}")
        assert len(names_of(out, "train")) == 4
    run("rain100h", loose, "--data_dir", tmp_path / "out")
    assert [len(names_of(tmp_path / "out", split)) for split in ("train", "test")] == [0, 2]
    assert sum("rain_data_train_Heavy" in line for line in report(tmp_path / "out")["ignored"]) == 2


def test_links_are_read_under_their_own_names_except_loops(tmp_path):
    source = lay_out(tmp_path / "d", {**separate("all"), **separate("more", 2, 50)})
    for link, target in (("train", "all"), ("test", "more"), ("all/loop", "..")):
        (source / link).symlink_to(target)
    run("own", source, "--data_dir", tmp_path / "out", "--val", 1)
    assert [len(names_of(tmp_path / "out", split)) for split in ("train", "val", "test")] == [3, 1, 2]
    assert any("/loop: " in line for line in report(tmp_path / "out")["ignored"])


def test_pairs_without_rain_are_left_out(tmp_path):
    lay_out(tmp_path, {**separate("d/test"), "d/test/input/2.png": "B1"})
    lay_out(tmp_path, {**numbered("j/test/{}.png", "B{0}|O{0}"), "j/test/3.png": "B2|B2"})
    for name, number in (("d", 2), ("j", 3)):
        assert run("own", tmp_path / name, "--data_dir", tmp_path / f"{name}_out") == 1
        assert names_of(tmp_path / f"{name}_out", "test") == {f"{k}.png" for k in (1, 2, 3, 4) if k != number}
    with pytest.raises(MissingFile):
        run("folders", "--clean", tmp_path / "d/test/target", "--rainy", tmp_path / "d/test/target")


def test_a_pair_in_two_folders_is_written_once_and_named(tmp_path):
    """PReNet's Rain100H holds its rainy images twice."""
    rain = {**numbered("Rain100H/rainy/rain-{}.png", "O{}"), **numbered("Rain100H/rain-{}.png", "O{}")}
    lay_out(tmp_path / "d", {**rain, **numbered("Rain100H/norain-{}.png", "B{}")})
    assert run("rain100h", tmp_path / "d", "--data_dir", tmp_path / "out") == 0
    assert names_of(tmp_path / "out", "test") == {"1.png", "2.png", "3.png", "4.png"}
    assert sum("same pair" in line for line in report(tmp_path / "out")["ignored"]) == 4


def test_names_that_disks_or_utf8_do_not_take(tmp_path):
    """Equal stems, names that become too long, and bytes that are no text."""
    long = "n" * 245
    for rain, level in enumerate(("Rain_Heavy", "Rain_Light")):
        for k, name in enumerate((f"{long}.png", "2.png", "3.bmp", "3.png", "\udcff.png")):
            folder = lay_out(tmp_path / "d" / level / "train", {f"new{name[-4:]}": f"B{k}|O{k}.{rain}"})
            (folder / f"new{name[-4:]}").rename(folder / name)
    assert run("rain1200", tmp_path / "d", "--data_dir", tmp_path / "out", "--val", 2) == 1
    stems = {f"Rain_{level}-{stem}" for level in ("Heavy", "Light") for stem in ("2", "3", "3-2", "\udcff")}
    assert names_of(tmp_path / "out", "train", "val") == {f"{stem}.png" for stem in stems}
    assert [long in line for line in report(tmp_path / "out")["left out"]] == [True, True]


def test_a_test_folder_is_not_ignored_and_must_hold_pairs(tmp_path):
    source = lay_out(tmp_path / "Datasets", RESTORMER)
    run("rain13k", source, "--test", source / "test/Rain100L", "--data_dir", tmp_path / "out")
    ignored = report(tmp_path / "out")["ignored"]
    assert not any("Rain100L" in line for line in ignored)
    assert len(set(ignored)) == len(ignored)
    with pytest.raises(MissingFile, match=str(source / "test")):
        run("rain13k", source, "--test", source / "test", "--data_dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_lists_of_spa_data_with_tabs_and_other_names(tmp_path):
    source = lay_out(tmp_path / "download", SPA)
    lines = SPA_LISTS["Training/real_world.txt"].replace(" ", "\t")
    (source / "Testing/test_list.txt").write_text(SPA_LISTS["Testing/real_test_1000.txt"].splitlines()[0])
    (source / "Training/train_list.txt").write_text(lines, "utf-8-sig")
    (source / "Training/readme.txt").write_text("no list")
    run("spa", source, "--data_dir", tmp_path / "out", "--val", 2)
    assert names_of(tmp_path / "out", "train", "val") == {f"{k}_{j}.png" for k in (1, 2) for j in (1, 2)}
    ignored = "\n".join(report(tmp_path / "out")["ignored"])
    assert "real_world/9/rain" in ignored
    assert "readme.txt" in ignored
    assert "_list.txt" not in ignored
    assert names_of(tmp_path / "out", "test") == {"001.png"}


def test_folders_that_do_not_say_which_is_clean(tmp_path):
    """The command that the error names takes them."""
    lay_out(tmp_path, {**numbered("d/train/data/{}.png", "O{}"), **numbered("d/train/gt/{}.png", "B{}")})
    for words in ([tmp_path / "d"], ["--train", tmp_path / "d/train"]):
        with pytest.raises(UserError, match="folders --clean DIR --rainy DIR"):
            run("own", *words, "--data_dir", tmp_path / "out")
    options = ("--clean", tmp_path / "d/train/gt", "--rainy", tmp_path / "d/train/data", "--data_dir", tmp_path / "out")
    assert run("folders", *options) == 0


def test_real_rain_with_ground_truth_is_read(tmp_path):
    scenes = {f"SPA/Training/real_world_rain/{k}/{k}_{j}.png": f"O{k}.{j}" for k in range(2) for j in (1, 2)}
    lay_out(tmp_path, {**scenes, **{f"SPA/Training/real_world_gt/{k}/{k}.png": f"B{k}" for k in range(2)}})
    assert run("spa", tmp_path / "SPA", "--data_dir", tmp_path / "out", "--val", 2) == 0
    assert len(names_of(tmp_path / "out", "train", "val")) == 4


def test_a_single_training_pair_needs_no_option(tmp_path, capsys):
    lay_out(tmp_path, separate("d/train", 1))
    assert run("own", tmp_path / "d", "--data_dir", tmp_path / "out") == 0
    assert names_of(tmp_path / "out", "train") == {"1.png"}
    assert str(tmp_path / "out/val") in capsys.readouterr().out  # is missing
