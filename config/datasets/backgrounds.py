"""Which pictures show the same background: other renderings of it, or the same photograph in another set."""

import cv2
import numpy as np

SAME_BACKGROUND = 0.995  # correlation of thumbnails; on Rain800 unlike pictures reach 0.991, the same start at 0.999


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as (1024,) float32 of mean 0 and length 1, so that a product is a correlation; 0 if flat."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    grey = grey.astype(np.float32).ravel()
    grey -= grey.mean()
    length = np.linalg.norm(grey)
    return grey / length if length > 32 else np.zeros_like(grey)  # 32: a standard deviation of one grey level


def find_twins(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Which `others` show the background of each of `some`, where any do; takes thumbnails by name."""
    names, matrix = np.array(list(others)), np.stack([*others.values(), np.zeros(1024, np.float32)])[:-1]
    twins = {name: names[matrix @ thumb > SAME_BACKGROUND].tolist() for name, thumb in some.items()} if others else {}
    return {name: same for name, same in twins.items() if same}
