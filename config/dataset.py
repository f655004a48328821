"""Images: random crops for training, of pairs or with rain drawn afresh; whole pairs for validation and test.

One file a pair: the clean background `B` on the left half, the rainy image `O` on the right half, in cv2's BGR order.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from base import ranks
from base.console import in_terminal, log
from base.errors import UserError
from base.files import ROOT
from base.images import list_images, read_image, read_pair, to_bgr8
from datasets import builtin
from datasets.backgrounds import shared_backgrounds, thumbnail
from losses import IGNORED, wants_labels
from networks.php import CLASSES
from settings import Settings
from synthesis.streaks import add_rain
from synthesis.styles import STYLES

Images = tuple[np.ndarray, ...]  # B, then O unless rain is drawn on it, (H, W, 3) uint8, then labels (H, W) if any
LABELS = "label"  # folder of them beside the pairs
SCALES = (0.7, 1.4)  # of aug_data "scale"
STOPS = (signal.SIGINT, signal.SIGTERM)  # what asks a training to end
TURNS = 30.0  # degrees to either side for aug_data "rotate", section 3.2


def data_path(settings: Settings) -> Path:
    """The data set's folder; without `data_dir`, or where it names it, the built-in set, made on first use."""
    folder = ROOT / "data" / "builtin"
    if settings.data_dir and Path(settings.data_dir) != folder:
        return Path(settings.data_dir)
    why = "" if settings.data_dir else "no data_dir: "
    log.info(f"{why}the built-in set in {folder}, scikit-image's photographs with drawn rain")
    builtin.make_builtin(folder)
    return folder


def list_pairs(folder: Path) -> list[Path]:
    """The pairs' files of one split. Raises UserError where the folder is missing or empty."""
    return _list_filled(
        folder,
        "a data set has the folders train, val and test; convert.py makes them",
        "put joined pairs there, or make them with convert.py",
    )


def list_clean(folder: Path) -> list[Path]:
    """The files of a folder of clean images. Raises UserError where the folder is missing or empty."""
    advice = "clean_dir is a folder of clean images"
    return _list_filled(folder, advice, advice)


