"""Shared backgrounds: found under other rain and in another size, and nowhere else."""

import cv2
import numpy as np

from conftest import make_pair
from datasets.backgrounds import shared_backgrounds, thumbnail


def test_backgrounds_are_found_in_another_size_and_brightness():
    pictures = {f"{seed}.png": make_pair(90, 120, seed)[0] for seed in range(6)}
    known = {name: thumbnail(B) for name, B in pictures.items()}
    others = {
        "smaller": thumbnail(cv2.resize(pictures["2.png"], (60, 45), interpolation=cv2.INTER_AREA)),
        "darker": thumbnail((pictures["4.png"] * 0.7).astype(np.uint8)),
        "copy": thumbnail(pictures["4.png"]),
        "flat": thumbnail(np.full((40, 40, 3), 99, np.uint8)),
        "unknown": thumbnail(make_pair(90, 120, 7)[0]),
    }
    assert shared_backgrounds(known, others) == {"2.png": ["smaller"], "4.png": ["darker", "copy"]}
    assert shared_backgrounds(known, {}) == shared_backgrounds({}, known) == {}
    flat = {"flat": others["flat"]}
    assert shared_backgrounds(flat, flat) == {}  # what has no shape is like nothing
