"""Image files by Pillow: in the formats that are documented, and no others."""

import io
import warnings
from typing import BinaryIO

from PIL import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Those that are read.  For others Pillow may start a program on the content of a file, as it does for PostScript."""

# It warns of damaged metadata without the file's name; pixels are not concerned.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def opened(source: bytes | str) -> Image.Image:
    """The image in a file, or in its content, whose header has been read.

    Raises:
      Exception: it is none, or has another format; every format has its own errors.
    """
    source_: BinaryIO | str = io.BytesIO(source) if isinstance(source, bytes) else source
    return Image.open(source_, formats=FORMATS)
