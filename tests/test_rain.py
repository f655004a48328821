"""Rain: its model O = clip(B + R), the geometry of streaks, the figures of the styles, the command line."""

from dataclasses import replace
from statistics import NormalDist

import cv2
import numpy as np
import pytest

import rain
from base.errors import UserError
from base.images import read_pair
from rain import STYLES, RainStyle, Streaks


def one_kind(hard, turn: float = 0, length=40, width=1.5, coverage=0.2, level=40.0, peak=99.0, missing=()) -> RainStyle:
    """A style of one set of streaks in which only the places are random."""
    fixed = ((value, value) for value in (turn, length, width, coverage, level, peak))
    kind = Streaks(hard, (1, 1), *fixed, missing=tuple((share, share) for share in missing))
    return RainStyle(angle=0, streaks=(kind,))


def direction(layer: np.ndarray) -> float:
    """The structure tensor's angle over the whole layer in degrees; vertical = 0."""
    layer = cv2.GaussianBlur(layer.astype(np.float32), (0, 0), 1)
    dx, dy = cv2.Sobel(layer, cv2.CV_32F, 1, 0), cv2.Sobel(layer, cv2.CV_32F, 0, 1)
    return np.degrees(np.arctan2(2 * (dx * dy).mean(), (dx * dx - dy * dy).mean())) / 2


