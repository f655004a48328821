"""show.py: every kind of image comes back as its kind, no file of the user is lost."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import model
import show
from base.errors import BadArgument, MissingFile, NotWritable, Occupied
from base.files import ROOT
from base.images import read_image, write_image
from runs import checkpoints
from runs.checkpoints import Checkpoint
from runs.restore import Restoring, open_network, restore, score_pairs
from settings import resolve

NETWORKS = ("plain", "still")
TINY = {"channel": 2, "depth": 4, "stage_num": 3, "link": "concat"}


@pytest.fixture
def picture():
    """A function that makes a random image: (H, W) grey, (H, W, 3) or (H, W, 4), 8 or 16 bits."""

    def draw(*shape, dtype=np.uint8, seed=0):
        return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)

    return draw


@pytest.fixture
def run(tmp_path):
    """A function that calls show.main on network `name`: "plain", or "still", whose rain layers are all zero."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such images are too small to share
    for name in NETWORKS:
        torch.manual_seed(0)
        settings = resolve("sdsen", {**TINY, "run": name, "data_dir": str(tmp_path / "pairs")})
        network = model.build(settings)
        if name == "still":
            torch.nn.init.zeros_(network.dec[-1].weight)
            torch.nn.init.zeros_(network.dec[-1].bias)
        state = Checkpoint(network.state_dict(), step=7, settings=settings)
        checkpoints.save(tmp_path / "models" / name / "best.pth", state)

    def call(name, *words, show_dir="out"):
        places = ["--model_dir", tmp_path / "models", "--show_dir", tmp_path / show_dir, "--device", "cpu"]
        return show.main([str(word) for word in ("-m", name, *words, *places)])

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def pairs(tmp_path, picture):
    """A test set of three joined pairs, 16 pixels wide and high each."""
    for index in range(3):
        B, rain = picture(16, 16, 3, seed=index), picture(16, 16, 3, seed=index + 9) // 4
        write_image(tmp_path / "pairs" / "test" / f"{index + 1}.png", np.hstack([B, cv2.add(B, rain)]))
    return tmp_path / "pairs"


