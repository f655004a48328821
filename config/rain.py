"""Draws rain on clean images: grey additive streaks, `O = clip(B + R)`, in styles fitted to the data sets of the paper.

`python config/rain.py draw CLEAN PAIRS --style rain100h --count 5` writes pairs for training;
`python config/rain.py compare PAIRS --style rain100h` sets drawn rain beside real pairs, in figures.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, cos, log1p, nan, radians, sqrt, tan
from pathlib import Path
from statistics import NormalDist

import cv2
import numpy as np

from base.console import Parser, log, run_script, set_up_log
from base.errors import UserError
from base.files import write_bytes
from base.images import list_images, read_image, read_pair, to_bgr8, write_image

Range = tuple[float, float]
Rows = tuple[int, int]
Borders = tuple[tuple[Range, int], ...]  # top and bottom of a picture: `Streaks.missing`, and how many rows away it is

SMOOTH = np.array([[0.18], [0.64], [0.18]], np.float32)  # along stepped streaks, whose steps are softened so
FINE = 3  # hard streaks are drawn on so many columns to a pixel, as they lie anywhere between the pixels


@dataclass(frozen=True)
class Streaks:
    """One kind of streaks. Every set of this kind draws its own values from these ranges.

    Hard streaks are single noise pixels drawn out to lines: their brightness is constant and they end square. Soft
    streaks are blurred noise of which only what exceeds a threshold is left: they taper. A set has a brightness that it
    doesn't exceed, however many of its streaks overlap, unless these are hard ones that add up; sets add up.
    """

    hard: bool
    sets: tuple[int, int]  # how many sets of this kind a picture holds, both ends included
    turn: Range  # degrees that a set leans from the picture's main direction, to either side; mostly near the lower end
    length: Range  # pixels, log-uniform
    width: Range  # pixels, uniform: the full width of a hard streak; the blur of a soft one's noise at half its height.
    # Stepped hard streaks are 1 to 2 pixels wide, whatever lies outside of that.
    coverage: Range  # share of the pixels, 0..1, uniform, that one set covers before shearing smooths its edges
    level: Range  # grey levels, log-uniform: of hard streaks the brightest, of soft ones the mean of what they cover
    peak: Range = (99.0, 99.0)  # of soft streaks, log-uniform: the brightest, in multiples of the level
    taper: float = 0.35  # of soft streaks: the share of their length over which they rise, and fall
    # Shares of the streaks' length, at the picture's top and at its bottom, where none has its middle, of the rows from
    # half a length outside the picture on: there rain is weaker. Empty: as dense as everywhere.
    missing: tuple[Range, ...] = ()
    adds: bool = False  # of hard streaks: they add up where they cross, and `level` is the mean of one, not its limit
    steps: bool = False  # streaks lean in steps of half a pixel, each in its own rows, instead of evenly
    order: float = 2.0  # the higher, the more sets have a turn near its lower end


@dataclass(frozen=True)
class RainStyle:
    """How the rain of one data set looks."""

    angle: float  # degrees: a picture's main direction is uniform in -angle..angle; vertical = 0; with a turn below 60
    streaks: tuple[Streaks, ...]
    strength: Range = (1.0, 1.0)  # factor on all levels of one picture, log-uniform


@dataclass(frozen=True)
class IntensityRain:
    """The rain of the intensity-aware paper, section III-D: noise, blurred, thresholded, motion-blurred.

    A picture has one direction and one radius, of which streaks are small, middling or large. The paper gives these two
    alone; the rest was chosen by eye.
    """

    radii: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)  # sigma of the noise's Gaussian blur, pixels
    directions: tuple[float, ...] = (-40, -30, -15, 0, 15, 30, 40)  # degrees from straight down; positive leans as "/"
    coverage: float = 0.02  # share of the pixels whose noise exceeds the threshold
    length: int = 31  # of the motion blur, pixels
    gain: float = 1.6  # a pixel's share of the motion blur that is lit, times this, is its brightness, at most 1

    def choose(self, rng: np.random.Generator) -> tuple[float, float]:
        """A picture's direction in degrees and radius in pixels, the first that its generator is asked for."""
        return self.directions[rng.integers(len(self.directions))], self.radii[rng.integers(len(self.radii))]


