"""From an encoded image to the pixels of one box of it, at a network's size."""

import io
import math
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from lowrank_jax.data.crops import Box

# Batches are decoded by a thread for each core: threads inside of an operation would only fight with them.
cv2.setNumThreads(1)

Choose = Callable[[int, int], Box]
"""Which box of an image of some height and width."""


class Undecodable(Exception):
    """The bytes are no image, or only the beginning of one."""


def decode_box(data: bytes, choose: Choose, out: np.ndarray) -> None:
    """Decodes one box of an image and brings it to a size.

    A JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size at which the box has at least the pixels asked for.

    Args:
      data: the image as a file would hold it.
      choose: the box, from the image's height and width.
      out: where the pixels go, uint8 `[height, width, 3]`; contiguous.

    Raises:
      Undecodable: it is no image, or truncated.
    """
    height, width, box, image = _decode(data, choose, out.shape[:2])
    # The scaled image is rounded up to whole pixels, so that its own size tells the scale.
    top, bottom = (round(y * image.shape[0] / height) for y in (box.top, box.top + box.height))
    left, right = (round(x * image.shape[1] / width) for x in (box.left, box.left + box.width))
    resize(image[top : max(bottom, top + 1), left : max(right, left + 1)], out)


def _decode(data: bytes, choose: Choose, size: tuple[int, int]) -> tuple[int, int, Box, np.ndarray]:
    """Height, width and box of the image as stored, and its pixels, possibly scaled down."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("CMYK", "YCCK"):
            box = choose(height, width)
            factor = _reduction(box, size)
            least = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
            return height, width, box, simplejpeg.decode_jpeg(data, **least)
    except ValueError:  # no JPEG, or a damaged one
        pass
    image = _decode_slowly(data)
    return *image.shape[:2], choose(*image.shape[:2]), image


def _reduction(box: Box, size: tuple[int, int]) -> int:
    """By how much a JPEG may be scaled down as it is decoded.  Between powers of two that takes longer than not at all."""
    least = min(box.height / size[0], box.width / size[1])
    return 2 ** min(3, int(math.log2(least))) if least >= 2 else 1


def _decode_slowly(data: bytes) -> np.ndarray:
    """Whatever Pillow can read: other formats and colours, and JPEGs with flaws that leave all of the image there."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # each of its formats has errors of its own
        raise Undecodable(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def resize(image: np.ndarray, out: np.ndarray) -> None:
    """Brings an image to the size of `out`, both uint8 `[height, width, 3]`, without aliasing.

    Pillow's and jax's antialiased bilinear resizing averages with a triangle as wide as two pixels of the result, whose variance
    is f²/6 when shrinking f times.  Plain linear interpolation has 1/6 of that; a 3-tap filter before it adds what lacks.  That
    is as close to it as area averaging and three times as fast.
    """
    shrink = [before / after for before, after in zip(image.shape[:2], out.shape[:2], strict=True)]
    if max(shrink) > 2.2:  # more than three taps can add
        cv2.resize(image, out.shape[1::-1], dst=out, interpolation=cv2.INTER_AREA)
        return
    if max(shrink) > 1:
        (rows, deviation_y), (columns, deviation_x) = map(_filter, shrink)
        image = cv2.GaussianBlur(image, (columns, rows), deviation_x, sigmaY=deviation_y)
    cv2.resize(image, out.shape[1::-1], dst=out, interpolation=cv2.INTER_LINEAR)


def _filter(shrink: float) -> tuple[int, float]:
    """Taps, and the deviation that makes OpenCV's kernel [a, 1 - 2a, a] one of variance 2a = (shrink² - 1) / 6."""
    outer = (shrink**2 - 1) / 12
    return (3, math.sqrt(0.5 / math.log((1 - 2 * outer) / outer))) if outer > 1e-6 else (1, 1.0)
