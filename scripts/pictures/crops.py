"""Cuts photographs into square images of one size, and says which photographs look alike."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SMALLEST, LARGEST = 300, 900
"""Sides of the crops, in pixels, where the picture is large enough."""

_GRID = 32


def opened(file: Path) -> Image.Image:
    """A picture, upright, in RGB.

    Raises:
      OSError: Pillow cannot read it.
    """
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def random_crops(image: Image.Image, name: str, n: int, size: int = 224, seed: int = 0) -> np.ndarray:
    """Random squares of a picture, resized with antialiasing.

    The side of a square is uniform between `SMALLEST` and `LARGEST` pixels.  Where the picture's short side s is below LARGEST,
    it goes up to s, and down to s/2 or `size`, whichever is larger, if that is below SMALLEST: so crops of a small picture
    vary too, and are not enlarged unless the picture itself is smaller than `size`.  The draws depend on the seed and the
    picture's name alone, and the first of them do not depend on n.

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
    """What a picture looks like, whatever its size, format, brightness and contrast: float64 `[1024]`, of length 1.

    A perceptual hash without the rounding to bits: 32 by 32 grey values, less their mean.  All zeros for one grey.
    """
    grey = np.asarray(image.convert("L").resize((_GRID, _GRID), Image.Resampling.BOX), np.float64).ravel()
    grey -= grey.mean()
    return grey / max(float(np.linalg.norm(grey)), 1e-9)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two fingerprints: above 0.96 for copies, below 0.94 for any two pictures of the list."""
    return float(a @ b)
