"""Renders rain layers R of grey streaks and adds them to clean images: `O = clip(B + R)`."""

import os
import zlib
from math import ceil, cos, log1p, radians, sqrt, tan
from statistics import NormalDist

import cv2
import numpy as np
from numpy.random import Generator

from synthesis.styles import IntensityRain, RainStyle, Range, Streaks

SMOOTH = np.array([[0.18], [0.64], [0.18]], np.float32)  # softens stepped streaks along their length
FINE = 3  # hard streaks are rendered on so many columns per pixel, so that they can lie between pixels

Size = tuple[int, int]  # height, width in pixels
Shape = tuple[int, float, float]  # of streaks: length down the rows, width along a row, both in pixels; coverage


def add_rain(clean: np.ndarray, style: RainStyle | IntensityRain, rng: Generator) -> np.ndarray:
    """Synthetic rain on a clean image: `O = clip(B + R)`, both (H, W, 3) uint8."""
    return cv2.add(clean, cv2.merge([render(*clean.shape[:2], style, rng)] * 3))  # cv2.add clips at 255


def render(height: int, width: int, style: RainStyle | IntensityRain, rng: Generator) -> np.ndarray:
    """One rain layer R, (height, width) uint8 grey levels. The same generator state gives the same layer."""
    if isinstance(style, IntensityRain):
        return cv2.convertScaleAbs(_intensity_rain((height, width), style, rng))
    rain = np.zeros((height, width), np.float32)
    main = rng.uniform(-style.angle, style.angle)
    strength = _log_uniform(style.strength, rng)
    for streaks in style.streaks:
        for _ in range(rng.integers(streaks.sets[0], streaks.sets[1] + 1)):
            turn = streaks.turn[0] + (streaks.turn[1] - streaks.turn[0]) * rng.uniform() ** streaks.order
            angle = main + turn * (-1, 1)[rng.integers(2)]
            level = strength * _log_uniform(streaks.level, rng)
            rain += _one_set((height, width), angle, level, streaks, style.stepped, rng)
    return cv2.convertScaleAbs(rain)  # rounds, clips at 255


def picture_generator(seed: int, name: str, number: int) -> Generator:
    """The generator of rendering `number` on the image called `name`, whatever other images there are."""
    return np.random.default_rng([seed, zlib.crc32(os.fsencode(name)), number])


def _one_set(size: Size, angle: float, level: float, streaks: Streaks, stepped: bool, rng: Generator) -> np.ndarray:
    """One set of streaks, `size` float32, that lean by `angle` degrees, positive as "/"; sheared unless `stepped`."""
    slant = cos(radians(angle))
    length = max(2, round(_log_uniform(streaks.length, rng) * slant))
    shape = (length, rng.uniform(*streaks.width) / slant, rng.uniform(*streaks.coverage))
    canvas = (size[0], _canvas_width(size, angle))
    if streaks.hard:
        rain = _stepped_hard(size, angle, shape, streaks.adds, rng) if stepped else _hard(canvas, shape, rng)
    else:
        soft = _stepped_soft(size, angle, shape, streaks, rng) if stepped else _soft(canvas, shape, streaks, rng)
        rain = np.minimum(soft, _log_uniform(streaks.peak, rng))
    return level * rain if stepped else _shear(level * rain, size, angle, rng)


def _canvas_width(size: Size, angle: float) -> int:
    return size[1] + ceil(size[0] * abs(tan(radians(angle)))) + 2


