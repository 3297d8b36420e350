"""How an image is turned and mirrored to stand upright, as its EXIF data says."""

import dataclasses

import numpy as np
from PIL import ExifTags, Image

from lowrank_jax.experiment.data import pillow
from lowrank_jax.experiment.data.crops import Box


@dataclasses.dataclass(frozen=True)
class Orientation:
    """What to do to the stored pixels, in this order."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the upright image from those of the stored one, or the reverse."""
        return (width, height) if self.transpose else (height, width)

    def stored(self, box: Box, height: int, width: int) -> Box:
        """The box of the stored image that is a box of the upright one, whose height and width are given."""
        top = height - box.top - box.height if self.flip_rows else box.top
        left = width - box.left - box.width if self.flip_columns else box.left
        return Box(left, top, box.width, box.height) if self.transpose else Box(top, left, box.height, box.width)

    def upright(self, image: np.ndarray) -> np.ndarray:
        """A view of the stored pixels `[height, width, channels]`."""
        image = image.swapaxes(0, 1) if self.transpose else image
        return image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


UPRIGHT = Orientation()

_BY_NUMBER = {
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}


def orientation(data: bytes) -> Orientation:
    """What an encoded image says of itself; upright if it says nothing, or nothing that can be read."""
    try:
        exif = _exif_of_jpeg(data) if data[:2] == b"\xff\xd8" else _exif_of_others(data)
        return orientation_of(exif)
    except Exception:  # every format has its own errors; decoding will name the image that is damaged
        return UPRIGHT


def orientation_of(exif: Image.Exif | None) -> Orientation:
    """The orientation in EXIF data that is parsed already."""
    return _BY_NUMBER.get(exif.get(ExifTags.Base.Orientation, 1), UPRIGHT) if exif else UPRIGHT


def orientation_of_image(image: Image.Image) -> Orientation:
    """The orientation of Pillow's image, whose pixels are as they are stored."""
    try:
        return orientation_of(_exif_of_image(image))
    except Exception:  # every format has its own errors
        return UPRIGHT


_APP1, _SCAN = 0xE1, 0xDA
_MARK = b"Exif\0\0"


def _exif_of_jpeg(data: bytes) -> Image.Exif | None:
    """Without opening the image, which would take longer than to decode a small one."""
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF and data[place + 1] != _SCAN:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == _APP1 and data[place + 4 : place + 10] == _MARK:
            exif = Image.Exif()
            exif.load(bytes(data[place + 4 : end]))
            return exif
        place = end
    return None


def _exif_of_others(data: bytes) -> Image.Exif | None:
    with pillow.opened(data) as image:
        return _exif_of_image(image)


def _exif_of_image(image: Image.Image) -> Image.Exif | None:
    return None if image.format == "TIFF" else image.getexif()  # Pillow turns a TIFF when it loads it
