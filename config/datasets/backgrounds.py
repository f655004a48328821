"""Which images show the same background: another rendering of it, or the same photograph in another set."""

import cv2
import numpy as np

SAME_BACKGROUND = 0.995  # correlation of thumbnails; in Rain800 the same background reaches 0.999, others 0.991 at most


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as (1024,) float32 of mean 0 and length 1, so that products are correlations; 0 if flat."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    grey = grey.astype(np.float32).ravel()
    grey -= grey.mean()
    length = np.linalg.norm(grey)
    return grey / length if length > 32 else np.zeros_like(grey)  # 32: a standard deviation of one grey level


def shared_backgrounds(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """For each of `some` that shares its background with any of `others`, these; takes thumbnails by name."""
    if not others:
        return {}
    names, matrix = np.array(list(others)), np.stack([*others.values()])
    shared = {name: names[matrix @ thumb > SAME_BACKGROUND].tolist() for name, thumb in some.items()}
    return {name: same for name, same in shared.items() if same}
