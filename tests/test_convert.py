"""The converter: every layout that the sets are distributed in, and the folder that it writes."""

from pathlib import Path

import cv2
import numpy as np
import pytest

import convert
from base.errors import BadArgument, MissingFile, Occupied, UserError
from base.images import list_images, read_image, read_pair

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
TEST_SET = {"001": "51", "002": "52"}
LEVELS = {
    f"Rain_{level}-{k + 1}": f"{start + k}.{rain}"
    for level, start, rain in (("Heavy", 0, 1), ("Medium", 10, 2), ("Light", 20, 3))
    for k in range(2)
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
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_exact_pairs(tmp_path, layout):
    set_name, files, training, test = LAYOUTS[layout]
    source, out = lay_out(tmp_path / "download", files), tmp_path / "out"
    assert run(set_name, source, "--data_dir", out, "--val", 1 if set_name != "rain1400" else 3) == 0
    ignored = "\n".join(report(out)["ignored"])
    for folder in {"rainstreak", "rainregion", "test_nature", "RainTrainL"} & {p.name for p in source.rglob("*")}:
        assert (folder in ignored) == (set_name != "rain100l")
    assert ("RainTrainH" in ignored) == any("/rainstreak-" in name for name in files)
    assert len(names_of(out, "val")) == (0 if not training else 1 if set_name != "rain1400" else 3)
    for splits, expected in ((("train", "val"), training), (("test",), test)):
        written = {path.stem: path for split in splits if (out / split).is_dir() for path in list_images(out / split)}
        assert set(written) == set(expected)
        for stem, which in expected.items():
            clean, rain = read_pair(written[stem])
            np.testing.assert_array_equal(clean, picture("B" + which.partition(".")[0]))
            np.testing.assert_array_equal(rain, picture("O" + which))


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
    write, calls = getattr(convert, failing), []

    def interrupted(path: Path, data: object) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(convert, failing, interrupted)
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
        (BadArgument, "rain800", "rain800", "--train", "rain800/train"),
        (BadArgument, "folders", "--clean", "empty"),
        (UserError, "rain900", "rain800"),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(error):
            run(*arguments, "--data_dir", "out")
        assert list((tmp_path / "out").iterdir()) == []


def test_paths_start_at_the_working_directory(tmp_path, rain800, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("rain800", rain800.name, "--val", 3, "--data_dir", "out") == 0
    assert [len(names_of(tmp_path / "out", split)) for split in ("train", "val", "test")] == [7, 3, 3]
    assert str(tmp_path / "out") in capsys.readouterr().out  # the next command
