"""Decodes one box of an encoded image at the size that a network takes."""

import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from lowrank_jax.experiment.data import pillow
from lowrank_jax.experiment.data.base import Decoding
from lowrank_jax.experiment.data.crops import Box
from lowrank_jax.experiment.data.orientation import UPRIGHT, Orientation, orientation
from lowrank_jax.text import first_line

# Batches are decoded by one thread per core; OpenCV's own threads would only compete with them.
cv2.setNumThreads(1)


@functools.cache
def pool() -> concurrent.futures.ThreadPoolExecutor:
    """The one pool that images are decoded in; created on first use, so that the process can fork before."""
    return concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")


Choose = Callable[[int, int], Box]
"""The box to decode, from the image's height and width."""


class Undecodable(Exception):
    """The bytes are not an image, a truncated one, or one of an absurd size.

    Damage inside an image is not detected: a JPEG that reaches its end marker but has missing or garbled parts is taken as
    libjpeg reads it, as in TensorFlow and Pillow.  ImageNet has such files, and their content is still recognisable.
    """


def decode_box(
    data: bytes | np.ndarray, choose: Choose, out: np.ndarray, *, fast: bool = False, exif: bool = False, alpha: str = "drop"
) -> None:
    """Decodes one box of an image and resizes it.

    A JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size at which the box still has the pixels of `out`, and
    only down to the lower edge of the box.

    Args:
      data: the encoded image; or its pixels, uint8 `[height, width, channels]` with the channels of `out`.
      choose: the box, from the image's height and width.
      out: receives the pixels, uint8 `[height, width, channels]` of one or three channels; contiguous.
      fast: saves a twelfth of the time, for colours that may be off by a level or two.
      exif, alpha: see `Decoding`.

    Raises:
      Undecodable: it is not an image, is truncated, or is too large.
    """
    turned = orientation(data) if exif and isinstance(data, bytes) else UPRIGHT
    if turned == UPRIGHT:
        _decode_stored(data, choose, out, fast, alpha)
        return
    stored = np.empty((*turned.size(*out.shape[:2]), out.shape[2]), np.uint8)
    _decode_stored(data, _of_stored(choose, turned), stored, fast, alpha)
    out[...] = turned.upright(stored)


def decode_whole(data: bytes, channels: int, decoding: Decoding) -> np.ndarray:
    """A whole image at its own size, uint8 `[height, width, channels]`.  Raises Undecodable as `decode_box` does."""
    turned = orientation(data) if decoding.exif else UPRIGHT

    def whole(height: int, width: int) -> Box:
        return Box(0, 0, height, width)

    _, _, image = _decode(data, whole, (1 << 30, 1 << 30, channels), False, decoding.alpha)
    return np.ascontiguousarray(turned.upright(image))


def _of_stored(choose: Choose, turned: Orientation) -> Choose:
    """The choice as a box of the image as it is stored."""

    def choose_stored(height: int, width: int) -> Box:
        upright = turned.size(height, width)
        return turned.stored(choose(*upright), *upright)

    return choose_stored


def _decode_stored(data: bytes | np.ndarray, choose: Choose, out: np.ndarray, fast: bool, alpha: str) -> None:
    """The same for an image as it is stored."""
    if isinstance(data, np.ndarray):
        box, factor, image = choose(*data.shape[:2]), 1, data
    else:
        box, factor, image = _decode(data, choose, out.shape, fast, alpha)
    resample(image, [side / factor for side in (box.top, box.left, box.height, box.width)], out)