# The first form of rain100h: streaks are shorter, hard ones add up, and none fades at the borders.
ADDING = (
    Streaks(True, (0, 5), (0, 12), (40, 160), (1.2, 2.1), (0.17, 0.42), (34, 70), adds=True),
    Streaks(False, (1, 2), (0, 14), (25, 120), (1.2, 2.0), (0.2, 0.45), (18, 42)),
    Streaks(True, (0, 1), (25, 45), (20, 50), (1.0, 1.4), (0.02, 0.08), (10, 20), adds=True),
)

PEAK = (0.9, 2.8)

# Fitted until `compare` printed two like columns and the pictures looked alike side by side.
STYLES = {
    # To 18 real pairs: nearly every picture mixes hard lines, dense, dim and about 100 pixels long, with soft ones that
    # are brighter and lean otherwise.
    "rain100h": RainStyle(
        angle=13,
        strength=(0.6, 1.2),
        streaks=(
            Streaks(True, (1, 2), (0, 10), (90, 170), (0.9, 2.2), (0.2, 0.6), (45, 85), missing=((0, 0.4), (0.3, 1))),
            Streaks(
                *(False, (1, 3), (0, 13), (90, 200), (1.2, 2.8), (0.24, 0.45), (50, 95), (0.9, 2.8), 0.12),
                missing=((0, 0.6), (0.2, 0.8)),
            ),
            Streaks(True, (0, 2), (20, 45), (25, 60), (1.0, 1.6), (0.02, 0.1), (10, 30)),  # faint, across the others
        ),
    ),
    # To published figures: one direction, sparse and soft.
    "rain100l": RainStyle(
        angle=25,
        streaks=(Streaks(False, (1, 1), (0, 0), (20, 60), (1.2, 2.0), (0.19, 0.27), (9, 62)),),
    ),
    # To the 700 real training pairs. Their rain is blended as "screen" does, weaker where B is bright, and B is often
    # darkened or given more contrast besides. R here doesn't depend on B: it has the mean look of max(O - B, 0).
    "rain800": RainStyle(
        angle=22,
        strength=(0.75, 2.2),
        streaks=(Streaks(False, (1, 1), (0, 0), (10, 65), (0.8, 2.2), (0.4, 0.9), (13, 19)),),
    ),
    # What the weights in the box were trained with.
    "rain100h_adding": RainStyle(angle=10, strength=(0.85, 1.15), streaks=ADDING),
    "rain100h_varied": RainStyle(
        angle=10,
        strength=(0.55, 1.4),
        streaks=(*ADDING, Streaks(False, (0, 1), (18, 42), (30, 90), (1.2, 2.6), (0.04, 0.2), (10, 30))),
    ),
    # rain100h with what was missing there: real streaks lean in steps, and many are short, faint and across the others.
    "rain100h_stepped": RainStyle(
        angle=13,
        strength=(0.4, 1.6),
        streaks=tuple(
            replace(kind, steps=True)
            for kind in (
                Streaks(True, (0, 3), (0, 14), (100, 190), (1.2, 2.6), (0.15, 0.5), (40, 95), order=3),
                Streaks(True, (0, 2), (0, 14), (60, 190), (1.2, 2.4), (0.12, 0.35), (30, 75), adds=True, order=3),
                Streaks(False, (0, 2), (0, 18), (115, 285), (1.4, 3.2), (0.2, 0.45), (40, 105), PEAK, 0.23, order=3),
                Streaks(False, (0, 2), (0, 22), (18, 90), (1.4, 2.8), (0.12, 0.35), (20, 60), PEAK, 0.23),
                Streaks(True, (0, 1), (24, 42), (20, 60), (0.85, 1.35), (0.03, 0.2), (5, 20), adds=True, order=1),
                Streaks(False, (0, 1), (16, 45), (13, 65), (1, 1.7), (0.05, 0.3), (5, 20), PEAK, 0.23, order=1),
            )
        ),
    ),
    "intensity": IntensityRain(),
    # Table IV of the paper: without small, middling and large streaks.
    "intensity_wo_s": IntensityRain(radii=(0.4, 0.6, 0.8, 1.0)),
    "intensity_wo_m": IntensityRain(radii=(0.2, 0.8, 1.0)),
    "intensity_wo_l": IntensityRain(radii=(0.2, 0.4, 0.6)),
}


