"""show.py and its page: every kind of image comes back as its kind, no file of the user is lost, the page is whole."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch

import model
import show
from base.errors import BadArgument, MissingFile, Occupied
from base.files import ROOT
from base.images import read_image, write_image
from runs import checkpoints
from runs.checkpoints import Checkpoint
from runs.restore import Restoring, open_network, restore, score_pairs
from settings import resolve

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
    for name in ("plain", "still"):
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
        write_image(tmp_path / "pairs" / "test" / f"{index + 1}.png", picture(16, 32, 3, seed=index))
    return tmp_path / "pairs"


def page_facts(folder: Path) -> dict:
    """The JSON that the page holds, as a browser cuts it out of the HTML."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def page_files(folder: Path) -> list[Path]:
    """All files that the page refers to."""
    images = page_facts(folder)["images"]
    urls = [url for image in images for url in (image["result"], *(v["url"] for v in image["views"]))]
    return [folder / unquote(url) for url in urls]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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
        np.testing.assert_array_equal(read_image((tmp_path / "out/still" / name).with_suffix(".png")), image)


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


# ---------------------------------------------------------------- files


def test_equal_names_from_different_folders_keep_apart(run, tmp_path, picture):
    shades = {"a/x.png": 10, "b/x.png": 60, "c/X.PNG": 110, "d/x_2.png": 160, "e/x_stage1.png": 210}
    for name, shade in shades.items():
        write_image(tmp_path / name, np.full((4, 4), shade, np.uint8))
    assert run("still", "--all-stages", "-i", *(tmp_path / name for name in shades), tmp_path / "a") == 0
    results = {path: int(read_image(path)[0, 0]) for path in (tmp_path / "out/still").iterdir()}
    assert sorted(results.values()) == sorted([*shades.values()] * 4)  # a result and three stages each; a/x.png once
    assert len({path.name.casefold() for path in results}) == len(results)  # also where x.png and X.PNG are one file
    facts = page_facts(tmp_path / "out")
    shown = {image["source"]: results[tmp_path / "out" / unquote(image["result"])] for image in facts["images"]}
    assert shown == {str(tmp_path / name): shade for name, shade in shades.items()}


@pytest.mark.parametrize(
    ("inputs", "stage_num", "stems"),
    [
        ("a/x.png b/x.png c/x.png", 0, "x x_2 x_3"),
        ("a/x.png b/x_2.png c/x.png", 0, "x x_2 x_3"),
        ("a/x.png b/x.png c/x_2.png", 0, "x x_2 x_2_2"),
        ("x.jpg x.png", 0, "x x_2"),  # what is named .jpg may be written as .png
        ("x.png x.jpg", 0, "x x_2"),
        ("x.jpg x.webp x.tif", 0, "x x_2 x"),
        ("x.png x.tif", 0, "x x"),
        ("x.png X.PNG", 0, "x X_2"),
        ("x.png x_stage1.png", 0, "x x_stage1"),
        ("x.png x_stage1.png", 1, "x x_stage1_2"),
        ("x_stage2.png x.png", 2, "x_stage2 x_2"),
        ("x_stage2.png x.png", 1, "x_stage2 x"),
    ],
)
def test_result_stems(inputs, stage_num, stems):
    assert show.result_stems([Path(name) for name in inputs.split()], stage_num) == stems.split()


def test_stage_names():
    assert show.stage_names("a.b", 2) == ["a.b", "a.b_stage1", "a.b_stage2"]
    assert show.stage_names("x", 0) == ["x"]


def test_a_bad_file_is_named_and_skipped_and_the_exit_status_tells(run, tmp_path, picture, capsys):
    write_image(tmp_path / "in/good.png", picture(9, 9, 3))
    whole = (tmp_path / "in/good.png").read_bytes()
    (tmp_path / "in/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/text.jpg").write_text("no image")
    assert run("plain", "-i", tmp_path / "in") == 1
    out = capsys.readouterr().out
    assert [str(tmp_path / "in" / name) in out for name in ("cut.png", "text.jpg", "good.png")] == [True, True, False]
    assert names(tmp_path / "out/plain") == {"good.png"}
    assert [image["name"] for image in page_facts(tmp_path / "out")["images"]] == ["good.png"]


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


def test_without_any_good_image_the_former_page_stays(run, tmp_path, picture):
    write_image(tmp_path / "good.png", picture(9, 9, 3))
    (tmp_path / "bad.png").write_text("no image")
    run("plain", "-i", tmp_path / "good.png")
    before = (tmp_path / "out/index.html").read_bytes()
    assert run("plain", "-i", tmp_path / "bad.png") == 1
    assert (tmp_path / "out/index.html").read_bytes() == before
    assert all(path.is_file() for path in page_files(tmp_path / "out"))
    assert names(tmp_path / "out/page") == {"1"}


@pytest.mark.parametrize("place", ["out", "out/plain", "out/page"])
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


