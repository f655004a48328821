"""Crops and their rain: aligned, a function of (seed, step, sample), without padding; and the first scan."""

import dataclasses
import re
import shlex
import shutil

import cv2
import numpy as np
import pytest
import torch

import convert
import dataset as data
import losses
from base.errors import BadArgument, DamagedFile, Mismatch, MissingFile, UserError
from conftest import make_pair
from dataset import CropDataset, data_path, list_pairs, random_crop, read_whole, to_tensor
from datasets.loader import training_batches
from settings import Settings, override
from synthesis.styles import STYLES

SETTINGS = override(Settings(), {"patch_size": 16, "batch_size": 4, "steps": 6, "seed": 3})


def dataset(data_dir, **values):
    settings = dataclasses.replace(SETTINGS, **values)
    return CropDataset(data_dir / "train", settings, losses.label_reader(settings, data_dir / "train"))


def batches(data_dir, first_step=0, **values):
    return list(training_batches(dataset(data_dir, **values), first_step, torch.device("cpu")))


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(x, y) for a, b in zip(some, others, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_read_whole_pair(data_dir):
    O, B = read_whole(data_dir / "test" / "0.png")
    joined = cv2.imread(str(data_dir / "test" / "0.png"))  # BGR, as the published code reads it
    assert torch.equal(B, to_tensor(joined[:, :48]))
    assert torch.equal(O, to_tensor(joined[:, 48:]))


def test_more_data_are_trained_on_as_they_are_stored(data_dir, tmp_path):
    """Beside clean images with synthetic rain; from several folders."""
    folders = [tmp_path / "near", tmp_path / "more"]
    for folder, name, seed in zip(folders, ("near.png", "far.png"), (71, 70), strict=True):
        folder.mkdir()
        B, O = make_pair(40, 48, seed=seed)
        cv2.imwrite(str(folder / name), np.hstack([B, O]))
    with_more = dataset(data_dir, more_data=tuple(map(str, folders)), rain="rain100h", patch_size=40)
    names = [path.name for path in with_more.paths]
    assert names == [*(path.name for path in list_pairs(data_dir / "train")), "near.png", "far.png"]
    where = list(data._order(SETTINGS.seed, 0, len(names))).index(names.index("far.png"))
    rainy, clean = with_more[where]
    crops = [(to_tensor(O[:, x : x + 40]), to_tensor(B[:, x : x + 40])) for x in range(48 - 40 + 1)]
    assert any(torch.equal(rainy, crop[0]) and torch.equal(clean, crop[1]) for crop in crops)


def test_excluded_backgrounds_are_not_trained_on(data_dir, tmp_path):
    """Neither the same pair nor another rendering of its background, nor that background as a clean image."""
    paths = list_pairs(data_dir / "train")
    (tmp_path / "test").mkdir()
    joined = cv2.imread(str(paths[1]))
    width = joined.shape[1] // 2
    joined[:, width:] = joined[:, width:] // 2  # other rain
    cv2.imwrite(str(tmp_path / "test" / "other_name.png"), joined)
    values = {"exclude": (str(tmp_path / "test"),)}
    assert dataset(data_dir, **values).paths == [path for path in paths if path != paths[1]]
    assert paths[1] not in dataset(data_dir, **values, cache_gib=0.0).paths
    assert len(batches(data_dir, **values)) == SETTINGS.steps
    (tmp_path / "clean").mkdir()
    for path in paths:
        cv2.imwrite(str(tmp_path / "clean" / path.name), cv2.imread(str(path))[:, :width])
    synthetic = dataset(data_dir, **values, rain="rain100h", clean_dir=str(tmp_path / "clean"))
    assert [path.name for path in synthetic.paths] == [path.name for path in paths if path != paths[1]]
    with pytest.raises(BadArgument):
        dataset(data_dir, exclude=(str(data_dir / "train"),))


def test_every_excluded_folder_is_read(data_dir, tmp_path):
    paths = list_pairs(data_dir / "train")
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, path in zip(folders, paths[1:], strict=False):
        folder.mkdir()
        shutil.copy(path, folder)
    assert dataset(data_dir, exclude=tuple(map(str, folders))).paths == [paths[0], paths[4]]


@pytest.mark.parametrize("style", ["", "rain100h"])
def test_crops_differ_by_seed_step_and_sample(data_dir, style):
    crops = torch.cat([O for O, _ in batches(data_dir, steps=20, rain=style)])
    assert len(crops) == 80
    assert len({crop.numpy().tobytes() for crop in crops}) > 70
    assert not same(batches(data_dir, rain=style), batches(data_dir, rain=style, seed=4))


def test_an_epoch_goes_through_all_pairs(data_dir, monkeypatch):
    seen = []
    monkeypatch.setattr("dataset.random_crop", lambda images, *_: seen.append(id(images[0])) or images)
    crops = dataset(data_dir)
    for sample in range(15):
        crops[sample]
    epochs = [seen[0:5], seen[5:10], seen[10:15]]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_crops_without_room_in_memory_are_the_same(data_dir):
    crops = dataset(data_dir, cache_gib=0.0)
    assert not crops.kept
    assert same([crops[i] for i in range(6)], [dataset(data_dir)[i] for i in range(6)])


@pytest.mark.parametrize("aug_data", ["none", "rotate", "quarter_turns", "flip", "scale"])
def test_crops_of_both_images_are_aligned(aug_data):
    """O = B + 40 everywhere, so their crops must differ by 40 everywhere, to the rounding of interpolation."""
    B, _ = make_pair(40, 50)
    for seed in range(20):
        O, crop = random_crop((B // 2 + 40, B // 2), 24, aug_data, np.random.default_rng(seed))
        assert O.shape == (24, 24, 3)
        assert np.abs(O.astype(int) - crop - 40).max() <= 1


@pytest.mark.parametrize("aug_data", ["rotate", "scale"])
@pytest.mark.parametrize(("height", "width"), [(40, 50), (24, 24), (25, 60), (24, 25)])
def test_rotated_crops_contain_no_padding(height, width, aug_data, monkeypatch):
    """Nor is there an endless loop for an image that is hardly larger than the crop."""
    white, calls, reach = np.full((height, width, 3), 255, np.uint8), [], data._reach

    def counted(*how):
        calls.append(how)
        assert len(calls) < 40, "an endless loop"
        return reach(*how)

    monkeypatch.setattr(data, "_reach", counted)
    for seed in range(200):
        crops = random_crop((white, white, white[..., 0]), 24, aug_data, np.random.default_rng(seed))
        assert [crop.shape for crop in crops] == [(24, 24, 3), (24, 24, 3), (24, 24)]
        assert min(crop.min() for crop in crops) == 255
        calls.clear()


def test_turning_turns_by_up_to_30_degrees():
    """The gradient of a ramp tells the angle of each crop."""
    ramp = np.repeat((np.arange(120) * 2).astype(np.uint8)[None, :, None].repeat(120, 0), 3, axis=2)
    angles = []
    for seed in range(200):
        crop, _ = random_crop((ramp, ramp), 32, "rotate", np.random.default_rng(seed))
        down, right = np.gradient(crop[..., 0].astype(float))
        angles.append(np.rad2deg(np.arctan2(down.mean(), right.mean())))
    assert -31 < min(angles) < -25
    assert 25 < max(angles) < 31
    assert abs(np.mean(angles)) < 4


def test_scale_turns_scales_and_mirrors():
    """Two channels tell the place in the image that each pixel of a crop was taken from."""
    y, x = np.mgrid[:120, :120]
    image = np.stack([2 * x, 2 * y, x], 2).astype(np.uint8)
    scales, angles, mirrored = [], [], []
    for seed in range(200):
        (crop,) = random_crop((image,), 32, "scale", np.random.default_rng(seed))
        assert crop.shape == (32, 32, 3)
        (x_down, x_right), (y_down, y_right) = (
            [slope.mean() / 2 for slope in np.gradient(crop[..., channel].astype(float))] for channel in (0, 1)
        )
        area = x_right * y_down - x_down * y_right
        mirrored.append(area < 0)
        scales.append(abs(area) ** -0.5)
        # Lengths and right angles are the image's, but for the scale.
        assert np.hypot(x_right, y_right) * scales[-1] == pytest.approx(1, abs=0.02)
        assert np.hypot(x_down, y_down) * scales[-1] == pytest.approx(1, abs=0.02)
        angles.append(np.rad2deg(np.arctan2(-x_down if area > 0 else x_down, y_down)))
    assert 0.69 < min(scales) < 0.73
    assert 1.36 < max(scales) < 1.42
    assert abs(np.mean(scales) - 1.05) < 0.05
    assert -31 < min(angles) < -25
    assert 25 < max(angles) < 31
    assert 80 < sum(mirrored) < 120


def test_flip_comes_about_as_often_as_not():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None].repeat(64, 0), 3, axis=2)
    slopes = []
    for seed in range(200):
        crop, _ = random_crop((ramp, ramp), 8, "flip", np.random.default_rng(seed))
        slopes.append(int(crop[0, 1, 0]) - int(crop[0, 0, 0]))
    assert set(slopes) == {-1, 1}
    assert 80 < slopes.count(1) < 120


def test_quarter_turns_come_about_equally_often():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None].repeat(64, 0), 3, axis=2)
    turns = []
    for seed in range(200):
        crop, _ = random_crop((ramp, ramp), 8, "quarter_turns", np.random.default_rng(seed))
        down, right = (float(gradient.mean()) for gradient in np.gradient(crop[..., 0].astype(float)))
        turns.append((round(down), round(right)))
    assert {turn: turns.count(turn) > 30 for turn in set(turns)} == {
        (0, 1): True,
        (0, -1): True,
        (1, 0): True,
        (-1, 0): True,
    }


