"""Figures of rain, to compare synthetic rain with real pairs."""

from math import nan
from pathlib import Path

import cv2
import numpy as np

from base.images import read_pair
from synthesis.streaks import add_rain, picture_generator
from synthesis.styles import STYLES

FIGURES = ("mean of R", "90th percentile", "99th percentile", "% with R > 8", "% saturated", "% corr. at 32 px")
ROWS, REACH = 32, 18  # the distance of that correlation, and how far streaks up to 30 degrees off vertical reach on it
COLUMNS = {"min": 0, "25%": 25, "50%": 50, "75%": 75, "max": 100}  # percentiles over the pictures


def measure(clean: np.ndarray, rainy: np.ndarray) -> np.ndarray:
    """The FIGURES of a pair, each (H, W, 3) uint8; (6,), nan where a figure is unknown."""
    rain = rain_layer(clean, rainy)
    shares = (rain > 8).mean(), (rainy.min(axis=2) == 255).mean(), streak_correlation(clean, rainy)
    return np.array([rain.mean(), *np.percentile(rain, (90, 99)), *(100 * share for share in shares)])


def rain_layer(clean: np.ndarray, rainy: np.ndarray) -> np.ndarray:
    """R = max(mean of O - B over the channels, 0), (H, W) float32 in grey levels."""
    return np.maximum(cv2.subtract(rainy, clean, dtype=cv2.CV_32F).mean(axis=2), 0)


def streak_correlation(clean: np.ndarray, rainy: np.ndarray) -> float:
    """How long streaks are: the highest correlation of R with R shifted by ROWS pixels along them; nan if unknown."""
    rain, known = rain_layer(clean, rainy), rainy.max(axis=2) < 255  # not the saturated pixels
    width, highest = rain.shape[1], nan
    for shift in range(-min(REACH, width), min(REACH, width) + 1):
        upper = np.s_[:-ROWS, max(0, -shift) : width - max(0, shift)]
        lower = np.s_[ROWS:, max(0, shift) : width - max(0, -shift)]
        both = known[upper] & known[lower]
        first, second = rain[upper][both], rain[lower][both]
        if both.sum() > 100 and first.std() and second.std():
            highest = np.fmax(highest, np.corrcoef(first, second)[0, 1])
    return float(highest)


def angle_histogram(clean: np.ndarray, rainy: np.ndarray) -> np.ndarray:
    """Shares of R's energy by the structure tensor's direction: -75, -60, .. 90 degrees, (12,); "|" is 0, "/" is 45."""
    rain = cv2.GaussianBlur(rain_layer(clean, rainy), (0, 0), 1)
    dx, dy = cv2.Sobel(rain, cv2.CV_32F, 1, 0), cv2.Sobel(rain, cv2.CV_32F, 0, 1)
    difference, product = (cv2.GaussianBlur(term, (0, 0), 3) for term in (dx * dx - dy * dy, 2 * dx * dy))
    angle = np.degrees(np.arctan2(product, difference)) / 2  # -90..90
    bins = np.round(angle / 15).astype(int) + 6
    bins[bins == 0] = 12  # -90 is the same direction as 90
    energy = np.bincount(bins.ravel(), np.hypot(difference, product).ravel(), minlength=13)[1:]
    return energy / max(energy.sum(), 1e-9)


def comparison(paths: list[Path], name: str, count: int, seed: int) -> str:
    """A table of real pairs beside `count` renderings of the style `name` on each of their clean halves."""
    figures, angles = {"real": [], name: []}, {"real": [], name: []}
    for path in paths:
        clean, rainy = read_pair(path)
        synthetic = (add_rain(clean, STYLES[name], picture_generator(seed, path.stem, i)) for i in range(count))
        for column, image in (("real", rainy), *((name, image) for image in synthetic)):
            figures[column].append(measure(clean, image))
            angles[column].append(angle_histogram(clean, image))
    titles = "  ".join(f"{f'{column} ({len(rows)} pictures)':>35}" for column, rows in figures.items())
    header = "".join(f"{column:>7}" for column in COLUMNS)
    lines = [f"{'':16}  {titles}", f"{'':16}  {header}  {header}"]
    for figure, *rows in zip(FIGURES, *map(_percentiles, figures.values()), strict=True):
        cells = ("".join(f"{'-' if np.isnan(value) else f'{value:.1f}':>7}" for value in row) for row in rows)
        lines.append("  ".join((f"{figure:16}", *cells)))
    lines += ["", f"{'degrees (0 = |)':16}  " + "".join(f"{angle:>5}" for angle in range(-75, 91, 15))]
    for column, shares in angles.items():
        lines.append(f"{f'% {column}':16}  " + "".join(f"{100 * share:>5.0f}" for share in np.mean(shares, axis=0)))
    return "\n".join(lines)


def _percentiles(figures: list[np.ndarray]) -> np.ndarray:
    """(figures, COLUMNS) over the pictures; nan for a figure that is unknown in all of them."""
    known = (column[~np.isnan(column)] for column in np.array(figures).T)
    return np.array([np.percentile(column, [*COLUMNS.values()]) if column.size else [nan] * 5 for column in known])
