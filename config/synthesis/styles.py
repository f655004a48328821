"""How the rain of each data set looks, in ranges that every picture draws its own values from."""

from dataclasses import dataclass

from numpy.random import Generator

Range = tuple[float, float]


@dataclass(frozen=True)
class Streaks:
    """One kind of streaks, of which a picture holds several sets, each with values of its own from these ranges."""

    hard: bool  # lines of constant brightness with square ends; else soft: blurred noise above a threshold
    sets: tuple[int, int]  # sets of this kind in a picture, both ends included
    turn: Range  # degrees between a set and the picture's main direction, to either side
    length: Range  # pixels, log-uniform
    width: Range  # pixels, uniform; of soft streaks at half height. Stepped hard streaks are limited to 1..2.
    coverage: Range  # share of the pixels that one set covers, uniform
    level: Range  # grey levels, log-uniform: of hard streaks the maximum, of soft ones the mean where there is rain
    peak: Range = (99.0, 99.0)  # soft: the maximum in multiples of the level, log-uniform
    taper: float = 0.35  # soft: share of the length over which a streak rises, and falls
    adds: bool = False  # stepped and hard: streaks of a set add up without limit; `level` is the mean of one streak
    order: float = 2.0  # the higher, the more turns lie near the lower end of their range


@dataclass(frozen=True)
class RainStyle:
    angle: float  # degrees: a picture's main direction is uniform in -angle..angle; 0 is vertical; angle + turn < 60
    streaks: tuple[Streaks, ...]
    strength: Range = (1.0, 1.0)  # factor on all levels of one picture, log-uniform
    stepped: bool = False  # streaks lean in steps of half a pixel, as in Rain100H, instead of evenly


@dataclass(frozen=True)
class IntensityRain:
    """The rain of the intensity-aware paper, section III-D. Radii and directions are the paper's."""

    radii: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)  # sigma of the noise's Gaussian blur, pixels
    directions: tuple[float, ...] = (-40, -30, -15, 0, 15, 30, 40)  # degrees; 0 is vertical, positive leans as "/"
    coverage: float = 0.02  # share of the noise above the threshold
    length: int = 31  # of the motion blur, pixels
    gain: float = 1.6  # factor on the motion-blurred noise, clipped to 1 afterwards

    def choose(self, rng: Generator) -> tuple[float, float]:
        """Direction (degrees) and radius (pixels) of a picture: what `render` takes from the generator first."""
        return self.directions[rng.integers(len(self.directions))], self.radii[rng.integers(len(self.radii))]


PEAK = (0.9, 2.8)

STYLES = {
    # Fitted to 18 real pairs: dense hard lines, brighter soft ones that lean otherwise, and short faint ones across.
    "rain100h": RainStyle(
        angle=13,
        strength=(0.4, 1.6),
        stepped=True,
        streaks=(
            Streaks(True, (0, 3), (0, 14), (100, 190), (1.2, 2.6), (0.15, 0.5), (40, 95), order=3),
            Streaks(True, (0, 2), (0, 14), (60, 190), (1.2, 2.4), (0.12, 0.35), (30, 75), adds=True, order=3),
            Streaks(False, (0, 2), (0, 18), (115, 285), (1.4, 3.2), (0.2, 0.45), (40, 105), PEAK, 0.23, order=3),
            Streaks(False, (0, 2), (0, 22), (18, 90), (1.4, 2.8), (0.12, 0.35), (20, 60), PEAK, 0.23),
            Streaks(True, (0, 1), (24, 42), (20, 60), (0.85, 1.35), (0.03, 0.2), (5, 20), adds=True, order=1),
            Streaks(False, (0, 1), (16, 45), (13, 65), (1, 1.7), (0.05, 0.3), (5, 20), PEAK, 0.23, order=1),
        ),
    ),
    # Fitted to published figures: one direction, sparse and soft.
    "rain100l": RainStyle(
        angle=25,
        streaks=(Streaks(False, (1, 1), (0, 0), (20, 60), (1.2, 2.0), (0.19, 0.27), (9, 62)),),
    ),
    # Fitted to the 700 training pairs by the mean look of max(O - B, 0). Real Rain800 rain is blended as "screen" does
    # and often darkens the picture; R here does not depend on B.
    "rain800": RainStyle(
        angle=22,
        strength=(0.75, 2.2),
        streaks=(Streaks(False, (1, 1), (0, 0), (10, 65), (0.8, 2.2), (0.4, 0.9), (13, 19)),),
    ),
    "intensity": IntensityRain(),
    # Table IV of the intensity-aware paper: without small, middle and large streaks.
    "intensity_wo_s": IntensityRain(radii=(0.4, 0.6, 0.8, 1.0)),
    "intensity_wo_m": IntensityRain(radii=(0.2, 0.8, 1.0)),
    "intensity_wo_l": IntensityRain(radii=(0.2, 0.4, 0.6)),
}