def test_every_place_of_the_image_is_cut():
    image = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40, 1).astype(np.float32).repeat(3, 2)
    corners = [random_crop((image, image), 38, "none", np.random.default_rng(seed))[0][0, 0, 0] for seed in range(200)]
    assert {int(corner) for corner in corners} == {row * 40 + column for row in range(3) for column in range(3)}


@pytest.fixture
def clean_dir(tmp_path):
    """Clean images that are grey all over, each in a level of its own, so that a test can tell them apart."""
    folder = tmp_path / "clean"
    folder.mkdir()
    for name, level in (("a.png", 60), ("b.png", 220)):
        cv2.imwrite(str(folder / name), np.full((30, 20), level, np.uint8))
    return folder


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("aug_data", ["none", "rotate", "quarter_turns"])
def test_synthetic_rain_is_grey_added_and_clipped(data_dir, clean_dir, style, aug_data):
    """`B` is the clean crop, `O = clip(B + R)` with one grey R >= 0."""
    crops = dataset(data_dir, rain=style, clean_dir=str(clean_dir), aug_data=aug_data, steps=20)
    levels = set()
    for O, B in (crops[sample] for sample in range(40)):
        assert O.shape == B.shape == (3, 16, 16)
        assert B.min() == B.max()
        levels.add(int(B.max()))
        assert (O >= B).all()
        assert (O[:1] == O).all()  # on grey, grey rain leaves grey
    assert levels == {60, 220}
    clipped = torch.stack([crops[sample][0] for sample in range(40)]).max()
    assert clipped == 255 or style != "rain100h"


