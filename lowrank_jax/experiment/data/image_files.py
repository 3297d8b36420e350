"""Image files as a network that was trained on a data set takes them."""

import os
import pathlib
from collections.abc import Iterable

import numpy as np

from lowrank_jax.experiment.data import crops, pillow
from lowrank_jax.experiment.data.base import Dataset, Decoding
from lowrank_jax.experiment.data.decode import decode_box

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of the files that are taken for images."""


def find(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[str], int]:
    """Files as they are given, and in the place of a folder the image files in it and below, sorted by name.

    Returns:
      The files, and how many others were passed over in folders: hidden ones, and those without an image's suffix.
    """
    found, others = [], 0
    for path in [os.fspath(path) for path in paths]:
        if not pathlib.Path(path).is_dir():
            found.append(path)
            continue
        for folder, below, names in os.walk(path):
            below[:] = sorted(name for name in below if not name.startswith("."))
            images = [name for name in sorted(names) if is_image(name) and not name.startswith(".")]
            found += [str(pathlib.Path(folder, name)) for name in images]
            others += len(names) - len(images)
    return found, others


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return name.lower().endswith(SUFFIXES)


def why_not(dataset: Dataset) -> str | None:
    """Why image files cannot be what a network of this data set takes; None if they can."""
    if len(dataset.image_shape) != 3 or dataset.image_shape[2] not in (1, 3):
        return f"its inputs are {list(dataset.image_shape)}, which no image file holds"
    if dataset.image_dtype != "uint8":
        return f"its inputs are {dataset.image_dtype}, and image files hold whole numbers from 0 to 255"
    return None


def read(dataset: Dataset, data: bytes) -> tuple[np.ndarray, str]:
    """An encoded image as it is read in evaluation.

    Where a data set has images of one size, others are cropped at the centre to its aspect ratio and resized; colours become
    grey where it has one channel.

    Returns:
      uint8 `[height, width, channels]` as the data set has them, and what was done beyond what evaluation does; "" for nothing.

    Raises:
      Undecodable: it is no image, is truncated, or is too large.
    """
    height, width, channels = dataset.image_shape
    decoding = dataset.decoding or Decoding(exif=True)
    found: list[tuple[int, int]] = []

    def choose(rows: int, columns: int) -> crops.Box:
        found.append((rows, columns))
        if dataset.cropped:
            return crops.central_crop(rows, columns, decoding.eval_crop)
        return _central(rows, columns, height / width)

    image = np.empty(dataset.image_shape, np.uint8)
    decode_box(data, choose, image, exif=decoding.exif, alpha=decoding.alpha)
    done = []
    if not dataset.cropped and found[-1] != (height, width):
        done.append(f"resized from {found[-1][1]}x{found[-1][0]} to {width}x{height}")
    if channels == 1 and not dataset.decoding and _has_colours(data):
        done.append("turned grey")
    return image, " and ".join(done)


def _has_colours(data: bytes) -> bool:
    """Whether an image that could be decoded is not stored in grey."""
    with pillow.opened(data) as image:
        return image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;")


def _central(rows: int, columns: int, aspect: float) -> crops.Box:
    """The largest box at the centre whose height is so many times its width."""
    height, width = min(rows, max(1, round(columns * aspect))), min(columns, max(1, round(rows / aspect)))
    return crops.Box((rows - height) // 2, (columns - width) // 2, height, width)
