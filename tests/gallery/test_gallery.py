"""The pages: what they show and link to, what they keep, and that a browser draws them."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from base.errors import Occupied
from base.images import read_image, write_image
from base.metadata import EXIF, PROFILE
from gallery import gallery
from gallery.gallery import Gallery, rain_layer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def draw(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def add(page, name, image=None, stages=1, **more):
    """Adds an image, which is its own result, as `name` in the page's folder or elsewhere; returns the result."""
    image = draw(6, 8) if image is None else image
    result = page.folder / name
    write_image(result, image)
    page.add(Path("photos") / Path(name).name, result, [image] * (1 + stages), **more)
    return result


def make(folder, *names, checkpoint="run/best.pth"):
    """A page of one call."""
    with Gallery(folder, checkpoint, 7) as page:
        for name in names:
            add(page, name)
    return page


def facts(page: Path) -> dict:
    """The JSON that a page holds, as a browser cuts it out of the HTML."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def images(folder: Path) -> dict[str, dict]:
    return {image["name"]: image for image in facts(folder / "index.html")["images"]}


def previews(image: dict) -> set[str]:
    urls = {url for view in image["views"] for url in (view["url"], view.get("full")) if url}
    return urls | {f"page/{image['key']}/thumbnail.jpg"}


# ---------------------------------------------------------------- pages


def test_calls_add_to_a_page_and_replace_images_of_the_same_result(tmp_path):
    make(tmp_path / "run", "a.png", "b.png")
    with Gallery(tmp_path / "run", "run/latest.pth", 9) as page:
        add(page, "b.png", draw(9, 5))
        add(page, "c.png")
    shown = images(tmp_path / "run")
    assert {name: (image["width"], image["step"]) for name, image in shown.items()} == {
        "a.png": (8, 7), "b.png": (5, 9), "c.png": (8, 9)
    }  # fmt: skip


def test_a_replaced_image_leaves_no_previews(tmp_path):
    with Gallery(tmp_path / "run", "run/best.pth", 7) as page:
        add(page, "a.png", stages=8)
        add(page, "a.png", stages=2)
    (image,) = facts(page.page)["images"]
    found = {str(path.relative_to(page.folder)) for path in page.folder.rglob("*.jpg")}
    assert found == previews(image)
    assert image["last"] == 2


def test_calls_at_once_leave_each_others_files(tmp_path, monkeypatch):
    """The second call adds the same image while the first one writes its entry."""
    write = gallery.write_json

    def write_late(path, values):
        monkeypatch.setattr(gallery, "write_json", write)
        (path.parent / ".1234.5.tmp").touch()  # what a third call is writing
        add(Gallery(tmp_path / "run", "run/latest.pth", 9), "a.png", stages=2)
        write(path, values)

    monkeypatch.setattr(gallery, "write_json", write_late)
    page = make(tmp_path / "run", "a.png")
    (image,) = facts(page.page)["images"]
    assert all((page.folder / url).is_file() for url in previews(image))
    assert (page.folder / "page" / image["key"] / ".1234.5.tmp").is_file()


WRONG = [[], {}, "x", None, *({name: wrong} for name in gallery.KINDS for wrong in (None, [1], {}))]
WRONG += [{"views": wrong} for wrong in ([], {}, "x", [{}], [[]] * 3, [None] * 3)]
WRONG += [{"last": 9}, {"last": 0}, {"change": float("nan")}, {"key": "other"}, {"result": "gone.png"}]


def test_a_damaged_entry_is_left_out(tmp_path):
    scores = [{"psnr": 20.0, "ssim": 0.5}] * 2
    with Gallery(tmp_path / "run", "run/best.pth", 7) as page:
        add(page, "a.png", scores=scores)
        add(page, "b.png", scores=scores)
    entry = next(path for path in page.folder.glob("page/*/entry.json") if b'"a.png"' in path.read_bytes())
    whole = json.loads(entry.read_bytes())
    rows = [{**view, "scores": wrong} for view in whole["views"][:1] for wrong in (None, [], [1.0], ["x", None], 3)]
    wrong = [*WRONG, *({"views": [row, *whole["views"][1:]]} for row in rows)]
    for values in wrong:
        changed = {**whole, **values} if isinstance(values, dict) and values else values
        entry.write_text(json.dumps(changed))
        page.write()
        assert images(page.folder).keys() == {"b.png"}, values
    entry.write_text(json.dumps(whole))
    page.write()
    assert images(page.folder).keys() == {"a.png", "b.png"}


def test_previews_have_the_profile_of_the_image(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with Gallery(tmp_path / "run", "run/best.pth", 7) as page:
        add(page, "a.png", draw(20, 2000), metadata={PROFILE: profile, EXIF: b"MM\0*\0\0\0\x08\0\0"})
    (image,) = facts(page.page)["images"]
    for url in previews(image):
        with Image.open(page.folder / url) as preview:
            assert (preview.info["icc_profile"], "exif" in preview.info) == (profile, False)


def test_an_image_whose_result_is_gone_leaves_the_page(tmp_path):
    page = make(tmp_path / "run", "a.png", "b.png", "c #1?.png")
    (page.folder / "a.png").unlink()
    page.write()
    assert images(page.folder).keys() == {"b.png", "c #1?.png"}


def test_the_list_holds_each_page_with_images(tmp_path):
    for name in ("some", "it's # %41"):
        make(tmp_path / name, "a.png", "b.png", checkpoint=name)
    make(tmp_path / "empty")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/index.html").write_text("not a page of images")
    pages = facts(tmp_path / "index.html")["pages"]
    assert {(page["name"], page["checkpoint"], page["count"]) for page in pages} == {
        ("some", "some", 2), ("it's # %41", "it's # %41", 2)
    }  # fmt: skip
    for page in pages:
        folder = tmp_path / unquote(page["url"])
        assert (folder / "index.html").is_file()
        assert (folder / "page" / page["key"] / "thumbnail.jpg").is_file()


def test_means_leave_out_what_has_no_score(tmp_path):
    rows = [[{"psnr": 20.0 + n, "ssim": ssim} for n in (0, 6)] for ssim in (0.5, float("nan"))]
    with Gallery(tmp_path / "run", "run/best.pth", 7) as page:
        add(page, "a.png", scores=rows[0])
        add(page, "tiny.png", scores=[{**row, "psnr": 40.0} for row in rows[1]])
        add(page, "unpaired.png")
    for shown in (facts(page.page), facts(tmp_path / "index.html")["pages"][0]):
        assert (shown["psnr"], shown["ssim"]) == ([30.0, 33.0], [0.5, 0.5])


@pytest.mark.parametrize("error", [KeyboardInterrupt, Occupied, ZeroDivisionError])
def test_an_error_leaves_a_page_of_what_was_done(tmp_path, error, monkeypatch):
    monkeypatch.setattr(gallery, "EVERY", 1e9)

    def stop_after(folder, *names):
        with Gallery(folder, "run/best.pth", 7) as page:
            for name in names:
                add(page, name)
            raise error

    with pytest.raises(error):
        stop_after(tmp_path / "run", "a.png", "b.png")
    assert images(tmp_path / "run").keys() == {"a.png", "b.png"}
    with pytest.raises(error):
        stop_after(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_call_that_is_killed_leaves_a_page_too(tmp_path, monkeypatch):
    page = Gallery(tmp_path / "run", "run/best.pth", 7)
    add(page, "a.png")
    add(page, "b.png")
    assert images(page.folder).keys() == {"a.png"}
    monkeypatch.setattr(gallery, "EVERY", 0)
    add(page, "c.png")
    assert images(page.folder).keys() == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize("place", ["index.html", "run/index.html"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_page_of_somebody_else_is_kept(tmp_path, place, is_folder):
    page = tmp_path / place
    page.parent.mkdir(exist_ok=True)
    page.mkdir() if is_folder else page.write_text("my home page")
    with pytest.raises(Occupied):
        make(tmp_path / "run", "a.png")
    assert page.is_dir() if is_folder else page.read_text() == "my home page"


# ---------------------------------------------------------------- files


def test_every_file_of_the_page_is_there_and_no_name_breaks_it(tmp_path):
    odd = [
        'a<b>&"x".png', "50%25 #1?.png", "<script>alert(1).png", "<!--<script>.png", "é 雨.png", "{{style}}.png",
        "back\\slash.png", "new\nline.png", os.fsdecode(b"\xff.png"), "..png",
    ]  # fmt: skip
    page = make(tmp_path / "run", *odd)
    page.add(Path("x</script><script>alert(1)/y.png"), page.folder / odd[0], [draw(6, 8)] * 2)  # a folder's
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    page.write()
    parser.feed(page.page.read_text(encoding="utf-8"))
    assert tags.count("script") == 2  # the JSON and the program
    shown = facts(page.page)["images"]
    assert len(shown) == len(odd)
    for image in shown:
        assert re.fullmatch("[A-Za-z0-9%/._~-]+", image["result"])
        # Web servers take addresses for UTF-8.
        assert (page.folder / unquote(image["result"], errors="strict")).read_bytes().startswith(b"\x89PNG")
        assert all((page.folder / url).is_file() for url in previews(image))


def test_a_result_elsewhere_is_copied_for_the_page(tmp_path):
    page = make(tmp_path / "shown/run", "../../elsewhere/a b.png")
    (image,) = facts(page.page)["images"]
    copy = page.folder / image["result"]
    assert copy.resolve().is_relative_to(page.folder)
    assert copy.read_bytes() == (tmp_path / "elsewhere/a b.png").read_bytes()
    assert Path(image["file"]).name == "a b.png"


def test_previews_are_small_and_the_zoom_has_every_pixel(tmp_path):
    with Gallery(tmp_path / "run", "run/best.pth", 7) as page:
        add(page, "large.png", cv2.resize(draw(20, 40), (2000, 1000)), stages=2)
        add(page, "small.png", draw(20, 1600))
    large, small = (images(page.folder)[name] for name in ("large.png", "small.png"))
    assert {read_image(page.folder / view["url"]).shape for view in large["views"]} == {(800, 1600, 3)}
    full = {view["label"]: read_image(page.folder / view["full"]).shape for view in large["views"] if "full" in view}
    assert full == {"Input": (1000, 2000, 3), "Stage 2": (1000, 2000, 3)}
    assert [view["side"] for view in large["views"]] == [2000, 1600, 2000, 1600]
    assert not any("full" in view for view in small["views"])
    assert read_image(page.folder / small["views"][0]["url"]).shape == (20, 1600, 3)
    assert all(path.suffix == ".jpg" for path in map(Path, previews(large)))


def test_the_pages_ask_for_nothing_from_outside(tmp_path):
    page = make(tmp_path / "run", "a.png")
    for file, links in ((page.page, ["data:,", "../index.html"]), (tmp_path / "index.html", ["data:,"])):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://|//[a-z]|@import|<script src|fetch\(|url\(|{{", text)
        assert re.findall(r'href="([^"]*)"', text) == links


def test_the_rain_layer_is_made_visible_by_a_gain_that_clips_little():
    O = np.full((50, 50, 3), 100, np.uint8)
    layer, gain = rain_layer(O, O - 20)
    assert gain == 8
    assert (layer == 160).all()
    layer, gain = rain_layer(O, O + 20)  # brightened
    assert (layer == 0).all()
    layer, gain = rain_layer(np.full_like(O, 255), np.zeros_like(O))
    assert gain == 1
    assert (layer == 255).all()


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_a_browser_draws_the_pages(tmp_path):
    with Gallery(tmp_path / "run", "run/best.pth", 7) as page:
        scores = [{"psnr": 20.0, "ssim": float("nan")}, {"psnr": 26.0, "ssim": float("nan")}]
        add(page, "<b>.png", scores=scores, ground_truth=draw(6, 8))
        add(page, "wide.png", draw(20, 2000), stages=3)
        page.add(Path("A/x.png"), page.folder / "wide.png", [draw(6, 8)] * 2)
        write_image(page.folder / "x_2.png", draw(6, 8))
        page.add(Path("B/x.png"), page.folder / "x_2.png", [draw(6, 8)] * 2)
    drawn = {}
    for file in (page.page, tmp_path / "index.html"):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=60)
        drawn[file] = done.stdout
    text = drawn[page.page].partition("<template")[0]
    assert text.count("<article") == 3 == text.count("aria-valuenow")
    assert len(re.findall("<li><a", text)) == len(re.findall('download="', text)) == 3
    assert [f'<h2 title="{Path(name).resolve()}">{name}<' in text for name in ("A/x.png", "B/x.png")] == [True, True]
    assert "&lt;b&gt;.png" in text
    assert 'href="run/index.html"' in drawn[tmp_path / "index.html"]