def test_synthetic_rain_is_added_to_the_pairs_clean_halves(data_dir):
    stored, synthetic = batches(data_dir), batches(data_dir, rain="rain100h")
    for (O, B), (rainy, clean) in zip(stored, synthetic, strict=True):
        assert torch.equal(B, clean)
        assert not torch.equal(O, rainy)
        assert rainy.float().mean() > clean.float().mean() + 10


def test_one_crop_has_other_rain_in_another_step(data_dir, clean_dir):
    (clean_dir / "b.png").unlink()
    rainy = [O for O, _ in batches(data_dir, rain="rain100h", clean_dir=str(clean_dir), steps=20)]
    assert len({crop.numpy().tobytes() for crop in torch.cat(rainy)}) == 80


def test_only_clean_halves_are_kept(data_dir):
    """Not views of the joined images, which are twice as large."""
    crops = dataset(data_dir, rain="rain100l")
    assert all(len(images) == 1 and images[0].base is None for images in crops.kept.values())
    size = sum(images[0].nbytes for images in crops.kept.values()) / 2**30
    assert len(dataset(data_dir, rain="rain100l", cache_gib=size).kept) == 5
    assert len(dataset(data_dir, cache_gib=size).kept) == 2


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda folder: shutil.rmtree(folder), MissingFile),
        (lambda folder: [path.unlink() for path in folder.iterdir()], MissingFile),
        (lambda folder: cv2.imwrite(str(folder / "b.png"), np.zeros((15, 40))), Mismatch),
        (lambda folder: (folder / "a.png").write_text("text"), DamagedFile),
    ],
)
def test_clean_images_that_are_refused(data_dir, clean_dir, spoil, error):
    spoil(clean_dir)
    with pytest.raises(error):
        dataset(data_dir, rain="rain100h", clean_dir=str(clean_dir))