def render(
    height: int, width: int, style: RainStyle | IntensityRain, rng: np.random.Generator, around: Rows = (0, 0)
) -> np.ndarray:
    """Draw one rain layer R, (height, width) uint8 in grey levels. The same generator state gives the same layer.

    `around` is how many rows of the picture lie above and below what is drawn, where that is a part of it: at the
    picture's own borders some styles are weaker.
    """
    if isinstance(style, IntensityRain):
        return cv2.convertScaleAbs(_intensity_rain(height, width, style, rng))
    rain = np.zeros((height, width), np.float32)
    main = rng.uniform(-style.angle, style.angle)
    strength = _log_uniform(style.strength, rng)
    for kind in style.streaks:
        for _ in range(rng.integers(kind.sets[0], kind.sets[1] + 1)):
            turn = kind.turn[0] + (kind.turn[1] - kind.turn[0]) * rng.uniform() ** kind.order
            angle = main + turn * (-1, 1)[rng.integers(2)]
            rain += _set(height, width, angle, kind, strength * _log_uniform(kind.level, rng), around, rng)
    return cv2.convertScaleAbs(rain)  # rounds, clips at 255


def add_rain(
    clean: np.ndarray, style: RainStyle | IntensityRain, rng: np.random.Generator, around: Rows = (0, 0)
) -> np.ndarray:
    """Rain on a clean image, or on a part of one: `O = clip(B + R)`, both (H, W, 3) uint8; `around` as in `render`."""
    return cv2.add(clean, cv2.merge([render(*clean.shape[:2], style, rng, around)] * 3))  # cv2.add saturates at 255


def _set(
    height: int, width: int, angle: float, kind: Streaks, level: float, around: Rows, rng: np.random.Generator
) -> np.ndarray:
    """One set, (height, width) float32: streaks that lean by `angle` degrees; positive leans as "/" does.

    All but stepped ones are vertical lines that are sheared: filtering along the columns and shearing takes the same
    few milliseconds for every length, a turned kernel doesn't.
    """
    length = max(2, round(_log_uniform(kind.length, rng) * cos(radians(angle))))
    across = rng.uniform(*kind.width) / cos(radians(angle))  # a sheared streak is as wide as its cut along a row
    size, borders = (height, _canvas_width(height, width, angle)), tuple(zip(kind.missing, around, strict=False))
    if kind.steps:
        canvas = _stepped_streaks(height, width, angle, length, across, kind, borders, rng)
    elif kind.hard:
        draw_lines = _adding_streaks if kind.adds else _hard_streaks
        canvas = draw_lines(*size, length, across, rng.uniform(*kind.coverage), borders, rng)
    else:
        canvas = _soft_streaks(*size, length, across, rng.uniform(*kind.coverage), kind.taper, borders, rng)
    if not kind.hard:
        canvas = np.minimum(canvas, _log_uniform(kind.peak, rng))
    return level * canvas if kind.steps else _shear(level * canvas, width, angle, rng)


def _canvas_width(height: int, width: int, angle: float) -> int:
    """Of what is sheared by `angle` degrees to (height, width)."""
    return width + ceil(height * abs(tan(radians(angle)))) + 2