@pytest.mark.parametrize("name", STYLES)
def test_same_generator_same_rain(name):
    first, again, other = (rain.render(90, 70, STYLES[name], np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first.dtype == np.uint8
    assert first.shape == (90, 70)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", STYLES)
def test_rain_is_grey_added_and_clipped(name):
    clean = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    before = clean.copy()
    rainy = rain.add_rain(clean, STYLES[name], np.random.default_rng(1))
    layer = rain.render(80, 60, STYLES[name], np.random.default_rng(1))
    assert np.array_equal(rainy, np.minimum(clean.astype(int) + layer[..., None], 255))
    assert np.array_equal(clean, before)
    assert layer.max() > 0


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("size", [(1, 1), (2, 150), (150, 2), (7, 7)])
def test_sizes_below_a_streak(name, size):
    layers = [rain.render(*size, STYLES[name], np.random.default_rng(seed)) for seed in range(20)]
    assert all(layer.shape == size for layer in layers)
    assert any(layer.any() for layer in layers)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("turn", [0, 20, 40])
def test_direction(hard, turn):
    style = one_kind(hard, turn=turn)
    angles = [direction(rain.render(200, 200, style, np.random.default_rng(seed))) for seed in range(12)]
    assert np.allclose(np.abs(angles), turn, atol=3)
    if turn:  # to either side
        assert min(angles) < 0 < max(angles)


@pytest.mark.parametrize("name", [name for name in STYLES if name.startswith("intensity")])
def test_intensity_rain_falls_as_it_chose(name):
    """Its generator's first choice is the direction and the radius that the rain is then drawn with."""
    style, found = STYLES[name], {}
    for seed in range(60):
        angle, radius = style.choose(np.random.default_rng(seed))
        layer = rain.render(200, 200, style, np.random.default_rng(seed))
        assert direction(layer) == pytest.approx(angle, abs=3)
        across = (layer > layer.max() / 2).astype(np.uint8)
        _, _, boxes, _ = cv2.connectedComponentsWithStats(across)
        found.setdefault(radius, []).append(np.median(boxes[1:, 4]))
        assert angle in (0, 15, -15, 30, -30, 40, -40)
    left_out = {"s": {0.2}, "m": {0.4, 0.6}, "l": {0.8, 1.0}}.get(name[-1] if "_wo_" in name else "", set())
    assert set(found) == {0.2, 0.4, 0.6, 0.8, 1.0} - left_out
    if 1.0 in found:  # the radius is the streaks' size; a blur below half a pixel is hardly any
        assert np.mean(found[1.0]) > 1.2 * np.mean(found[min(found)])


def test_draw_records_direction_and_radius(tmp_path):
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((60, 80, 3), 90, np.uint8))
    rain.draw(tmp_path, tmp_path / "pairs", "intensity", 2, 5)
    rows = (tmp_path / "pairs" / "drawn.csv").read_text().splitlines()
    assert rows[0] == "image,degrees,radius"
    assert [row.split(",")[0] for row in rows[1:]] == ["a_x1.png", "a_x2.png", "b_x1.png", "b_x2.png"]
    for row in rows[1:]:
        file, angle, _ = row.split(",")
        joined = cv2.imread(str(tmp_path / "pairs" / file))[..., 0]
        assert direction(cv2.subtract(joined[:, 80:], joined[:, :80])) == pytest.approx(float(angle), abs=8)


def test_hard_streaks_have_their_length_and_end_square():
    layer = rain.render(400, 400, one_kind(True, length=30, width=1.0, coverage=0.01), np.random.default_rng(0))
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


@pytest.mark.parametrize("hard", [True, False])
def test_streaks_of_a_set_do_not_add_up_beyond_its_brightest(hard):
    style = one_kind(hard, coverage=0.9, level=40 if hard else 32, peak=1.25)
    layer = rain.render(300, 300, style, np.random.default_rng(0))
    assert layer.max() == 40
    assert (layer == 40).mean() > 0.1
    assert rain.render(300, 300, one_kind(False, coverage=0.9, level=32), np.random.default_rng(0)).max() > 50


def test_hard_streaks_add_up_where_they_are_said_to():
    """Of a set, and of lines that are each as bright as 0.65 and more, 1 in the mean."""
    kind = replace(one_kind(True, length=30, coverage=0.9).streaks[0], adds=True)
    layer = rain.render(300, 300, RainStyle(angle=0, streaks=(kind,)), np.random.default_rng(0))
    assert layer.max() > 5 * 40
    mean = np.log(1 / (1 - 0.9)) * 40  # lines over a pixel, times their level
    assert layer.mean() == pytest.approx(mean, rel=0.05)
    sparse = replace(kind, coverage=(0.002, 0.002), width=(1.0, 1.0))
    layer = rain.render(400, 400, RainStyle(angle=0, streaks=(sparse,)), np.random.default_rng(0))
    count, places, _, _ = cv2.connectedComponentsWithStats((layer > 2).astype(np.uint8))
    one_row = [np.bincount(places[row], layer[row], count)[1:].max() for row in range(0, 400, 40)]
    assert any(one_row)
    assert min(value for value in one_row if value) >= 0.65 * 40 - 4  # one pixel's worth, over two of them


@pytest.mark.parametrize("angle", [0, 7, -15, 40])
def test_a_stepped_line_leans_in_halves_of_a_pixel(angle):
    line = rain._stepped_line(41, angle)
    assert np.array_equal(line.sum(1), np.ones(41))
    assert set(np.unique(line)) <= {0, 0.5, 1}
    places = (line * np.arange(line.shape[1])).sum(1)
    even = line.shape[1] // 2 + np.tan(np.radians(angle)) * np.arange(20, -21, -1)  # a row lower, "/" is further left
    assert np.abs(places - even).max() <= 0.25 + 1e-6
    assert set(places % 1) <= {0, 0.5}


def stepped(**fixed) -> RainStyle:
    style = one_kind(**fixed)
    return replace(style, streaks=(replace(style.streaks[0], steps=True, adds=True),))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("turn", [0, 15, 40])
def test_stepped_streaks_lean_cover_and_shine_as_the_others(hard, turn):
    style = stepped(hard=hard, turn=turn, coverage=0.3, level=30)
    layers = [rain.render(200, 200, style, np.random.default_rng(seed)) for seed in range(12)]
    angles = [direction(layer) for layer in layers]
    assert np.allclose(np.abs(angles), turn, atol=3)
    if turn:
        assert min(angles) < 0 < max(angles)
    assert np.mean(layers) == pytest.approx(30 * (-np.log(1 - 0.3) if hard else 0.3), rel=0.08)


def test_stepped_lines_step_each_in_its_own_rows():
    """Lone lines are all alike, wherever they begin: 59 pixels (60, leaning) and one more at each softened end."""
    style = stepped(hard=True, turn=-10, length=60, width=1, coverage=0.002, level=150)
    layer = rain.render(600, 600, style, np.random.default_rng(2))
    count, places, boxes, _ = cv2.connectedComponentsWithStats((layer > 0).astype(np.uint8))
    lone = [i for i in range(1, count) if boxes[i, 3] == 61 and boxes[i, 2] < 15]
    shapes = []
    for i in lone:
        left, top, wide, high, _ = boxes[i]
        line = (layer * (places == i))[top : top + high, left : left + wide].astype(float)
        shapes.append(np.round(8 * line / line.max()))
    assert len(shapes) > 3
    assert all(np.array_equal(shape, shapes[0]) for shape in shapes)
    assert len({boxes[i, 1] % 6 for i in lone}) > 1  # rows from one step to the next: tan(10 degrees) = 1/5.7


@pytest.mark.parametrize("coverage", [0.2, 0.5])
def test_soft_streaks_cover_their_share_at_their_level_and_taper(coverage):
    style = one_kind(False, width=5, coverage=coverage, level=40)
    layers = np.stack([rain.render(300, 300, style, np.random.default_rng(seed)) for seed in range(4)])
    assert coverage < (layers > 0).mean() < coverage + 0.08  # the shift by a part of a pixel widens the edges
    assert layers.mean() == pytest.approx(coverage * 40, rel=0.07)
    steps = np.abs(np.diff(layers.astype(int), axis=1))
    assert steps.max() < 30 < np.abs(np.diff(layers.astype(int), axis=2)).max()  # even along, edges across


def test_a_crop_has_the_figures_of_a_picture():
    for hard in (True, False):
        style = one_kind(hard, turn=10)
        small = [rain.render(48, 48, style, np.random.default_rng(seed)) for seed in range(300)]
        large = [rain.render(480, 320, style, np.random.default_rng(seed)) for seed in range(6)]
        assert np.mean(small) == pytest.approx(np.mean(large), rel=0.08)
        assert np.std(small) == pytest.approx(np.std(large), rel=0.08)


@pytest.mark.parametrize("name", STYLES)
def test_a_crop_drawn_directly_has_the_figures_of_one_cut_from_a_picture(name):
    """Over many pictures: mean, percentiles and % of pixels above 8, and the means of the four edges."""
    cut, drawn = [], []
    for seed in range(400):
        rng = np.random.default_rng([1, seed])
        picture = rain.render(321, 481, STYLES[name], rng)
        top, left = rng.integers(321 - 63), rng.integers(481 - 63)
        cut.append(picture[top : top + 64, left : left + 64])
        around = (int(top), 321 - 64 - int(top))
        drawn.append(rain.render(64, 64, STYLES[name], np.random.default_rng([2, seed]), around))
    figures = [
        [layers.mean(), *np.percentile(layers, (90, 99)), 100 * (layers > 8).mean()]
        for layers in map(np.array, (cut, drawn))
    ]
    assert figures[1] == pytest.approx(figures[0], rel=0.12)
    drawn = np.array(drawn, float)
    edges = [drawn[:, 0].mean(), drawn[:, -1].mean(), drawn[:, :, 0].mean(), drawn[:, :, -1].mean()]
    assert edges == pytest.approx([drawn.mean()] * 4, rel=0.06)


@pytest.mark.parametrize("hard", [True, False])
def test_rain_is_weaker_where_streaks_are_missing(hard):
    """On the very borders a quarter and three quarters of the streaks' length; half a length inside nowhere."""
    coverage = 0.05 if hard else 0.2
    even, weak = (one_kind(hard, length=80, coverage=coverage, missing=missing) for missing in ((), (0.25, 0.75)))
    even, weak = (
        np.mean([rain.render(300, 300, style, np.random.default_rng(seed)).mean(1) for seed in range(150)], axis=0)
        for style in (even, weak)
    )
    share = [weak[rows].mean() / even.mean() for rows in (np.s_[:4], np.s_[40:240], np.s_[-4:])]
    if hard:  # of the 80 rows that a border's streaks have their middles in, a quarter above and three below
        expected = [0.75, 1, 0.25]
    else:  # the sum of less noise deviates less, and exceeds the threshold less often and by less
        along = np.convolve(np.ones(52), np.ones(28))

        def excess(taps):
            deviation = np.sqrt((along[taps] ** 2).sum() / (along**2).sum())
            over = NormalDist().inv_cdf(1 - coverage) / deviation
            return deviation * (NormalDist().pdf(over) - over * NormalDist().cdf(-over))

        expected = [excess(taps) / excess(np.s_[:]) for taps in (np.s_[20:], np.s_[:], np.s_[60:])]
    assert share == pytest.approx(expected, abs=0.06)


def test_a_part_of_a_picture_is_as_weak_as_it_lies():
    style = one_kind(True, length=80, coverage=0.05, missing=(0.5, 0.5))
    whole = np.mean([rain.render(200, 100, style, np.random.default_rng(seed)).mean(1) for seed in range(60)], axis=0)
    for top in (0, 20, 70, 120):
        drawn = [rain.render(80, 100, style, np.random.default_rng(seed), (top, 120 - top)) for seed in range(60)]
        assert np.abs(np.mean(drawn, axis=(0, 2)) - whole[top : top + 80]).mean() < 0.12 * whole.mean()


# Medians over pictures of: mean of R, its 99th percentile, % of pixels above 8 grey levels, each with room for chance.
# On a ramp from black to nearly white, as on photographs, clipping takes a part of R away.
FIGURES = {
    "rain100h": ((35, 65), (125, 190), (70, 95)),
    "rain100h_adding": ((35, 65), (125, 190), (65, 95)),
    "rain100h_varied": ((30, 65), (110, 190), (60, 95)),
    "rain100h_stepped": ((33, 63), (115, 180), (65, 95)),
    "rain100l": ((3.8, 7.5), (40, 75), (14, 23)),
    "rain800": ((9, 17), (38, 66), (40, 64)),
    **dict.fromkeys(("intensity", "intensity_wo_s", "intensity_wo_m", "intensity_wo_l"), ((6, 11), (28, 75), (27, 52))),
}


@pytest.mark.parametrize("name", STYLES)
def test_figures_of_the_styles(name):
    ramp = np.linspace(0, 230, 160).astype(np.uint8)
    clean = np.broadcast_to(ramp[None, :, None], (160, 160, 3)).copy()
    layers = [rain.render(160, 160, STYLES[name], np.random.default_rng([seed, 9])) for seed in range(60)]
    measured = [rain.measure(clean, cv2.add(clean, cv2.merge([layer] * 3)))[[0, 2, 3]] for layer in layers]
    for value, (lowest, highest) in zip(np.median(measured, axis=0), FIGURES[name], strict=True):
        assert lowest < value < highest
    angles = np.abs([direction(layer) for layer in layers])
    assert np.percentile(angles, 95) < (43 if name.startswith("intensity") else 28)
    assert min(layer.max() for layer in layers) > 8  # no picture without rain


def test_histogram_puts_a_slash_at_plus_45():
    clean = np.zeros((100, 100, 3), np.uint8)
    for start, end, bin_index in (((0, 99), (99, 0), 8), ((0, 0), (99, 99), 2), ((50, 0), (50, 99), 5)):
        rainy = cv2.line(clean.copy(), start, end, (90, 90, 90), 2)
        histogram = rain.angle_histogram(clean, rainy)
        assert histogram.shape == (12,)
        assert histogram.sum() == pytest.approx(1)
        assert histogram[bin_index] > 0.8
    assert rain.angle_histogram(clean, clean).sum() == 0


def test_measure():
    clean = np.full((10, 10, 3), 100, np.uint8)
    rainy = clean.copy()
    rainy[:2] += 50
    rainy[9] = 255
    rainy[8] -= 40  # darker is no rain
    assert rain.measure(clean, rainy) == pytest.approx([25.5, 60.5, 155, 30, 10, *[np.nan] * 5], nan_ok=True)


@pytest.mark.parametrize(("turn", "length", "expected"), [(0, 2000, 1.0), (20, 2000, 1.0), (0, 64, 0.5), (20, 16, 0.0)])
def test_streak_correlation_tells_the_length(turn, length, expected):
    """Two points of one line, 32 rows apart: of a box of 64 pixels, half is shared."""
    clean = np.full((400, 400, 3), 20, np.uint8)
    rainy = rain.add_rain(clean, one_kind(True, turn, length, coverage=0.05, level=60), np.random.default_rng(0))
    assert rain.streak_correlation(clean, rainy) == pytest.approx(expected, abs=0.1)
    saturated = rainy.copy()
    saturated[::5] = 255
    assert rain.streak_correlation(clean, saturated) == pytest.approx(expected, abs=0.1)
    assert np.isnan(rain.streak_correlation(clean[:32], rainy[:32]))
    assert np.isnan(rain.streak_correlation(clean, clean))


def test_border_shares_are_of_the_known_pixels():
    clean = np.full((64, 50, 3), 20, np.uint8)
    rainy = clean + np.uint8(40)
    rainy[:16] -= 30
    rainy[48:] += 40
    rainy[48:56] = 255
    mean = (16 * 10 + 32 * 40 + 8 * 80) / 56
    assert rain.border_shares(clean, rainy) == pytest.approx((10 / mean, 80 / mean))
    rainy[48:] = 255
    assert np.isnan(rain.border_shares(clean, rainy)[1])
    assert np.isnan(rain.border_shares(clean, clean)).all()


def test_spectral_figures_tell_crossing_and_stepped_streaks():
    clean = np.full((300, 300, 3), 20, np.uint8)

    def figures(*styles):
        layers = [rain.render(300, 300, style, np.random.default_rng(3)).astype(int) for style in styles]
        return rain.spectral_figures(clean, (clean + sum(layers)[..., None]).astype(np.uint8))

    line = {"hard": True, "coverage": 0.1, "width": 1.5, "length": 100}
    alone, crossed = figures(stepped(turn=5, **line)), figures(stepped(turn=5, **line), one_kind(turn=35, **line))
    assert alone[0] < 10
    assert 40 < crossed[0] < 60  # as much power in the one direction as in the other
    assert alone[1] > figures(one_kind(turn=5, **line))[1] + 3
    assert np.isnan(rain.spectral_figures(clean, clean)).all()
    assert np.isnan(rain.spectral_figures(clean, np.full_like(clean, 255))).all()
    assert np.isnan(rain.spectral_figures(clean[:60], clean[:60] + np.uint8(1))).all()


@pytest.fixture
def clean_folder(tmp_path):
    folder = tmp_path / "clean"
    folder.mkdir()
    for name, size in (("a.png", (40, 50)), ("b.jpg", (30, 60))):
        cv2.imwrite(str(folder / name), np.random.default_rng(0).integers(0, 200, (*size, 3), np.uint8))
    return folder


def test_draw_round_trip(clean_folder, tmp_path, capsys):
    target = tmp_path / "deep" / "pairs"
    arguments = ["draw", str(clean_folder), str(target), "--style", "rain800", "--count", "2", "--seed", "3"]
    rain.main(arguments)
    drawn = target / "drawn.txt"
    assert sorted(target.iterdir()) == [*(target / f"{name}.png" for name in ("a_x1", "a_x2", "b_x1", "b_x2")), drawn]
    assert drawn.read_text() == "drawn: rain800, 2 on each of 2 images, seed 3\n"
    clean, rainy = read_pair(target / "a_x1.png")
    assert np.array_equal(clean, cv2.imread(str(clean_folder / "a.png")))
    assert (rainy >= clean).all()
    assert (rainy > clean).any()
    first = {path.name: path.read_bytes() for path in target.iterdir()}
    assert first["a_x1.png"] != first["a_x2.png"]

    rain.main(arguments)  # a second run writes the same
    assert {path.name: path.read_bytes() for path in target.iterdir()} == first
    alone = tmp_path / "alone"  # an image's rain doesn't depend on its neighbours
    rain.main(["draw", str(clean_folder / "b.jpg"), str(alone), "--style", "rain800", "--seed", "3"])
    assert (alone / "b_x1.png").read_bytes() == first["b_x1.png"]

    rain.main(["compare", str(target), "--style", "rain100l", "--count", "3"])
    table = capsys.readouterr().out
    assert "Rain100L's published figures" in table
    assert "rain100l (12 rendered)" in table


def test_draw_on_the_clean_halves_of_pairs(clean_folder, tmp_path):
    rain.main(["draw", str(clean_folder / "a.png"), str(tmp_path / "pairs")])
    rain.main(["draw", "--pairs", str(tmp_path / "pairs"), str(tmp_path / "again"), "--style", "rain100l"])
    clean, rainy = read_pair(tmp_path / "again" / "a_x1_x1.png")
    assert np.array_equal(clean, cv2.imread(str(clean_folder / "a.png")))
    assert not np.array_equal(rainy, read_pair(tmp_path / "pairs" / "a_x1.png")[1])


def test_draw_errors(clean_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        rain.main(["draw", str(tmp_path / "empty"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="can't be read"):
        rain.main(["draw", str(tmp_path / "absent.png"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="another folder"):
        rain.main(["draw", str(clean_folder), str(clean_folder)])
    (clean_folder / "a.bmp").write_bytes(b"")
    with pytest.raises(UserError, match="two images called a"):
        rain.main(["draw", str(clean_folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--seed", "-1"], ["--style", "snow"], ["--count", "two"]])
def test_wrong_arguments(wrong, clean_folder, tmp_path):
    with pytest.raises(UserError, match=f"argument {wrong[0]}"):
        rain.main(["draw", str(clean_folder), str(tmp_path / "out"), *wrong])