# ---------------------------------------------------------------- labels


def classes(B):
    """Labels that follow from a clean image (.., H, W, 3): one of three, or none where it is bright."""
    level = np.asarray(B)[..., 0].astype(int)
    return np.select([level < 60, level < 110, level < 160], [18, 0, 7], 255).astype(np.uint8)


@pytest.fixture
def label_dir(data_dir):
    """Labels of all pairs but the last."""
    folder = data_dir / "train" / "label"
    folder.mkdir()
    for path in list_pairs(data_dir / "train")[:-1]:
        cv2.imwrite(str(folder / path.name), classes(np.hsplit(cv2.imread(str(path)), 2)[0]))
    return folder


def labelled(data_dir, **values):
    """Of training pairs, all with labels: crops (B, labels) as numpy, of 40 samples."""
    (data_dir / "train" / "4.png").unlink()
    crops = dataset(data_dir, loss="php", **values)
    assert crops.read_labels
    for O, B, labels in (crops[sample] for sample in range(40)):
        assert (O.dtype, B.dtype, labels.dtype) == (torch.uint8, torch.uint8, torch.int64)
        assert (O.shape, labels.shape) == (B.shape, B.shape[1:])
        yield B.permute(1, 2, 0).numpy(), labels.numpy()


@pytest.mark.parametrize("style", ["", "rain100h"])
@pytest.mark.parametrize("aug_data", ["none", "quarter_turns", "flip"])
def test_labels_are_cut_and_turned_with_their_pair(data_dir, label_dir, aug_data, style):
    seen = set()
    for B, labels in labelled(data_dir, aug_data=aug_data, rain=style):
        assert (labels == classes(B)).all()
        seen |= set(np.unique(labels))
    assert seen == {0, 7, 18, 255}


@pytest.mark.parametrize("aug_data", ["rotate", "scale"])
def test_labels_between_pixels_are_the_nearest_ones(aug_data):
    """Where the image is its own place, labels are it too, to half a pixel and without bias; and they don't mix."""
    for place in np.mgrid[:90, :90].astype(np.uint8):
        crops = [
            random_crop((np.stack([place] * 3, 2), place, place % 2 * 200), 32, aug_data, np.random.default_rng(seed))
            for seed in range(50)
        ]
        away = np.array([labels.astype(float) - image[..., 0] for image, labels, _ in crops])
        assert np.abs(away).max() <= 1  # the image is rounded, too
        assert abs(away.mean()) < 0.02
        assert set(np.unique([stripes for *_, stripes in crops])) == {0, 200}


@pytest.mark.parametrize("aug_data", ["rotate", "scale"])
def test_labels_of_turned_crops_are_those_of_their_pair(data_dir, label_dir, aug_data):
    """But for pixels at the classes' edges."""
    found = list(labelled(data_dir, aug_data=aug_data))
    assert set(np.unique([labels for _, labels in found])) == {0, 7, 18, 255}
    assert np.mean([(labels != classes(B)).mean() for B, labels in found]) < 0.08
    assert np.mean([(labels[:, ::-1] != classes(B)).mean() for B, labels in found]) > 0.3


