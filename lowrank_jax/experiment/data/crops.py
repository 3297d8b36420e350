"""The part of an image that a network sees: a random crop in training, the central one in evaluation."""

import dataclasses
import math

import numpy as np

ASPECTS = (3 / 4, 4 / 3)
"""Minimum and maximum of width over height of a random crop (Szegedy et al. 2015)."""

_TRIES = 10
DRAWS = 2 * _TRIES + 2
"""The number of uniform draws that `random_crop` takes."""


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


def central_crop(height: int, width: int, fraction: float) -> Box:
    """The central square whose side is a fraction of the image's shorter side.

    Resizing it to `size` gives the same view as resizing the shorter side to `size / fraction` and cropping `size` from the
    centre.
    """
    side = max(1, round(fraction * min(height, width)))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def random_crop(height: int, width: int, area: tuple[float, float], draws: np.ndarray) -> Box:
    """A box of random area and aspect ratio at a random place.

    As in torchvision's RandomResizedCrop: up to ten attempts to fit one into the image, then the largest central box of an
    allowed aspect ratio.

    Args:
      area: minimum and maximum, as fractions of the image's area; uniform.  The aspect ratio is log-uniform over `ASPECTS`.
      draws: uniform numbers in [0, 1), `[DRAWS]`.
    """
    low, high = math.log(ASPECTS[0]), math.log(ASPECTS[1])
    *tries, down, right = draws.tolist()
    for u, v in zip(tries[::2], tries[1::2], strict=True):
        pixels = height * width * (area[0] + (area[1] - area[0]) * u)
        aspect = math.exp(low + (high - low) * v)
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    w = min(width, round(height * ASPECTS[1]))
    h = min(height, round(width / ASPECTS[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)