def page_facts(folder: Path) -> dict:
    """The JSON that the page holds, as a browser cuts it out of the HTML."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def names(folder: Path) -> set[str]:
    """Of the results in a folder."""
    return {path.name for path in folder.iterdir()} - {"index.html", "page"}


# ---------------------------------------------------------------- one image


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 3), (6, 7, 4), (1, 1, 3), (1, 1), (3, 5, 3), (1, 40), (40, 1, 3)])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".png", np.uint8), (".PNG", np.uint16), (".tif", np.uint8), (".tiff", np.uint16), (".bmp", np.uint8)],
)
def test_a_network_without_rain_layers_gives_every_lossless_image_back(run, tmp_path, picture, suffix, shape, dtype):
    image = picture(*shape, dtype=dtype)
    write_image(tmp_path / f"in{suffix}", image)
    assert run("still", "-i", tmp_path / f"in{suffix}") == 0
    result = read_image(tmp_path / "out" / "still" / f"in{suffix}")
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, image)


@pytest.mark.parametrize(("suffix", "tolerance"), [(".jpg", 3), (".JPEG", 3), (".webp", 12)])
def test_lossy_formats_come_back_in_their_format_nearly_unchanged(run, tmp_path, suffix, tolerance):
    image = np.repeat(np.linspace(0, 255, 64).round().astype(np.uint8)[None, :, None], 48, 0).repeat(3, 2)
    write_image(tmp_path / f"in{suffix}", image)
    assert run("still", "-i", tmp_path / f"in{suffix}") == 0
    result = read_image(tmp_path / "out" / "still" / f"in{suffix}")
    assert np.abs(result.astype(int) - image).max() <= tolerance
    start = b"RIFF" if suffix == ".webp" else b"\xff\xd8\xff\xe0"
    assert (tmp_path / "out" / "still" / f"in{suffix}").read_bytes().startswith(start)


def test_a_file_whose_name_belies_its_content_loses_neither_bits_nor_alpha(run, tmp_path, picture):
    images = {"deep.jpg": picture(5, 6, dtype=np.uint16), "alpha.jpeg": picture(5, 6, 4)}
    for name, image in images.items():
        (tmp_path / name).write_bytes(cv2.imencode(".png", image)[1])
    assert run("still", "-i", *(tmp_path / name for name in images)) == 0
    for name, image in images.items():
        np.testing.assert_array_equal(read_image(tmp_path / "out/still" / f"{name}.png"), image)


def test_grey_is_the_mean_of_the_channels_and_alpha_is_not_touched(run, tmp_path, picture):
    grey, alpha = picture(9, 8, dtype=np.uint16), picture(9, 8, 4)
    write_image(tmp_path / "grey.png", grey)
    write_image(tmp_path / "alpha.png", alpha)
    assert run("plain", "-i", tmp_path / "grey.png", tmp_path / "alpha.png") == 0
    network, *_ = open_network(None, "plain", {"model_dir": str(tmp_path / "models"), "device": "cpu"})
    O = torch.from_numpy(grey.astype(np.float32)).expand(3, -1, -1) / 65535
    expected = (list(restore(network, O))[-1].mean(0) * 65535).round().numpy().astype(np.uint16)
    np.testing.assert_array_equal(read_image(tmp_path / "out/plain/grey.png"), expected)
    assert np.unique(expected).size > 60  # 16 bits were not taken through 8
    result = read_image(tmp_path / "out/plain/alpha.png")
    np.testing.assert_array_equal(result[..., 3], alpha[..., 3])
    assert (result[..., :3] != alpha[..., :3]).any()


def test_exif_orientation_is_honoured(run, tmp_path):
    image = np.zeros((24, 40, 3), np.uint8)
    image[:, :8] = 255  # a white band on the left, which belongs on top
    data = bytes(cv2.imencode(".jpg", image)[1])
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "in.jpg").write_bytes(data[:2] + segment + data[2:])
    assert run("still", "-i", tmp_path / "in.jpg") == 0
    result = read_image(tmp_path / "out/still/in.jpg")
    assert result.shape == (40, 24, 3)
    assert result[:6].mean() > 240 > 15 > result[12:].mean()


@pytest.mark.parametrize(
    ("name", "form", "result"),
    [
        ("x.jfif", "JPEG", "x.jfif"),
        ("x.JPE", "JPEG", "x.JPE"),
        ("x", "JPEG", "x.jpg"),
        ("x.2024", "PNG", "x.2024.png"),
        ("x.avif", "AVIF", "x.avif"),
        ("x.gif", "GIF", "x.png"),
        ("x.jp2", "JPEG2000", "x.png"),
        ("x.ppm", "PPM", "x.png"),
    ],
)
def test_every_format_that_opencv_reads_comes_back_in_its_format_or_as_png(run, tmp_path, picture, name, form, result):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(9, 8, 3)).save(tmp_path / "in" / name, form)
    assert run("still", "-i", tmp_path / "in") == 0
    assert names(tmp_path / "out/still") == {result}
    with Image.open(tmp_path / "out/still" / result) as image:
        assert (image.format, image.size) == (form if result != "x.png" else "PNG", (8, 9))


def test_exif_and_profile_come_back_and_what_does_not_is_named(run, tmp_path, picture, capsys):
    image, exif = Image.fromarray(picture(9, 8, 3)), Image.Exif()
    exif[271], exif[274] = "A Camera", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/a.jpg", exif=exif, icc_profile=profile)
    image.convert("CMYK").save(tmp_path / "in/b.jpg")
    image.save(tmp_path / "in/c.gif", save_all=True, append_images=[image.transpose(0)])
    assert run("plain", "-i", tmp_path / "in", "--all-stages") == 0
    for name in ("a.jpg", "a_stage1.jpg"):
        with Image.open(tmp_path / "out/plain" / name) as result:
            assert (dict(result.getexif()), result.info["icc_profile"]) == ({271: "A Camera", 274: 1}, profile)
    out = capsys.readouterr().out
    assert [str(tmp_path / "in" / name) in out for name in ("a.jpg", "b.jpg", "c.gif")] == [False, True, True]


# ---------------------------------------------------------------- files


def test_folders_in_folders_are_named_or_restored_as_a_tree(run, tmp_path, picture, capsys):
    for name in ("a.png", "sub/a.png", "sub/deep/a.png"):
        write_image(tmp_path / "in" / name, picture(5, 5, 3))
    (tmp_path / "in/notes.txt").write_text("no image")
    assert run("still", "-i", tmp_path / "in", show_dir="flat") == 0
    out = capsys.readouterr().out
    assert [str(tmp_path / "in" / name) in out for name in ("sub", "notes.txt", "a.png")] == [True, True, False]
    assert names(tmp_path / "flat/still") == {"a.png"}
    assert run("still", "-i", tmp_path / "in", "--recursive") == 0
    results = (tmp_path / "out/still").rglob("*.png")
    assert {path.relative_to(tmp_path / "out/still").as_posix() for path in results} == {
        "a.png", "sub/a.png", "sub/deep/a.png"
    }  # fmt: skip
    assert run("still", "-i", tmp_path / "in/sub", tmp_path / "in", "--recursive", show_dir="both") == 0
    assert len(list((tmp_path / "both/still").rglob("*.png"))) == 3  # each once


def test_many_files_are_counted_and_all_named_at_level_debug(run, tmp_path, picture, capsys):
    write_image(tmp_path / "in/a.png", picture(5, 5, 3))
    for index in range(9):
        (tmp_path / f"in/{index}.txt").touch()
    shown = []
    for words in ([], ["--log_level", "debug"]):
        run("still", "-i", tmp_path / "in", *words)
        shown.append(capsys.readouterr().out.count(".txt"))
    assert shown == [3, 9]


def test_a_name_that_is_too_long_is_skipped_and_a_long_one_is_written(run, tmp_path, picture):
    (tmp_path / "in").mkdir()
    data = cv2.imencode(".png", picture(5, 5, 3))[1].tobytes()
    for name in ("雨" * 83 + ".png", "y" * 253, "a.png"):
        (tmp_path / "in" / name).write_bytes(data)
    assert run("still", "-i", tmp_path / "in") == 1
    assert names(tmp_path / "out/still") == {"雨" * 83 + ".png", "a.png"}


def test_a_full_disk_ends_the_run(run, tmp_path, picture):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, picture(40, 40, 3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(NotWritable):
            run("still", "-i", tmp_path / "in")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_output_names_a_folder_or_a_file(run, tmp_path, picture):
    deep, alpha = picture(5, 6, 3, dtype=np.uint16), picture(5, 6, 4)
    write_image(tmp_path / "in/deep.png", deep)
    write_image(tmp_path / "in/alpha.png", alpha)
    assert run("still", "-i", tmp_path / "in", "-o", tmp_path / "results") == 0
    assert names(tmp_path / "results") == {"deep.png", "alpha.png"}
    assert run("still", "-i", tmp_path / "in/deep.png", "--output", tmp_path / "in/result.tif", "--all-stages") == 0
    np.testing.assert_array_equal(read_image(tmp_path / "in/result.tif"), deep)
    assert names(tmp_path / "in") == {
        "deep.png",
        "alpha.png",
        "result.tif",
        *(f"result_stage{t}.tif" for t in (1, 2, 3)),
    }
    assert (tmp_path / "out/index.html").is_file()


@pytest.mark.parametrize(
    ("shape", "suffix", "kept"),
    [
        ((5, 6, 3), ".jpg", (5, 6, 3)),
        ((5, 6, 4), ".jpg", (5, 6, 3)),
        ((5, 6, 4), ".webp", (5, 6, 4)),
        ((5, 6, 4), ".avif", (5, 6, 4)),
        ((5, 6, 4), ".bmp", (5, 6, 4)),
        ((5, 6), ".jpg", (5, 6)),
    ],
)
def test_a_named_format_loses_only_what_it_does_not_hold(run, tmp_path, picture, capsys, shape, suffix, kept):
    write_image(tmp_path / "x.png", picture(*shape, dtype=np.uint16))
    assert run("still", "-i", tmp_path / "x.png", "-o", tmp_path / f"y{suffix}") == 0
    image = read_image(tmp_path / f"y{suffix}")
    assert (image.shape, image.dtype) == (kept, np.uint8)
    assert ("alpha" in capsys.readouterr().out) == (len(shape) == 3 and kept[2:] != shape[2:])


def test_results_elsewhere_need_no_page(run, tmp_path, picture, capsys):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, picture(5, 5, 3))
    (tmp_path / "out").touch()  # as if SHOW_DIR were on a disk that is read only
    assert run("still", "-i", tmp_path / "in", "-o", tmp_path / "results") == 0
    assert names(tmp_path / "results") == {"a.png", "b.png"}
    assert capsys.readouterr().out.count(str(tmp_path / "out")) == 1


def test_a_later_call_replaces_the_result_of_the_same_source_alone(run, tmp_path, picture):
    shades = {"A/p.png": 10, "B/p.png": 60, "C/P.png": 110, "A/p_stage1.png": 160}
    for name, shade in shades.items():
        write_image(tmp_path / name, np.full((4, 4), shade, np.uint8))
    folder = tmp_path / "out/still"
    for name in [*shades, "B/p.png", "A/p.png"]:
        assert run("still", "-i", tmp_path / name, *["--all-stages"] * (name == "A/p.png")) == 0
    assert {name: int(read_image(folder / name)[0, 0]) for name in names(folder) if "stage" not in name} == {
        "p.png": 10, "p_2.png": 60, "P_3.png": 110
    }  # fmt: skip
    assert {name: int(read_image(folder / name)[0, 0]) for name in names(folder) if "stage1" in name} == {
        "p_stage1.png": 10, "p_stage1_2.png": 160
    }  # fmt: skip
    assert len(page_facts(folder)["images"]) == 4
    for name in ("A/p.png", "B/p.png"):  # in a folder that is named, files are replaced
        run("still", "-i", tmp_path / name, "-o", tmp_path / "results")
    assert {name: int(read_image(tmp_path / "results" / name)[0, 0]) for name in names(tmp_path / "results")} == {
        "p.png": 60
    }


@pytest.mark.parametrize("name", ["index.html", "page", "PAGE"])
def test_names_of_the_page_are_no_folders_of_results(run, tmp_path, picture, name):
    write_image(tmp_path / "in" / name / "x.png", picture(4, 4, 3))
    write_image(tmp_path / "in" / f"{name}_2" / "x.png", picture(4, 4, 3))
    with pytest.raises(BadArgument):
        run("still", "-i", tmp_path / "in", "--recursive", "--run", name)
    with pytest.raises(BadArgument):
        run("still", "-i", tmp_path / "in", "--recursive", "-o", tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()
    assert run("still", "-i", tmp_path / "in", "--recursive", "-o", tmp_path / "results", show_dir="other") == 0
    assert (tmp_path / "results" / name / "x.png").is_file()
    assert run("still", "-i", tmp_path / "in", "--recursive") == 0
    assert names(tmp_path / "out/still") >= {f"{name}_2"}
    assert len(list((tmp_path / "out/still").rglob("x*.png"))) == 2
    assert len(page_facts(tmp_path / "out/still")["images"]) == 2


def test_a_link_gives_way_to_its_file(run, tmp_path, picture):
    write_image(tmp_path / "in/b.png", picture(5, 5, 3))
    for link in ("a.png", "c.png"):
        (tmp_path / "in" / link).symlink_to("b.png")
    assert run("still", "-i", tmp_path / "in") == 0
    assert names(tmp_path / "out/still") == {"b.png"}
    assert run("still", "-i", tmp_path / "in/a.png", tmp_path / "in/c.png", show_dir="links") == 0
    assert names(tmp_path / "links/still") == {"a.png"}


def test_results_inside_the_searched_folder_are_left_out_the_next_time(run, tmp_path, picture, capsys):
    write_image(tmp_path / "in/a.png", picture(5, 5, 3))
    for _ in range(2):
        assert run("still", "-i", tmp_path / "in", "--recursive", "-o", tmp_path / "in/new", show_dir="in/out") == 0
    assert names(tmp_path / "in/new") == {"a.png"}
    assert capsys.readouterr().out.count(f"{tmp_path}/in/new, {tmp_path}/in/out") == 1


def test_without_every_stage_there_is_no_result(run, tmp_path, picture):
    for name in ("a.png", "y" * 247 + ".png"):  # a name that is too long with _stage1
        write_image(tmp_path / "in" / name, picture(5, 5, 3))
    assert run("still", "-i", tmp_path / "in", "--all-stages") == 1
    assert names(tmp_path / "out/still") == {"a.png", *(f"a_stage{t}.png" for t in (1, 2, 3))}


def test_no_name_steers_the_terminal(run, tmp_path, picture, capsys):
    write_image(tmp_path / "in/a\x1b[31m\n\u202eb.png", picture(5, 5, 3))
    for name in ("c\x1b.png", "d\x1b.txt"):
        (tmp_path / "in" / name).touch()
    run("still", "-i", tmp_path / "in")
    out = capsys.readouterr().out
    assert [character in out for character in "\x1b\u202e"] == [False, False]
    assert [text in out for text in ("a\\x1b[31m\\n\\u202eb.png", "c\\x1b.png", "d\\x1b.txt")] == [True] * 3


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("-i in -o result.png", BadArgument),  # two images, one file
        ("-i in/a.png -o result.gif", BadArgument),
        ("-i in/a.png -o notes", BadArgument),  # a file that is no image
        ("-i in/a.png -o in/a.png", Occupied),
        ("-i link.png -o in/a.png", Occupied),
        ("-i in/x_stage1.png -o in/x.png --all-stages", Occupied),
        ("-i in -o in", Occupied),
        ("-i . --recursive -o in", Occupied),
    ],
)
def test_outputs_that_are_refused(run, tmp_path, picture, monkeypatch, words, error):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/x_stage1.png", "in/sub/still/b.png"):
        write_image(tmp_path / name, picture(5, 5, 3))
    (tmp_path / "notes").touch()
    (tmp_path / "link.png").symlink_to("in/a.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error):
        run("still", *words.split())
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_results_may_go_to_the_folder_above(run, tmp_path, picture):
    write_image(tmp_path / "in/sub/b.png", picture(5, 5, 3))
    write_image(tmp_path / "in/a.png", picture(5, 5, 3))
    assert run("still", "-i", tmp_path / "in", "--recursive", "-o", tmp_path) == 0
    assert {"a.png", "sub", "in"} <= names(tmp_path)


def test_equal_names_from_different_folders_keep_apart(run, tmp_path, picture):
    shades = {"a/x.png": 10, "b/x.png": 60, "c/X.PNG": 110, "d/x_2.png": 160, "e/x_stage1.png": 210}
    for name, shade in shades.items():
        write_image(tmp_path / name, np.full((4, 4), shade, np.uint8))
    assert run("still", "--all-stages", "-i", *(tmp_path / name for name in shades), tmp_path / "a") == 0
    folder = tmp_path / "out/still"
    results = {folder / name: int(read_image(folder / name)[0, 0]) for name in names(folder)}
    assert sorted(results.values()) == sorted([*shades.values()] * 4)  # a result and three stages each; a/x.png once
    assert len({path.name.casefold() for path in results}) == len(results)  # also where x.png and X.PNG are one file
    shown = {image["source"]: results[folder / unquote(image["result"])] for image in page_facts(folder)["images"]}
    assert shown == {str(tmp_path / name): shade for name, shade in shades.items()}


@pytest.mark.parametrize(
    ("inputs", "stage_num", "results"),
    [
        ("a/x.png b/x.png c/x.png", 0, "x.png x_2.png x_3.png"),
        ("a/x.png b/x_2.png c/x.png", 0, "x.png x_2.png x_3.png"),
        ("a/x.png b/x.png c/x_2.png", 0, "x.png x_2.png x_2_2.png"),
        ("x.jpg x.png x.webp x.tif", 0, "x.jpg x.png x.webp x.tif"),
        ("x.jpg x.jpg.png", 0, "x.jpg x.jpg_2.png"),  # what is named .jpg may be written as .jpg.png
        ("x.png x.tif", 0, "x.png x.tif"),
        ("x.gif x.png X.JP2", 0, "x_2.png x.png X_3.png"),  # what keeps its format keeps its name
        ("x.png X.PNG", 0, "x.png X_2.PNG"),
        ("x.v2 x.v3", 0, "x.v2.png x.v3.png"),
        ("x.png x_stage1.png", 0, "x.png x_stage1.png"),
        ("x.png x_stage1.png", 1, "x.png x_stage1_2.png"),
        ("x_stage2.png x.png", 2, "x_stage2.png x_2.png"),
        ("x_stage2.png x.png", 1, "x_stage2.png x.png"),
    ],
)
def test_result_names(inputs, stage_num, results):
    named = show.result_names({Path(name): Path() for name in inputs.split()}, stage_num, {})
    assert named == [Path(name) for name in results.split()]
    inside = show.result_names({Path(name): Path("sub") for name in inputs.split()}, stage_num, {})
    assert inside == [Path("sub", name) for name in results.split()]


def test_stage_files():
    assert show.stage_files(Path("a/b.c.png"), 2) == [Path("a/b.c_stage1.png"), Path("a/b.c_stage2.png")]
    assert show.stage_files(Path("x.jpg"), 0) == []


def test_a_bad_file_is_named_and_skipped_and_the_exit_status_tells(run, tmp_path, picture, capsys):
    write_image(tmp_path / "in/good.png", picture(9, 9, 3))
    whole = (tmp_path / "in/good.png").read_bytes()
    (tmp_path / "in/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/text.jpg").write_text("no image")
    assert run("plain", "-i", tmp_path / "in") == 1
    out = capsys.readouterr().out
    assert [str(tmp_path / "in" / name) in out for name in ("cut.png", "text.jpg", "good.png")] == [True, True, False]
    assert names(tmp_path / "out/plain") == {"good.png"}
    assert [image["name"] for image in page_facts(tmp_path / "out/plain")["images"]] == ["good.png"]


def test_mirror_changes_what_is_written(run, tmp_path, picture):
    write_image(tmp_path / "in/a.png", picture(24, 20, 3))
    for folder, words in (("out", []), ("mirrored", ["--mirror", "true"])):
        assert run("plain", "-i", tmp_path / "in", *words, show_dir=folder) == 0
    plain, mirrored = (read_image(tmp_path / folder / "plain/a.png") for folder in ("out", "mirrored"))
    assert (plain != mirrored).any()
    network = open_network(None, "plain", {"model_dir": str(tmp_path / "models")})[0]
    O = show.to_network(read_image(tmp_path / "in/a.png"))
    expected = show.from_network(list(restore(network, O, Restoring(mirror=True)))[-1], mirrored)
    np.testing.assert_array_equal(mirrored, expected)


def test_an_image_too_large_for_the_memory_is_skipped(run, tmp_path, picture, capsys, monkeypatch):
    def restore_small(network, O, *how):
        if O.shape[1] > 9:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
        return restore(network, O, *how)

    monkeypatch.setattr(show, "restore", restore_small)
    write_image(tmp_path / "in/large.png", picture(10, 12, 3))
    write_image(tmp_path / "in/small.png", picture(9, 9, 3))
    assert run("plain", "-i", tmp_path / "in") == 1
    assert str(tmp_path / "in/large.png") in capsys.readouterr().out
    assert names(tmp_path / "out/plain") == {"small.png"}


def test_without_any_good_image_nothing_is_written(run, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    assert run("plain", "-i", tmp_path / "bad.png") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, NotWritable])
def test_a_call_that_stops_half_way_leaves_a_page_of_what_was_done(run, tmp_path, picture, error, monkeypatch):
    def write_two(item, path, *where):
        if path.name == "3.png":
            raise error
        return write(item, path, *where)

    for number in range(1, 4):
        write_image(tmp_path / f"in/{number}.png", picture(9, 9, 3))
    write = show.write_result
    monkeypatch.setattr(show, "write_result", write_two)
    with pytest.raises(error):
        run("plain", "-i", tmp_path / "in")
    assert {image["name"] for image in page_facts(tmp_path / "out/plain")["images"]} == {"1.png", "2.png"}


def test_each_network_has_its_page_which_later_calls_add_to(run, tmp_path, picture):
    for number, name in enumerate(["plain", "still", "plain"]):
        write_image(tmp_path / f"{number}.png", picture(9, 9, 3))
        run(name, "-i", tmp_path / f"{number}.png")
    shown = {name: {image["name"] for image in page_facts(tmp_path / "out" / name)["images"]} for name in NETWORKS}
    assert shown == {"plain": {"0.png", "2.png"}, "still": {"1.png"}}
    assert {page["name"]: page["count"] for page in page_facts(tmp_path / "out")["pages"]} == {"plain": 2, "still": 1}


@pytest.mark.parametrize("place", ["out", "out/plain", "out/plain/page"])
@pytest.mark.parametrize("linked", [False, True])
def test_an_input_is_never_overwritten(run, tmp_path, picture, place, linked):
    write_image(tmp_path / place / "x.png", picture(5, 5, 3))
    before = (tmp_path / place / "x.png").read_bytes()
    given = tmp_path / place
    if linked:
        given = tmp_path / "elsewhere.png"
        given.symlink_to(tmp_path / place / "x.png")
    with pytest.raises(Occupied):
        run("plain", "-i", given)
    assert (tmp_path / place / "x.png").read_bytes() == before


def test_a_page_of_somebody_else_is_kept(run, tmp_path, picture):
    write_image(tmp_path / "x.png", picture(5, 5, 3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.html").write_text("my home page")
    with pytest.raises(Occupied):
        run("plain", "-i", tmp_path / "x.png")
    assert (tmp_path / "out/index.html").read_text() == "my home page"
    assert not (tmp_path / "out/plain").exists()


@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        (["-i", "nowhere.png"], MissingFile, r"nowhere\.png"),
        (["-i", "empty"], MissingFile, "empty"),
        (["-i", "x" * 300], MissingFile, "xxx"),
        (["-i", "~no-such-user/x.png"], MissingFile, "user"),
        (["-i", "nowhere.png", "-o", "~no-such-user"], MissingFile, "nowhere"),
        (["photo.png"], BadArgument, "-i"),
        (["-i", "nowhere.png", "-o", ""], BadArgument, "output"),
        (["--colour", "red"], BadArgument, "--colour"),
        (["--log_level", "loud"], BadArgument, "log_level"),
        ([], MissingFile, "pairs"),
    ],
)
def test_wrong_calls_write_nothing(run, tmp_path, monkeypatch, words, error, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=part):
        run("plain", *words)
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    command = [sys.executable, ROOT / "config" / "show.py", "-m", "none", "--model_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (done.stderr.count("\n"), done.stderr.startswith("error: ")) == (1, True)


# ---------------------------------------------------------------- stages, scores, determinism


def test_all_stages_are_written_and_the_last_one_is_the_result(run, tmp_path, picture):
    write_image(tmp_path / "x.png", picture(12, 12, 3))
    run("plain", "-i", tmp_path / "x.png")
    assert names(tmp_path / "out/plain") == {"x.png"}
    run("plain", "-i", tmp_path / "x.png", "--all-stages")
    folder = tmp_path / "out/plain"
    assert names(folder) == {"x.png", "x_stage1.png", "x_stage2.png", "x_stage3.png"}
    assert (folder / "x.png").read_bytes() == (folder / "x_stage3.png").read_bytes()
    assert (folder / "x.png").read_bytes() != (folder / "x_stage1.png").read_bytes()


def test_stopping_early_gives_that_stage(run, tmp_path, picture):
    write_image(tmp_path / "x.png", picture(12, 12, 3))
    run("plain", "-i", tmp_path / "x.png", "--all-stages", show_dir="whole")
    run("plain", "-i", tmp_path / "x.png", "--stages", 2, show_dir="early")
    whole, early = tmp_path / "whole/plain/x_stage2.png", tmp_path / "early/plain/x.png"
    np.testing.assert_array_equal(read_image(whole), read_image(early))
    assert page_facts(tmp_path / "early/plain")["images"][0]["last"] == 2


@pytest.mark.parametrize("stages", [0, 4, -1])
def test_stages_beyond_the_network_are_refused(run, tmp_path, picture, stages):
    write_image(tmp_path / "x.png", picture(5, 5, 3))
    with pytest.raises(BadArgument, match="--stages"):
        run("plain", "-i", tmp_path / "x.png", "--stages", stages)


def test_scores_of_the_test_set_are_those_of_the_protocol(run, tmp_path, pairs):
    assert run("plain") == 0
    network, *_ = open_network(None, "plain", {"model_dir": str(tmp_path / "models"), "device": "cpu"})
    files = sorted((pairs / "test").iterdir())
    scored = score_pairs(network, files, torch.device("cpu"))
    table = np.array([pair.scores for pair in scored])  # (pairs, 1 + stages, METRICS)
    facts = page_facts(tmp_path / "out/plain")
    images = sorted(facts["images"], key=lambda image: image["name"])
    shown = [[view["scores"] for view in image["views"][:4]] for image in images]
    np.testing.assert_allclose(shown, table[..., :2], atol=1e-4)
    psnr, ssim = table.mean(0)[[0, -1], :2].T
    for page in (facts, page_facts(tmp_path / "out")["pages"][0]):
        assert [*page["psnr"], *page["ssim"]] == pytest.approx([*psnr, *ssim], abs=1e-3)
    assert (images[0]["checkpoint"], images[0]["step"], images[0]["last"]) == ("plain/best.pth", 7, 3)
    assert [view["label"] for view in images[0]["views"]] == [
        "Input", "Stage 1", "Stage 2", "Stage 3", "Rain layer", "Ground truth"
    ]  # fmt: skip


def test_pairs_without_an_ssim_and_without_a_difference_are_scored(run, tmp_path):
    tiny, same = np.zeros((3, 10, 3), np.uint8), np.full((12, 24, 3), 7, np.uint8)
    tiny[:, :5] = 9
    write_image(tmp_path / "pairs/test/tiny.png", tiny)
    write_image(tmp_path / "pairs/test/same.png", same)
    assert run("still") == 0
    by_name = {image["name"]: image["views"][1]["scores"] for image in page_facts(tmp_path / "out/still")["images"]}
    assert by_name["same.png"] == [58.9226, 1.0]
    assert by_name["tiny.png"] == [pytest.approx(20 * np.log10(255 / 9), abs=1e-3), None]


def test_two_calls_write_the_same(run, tmp_path, picture):
    write_image(tmp_path / "x.png", picture(20, 30, 3))
    for show_dir in ("one", "two"):
        run("plain", "-i", tmp_path / "x.png", "--all-stages", show_dir=show_dir)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 4 + 5 + 1 + 1 + 2  # results, previews, thumbnail, entry, pages
    for file in files:
        if file.suffix in (".png", ".jpg"):  # the others hold times
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_results_that_are_nearly_their_inputs_are_one_warning(run, pairs, monkeypatch):
    warnings = []
    monkeypatch.setattr(show.log, "warning", warnings.append)
    run("still")
    assert len(warnings) == 1
    run("plain")
    assert len(warnings) == 1
