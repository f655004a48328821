"""Figures of rain: known values on rain that is made for it."""

import cv2
import numpy as np
import pytest

from base.images import write_image
from synthesis.measure import angle_histogram, comparison, measure, streak_correlation
from synthesis.streaks import add_rain, picture_generator
from synthesis.styles import STYLES, RainStyle, Streaks


def test_histogram_puts_a_slash_at_plus_45():
    clean = np.zeros((100, 100, 3), np.uint8)
    for start, end, index in (((0, 99), (99, 0), 8), ((0, 0), (99, 99), 2), ((50, 0), (50, 99), 5)):
        histogram = angle_histogram(clean, cv2.line(clean.copy(), start, end, (90, 90, 90), 2))
        assert histogram.shape == (12,)
        assert histogram.sum() == pytest.approx(1)
        assert histogram[index] > 0.8
    assert angle_histogram(clean, clean).sum() == 0


def test_measure():
    clean = np.full((10, 10, 3), 100, np.uint8)
    rainy = clean.copy()
    rainy[:2] += 50
    rainy[9] = 255
    rainy[8] -= 40  # darker is no rain
    assert measure(clean, rainy) == pytest.approx([25.5, 60.5, 155, 30, 10, np.nan], nan_ok=True)


@pytest.mark.parametrize(("turn", "length", "expected"), [(0, 2000, 1.0), (20, 2000, 1.0), (0, 64, 0.5), (20, 16, 0.0)])
def test_streak_correlation_tells_the_length(turn, length, expected):
    """Two points of one line, 32 rows apart: half of a box of 64 pixels is shared."""
    clean = np.full((400, 400, 3), 20, np.uint8)
    ranges = ((value, value) for value in (turn, length, 1.5, 0.05, 60))
    style = RainStyle(angle=0, streaks=(Streaks(True, (1, 1), *ranges),))
    rainy = add_rain(clean, style, np.random.default_rng(0))
    assert streak_correlation(clean, rainy) == pytest.approx(expected, abs=0.1)
    rainy[::5] = 255  # saturated pixels are left out
    assert streak_correlation(clean, rainy) == pytest.approx(expected, abs=0.1)
    assert np.isnan(streak_correlation(clean[:32], rainy[:32]))
    assert np.isnan(streak_correlation(clean, clean))


def test_comparison_has_percentiles_of_real_and_synthetic_rain(tmp_path):
    B = np.full((60, 80, 3), 20, np.uint8)
    for number, level in enumerate((10, 30, 50)):
        write_image(tmp_path / f"{number}.png", np.hstack([B, B + np.uint8(level)]))
    paths = sorted(tmp_path.iterdir())
    rows = {line[:16].strip(): line[16:].split() for line in comparison(paths, "rain800", 2, 5).splitlines()}
    assert [float(value) for value in rows["mean of R"][:5]] == [10, 20, 30, 40, 50]
    assert rows["% corr. at 32 px"][:5] == ["-"] * 5
    figures = [
        measure(B, add_rain(B, STYLES["rain800"], picture_generator(5, path.stem, i)))[0]
        for path in paths
        for i in (0, 1)
    ]
    expected = np.percentile(figures, (0, 25, 50, 75, 100))
    assert [float(value) for value in rows["mean of R"][5:]] == pytest.approx(expected, abs=0.051)
    assert sum(float(share) for share in rows["% rain800"]) == pytest.approx(100, abs=6)