def _decode(data: bytes, choose: Choose, shape: tuple[int, ...], fast: bool, alpha: str) -> tuple[Box, int, np.ndarray]:
    """The box, the factor by which the image is reduced, and its pixels from the top at least to the end of the box."""
    try:
        height, width, colours, _ = _header(data)
        _check_size(height, width)
        if colours not in ("CMYK", "YCCK"):
            box = choose(height, width)
            factor = _reduction(box, shape[:2])
            above, rows = _cut(data, height, box.top + box.height)
            least = {"min_height": -(-rows // factor), "min_width": -(-width // factor)} if factor > 1 else {}
            # A strict decoder would take the missing rows for damage.
            settings = {"fastdct": fast, "fastupsample": fast, "strict": rows == height, **least}
            return box, factor, simplejpeg.decode_jpeg(above, _COLOURS[shape[2]], **settings)
    except ValueError as error:  # not a JPEG, or a damaged one
        if _ENDS_EARLY in str(error):  # Pillow would fill the rest with zeros
            raise Undecodable("image file is truncated") from None
    image = _decode_slowly(data, shape[2], alpha)
    return choose(*image.shape[:2]), 1, image


_REMEDY = "store 8 or 16 bits without a sign"
_COLOURS = {1: "GRAY", 3: "RGB"}  # by the number of channels, as simplejpeg calls them


def _header(data: bytes) -> Any:
    """Height, width, colour space and subsampling."""
    return simplejpeg.decode_jpeg_header(data)


def _reduction(box: Box, size: Sequence[int]) -> int:
    """The factor by which a JPEG is reduced while it is decoded; other factors than powers of two take longer than none."""
    least = min(box.height / size[0], box.width / size[1])
    return 2 ** min(3, int(math.log2(least))) if least >= 2 else 1


def _cut(data: bytes, height: int, bottom: int) -> tuple[bytes | bytearray, int]:
    """The JPEG with a header that ends it some rows below `bottom`, where a decoder stops, and that height.

    Progressive JPEGs are left whole, as they are not coded from top to bottom, and so are those without an end marker, which
    need a closer look.
    """
    rows = -(-(bottom + _CONTEXT) // _MCU) * _MCU
    place = _frame_header(data)
    if rows >= height or place is None or data[-2:] != _END:
        return data, height
    shorter = bytearray(data)
    shorter[place + 5 : place + 7] = rows.to_bytes(2, "big")
    return shorter, rows


_MCU = 32  # rows that are coded together: at most 16, or 32 at the rarest subsampling
_CONTEXT = 2  # rows that the interpolation of colours looks ahead
_END = b"\xff\xd9"
_ENDS_EARLY = "Premature end of JPEG file"  # libjpeg's words
_NO_IMAGE = f"not an image, or of another format than {', '.join(pillow.FORMATS)}"
_MAX_PIXELS = 10**8  # ImageNet's largest has 2 * 10**7; a damaged header may ask for gigabytes
_BASELINE, _EXTENDED, _SCAN = 0xC0, 0xC1, 0xDA


def _frame_header(data: bytes) -> int | None:
    """The offset of the frame header of a JPEG that is coded in one pass from top to bottom; None for other JPEGs."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _SCAN:
        if data[place + 1] in (_BASELINE, _EXTENDED):
            return place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _decode_slowly(data: bytes, channels: int, alpha: str) -> np.ndarray:
    """Decodes whatever Pillow reads: other formats and colours, and JPEGs with flaws that leave the image complete."""
    try:
        with pillow.opened(data) as image:
            _check_size(image.height, image.width)
            return pixels(image, channels, alpha)
    except Undecodable:
        raise
    except UnidentifiedImageError:  # its message shows the address of an object
        tiff = data[:4] in (b"II*\0", b"MM\0*")
        raise Undecodable(f"a TIFF of a kind that Pillow cannot read; {_REMEDY}" if tiff else _NO_IMAGE) from None
    except Exception as error:  # every format has its own errors
        raise Undecodable(first_line(error)) from None


def pixels(image: Image.Image, channels: int, alpha: str = "drop") -> np.ndarray:
    """The pixels of Pillow's image, uint8 `[height, width, channels]` of one (luma) or three (RGB) channels.

    16 bits become 8 by their upper byte; of several frames it is the current one.

    Args:
      alpha: see `Decoding`.

    Raises:
      Undecodable: its pixels have no fixed range, or another one than Pillow takes them to have.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise Undecodable(f"its pixels are floating-point, signed or of 32 bits, which have no fixed range; {_REMEDY}")
    if image.format == "TIFF" and image.mode.startswith("I") and _tags(image) != _GREY_16:  # Pillow takes it for that
        raise Undecodable(f"its grey is not of 16 bits with 0 for black; {_REMEDY}")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], channels, axis=2)
    if alpha != "drop" and image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, alpha)
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    values = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return values.reshape(*values.shape[:2], channels)


_BITS, _PHOTOMETRIC = 258, 262
_GREY_16 = {_BITS: (16,), _PHOTOMETRIC: 1}


def _tags(image: Image.Image) -> dict[int, Any]:
    """What a TIFF says of its pixels."""
    tags = getattr(image, "tag_v2", {})
    return {tag: tags.get(tag) for tag in _GREY_16}


def _check_size(height: int, width: int) -> None:
    if height * width > _MAX_PIXELS:
        raise Undecodable(f"{width}x{height} pixels are too many for an image")


def resample(image: np.ndarray, box: Sequence[float], out: np.ndarray) -> None:
    """Resizes a box of an image to the size of `out`, both uint8 `[height, width, channels]`, without aliasing.

    The antialiased bilinear resizing of Pillow and jax averages with a triangle as wide as two output pixels, whose variance
    is f²/6 when shrinking f times.  Plain linear interpolation has a variance of 1/6; a 3-tap filter before it adds the rest.
    The result is as close to theirs as area averaging, in a third of its time.

    Args:
      box: top, left, height and width in pixels, not necessarily whole numbers.
    """
    top, left, height, width = box
    bottom, right = math.ceil(top + height), math.ceil(left + width)
    top, left = top - int(top), left - int(left)
    part = image[int(box[0]) : bottom, int(box[1]) : right]
    shrink = height / out.shape[0], width / out.shape[1]
    size = out.shape[1::-1]
    if max(shrink) > 2.2:  # more than three taps can add; fractions of a pixel hardly matter here
        cv2.resize(part, size, dst=out, interpolation=cv2.INTER_AREA)
        return
    if max(shrink) > 1:
        (rows, deviation_y), (columns, deviation_x) = map(_filter, shrink)
        part = cv2.GaussianBlur(part, (columns, rows), deviation_x, sigmaY=deviation_y)
    if (height, width) == part.shape[:2]:
        cv2.resize(part, size, dst=out, interpolation=cv2.INTER_LINEAR)
        return
    # OpenCV's origin is the centre of the first pixel.
    inverse = np.array(
        [
            [shrink[1], 0, left + shrink[1] / 2 - 0.5],
            [0, shrink[0], top + shrink[0] / 2 - 0.5],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(part, inverse, size, dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _filter(shrink: float) -> tuple[int, float]:
    """The number of taps, and the sigma for which OpenCV's kernel [a, 1 - 2a, a] has the variance 2a = (shrink² - 1) / 6."""
    outer = (shrink**2 - 1) / 12
    return (3, math.sqrt(0.5 / math.log((1 - 2 * outer) / outer))) if outer > 1e-6 else (1, 1.0)
