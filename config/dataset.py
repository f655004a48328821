"""Random crops for training, from stored pairs or with new synthetic rain; whole pairs for validation and test."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from base import images as image_files
from base.console import Progress, command_line, log
from base.errors import BadArgument, Mismatch, MissingFile, UserError
from base.files import ROOT
from base.images import list_images, read_image, read_pair, shared_backgrounds, thumbnail, to_bgr8
from datasets import builtin, pairing
from datasets.layouts import BOTH_FOLDERS, SPLITS, Found, find_images, role_of
from settings import Settings
from synthesis.streaks import add_rain
from synthesis.styles import STYLES

Images = tuple[np.ndarray, ...]  # B, O unless its rain is synthetic, both (H, W, 3) uint8; labels (H, W) uint8 if any
LabelReader = Callable[[Path, tuple[int, ...]], np.ndarray]  # (path of an image, (H, W)) to labels (H, W) uint8
SCALES = (0.7, 1.4)  # of aug_data "scale"
ANGLE = 30.0  # degrees to either side, of aug_data "rotate" (section 3.2) and "scale"


def data_path(settings: Settings) -> Path:
    """The folder of the data set: `data_dir`, or the built-in set, which is made on first use."""
    folder = ROOT / "data" / "builtin"
    if settings.data_dir and Path(settings.data_dir) != folder:
        return Path(settings.data_dir)
    log.info(f"using the built-in set, photographs with synthetic rain: {folder}")
    builtin.make_builtin(folder)
    return folder


def list_pairs(source: Path, or_clean: bool = False) -> list[Path]:
    """The joined pairs, or clean images if these will do, in a folder, or `source` itself if it is a file.

    Raises MissingFile where there are none, Mismatch where the files are rainy and clean images by name and contents,
    or single pictures. The errors say how to convert what is there.
    """
    try:
        paths = image_files.list_pairs(source)
    except MissingFile:
        missing = source if source.parent.exists() else source.parent
        state = f"{source} contains no pairs" if source.exists() else f"there is no folder {missing}"
        raise MissingFile(f"{state}{_how_to_convert(source)}") from None
    images = [Found(path, (), role_of(path, ())) for path in paths]
    both = {"clean", "rainy"} <= {image.role for image in images}
    if both and pairing.pair_by_name(images)[0] and not pairing.are_joined(images):
        raise Mismatch(f"{source} contains rainy and clean images, not joined pairs{_how_to_convert(source)}")
    if not or_clean and not pairing.show_pairs(paths, least=pairing.OTHER_PICTURE):
        raise Mismatch(f"{source} contains single pictures, not joined pairs{_how_to_convert(source)}")
    return paths


def _how_to_convert(source: Path) -> str:
    """What to do about a folder without pairs: the folder that is meant, or a command that makes or completes a set."""
    split = source.name if source.name in SPLITS else ""
    root, wanted = (source.parent if split else source), ("test" if split == "test" else "train")
    sets = {folder: [name for name in SPLITS if list_images(folder / name)] for folder in (root, root.parent)}
    if not split and sets[root]:
        return f"; did you mean {root / sets[root][0]}?"
    if split and root.name in SPLITS and len(sets[root.parent]) > 1:
        return f"; did you mean {root.parent}?"
    if split in ("train", "test") and sets[root] and not source.is_dir():
        command = command_line("convert.py", "own", f"--{split}", "DIR", "--data_dir", str(root))
        return f"; this data set has no {split} pairs; to add some: {command}"
    for words, given in (([str(root)], ""), ([f"--{wanted}", str(root)], wanted)):
        try:
            images = find_images("own", root, (), given)[0].get(wanted, [])
        except UserError:
            continue
        if images and (pairing.are_joined(images) or pairing.pair_by_name(images)[0]):
            command = command_line("convert.py", "own", *words, "--data_dir", f"{root}_pairs")
            return f"; this makes a data set of it: {command}"
    return f"; rain.py draw makes data sets of clean images, convert.py of pairs; {BOTH_FOLDERS}"


class CropDataset(Dataset):
    """Random crops (O, B) of stored pairs or, with setting `rain`, of clean images with new synthetic rain.

    Item i is sample i of the whole training, a function of (seed, step, position in the batch). The pairs are in
    `folder`; with `rain`, only their clean halves are used. Pairs of `more_data` are added as stored. Reads every file
    once. Raises UserError if one is not a pair or smaller than the patch, or if none is left.
    """

    def __init__(self, folder: Path, settings: Settings, read_labels: LabelReader | None = None):
        self.settings, self.read_labels = settings, read_labels
        first = Path(settings.clean_dir or folder)
        clean = image_files.list_pairs(first) if settings.clean_dir else list_pairs(first)
        self.paths = [*clean, *(path for each in settings.more_data for path in list_pairs(Path(each)))]
        self.synthetic = {path for path in self.paths if settings.rain and path.parent == first}
        self.kept: dict[Path, Images] = {}
        excluded, thumbs = _thumbnails(settings.exclude), {}
        free = settings.cache_gib * 2**30
        with ThreadPoolExecutor() as pool:  # cv2 decodes outside Python's lock
            images_of = pool.map(self._read, self.paths)
            bar = Progress(self.paths, "first scan", unit="image")
            for path, images in zip(bar, images_of, strict=True):
                if excluded:
                    thumbs[path] = thumbnail(images[0])
                free -= sum(image.nbytes for image in images)
                if free >= 0:
                    self.kept[path] = images
        shared = shared_backgrounds(thumbs, excluded)
        self.paths = [path for path in self.paths if path not in shared]
        if not self.paths:
            raise BadArgument("exclude shows the backgrounds of all training images")
        self.kept = {path: self.kept[path] for path in self.paths if path in self.kept}
        log.info(f"{len(self.paths)} training images, {len(self.kept)} kept in memory, {len(shared)} excluded")

    def _read(self, path: Path) -> Images:
        """(B, O) of a stored pair, or (B,) for synthetic rain; followed by the labels, if any."""
        synthetic = path in self.synthetic
        images = (to_bgr8(read_image(path)),) if synthetic and self.settings.clean_dir else read_pair(path)
        (height, width), patch = images[0].shape[:2], self.settings.patch_size
        if min(height, width) < patch:
            raise Mismatch(f"{path} is only {width}x{height} (patch_size {patch}): remove it or lower --patch_size")
        # A copy: a view of the clean half would keep the whole pair in memory.
        images = tuple(np.ascontiguousarray(image) for image in images[: 1 if synthetic else 2])
        return (*images, self.read_labels(path, (height, width))) if self.read_labels else images

    def __getitem__(self, sample: int) -> tuple[Tensor, ...]:
        """The crops (O, B), each (3, patch, patch) uint8; then the labels, (patch, patch) int64, if any."""
        settings, count = self.settings, len(self.paths)
        epoch, position = divmod(sample, count)
        path = self.paths[int(_order(settings.seed, epoch, count)[position])]
        images = self.kept[path] if path in self.kept else self._read(path)
        rng = np.random.default_rng((settings.seed, *divmod(sample, settings.batch_size)))
        B, *others = random_crop(images, settings.patch_size, settings.aug_data, rng)
        labels = [torch.from_numpy(others.pop().astype(np.int64))] if self.read_labels else []
        # Rain is added after the augmentation, so that it falls in the directions of its style.
        O = others[0] if others else add_rain(B, STYLES[settings.rain], rng)
        return to_tensor(O), to_tensor(B), *labels


def _thumbnails(folders: Iterable[str]) -> dict[str, np.ndarray]:
    """Of the clean halves of the joined pairs, or of the clean images, in these folders."""
    thumbs = {}
    for paths in (list_pairs(Path(folder), or_clean=True) for folder in folders):
        joined = pairing.show_pairs(paths, otherwise=False)
        thumbs |= {str(path): thumbnail(read_pair(path)[0] if joined else to_bgr8(read_image(path))) for path in paths}
    return thumbs


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def random_crop(images: Images, patch: int, aug_data: str, rng: np.random.Generator) -> Images:
    """The same random crop (patch, patch, 3) of all images, augmented as `aug_data` says, and without padding."""
    height, width = images[0].shape[:2]
    if aug_data == "rotate":
        return _rotated_crop(images, patch, rng)
    if aug_data == "scale":
        if rng.integers(2):
            images = tuple(image[:, ::-1] for image in images)
        return _rotated_crop(images, patch, rng, rng.uniform(*SCALES))
    top = rng.integers(height - patch + 1)
    left = rng.integers(width - patch + 1)
    turns = rng.integers(4) if aug_data == "quarter_turns" else 0
    across = -1 if aug_data == "flip" and rng.integers(2) else 1
    crops = (np.rot90(image[top : top + patch, left : left + patch][:, ::across], turns) for image in images)
    return tuple(np.ascontiguousarray(crop) for crop in crops)


def _rotated_crop(images: Images, patch: int, rng: np.random.Generator, scale: float = 1.0) -> Images:
    height, width = images[0].shape[:2]
    angle = np.deg2rad(rng.uniform(-ANGLE, ANGLE))
    reach = _reach(angle, patch) / scale
    while 2 * reach > min(height, width) - 1:  # the image is too small for this scale or angle
        if scale < 1:
            scale = min(1.0, 1.1 * scale)
        else:
            angle = angle / 2 if abs(angle) > 1e-3 else 0.0
        reach = _reach(angle, patch) / scale
    x = rng.uniform(reach, width - 1 - reach)
    y = rng.uniform(reach, height - 1 - reach)
    cos, sin, middle = np.cos(angle) / scale, np.sin(angle) / scale, (patch - 1) / 2
    # Maps a pixel of the crop to its place in the image, hence WARP_INVERSE_MAP.
    matrix = np.array([[cos, -sin, x - middle * (cos - sin)], [sin, cos, y - middle * (sin + cos)]])
    flags = {3: cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, 2: cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP}  # 2: labels
    return tuple(
        cv2.warpAffine(np.ascontiguousarray(image), matrix, (patch, patch), flags=flags[image.ndim]) for image in images
    )


def _reach(angle: float, patch: int) -> float:
    """Half the side of the upright square around a rotated patch, pixels."""
    return (patch - 1) / 2 * (abs(np.cos(angle)) + abs(np.sin(angle)))


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def read_whole(path: Path) -> tuple[Tensor, Tensor]:
    """A whole pair (O, B), each (3, H, W) uint8. Raises UserError as `images.read_pair` does."""
    B, O = read_pair(path)
    return to_tensor(O), to_tensor(B)