def _shear(canvas: np.ndarray, width: int, angle: float, rng: np.random.Generator) -> np.ndarray:
    """Shears vertical streaks (height, `_canvas_width`) by `angle` degrees, to (height, width)."""
    height, slope = len(canvas), tan(radians(angle))
    # The shift by a part of a pixel keeps vertical streaks from lying exactly on the columns.
    left = rng.uniform(0, 1) + max(0.0, -slope * height)
    shear = np.array([[1, slope, left], [0, 1, 0]])
    return cv2.warpAffine(canvas, shear, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _intensity_rain(height: int, width: int, style: IntensityRain, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float32 in grey levels."""
    angle, radius = style.choose(rng)
    length = max(2, round(style.length * cos(radians(angle))))
    # Blurring has its own border, as wide as 4 sigma, and the rows above the image let streaks enter it from outside.
    noise = rng.standard_normal((height + length + 8, _canvas_width(height, width, angle) + 8), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (9, 9), radius)[4:-4, 4:-4]
    lit = (noise > NormalDist(0, float(noise.std())).inv_cdf(1 - style.coverage)).astype(np.float32)
    share = cv2.boxFilter(lit, -1, (1, length))[length // 2 : length // 2 + height]
    return _shear(255 * np.minimum(style.gain * share, 1), width, angle, rng)


def _hard_streaks(
    height: int, width: int, length: int, across: float, coverage: float, borders: Borders, rng: np.random.Generator
) -> np.ndarray:
    """(height, width) float32: vertical lines of one length, each as bright as 0.55 to 1, that add up to 1 at most."""
    rows = height + length  # the canvas is longer than the image, so that streaks enter it from outside
    fine = max(1, round(FINE * across))
    count = rng.poisson(-log1p(-coverage) * rows * width * FINE / (length * fine))
    lines = np.zeros((rows, width * FINE), np.uint8)
    lines.reshape(-1)[rng.integers(0, lines.size, count)] = rng.integers(140, 256, count, dtype=np.uint8)
    _clear_borders(lines, 0, length, borders, rng)
    # Sums of bytes saturate at 255: that is what keeps a set from exceeding its brightness.
    lines = cv2.boxFilter(lines, -1, (1, length), normalize=False)[length // 2 : length // 2 + height]
    lines = cv2.boxFilter(lines, -1, (fine, 1), normalize=False)
    return cv2.resize(lines, (width, height), interpolation=cv2.INTER_AREA) * np.float32(1 / 255)


def _adding_streaks(
    height: int, width: int, length: int, across: float, coverage: float, borders: Borders, rng: np.random.Generator
) -> np.ndarray:
    """(height, width) float32: vertical lines of one length that add up, each of one brightness, 1 in the mean."""
    rows = height + length
    count = rng.poisson(-log1p(-coverage) * rows * width / (length * across))
    lines = np.zeros((rows, width), np.float32)
    # Brightness varies from line to line as what exceeds a threshold in noise does.
    brightness = 0.65 + 0.35 * rng.standard_exponential(count, dtype=np.float32)
    lines.reshape(-1)[rng.integers(0, lines.size, count)] = brightness
    _clear_borders(lines, 0, length, borders, rng)
    lines = cv2.boxFilter(lines, -1, (1, length), normalize=False)[length // 2 : length // 2 + height]
    edge = (across - 1) / 2
    return cv2.sepFilter2D(lines, -1, np.array([edge, 1, edge]), np.ones(1))


def _stepped_streaks(
    height: int,
    width: int,
    angle: float,
    length: int,
    across: float,
    kind: Streaks,
    borders: Borders,
    rng: np.random.Generator,
) -> np.ndarray:
    """(height, width) float32: hard, adding or soft streaks as the other functions draw, but leaning in steps.

    They lean by `angle` degrees and step by half a pixel.
    """
    coverage, even = rng.uniform(*kind.coverage), rng.uniform() < 0.5
    if kind.hard:
        across = min(max(across, 1.0), 2.0)
        edge = across - 1
        profile = np.array([[edge / 2, 1, edge / 2] if even else [0, 1, edge]], np.float32)
        line = _filter(np.pad(_stepped_line(length, angle), 1), SMOOTH @ profile)
    else:
        first, second = max(1, round((1 - kind.taper) * length)), max(1, round(kind.taper * length))
        blur = cv2.getGaussianKernel(2 * ceil(across) + 1, across / 2.355, cv2.CV_32F)
        line = np.pad(_stepped_line(first, angle), second // 2 + ceil(across))
        line = _filter(_filter(line, _stepped_line(second, angle)), (blur if even else SMOOTH) @ blur.T)
    rows, columns = line.shape
    points = np.zeros((height + rows, width + columns), np.float32)  # larger, so that streaks enter from outside
    if kind.hard:
        count = rng.poisson(-log1p(-coverage) * points.size / (length * across))
        brightness = 0.65 + 0.35 * rng.standard_exponential(count) if kind.adds else rng.uniform(0.55, 1, count)
        points.reshape(-1)[rng.integers(0, points.size, count)] = brightness
    else:
        points = rng.standard_normal(points.shape, np.float32)
    _clear_borders(points, 0, rows, borders, rng)
    streaks = _filter(points, line)[rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]
    if kind.hard:
        return streaks if kind.adds else np.minimum(streaks, 1)
    threshold, excess = _over(coverage)
    return np.maximum(streaks / sqrt((line**2).sum()) - threshold, 0) / excess


def _stepped_line(length: int, angle: float) -> np.ndarray:
    """(length, columns) float32: what a point is drawn out to; a row sums to 1, in one column or halves of two."""
    places = np.round(-2 * tan(radians(angle)) * (np.arange(length) - (length - 1) / 2)) / 2
    centre = ceil(np.abs(places).max()) + 1
    line = np.zeros((length, 2 * centre + 1), np.float32)
    for shift in (0, 0.5):
        line[np.arange(length), np.floor(places + shift).astype(int) + centre] += 0.5
    return line


def _filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_CONSTANT)  # long kernels by Fourier transforms


def _over(coverage: float) -> tuple[float, float]:
    """The threshold that `coverage` of normal values exceed, and by how much these do in the mean, in deviations."""
    threshold = NormalDist().inv_cdf(1 - coverage)
    return threshold, NormalDist().pdf(threshold) / coverage - threshold


def _clear_borders(canvas: np.ndarray, value: int, length: int, borders: Borders, rng: np.random.Generator) -> None:
    """Sets to `value` the first and last rows of `canvas`, which is `length` rows higher than what is drawn."""
    for rows, (share, away) in zip((canvas, canvas[::-1]), borders, strict=False):
        rows[: max(0, round(length * rng.uniform(*share)) - away)] = value


def _soft_streaks(
    height: int,
    width: int,
    length: int,
    across: float,
    coverage: float,
    taper: float,
    borders: Borders,
    rng: np.random.Generator,
) -> np.ndarray:
    """(height, width) float32: noise blurred along and across, less the threshold that `coverage` of it exceeds.

    Where it exceeds it, it is 1 in the mean.
    """
    rows = height + length
    noise = rng.integers(0, 256, (rows, width), np.uint8)
    _clear_borders(noise, 128, length, borders, rng)
    # Two boxes in a row give even tapers; one would give the ragged profile of a random walk.
    first, second = max(1, round((1 - taper) * length)), max(1, round(taper * length))
    blurred = cv2.boxFilter(cv2.boxFilter(noise, cv2.CV_32F, (1, first)), -1, (1, second))
    blurred = blurred[length // 2 : length // 2 + height]
    blur = cv2.getGaussianKernel(2 * ceil(across) + 1, across / 2.355)  # 2.355 sigma is the width at half height
    blurred = cv2.sepFilter2D(blurred, -1, blur, np.ones(1))
    # The deviation of what is left of the noise (uniform over 0..255) follows from the kernels' weights.
    along = np.convolve(np.full(first, 1 / first), np.full(second, 1 / second))
    deviation = sqrt((256**2 - 1) / 12 * (along**2).sum() * (blur**2).sum())
    threshold, excess = _over(coverage)
    gain = 1 / (excess * deviation)
    return np.maximum(blurred * gain - (127.5 + threshold * deviation) * gain, 0)


def _log_uniform(bounds: Range, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


FIGURES = (
    "mean of R",
    "90th percentile",
    "99th percentile",
    "% with R > 8",
    "% saturated",
    "% corr. at 32 px",
    "% at the top",
    "% at the bottom",
    "% power aslant",
    "steps, dB",
)
QUARTILES = (0, 25, 50, 75, 100)

# Published figures of Rain100L's rain as (min, 25%, median, 75%, max) over its pictures; nan where none is given.
PUBLISHED_RAIN100L = np.array(
    [
        [1.7, nan, 5.4, nan, 16],
        [nan, nan, 19, nan, nan],
        [nan, nan, 58, nan, nan],
        [8, nan, 19, nan, 22],
        *[[nan] * 5] * 6,
    ]
)


def measure(clean: np.ndarray, rainy: np.ndarray) -> np.ndarray:
    """The FIGURES of one pair, (10,): R is what the rain added, `max(O - B, 0)` of the channels' means, 0..255."""
    rain = _rain_layer(clean, rainy)
    return np.array(
        [
            rain.mean(),
            *np.percentile(rain, (90, 99)),
            100 * (rain > 8).mean(),
            100 * (rainy.min(axis=2) == 255).mean(),
            100 * streak_correlation(clean, rainy),
            *(100 * share for share in border_shares(clean, rainy)),
            *spectral_figures(clean, rainy),
        ]
    )


def streak_correlation(clean: np.ndarray, rainy: np.ndarray, rows: int = 32) -> float:
    """How long streaks are: the correlation of R with R `rows` pixels lower and to the side as far as it is highest.

    To the side by 30 degrees at most. Pixels with a saturated channel are left out; nan where too few remain.
    """
    rain, known = _rain_layer(clean, rainy), rainy.max(axis=2) < 255
    (height, width), reach = rain.shape, round(rows * tan(radians(30)))
    if height <= rows or width <= reach:
        return nan
    highest = nan
    for shift in range(-reach, reach + 1):
        upper = np.s_[:-rows, max(0, -shift) : width - max(0, shift)]
        lower = np.s_[rows:, max(0, shift) : width - max(0, -shift)]
        both = known[upper] & known[lower]
        first, second = rain[upper][both], rain[lower][both]
        if both.sum() > 100 and first.std() and second.std():
            highest = np.fmax(highest, np.corrcoef(first, second)[0, 1])
    return float(highest)


def border_shares(clean: np.ndarray, rainy: np.ndarray, rows: int = 16) -> tuple[float, float]:
    """The mean of R in the first and in the last `rows`, divided by its mean in the whole picture.

    Pixels with a saturated channel are left out; nan where too few remain.
    """
    rain, known = _rain_layer(clean, rainy), rainy.max(axis=2) < 255
    if not rain[known].any():
        return nan, nan
    first, last = (rain[part][known[part]] for part in (np.s_[:rows], np.s_[-rows:]))
    return tuple(float(part.mean() / rain[known].mean()) if part.size > 100 else nan for part in (first, last))


def spectral_figures(clean: np.ndarray, rainy: np.ndarray, side: int = 64) -> tuple[float, float]:
    """What R's power spectrum shows: streaks across the others, and lines that lean in steps.

    The first is the share of the power, in %, that lies more than 18 degrees off the direction of most power. The
    second is the density of the power where the steps of lines show, in dB over that of the whole spectrum: at 0.2 to
    0.38 cycles a pixel down and more than 0.12 across. Of windows of `side` pixels with at most 4 % of saturated ones;
    nan where there are none.
    """
    rain, saturated = _rain_layer(clean, rainy), (rainy.max(axis=2) == 255).astype(np.float32)
    taper, power = np.outer(np.hanning(side), np.hanning(side)), np.zeros((side, side))
    for top in range(0, rain.shape[0] - side + 1, side // 4):
        for left in range(0, rain.shape[1] - side + 1, side // 4):
            window = np.s_[top : top + side, left : left + side]
            if saturated[window].mean() <= 0.04:
                power += np.abs(np.fft.fft2((rain[window] - rain[window].mean()) * taper)) ** 2
    if not power.any():
        return nan, nan
    down, across = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    known = np.hypot(down, across) > 4 / side  # the window blurs the direction of lower ones
    angle = np.degrees(np.arctan2(down, across))

    def off(direction: float) -> np.ndarray:
        return np.abs((angle - direction + 90) % 180 - 90)

    main = max(range(-90, 90, 3), key=lambda direction: power[known & (off(direction) <= 3)].mean())
    steps = (np.abs(down) > 0.2) & (np.abs(down) < 0.38) & (np.abs(across) > 0.12)
    aslant = power[known & (off(main) > 18)].sum() / power[known].sum()
    return float(100 * aslant), float(10 * np.log10(power[steps].mean() / power.mean()))


def angle_histogram(clean: np.ndarray, rainy: np.ndarray) -> np.ndarray:
    """Shares, (12,), of the rain's energy that runs at -75, -60, .. 90 degrees (vertical = 0, positive leans as "/").

    The direction is the structure tensor's, the weight the difference of its eigenvalues.
    """
    rain = cv2.GaussianBlur(_rain_layer(clean, rainy), (0, 0), 1)
    dx, dy = cv2.Sobel(rain, cv2.CV_32F, 1, 0), cv2.Sobel(rain, cv2.CV_32F, 0, 1)
    difference, product = (cv2.GaussianBlur(term, (0, 0), 3) for term in (dx * dx - dy * dy, 2 * dx * dy))
    angle = np.degrees(np.arctan2(product, difference)) / 2  # -90..90
    bins = np.round(angle / 15).astype(int) + 6
    bins[bins == 0] = 12  # -90 is the same direction as 90
    energy = np.bincount(bins.ravel(), np.hypot(difference, product).ravel(), minlength=13)[1:]
    return energy / max(energy.sum(), 1e-9)


def _rain_layer(clean: np.ndarray, rainy: np.ndarray) -> np.ndarray:
    difference = cv2.subtract(rainy, clean, dtype=cv2.CV_32F)
    return np.maximum(difference.mean(axis=2), 0)


def compare(paths: list[Path], name: str, count: int, seed: int) -> str:
    """The table of real pairs against `count` renderings of the style `name` on each of their clean halves."""
    real, rendered, real_angles, rendered_angles = [], [], [], []
    for path in paths:
        clean, rainy = read_pair(path)
        real.append(measure(clean, rainy))
        real_angles.append(angle_histogram(clean, rainy))
        for number in range(count):
            drawn = add_rain(clean, STYLES[name], _generator(seed, path, number))
            rendered.append(measure(clean, drawn))
            rendered_angles.append(angle_histogram(clean, drawn))
    real_quartiles, left = _quartiles(real), f"real ({len(real)} pairs)"
    if name == "rain100l":
        real_quartiles, left = PUBLISHED_RAIN100L, "Rain100L's published figures"
    rendered_quartiles = _quartiles(rendered)
    columns = "".join(f"{column:>7}" for column in ("min", "25%", "50%", "75%", "max"))
    lines = [f"{'':16}  {left:>35}  {f'{name} ({len(rendered)} rendered)':>35}", f"{'':16}  {columns}  {columns}"]
    for figure, *rows in zip(FIGURES, real_quartiles, rendered_quartiles, strict=True):
        cells = ("".join(f"{'-' if np.isnan(value) else f'{value:.1f}':>7}" for value in row) for row in rows)
        lines.append("  ".join((f"{figure:16}", *cells)))
    angles = "".join(f"{angle:>5}" for angle in range(-75, 91, 15))
    lines += ["", f"{'degrees (0 = |)':16}  {angles}"]
    # The angles of the pairs given are shown with rain100l too: the published figures hold no histogram.
    for title, shares in (("% of pairs", real_angles), ("% of rendered", rendered_angles)):
        lines.append(f"{title:16}  " + "".join(f"{100 * share:>5.0f}" for share in np.mean(shares, axis=0)))
    return "\n".join(lines)


def _quartiles(figures: list[np.ndarray]) -> np.ndarray:
    """(figures, 5); nan for a figure that no picture has."""
    known = (column[~np.isnan(column)] for column in np.array(figures).T)
    return np.array([np.percentile(column, QUARTILES) if column.size else [nan] * 5 for column in known])


def draw(source: Path, target: Path, name: str, count: int, seed: int, pairs: bool = False) -> int:
    """Write `count` joined pairs, B left and O right, for each clean image of `source`; returns how many were written.

    With `pairs`, `source` holds joined pairs, whose clean halves are taken. `drawn.txt` in `target` says how these
    were drawn, and where a style chooses a direction and a radius for each, `drawn.csv` holds these. A second call
    writes the same files again. Raises UserError where two images would get the same name.
    """
    style, chosen = STYLES[name], []
    paths = _images(source)
    if target.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise UserError(f"{target} holds the clean images: give another folder for the pairs")
    stems = [path.stem for path in paths]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise UserError(f"{source} holds two images called {twice}: rename one, as their pairs would share a name")
    for path in paths:
        clean = read_pair(path)[0] if pairs else to_bgr8(read_image(path))
        for number in range(count):
            file = target / f"{path.stem}_x{number + 1}.png"
            write_image(file, np.hstack([clean, add_rain(clean, style, _generator(seed, path, number))]))
            if isinstance(style, IntensityRain):
                chosen.append("{},{:g},{:g}\n".format(file.name, *style.choose(_generator(seed, path, number))))
    if chosen:
        write_bytes(target / "drawn.csv", "".join(["image,degrees,radius\n", *chosen]).encode())
    write_bytes(target / "drawn.txt", f"drawn: {name}, {count} on each of {len(paths)} images, seed {seed}\n".encode())
    return len(paths) * count


def _generator(seed: int, path: Path, number: int) -> np.random.Generator:
    """A picture's rain depends on its own name, not on which others lie beside it."""
    return np.random.default_rng([seed, zlib.crc32(path.stem.encode()), number])


def _images(source: Path) -> list[Path]:
    paths = list_images(source) if source.is_dir() else [source]
    if not paths:
        raise UserError(f"{source} holds no images: give a folder of PNG or JPEG files, or one file")
    return paths


def _at_least(lowest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise ValueError
        return int(text)

    whole_number.__name__ = f"whole number from {lowest} on"  # argparse's message: "invalid ... value: '-1'"
    return whole_number


def main(arguments: list[str]) -> None:
    """The command line: `draw` and `compare`."""
    parser = Parser(description="Draw rain on clean images, or compare drawn rain with real pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="write joined pairs (B left, O right) of clean images")
    drawing.add_argument("source", type=Path, metavar="CLEAN", help="a clean image or a folder of them")
    drawing.add_argument("target", type=Path, metavar="PAIRS", help="the folder to write name_x1.png, .. into")
    drawing.add_argument("--pairs", action="store_true", help="CLEAN holds joined pairs: take their clean halves")
    comparing = commands.add_parser("compare", help="print figures of real pairs and of rain drawn on their clean half")
    comparing.add_argument("source", type=Path, metavar="PAIRS", help="a folder of joined pairs (B left, O right)")
    for command in (drawing, comparing):
        command.add_argument("--style", choices=STYLES, default="rain100h", help="default: %(default)s")
        command.add_argument(
            "--count", type=_at_least(1), default=1, help="renderings of each picture; default: %(default)s"
        )
        command.add_argument("--seed", type=_at_least(0), default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    set_up_log()
    if options.command == "draw":
        written = draw(options.source, options.target, options.style, options.count, options.seed, options.pairs)
        log.info("%d pairs with %s rain are in %s", written, options.style, options.target)
    else:
        log.info(compare(_images(options.source), options.style, options.count, options.seed))


if __name__ == "__main__":
    run_script(main)