def _list_filled(folder: Path, if_missing: str, if_empty: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: {if_missing}")
    paths = list_images(folder)
    if not paths:
        raise UserError(f"{folder} holds no images: {if_empty}")
    return paths


class CropDataset(Dataset):
    """Random crops (O, B): aligned ones of pairs, or with `rain` clean ones and the rain that is drawn on them.

    Item i, the i-th sample of the whole training, is a function of (seed, i // batch_size, i % batch_size) alone: of
    seed, step and sample. Each epoch goes through the images in an order of its own.

    The pairs lie in `folder`. With `rain`, only their clean halves are taken, or the images in `clean_dir` instead. The
    pairs in the folders `more_data` come besides, as they are stored. Whatever shows a background of the pairs in the
    folders `exclude` is left out.

    Raises UserError where a file is no pair or smaller than the patch; all files are looked at once, at the start.
    """

    def __init__(self, folder: Path, settings: Settings):
        self.settings = settings
        first = list_clean(Path(settings.clean_dir)) if settings.clean_dir else list_pairs(folder)
        self.paths = first + [path for more in settings.more_data for path in list_pairs(Path(more))]
        self.drawn_on = set(first if settings.rain else ())
        self.labelled = wants_labels(settings) and any((path.parent / LABELS).is_dir() for path in self.paths)
        self.kept: dict[Path, Images] = {}
        excluded = {
            str(path): thumbnail(read_pair(path)[0]) for other in settings.exclude for path in list_pairs(Path(other))
        }
        room = settings.cache_gib * 2**30
        thumbs = {}
        with ThreadPoolExecutor() as pool:  # cv2 decodes outside Python's lock
            everything = pool.map(self._read, self.paths)
            bar = tqdm(everything, "first scan", len(self.paths), disable=not in_terminal(), leave=False)
            for path, images in zip(self.paths, bar, strict=True):
                if excluded:
                    thumbs[path] = thumbnail(images[0])
                room -= sum(image.nbytes for image in images)
                if room >= 0:
                    self.kept[path] = images
        if excluded:
            self._leave_out(set(shared_backgrounds(thumbs, excluded)))
        what = f"clean images, {settings.rain} rain drawn on their crops," if settings.rain else "training pairs"
        own, more = len(set(first).intersection(self.paths)), ""
        if settings.more_data:
            more = f" and {len(self.paths) - own} pairs from {' and '.join(settings.more_data)}"
        log.info(f"{own} {what} from {first[0].parent}{more}, {len(self.kept)} of them kept in memory")

    def _leave_out(self, twins: set[Path]) -> None:
        self.paths = [path for path in self.paths if path not in twins]
        self.kept = {path: images for path, images in self.kept.items() if path not in twins}
        what = f"{len(twins)} training images show backgrounds of {' and '.join(self.settings.exclude)}"
        if not self.paths:
            raise UserError(f"all {what}: nothing is left to train on")
        log.info(f"{what} and are left out")

    def _read(self, path: Path) -> Images:
        """(B, O) of a stored pair; (B,) of an image that rain is drawn on; with its labels, if these are trained on."""
        settings, patch, drawn_on = self.settings, self.settings.patch_size, path in self.drawn_on
        alone = drawn_on and settings.clean_dir
        images = (to_bgr8(read_image(path)),) if alone else read_pair(path)
        height, width = images[0].shape[:2]
        if min(height, width) < patch:
            size = f"{width}x{height}" if alone else f"a pair of {width}x{height} images"
            raise UserError(
                f"{path} is {size}, smaller than the patch of {patch}x{patch}: remove it or lower --patch_size"
            )
        # Copied out of the joined image: a clean half alone must not keep the rainy one in memory.
        images = tuple(np.ascontiguousarray(image) for image in images[: 1 if drawn_on else 2])
        return (*images, read_labels(path, images[0].shape[:2])) if self.labelled else images

    def __getitem__(self, sample: int) -> tuple[Tensor, ...]:
        """The crops (O, B), each (3, patch, patch) uint8; with labels, these behind, (patch, patch) int64."""
        settings, count = self.settings, len(self.paths)
        epoch, position = divmod(sample, count)
        path = self.paths[int(_order(settings.seed, epoch, count)[position])]
        images = self.kept[path] if path in self.kept else self._read(path)
        rng = np.random.default_rng((settings.seed, *divmod(sample, settings.batch_size)))
        B, *others = random_crop(images, settings.patch_size, settings.aug_data, rng)
        labels = [torch.from_numpy(others.pop().astype(np.int64))] if self.labelled else []
        if others:
            O = others[0]
        else:
            O = add_rain(B, STYLES[settings.rain], rng)  # after turning, so that rain leans as the style says
        return to_tensor(O), to_tensor(B), *labels


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def random_crop(images: Images, patch: int, aug_data: str, rng: np.random.Generator) -> Images:
    """The same random crop (patch, patch, 3) of all images, turned as `aug_data` says.

    Turning comes before cutting: the crop is taken where the turned image has pixels all over, so that no invented
    border is learnt. For quarter turns, turning the crop is the same.
    """
    height, width = images[0].shape[:2]
    if aug_data == "rotate":
        return _turned_crop(images, patch, rng)
    if aug_data == "scale":
        if rng.integers(2):
            images = tuple(image[:, ::-1] for image in images)
        return _turned_crop(images, patch, rng, rng.uniform(*SCALES))
    top = rng.integers(height - patch + 1)
    left = rng.integers(width - patch + 1)
    turns = rng.integers(4) if aug_data == "quarter_turns" else 0
    across = -1 if aug_data == "flip" and rng.integers(2) else 1
    crops = (np.rot90(image[top : top + patch, left : left + patch][:, ::across], turns) for image in images)
    return tuple(np.ascontiguousarray(crop) for crop in crops)


def _turned_crop(images: Images, patch: int, rng: np.random.Generator, scale: float = 1.0) -> Images:
    """The crop of the image turned by -30..30 degrees, `scale` times as large.

    Sampled at once: only the pixels of the crop are computed.
    """
    height, width = images[0].shape[:2]
    angle = np.deg2rad(rng.uniform(-TURNS, TURNS))
    reach = _reach(angle, patch) / scale
    while 2 * reach > min(height, width) - 1:  # too small an image for this scale, or this angle
        if scale < 1:
            scale = min(1.0, 1.1 * scale)
        else:
            angle = angle / 2 if abs(angle) > 1e-3 else 0.0
        reach = _reach(angle, patch) / scale
    x = rng.uniform(reach, width - 1 - reach)
    y = rng.uniform(reach, height - 1 - reach)
    cos, sin, middle = np.cos(angle) / scale, np.sin(angle) / scale, (patch - 1) / 2
    # WARP_INVERSE_MAP: the matrix takes a pixel of the crop to its place in the image.
    matrix = np.array(
        [[cos, -sin, x - middle * (cos - sin)], [sin, cos, y - middle * (sin + cos)]],
    )
    ways = (cv2.INTER_LINEAR if image.ndim == 3 else cv2.INTER_NEAREST for image in images)  # labels don't mix
    return tuple(
        cv2.warpAffine(np.ascontiguousarray(image), matrix, (patch, patch), flags=way | cv2.WARP_INVERSE_MAP)
        for image, way in zip(images, ways, strict=True)
    )


def _reach(angle: float, patch: int) -> float:
    """Half the side of the upright square around a turned patch, in pixels."""
    return (patch - 1) / 2 * (abs(np.cos(angle)) + abs(np.sin(angle)))


def read_labels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The classes (H, W) uint8 of a pair's pixels, from the PNG of its name in the folder `label` beside it.

    All unlabelled (255) where there is none. Raises UserError where they are not of the pair's size, or not grey.
    """
    file = path.parent / LABELS / f"{path.stem}.png"
    if not file.is_file():
        return np.full(shape, IGNORED, np.uint8)
    labels = read_image(file)
    if labels.shape != shape or labels.dtype != np.uint8:
        raise UserError(f"{file} must be a grey 8-bit image of {shape[1]}x{shape[0]} pixels, as its pair's halves are")
    if not ((labels < CLASSES) | (labels == IGNORED)).all():
        raise UserError(f"{file} has labels that are none of 0 to {CLASSES - 1} and {IGNORED}")
    return labels


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def training_batches(dataset: CropDataset, first_step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of the batches (O, B), each (N, 3, patch, patch) uint8, from step `first_step` to the last."""
    settings = dataset.settings
    mine = ranks.part(settings.batch_size)
    starts = range(first_step * settings.batch_size, settings.steps * settings.batch_size, settings.batch_size)
    workers = settings.num_workers
    if workers < 0:
        # Drawing rain is Python's work: more threads don't make it faster, and on a GPU a step is over before it is.
        workers = _spare_cores() if device.type == "cuda" and settings.rain else 0
    loader = DataLoader(
        dataset,
        batch_sampler=[range(start + mine.start, start + mine.stop) for start in starts],
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a seed, which must not come from the training's generator
        worker_init_fn=_init_worker,
    )
    return _from_workers(loader) if workers else _one_ahead(iter(loader))


def _spare_cores() -> int:
    """Processes that may draw rain for one rank: 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _from_workers(loader: DataLoader) -> Iterator:
    """The loader's batches. Its workers end with this iterator or, if something still holds that, with the program."""
    others, workers = multiprocessing.active_children(), []
    with ExitStack() as ending:
        # Python ends by sending SIGTERM to its child processes and waiting for them. Workers ignore it, so they must be
        # gone by then: PyTorch asks them to end, and whichever has not done so after some seconds is killed.
        atexit.register(ending.close)
        ending.callback(atexit.unregister, ending.close)
        ending.callback(lambda: [process.kill() for process in workers])
        try:
            with _blocked_stops():
                batches = iter(loader)
        finally:
            workers += [process for process in multiprocessing.active_children() if process not in others]
        ending.callback(batches._shutdown_workers)
        yield from batches


@contextmanager
def _blocked_stops() -> Iterator[None]:
    """Within this, STOPS wait, and new processes start with them blocked: a worker imports for seconds before its init.

    A fork server that starts within blocks them for good.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # which unblocks them when it starts the tracker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(_: int) -> None:
    """Leave STOPS, which a terminal or a scheduler sends to the whole process group, to the parent, and end with it."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """PyTorch watches the process that forked the worker: a fork server lives on as long as the worker does."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _one_ahead(batches: Iterator) -> Iterator:
    """The same batches; a thread makes the next one while the caller computes with the last."""
    with ThreadPoolExecutor(1, "crops") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def read_whole(path: Path) -> tuple[Tensor, Tensor]:
    """A whole pair (O, B), each (3, H, W) uint8. Raises UserError as `image_io.read_pair` does."""
    B, O = read_pair(path)
    return to_tensor(O), to_tensor(B)