def _shear(canvas: np.ndarray, size: Size, angle: float, rng: Generator) -> np.ndarray:
    """Shear vertical streaks (height, `_canvas_width`) by `angle` degrees to `size`."""
    (height, width), slope = size, tan(radians(angle))
    left = rng.uniform(0, 1) + max(0.0, -slope * height)  # else vertical streaks would lie exactly on the columns
    shear = np.array([[1, slope, left], [0, 1, 0]])
    return cv2.warpAffine(canvas, shear, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _intensity_rain(size: Size, style: IntensityRain, rng: Generator) -> np.ndarray:
    angle, radius = style.choose(rng)
    length = max(2, round(style.length * cos(radians(angle))))
    # 4 pixels on each side for the blur; `length` rows more, so that streaks enter from outside the image.
    noise = rng.standard_normal((size[0] + length + 8, _canvas_width(size, angle) + 8), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (9, 9), radius)[4:-4, 4:-4]
    lit = (noise > NormalDist(0, float(noise.std())).inv_cdf(1 - style.coverage)).astype(np.float32)
    share = cv2.boxFilter(lit, -1, (1, length))[length // 2 : length // 2 + size[0]]
    return _shear(255 * np.minimum(style.gain * share, 1), size, angle, rng)


def _hard(size: Size, shape: Shape, rng: Generator) -> np.ndarray:
    """Vertical lines, `size` float32: each has a brightness of 0.55 to 1, their sums are limited to 1."""
    (height, width), (length, across, coverage) = size, shape
    rows, fine = height + length, max(1, round(FINE * across))  # more rows, so that streaks enter from outside
    count = rng.poisson(-log1p(-coverage) * rows * width * FINE / (length * fine))
    lines = np.zeros((rows, width * FINE), np.uint8)
    lines.reshape(-1)[rng.integers(0, lines.size, count)] = rng.integers(140, 256, count, dtype=np.uint8)
    lines = cv2.boxFilter(lines, -1, (1, length), normalize=False)[length // 2 : length // 2 + height]
    lines = cv2.boxFilter(lines, -1, (fine, 1), normalize=False)  # saturates at 255, which limits the brightness
    return cv2.resize(lines, (width, height), interpolation=cv2.INTER_AREA) * np.float32(1 / 255)


def _soft(size: Size, shape: Shape, streaks: Streaks, rng: Generator) -> np.ndarray:
    """Noise blurred along and across, above the threshold that `coverage` of it exceeds; there its mean is 1."""
    length, across, coverage = shape
    noise = rng.integers(0, 256, (size[0] + length, size[1]), np.uint8)
    # Two boxes in a row give even tapers; one would give the ragged profile of a random walk.
    (first, second), blur = _tapers(length, streaks.taper), _blur(across, cv2.CV_64F)
    blurred = cv2.boxFilter(cv2.boxFilter(noise, cv2.CV_32F, (1, first)), -1, (1, second))
    blurred = cv2.sepFilter2D(blurred[length // 2 : length // 2 + size[0]], -1, blur, np.ones(1))
    # The kernels' weights give the deviation of the blurred noise, which is uniform over 0..255 before.
    along = np.convolve(np.full(first, 1 / first), np.full(second, 1 / second))
    deviation = sqrt((256**2 - 1) / 12 * (along**2).sum() * (blur**2).sum())
    threshold, excess = _exceed(coverage)
    gain = 1 / (excess * deviation)
    return np.maximum(blurred * gain - (127.5 + threshold * deviation) * gain, 0)


def _stepped_hard(size: Size, angle: float, shape: Shape, adds: bool, rng: Generator) -> np.ndarray:
    """As `_hard`, but lines lean in steps of half a pixel; with `adds` of mean brightness 1 and without a limit."""
    length, across, coverage = shape
    even, across = rng.uniform() < 0.5, min(max(across, 1.0), 2.0)
    edge = across - 1
    profile = np.array([[edge / 2, 1, edge / 2] if even else [0, 1, edge]], np.float32)
    line = _filter(np.pad(_stepped_line(length, angle), 1), SMOOTH @ profile)
    points = np.zeros(np.add(size, line.shape), np.float32)
    count = rng.poisson(-log1p(-coverage) * points.size / (length * across))
    brightness = 0.65 + 0.35 * rng.standard_exponential(count) if adds else rng.uniform(0.55, 1, count)
    points.reshape(-1)[rng.integers(0, points.size, count)] = brightness
    rain = _filter_inside(points, line, size)
    return rain if adds else np.minimum(rain, 1)


def _stepped_soft(size: Size, angle: float, shape: Shape, streaks: Streaks, rng: Generator) -> np.ndarray:
    length, across, coverage = shape
    even, (first, second), blur = rng.uniform() < 0.5, _tapers(length, streaks.taper), _blur(across, cv2.CV_32F)
    line = np.pad(_stepped_line(first, angle), second // 2 + ceil(across))
    line = _filter(_filter(line, _stepped_line(second, angle)), (blur if even else SMOOTH) @ blur.T)
    noise = rng.standard_normal(np.add(size, line.shape), np.float32)
    threshold, excess = _exceed(coverage)
    return np.maximum(_filter_inside(noise, line, size) / sqrt((line**2).sum()) - threshold, 0) / excess


def _stepped_line(length: int, angle: float) -> np.ndarray:
    """A leaning line, (length, columns) float32: each row sums to 1, in one column or halves of two."""
    places = np.round(-2 * tan(radians(angle)) * (np.arange(length) - (length - 1) / 2)) / 2
    centre = ceil(np.abs(places).max()) + 1
    line = np.zeros((length, 2 * centre + 1), np.float32)
    for shift in (0, 0.5):
        line[np.arange(length), np.floor(places + shift).astype(int) + centre] += 0.5
    return line


def _filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_CONSTANT)  # large kernels by Fourier transform


def _filter_inside(points: np.ndarray, line: np.ndarray, size: Size) -> np.ndarray:
    """Filter `points`, which are larger than `size` by the line's size, and cut out the middle."""
    top, left = line.shape[0] // 2, line.shape[1] // 2
    return _filter(points, line)[top : top + size[0], left : left + size[1]]


def _tapers(length: int, taper: float) -> tuple[int, int]:
    """Lengths of the two boxes whose convolution rises and falls over `taper` of `length`."""
    return max(1, round((1 - taper) * length)), max(1, round(taper * length))


def _blur(across: float, dtype: int) -> np.ndarray:
    return cv2.getGaussianKernel(2 * ceil(across) + 1, across / 2.355, dtype)  # 2.355 sigma: the width at half height


def _exceed(coverage: float) -> tuple[float, float]:
    """The threshold that `coverage` of normal values exceed, and the mean of what exceeds it, in deviations."""
    threshold = NormalDist().inv_cdf(1 - coverage)
    return threshold, NormalDist().pdf(threshold) / coverage - threshold


def _log_uniform(bounds: Range, rng: Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))
