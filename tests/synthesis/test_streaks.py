"""Rendering: the model O = clip(B + R), the geometry of streaks, and that rain stays the same."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from synthesis import streaks
from synthesis.streaks import add_rain, picture_generator, render
from synthesis.styles import STYLES, RainStyle, Streaks


def one_set(
    hard, turn=0, length=40, width=1.5, coverage=0.2, level=40.0, peak=99.0, stepped=False, **rest
) -> RainStyle:
    """A style of one set of streaks in which only the places are random."""
    ranges = ((value, value) for value in (turn, length, width, coverage, level, peak))
    return RainStyle(angle=0, streaks=(Streaks(hard, (1, 1), *ranges, **rest),), stepped=stepped)


def layers(style, size: tuple[int, int], seeds: int) -> np.ndarray:
    return np.stack([render(*size, style, np.random.default_rng(seed)) for seed in range(seeds)])


def direction(layer: np.ndarray) -> float:
    """The structure tensor's angle over the whole layer in degrees; vertical = 0."""
    layer = cv2.GaussianBlur(layer.astype(np.float32), (0, 0), 1)
    dx, dy = cv2.Sobel(layer, cv2.CV_32F, 1, 0), cv2.Sobel(layer, cv2.CV_32F, 0, 1)
    return np.degrees(np.arctan2(2 * (dx * dy).mean(), (dx * dx - dy * dy).mean())) / 2


@pytest.mark.parametrize("name", STYLES)
def test_same_generator_same_rain(name):
    first, again, other = (render(90, 70, STYLES[name], np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first.dtype == np.uint8
    assert first.shape == (90, 70)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# Mean and deviation of R over twelve pictures. Versions of OpenCV differ by up to 0.3 %.
PINNED = {
    "rain100h": (45.111, 47.895),
    "rain100l": (6.692, 17.430),
    "rain800": (13.508, 15.944),
    "intensity": (8.320, 11.790),
    "intensity_wo_s": (8.253, 12.191),
    "intensity_wo_m": (8.223, 11.927),
    "intensity_wo_l": (8.225, 9.433),
}


@pytest.mark.parametrize("name", STYLES)
def test_rain_of_a_seed_stays_the_same(name):
    rain = layers(STYLES[name], (120, 160), seeds=12)
    assert (rain.mean(), rain.std()) == pytest.approx(PINNED[name], rel=0.004)


def test_a_picture_s_generator_is_a_function_of_seed_name_and_number():
    keys = ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 0))
    draws = [picture_generator(*key).random() for key in keys]
    assert draws[0] == draws[-1]
    assert len(set(draws)) == 4


@pytest.mark.parametrize("name", STYLES)
def test_rain_is_grey_added_and_clipped(name):
    clean = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    before = clean.copy()
    rainy = add_rain(clean, STYLES[name], np.random.default_rng(1))
    layer = render(80, 60, STYLES[name], np.random.default_rng(1))
    assert np.array_equal(rainy, np.minimum(clean.astype(int) + layer[..., None], 255))
    assert np.array_equal(clean, before)
    assert layer.max() > 0


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("size", [(1, 1), (2, 150), (150, 2), (7, 7)])
def test_sizes_below_a_streak(name, size):
    assert layers(STYLES[name], size, seeds=20).any()


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("turn", [0, 15, 40])
def test_direction(stepped, hard, turn):
    rain = layers(one_set(hard, turn, stepped=stepped), (200, 200), seeds=8)
    angles = [direction(layer) for layer in rain]
    assert np.allclose(np.abs(angles), turn, atol=3)
    if turn:  # to either side
        assert min(angles) < 0 < max(angles)


@pytest.mark.parametrize("name", [name for name in STYLES if name.startswith("intensity")])
def test_intensity_rain_has_the_direction_and_radius_that_it_chose(name):
    style, sizes = STYLES[name], {}
    for seed in range(60):
        angle, radius = style.choose(np.random.default_rng(seed))
        layer = render(200, 200, style, np.random.default_rng(seed))
        assert direction(layer) == pytest.approx(angle, abs=3)
        _, _, boxes, _ = cv2.connectedComponentsWithStats((layer > layer.max() / 2).astype(np.uint8))
        sizes.setdefault(radius, []).append(np.median(boxes[1:, 4]))
    left_out = {"s": {0.2}, "m": {0.4, 0.6}, "l": {0.8, 1.0}}.get(name[-1] if "_wo_" in name else "", set())
    assert set(sizes) == {0.2, 0.4, 0.6, 0.8, 1.0} - left_out
    if 1.0 in sizes:  # the larger the radius, the larger the streaks
        assert np.mean(sizes[1.0]) > 1.2 * np.mean(sizes[min(sizes)])