def test_labels_of_clean_images_lie_beside_them(data_dir, clean_dir):
    (clean_dir / "label").mkdir()
    cv2.imwrite(str(clean_dir / "label" / "a.png"), np.full((30, 20), 3, np.uint8))
    crops = dataset(data_dir, loss="php", rain="intensity", clean_dir=str(clean_dir))
    found = {(int(B.max()), *labels.unique().tolist()) for _, B, labels in (crops[sample] for sample in range(4))}
    assert found == {(60, 3), (220, 255)}


def test_a_missing_label_is_255_all_over(data_dir, label_dir):
    crops = dataset(data_dir, loss="php")
    without = list_pairs(data_dir / "train").index(data_dir / "train" / "4.png")
    ignored = [bool((crops[sample][2] == 255).all()) for sample in range(5)]
    assert ignored == [index == without for index in data._order(SETTINGS.seed, 0, 5)]


@pytest.mark.parametrize("style", ["", "rain100h"])
def test_labels_do_not_depend_on_the_workers_nor_on_the_memory(data_dir, label_dir, style):
    values = {"loss": "php", "aug_data": "scale", "rain": style}
    wanted = batches(data_dir, **values)
    assert [len(batch) for batch in wanted] == [3] * SETTINGS.steps
    assert same(wanted, batches(data_dir, **values, num_workers=2))
    assert same(wanted, batches(data_dir, **values, cache_gib=0.0))
    assert same(wanted[4:], batches(data_dir, first_step=4, **values))


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((40, 96)), Mismatch),
        (np.zeros((40, 48, 3)), Mismatch),
        (np.zeros((40, 48), np.uint16), Mismatch),
        (np.full((40, 48), 19), Mismatch),
        (np.full((40, 48), 254), Mismatch),
        (None, DamagedFile),
    ],
)
def test_labels_that_are_refused(data_dir, label_dir, image, error):
    """At the start, and only where they are trained on."""
    if image is None:
        (label_dir / "2.png").write_text("text")
    else:
        cv2.imwrite(str(label_dir / "2.png"), image if image.dtype == np.uint16 else image.astype(np.uint8))
    with pytest.raises(error, match=r"2\.png"):
        dataset(data_dir, loss="php")
    for values in ({"loss": "mse"}, {"loss": "php", "segmentation_weight": 0.0}):
        crops = dataset(data_dir, **values)
        assert len(crops[0]) == 2


def test_without_a_folder_there_are_no_labels(data_dir):
    assert len(dataset(data_dir, loss="php")[0]) == 2


# ---------------------------------------------------------------- bad input


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(MissingFile):
        list_pairs(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(MissingFile):
        list_pairs(tmp_path / "train")


def write_kind(folder, kind: str):
    """Three pairs below `folder`: in folders of clean and of rainy images, as files with these words, or joined."""
    for k in range(3):
        B, O = make_pair(40, 48, k)
        files = {
            "folders": {f"input/{k}.png": O, f"target/{k}.png": B},
            "names": {f"rain-{k}.png": O, f"norain-{k}.png": B},
            "joined": {f"{k}.png": np.hstack([B, O])},
        }[kind]
        for name, image in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name), image)


@pytest.mark.parametrize(
    ("places", "asked"),
    [
        ({"": "folders"}, "train"),
        ({"": "joined"}, "train"),
        ({"": "joined"}, "test"),
        ({"": "folders"}, "test"),
        ({"": "names"}, "val"),
        ({"train": "folders", "test": "folders"}, "train"),
        ({"train": "names"}, "train"),
        ({"train": "joined"}, "val"),
        ({"train": "joined", "test": "folders"}, "test"),
    ],
)
def test_the_command_that_converts_what_is_there_is_shown_and_works(tmp_path, places, asked):
    folder = tmp_path / "my pairs"
    for place, kind in places.items():
        write_kind(folder / place, kind)
    with pytest.raises(UserError) as error:
        list_pairs(folder / asked)
    command = re.search(r"python \S*config/convert\.py .*", str(error.value))[0]
    assert convert.main(shlex.split(command)[2:]) == 0
    made = {path.parent.name for path in (tmp_path / "my pairs_pairs").rglob("*.png")}
    if places.keys() == {""} and asked == "test":
        assert made == {"test"}
    else:
        assert made == {"train", "val"} | ({"test"} & places.keys())
    assert len(list_pairs(tmp_path / "my pairs_pairs" / asked)) == {"train": 2, "val": 1, "test": 3}[asked]


