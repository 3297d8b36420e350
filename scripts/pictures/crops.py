"""Cuts photographs into square images of one size, and says which photographs look alike."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SMALLEST, LARGEST = 300, 900
"""Sides of the crops, in pixels, where the picture is large enough."""

_GRID = 16


def opened(file: Path) -> Image.Image:
    """A picture, upright, in RGB.

    Raises:
      OSError: Pillow cannot read it.
    """
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def random_crops(image: Image.Image, name: str, n: int, size: int = 224, seed: int = 0) -> np.ndarray:
    """Random squares of a picture, resized with antialiasing.

    The side of a square is uniform between `SMALLEST` and `LARGEST` pixels.  In a picture whose short side s is below LARGEST it
    ends at s, and starts at s/2 or `size`, whichever is larger, if that is below SMALLEST: so crops of a small picture vary too,
    and are not enlarged unless the picture itself is smaller than `size`.  The draws depend on the seed and the picture's name
    alone, and the first draws do not depend on n.

    Returns:
      uint8 `[n, size, size, 3]`.
    """
    folded = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    rng = np.random.default_rng([seed, folded])
    largest = min(LARGEST, *image.size)
    smallest = min(SMALLEST, largest, max(size, largest // 2))
    return np.stack([_resized(image, _square(image, int(rng.integers(smallest, largest + 1)), rng), size) for _ in range(n)])


def central_crop(image: Image.Image, size: int = 224) -> np.ndarray:
    """The largest square in the middle of a picture, resized with antialiasing: uint8 `[1, size, size, 3]`."""
    side = min(image.size)
    left, top = ((extent - side) // 2 for extent in image.size)
    return _resized(image, (left, top, left + side, top + side), size)[None]


def _square(image: Image.Image, side: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    left, top = (int(rng.integers(extent - side + 1)) for extent in image.size)
    return left, top, left + side, top + side


def _resized(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.LANCZOS))


def fingerprint(image: Image.Image) -> np.ndarray:
    """What a picture looks like, whatever its size: bool `[256]`, nearly equal for copies.

    A perceptual hash: the picture as 16 by 17 grey values, and for each whether its right neighbour is brighter.
    """
    grey = image.convert("L").resize((_GRID + 1, _GRID), Image.Resampling.BOX, reducing_gap=2)
    values = np.asarray(grey, np.int16)
    return (values[:, 1:] > values[:, :-1]).ravel()


def differing(a: np.ndarray, b: np.ndarray) -> float:
    """The share of two fingerprints that differs: 0 for copies, about a half for pictures that have nothing in common."""
    return float(np.mean(a != b))