@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        (["-i", "nowhere.png"], MissingFile, r"nowhere\.png"),
        (["-i", "empty"], MissingFile, "empty"),
        (["photo.png"], BadArgument, "-i"),
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
    assert page_facts(tmp_path / "early")["stages"] == 2


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
    images = page_facts(tmp_path / "out")["images"]
    shown = [[view["scores"] for view in image["views"][:4]] for image in images]
    np.testing.assert_allclose(shown, table[..., :2], atol=1e-4)
    psnr, ssim = table.mean(0)[[0, -1], :2].T
    facts = page_facts(tmp_path / "out")
    numbers = [float(word) for word in re.findall(r"-?\d+\.\d+", facts["summary"])]
    assert numbers[1:] == pytest.approx([*psnr, *ssim], abs=0.006)
    assert (facts["checkpoint"], facts["step"], facts["stages"]) == ("plain/best.pth", 7, 3)
    assert [view["label"] for view in images[0]["views"]] == [
        "Input", "Stage 1", "Stage 2", "Stage 3", "Rain layer", "Ground truth"
    ]  # fmt: skip


def test_pairs_without_an_ssim_and_without_a_difference_are_scored(run, tmp_path):
    tiny, same = np.zeros((3, 10, 3), np.uint8), np.full((12, 24, 3), 7, np.uint8)
    tiny[:, :5] = 9
    write_image(tmp_path / "pairs/test/tiny.png", tiny)
    write_image(tmp_path / "pairs/test/same.png", same)
    assert run("still") == 0
    by_name = {image["name"]: image["views"][1]["scores"] for image in page_facts(tmp_path / "out")["images"]}
    assert by_name["same.png"] == [58.9226, 1.0]
    assert by_name["tiny.png"] == [pytest.approx(20 * np.log10(255 / 9), abs=1e-3), None]


def test_two_calls_write_the_same(run, tmp_path, picture):
    write_image(tmp_path / "x.png", picture(20, 30, 3))
    for show_dir in ("one", "two"):
        run("plain", "-i", tmp_path / "x.png", "--all-stages", show_dir=show_dir)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 4 + 5 + 1
    for file in files:
        if file.name != "index.html":  # it holds the seconds
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_results_that_are_nearly_their_inputs_are_one_warning(run, pairs, monkeypatch):
    warnings = []
    monkeypatch.setattr(show.log, "warning", warnings.append)
    run("still")
    assert len(warnings) == 1
    run("plain")
    assert len(warnings) == 1


# ---------------------------------------------------------------- the page


def test_names_are_escaped_and_every_file_of_the_page_is_there(run, tmp_path, picture):
    odd = ['a<b>&"x".png', "50%25 #1?.png", "</script><script>alert(1).png", "<!--<script>.png", "é 雨.png"]
    for name in odd:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name.replace("/", "∕")).write_bytes(cv2.imencode(".png", picture(20, 20, 3))[1])
    # A folder's name can hold the slash that a file's can't: `source` is the whole path.
    inside = tmp_path / "x<" / "script><script>alert(1)/y.png"
    write_image(inside, picture(20, 20, 3))
    assert run("plain", "-i", tmp_path / "in", inside) == 0

    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed((tmp_path / "out/index.html").read_text(encoding="utf-8"))
    assert tags.count("script") == 2  # the JSON and the program
    images = page_facts(tmp_path / "out")["images"]
    assert {image["name"] for image in images} == {name.replace("/", "∕") for name in odd} | {"y.png"}
    assert all(path.is_file() for path in page_files(tmp_path / "out"))
    for image in images:
        assert not set(image["result"]) & set("<>\"'?# ")


def test_the_page_asks_for_nothing_from_outside(run, tmp_path, picture):
    write_image(tmp_path / "x.png", picture(20, 20, 3))
    run("plain", "-i", tmp_path / "x.png")
    text = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|<script src|fetch\(|url\(", text)
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]


def test_a_new_page_leaves_no_previews_of_the_former_one(run, tmp_path, picture):
    for size in (20, 30):
        write_image(tmp_path / "x.png", picture(size, size, 3))
        run("plain", "-i", tmp_path / "x.png")
    previews = {path for path in (tmp_path / "out/page").rglob("*") if path.is_file()}
    assert previews == {path for path in page_files(tmp_path / "out") if "page" in path.parts}
    assert page_facts(tmp_path / "out")["images"][0]["width"] == 30


def test_previews_are_small(tmp_path, picture):
    gallery = show.Gallery(tmp_path)
    image = cv2.resize(picture(20, 40, 3), (4000, 2000))
    entry = gallery.entry(1, show.Restored(image, [image], None, [], 0.0, 0.0), Path("x.png"), "run/x.png")
    paths = [tmp_path / view["url"] for view in entry["views"]]
    assert {read_image(path).shape for path in paths} == {(800, 1600, 3)}
    assert {path.suffix for path in paths} == {".jpg"}


def test_the_rain_layer_is_made_visible_by_a_gain_that_clips_little(picture):
    O = np.full((50, 50, 3), 100, np.uint8)
    layer, gain = show.rain_layer(O, O - 20)
    assert gain == 8
    assert (layer == 160).all()
    layer, gain = show.rain_layer(O, O + 20)  # brightened
    assert (layer == 0).all()
    layer, gain = show.rain_layer(np.full_like(O, 255), np.zeros_like(O))
    assert gain == 1
    assert (layer == 255).all()


def test_previews_of_calls_that_were_killed_are_removed_with_the_last_page(tmp_path):
    for name in ("1", "3", "notes"):
        (tmp_path / "page" / name).mkdir(parents=True)
    gallery = show.Gallery(tmp_path)
    assert gallery.folder.name == "4"
    gallery.write(images=[])
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["notes"]