def test_other_folders_of_a_training_say_how_to_convert_them_too(data_dir, tmp_path):
    write_kind(tmp_path / "more", "folders")
    write_kind(tmp_path / "named", "names")
    for name, error in (("more", MissingFile), ("named", Mismatch)):
        for setting in ("more_data", "exclude"):
            with pytest.raises(error, match=f"convert.py own --train {tmp_path / name} "):
                dataset(data_dir, **{setting: [str(tmp_path / name)]})


def single_pictures(folder, width: int = 96):
    folder.mkdir()
    for k in range(6):
        cv2.imwrite(str(folder / f"{k}.png"), np.random.default_rng(k).integers(0, 256, (40, width, 3), np.uint8))
    return folder


def test_single_pictures_are_refused_where_pairs_are_needed(data_dir, tmp_path):
    """The folder that holds them is named; as clean images they are as they should be."""
    single = single_pictures(tmp_path / "single")
    for values in ({"more_data": (str(single),)}, {"rain": "rain100l", "more_data": (str(single),)}):
        with pytest.raises(Mismatch, match=str(single)):
            dataset(data_dir, **values)
    with pytest.raises(Mismatch, match=str(single)):
        list_pairs(single)
    assert len(dataset(data_dir, rain="rain100l", clean_dir=str(single)).paths) == 6


@pytest.mark.parametrize("width", [48, 47])
def test_excluded_may_be_clean_images(data_dir, tmp_path, width):
    """They are not cut in halves, be their widths even or odd."""
    (tmp_path / "clean").mkdir()
    for name in ("1.png", "3.png"):
        clean = cv2.imread(str(data_dir / "train" / name))[:, :48]
        cv2.imwrite(str(tmp_path / "clean" / name), cv2.resize(clean, (width, 40), interpolation=cv2.INTER_AREA))
    left = dataset(data_dir, exclude=(str(tmp_path / "clean"),)).paths
    assert [path.name for path in left] == ["0.png", "2.png", "4.png"]


def test_a_data_set_is_not_converted_again(data_dir, tmp_path):
    """Its validation pairs must not become a test set: the command that is shown adds test pairs."""
    shutil.rmtree(data_dir / "test")
    with pytest.raises(MissingFile) as error:
        list_pairs(data_dir / "test")
    words = shlex.split(re.search(r"python \S*config/convert\.py .*", str(error.value))[0])[2:]
    write_kind(tmp_path / "more", "folders")
    before = sorted(data_dir.rglob("*.png"))
    assert convert.main([str(tmp_path / "more") if word == "DIR" else word for word in words]) == 0
    assert sorted(path for path in data_dir.rglob("*.png") if path.parent.name != "test") == before
    assert len(list_pairs(data_dir / "test")) == 3


def test_the_folder_that_is_meant_is_named(data_dir, tmp_path):
    for folder, meant in ((data_dir, data_dir / "train"), (data_dir / "train" / "train", data_dir)):
        with pytest.raises(MissingFile, match=f"{meant}[?]$"):
            list_pairs(folder)
    with pytest.raises(MissingFile, match="no folder"):
        list_pairs(tmp_path / "nowhere")


def spoil(path, kind):
    if kind == "no image":
        path.write_text("not an image")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        height, width = {"odd": (40, 97), "small": (15, 96)}[kind]
        cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("kind", "error"), [("no image", DamagedFile), ("cut off", DamagedFile), ("odd", Mismatch), ("small", Mismatch)]
)
def test_first_scan_refuses(data_dir, kind, error):
    spoil(data_dir / "train" / "3.png", kind)
    with pytest.raises(error, match=r"3\.png"):
        dataset(data_dir)


def test_data_path_without_data_dir_is_the_built_in_set(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(data.builtin, "make_builtin", calls.append)
    folder = data_path(Settings())
    assert folder.parts[-2:] == ("data", "builtin")
    assert data_path(override(Settings(), {"data_dir": str(folder)})) == folder
    assert calls == [folder, folder]
    assert data_path(override(Settings(), {"data_dir": str(tmp_path)})) == tmp_path