def test_hard_streaks_have_their_length_and_end_square():
    layer = layers(one_set(True, length=30, width=1.0, coverage=0.01), (400, 400), seeds=1)[0]
    _, _, boxes, _ = cv2.connectedComponentsWithStats((layer > 2).astype(np.uint8))
    inside = (boxes[:, 1] > 0) & (boxes[:, 1] + boxes[:, 3] < 400)
    inside[0] = False  # the background
    assert inside.sum() > 20
    assert np.median(boxes[inside, 3]) == 30
    assert set(boxes[inside, 2]) >= {2, 3}  # one pixel wide, anywhere between the columns
    alone = boxes[inside & (boxes[:, 3] == 30) & (boxes[:, 2] <= 3)]
    for left, top, width, height, _ in alone:
        assert np.ptp(layer[top : top + height, left : left + width], axis=0).max() == 0  # constant along the streak
        assert 0.54 * 40 - 2 < layer[top, left : left + width].sum() < 40 + 2  # one pixel's worth, over two or three


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("hard", [True, False])
def test_streaks_of_a_set_are_limited_to_its_brightest(hard, stepped):
    style = one_set(hard, coverage=0.9, level=40 if hard else 32, peak=1.25, stepped=stepped)
    layer = layers(style, (300, 300), seeds=1)
    assert layer.max() == 40
    assert (layer == 40).mean() > 0.1
    assert layers(one_set(False, coverage=0.9, level=32, stepped=stepped), (300, 300), seeds=1).max() > 50


def test_hard_streaks_add_up_where_the_style_says_so():
    dense = one_set(True, length=30, coverage=0.9, stepped=True, adds=True)
    layer = layers(dense, (300, 300), seeds=1)
    assert layer.max() > 5 * 40
    assert layer.mean() == pytest.approx(np.log(1 / (1 - 0.9)) * 40, rel=0.05)  # lines per pixel, times their level
    sparse = one_set(True, length=60, width=1.0, coverage=0.004, stepped=True, adds=True)
    rain = layers(sparse, (600, 600), seeds=1)[0]
    _, places, boxes, _ = cv2.connectedComponentsWithStats((rain > 2).astype(np.uint8))
    middles = [
        rain[top + height // 2][places[top + height // 2] == i].sum() for i, (_, top, _, height, _) in lone(boxes)
    ]
    assert len(middles) > 5
    assert min(middles) >= 0.65 * 40 - 2


def lone(boxes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Components as high as one stepped line of 60 pixels, and narrow."""
    return [(i, box) for i, box in enumerate(boxes) if 58 <= box[3] <= 62 and box[2] < 15]


@pytest.mark.parametrize("angle", [0, 7, -15, 40])
def test_a_stepped_line_leans_in_halves_of_a_pixel(angle):
    line = streaks._stepped_line(41, angle)
    assert np.array_equal(line.sum(1), np.ones(41))
    assert set(np.unique(line)) <= {0, 0.5, 1}
    places = (line * np.arange(line.shape[1])).sum(1)
    even = line.shape[1] // 2 + np.tan(np.radians(angle)) * np.arange(20, -21, -1)  # "/" is further left lower down
    assert np.abs(places - even).max() <= 0.25 + 1e-6
    assert set(places % 1) <= {0, 0.5}


def test_stepped_lines_step_in_rows_of_their_own():
    """Lone lines are all alike wherever they start: 59 pixels (60, leaning) and one more at each softened end."""
    style = one_set(True, turn=-10, length=60, width=1, coverage=0.002, level=150, stepped=True, adds=True)
    layer = render(600, 600, style, np.random.default_rng(2))
    _, places, boxes, _ = cv2.connectedComponentsWithStats((layer > 0).astype(np.uint8))
    shapes, rows = [], set()
    for i, (left, top, wide, high, _) in ((i, box) for i, box in lone(boxes) if box[3] == 61):
        line = (layer * (places == i))[top : top + high, left : left + wide].astype(float)
        shapes.append(np.round(8 * line / line.max()))
        rows.add(top % 6)
    assert len(shapes) > 3
    assert all(np.array_equal(shape, shapes[0]) for shape in shapes)
    assert len(rows) > 1  # a step every 5.7 rows: 1 / tan(10 degrees)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("coverage", [0.2, 0.5])
def test_soft_streaks_cover_their_share_at_their_level_and_taper(coverage, stepped):
    rain = layers(one_set(False, width=5, coverage=coverage, level=40, stepped=stepped), (300, 300), seeds=12)
    assert coverage - 0.03 < (rain > 0).mean() < coverage + 0.08  # the shift by part of a pixel widens the edges
    assert rain.mean() == pytest.approx(coverage * 40, rel=0.07)
    along, across = (np.abs(np.diff(rain.astype(int), axis=axis)).max() for axis in (1, 2))
    assert along < 30
    assert stepped or across > 30


CROPPED = {
    "hard": one_set(True, 10),
    "soft": one_set(False, 10),
    "stepped": one_set(True, 10, stepped=True),
    "intensity": replace(STYLES["intensity"], radii=(0.6,), directions=(15,)),
}


@pytest.mark.parametrize("kind", CROPPED)
def test_a_crop_has_the_figures_of_a_picture(kind):
    """Streaks enter from outside: a crop that is rendered alone is as dense, bright and even as a part of a picture."""
    style = CROPPED[kind]
    small, large = layers(style, (48, 48), seeds=300), layers(style, (480, 320), seeds=6)
    assert small.mean() == pytest.approx(large.mean(), rel=0.08)
    assert small.std() == pytest.approx(large.std(), rel=0.08)
    edges = [small[:, 0].mean(), small[:, -1].mean(), small[:, :, 0].mean(), small[:, :, -1].mean()]
    assert edges == pytest.approx([small.mean()] * 4, rel=0.12)
