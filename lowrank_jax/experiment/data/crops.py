"""Which box of an image becomes the input of a network."""

import dataclasses
import math

import numpy as np

ASPECTS = (3 / 4, 4 / 3)
"""Width over height of a random crop, from and to (Szegedy et al. 2015)."""

_TRIES = 10
DRAWS = 2 * _TRIES + 2
"""How many uniform numbers `random_crop` may need."""


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of an image in whole pixels."""

    top: int
    left: int
    height: int
    width: int


def central_crop(height: int, width: int, fraction: float) -> Box:
    """The square in the middle whose side is a fraction of the shorter side.

    Bringing it to `size` shows what bringing the shorter side to `size / fraction` and cropping `size` from the middle does.
    """
    side = max(1, round(fraction * min(height, width)))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def random_crop(height: int, width: int, area: tuple[float, float], draws: np.ndarray) -> Box:
    """A box of random area, as a fraction of the image's, and random aspect ratio, at a random place.

    As in torchvision's RandomResizedCrop: ten tries to fit one into the image, then the largest one in the middle whose aspect
    ratio is allowed.

    Args:
      area: from and to, uniformly; the aspect ratio is log-uniform over `ASPECTS`.
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
