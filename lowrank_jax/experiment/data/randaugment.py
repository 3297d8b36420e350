"""RandAugment (Cubuk, Zoph, Shlens and Le 2020): a few random operations, all of the same magnitude.

The paper's fourteen operations.  Magnitudes range from 0, the least change that an operation can make, to 10, the end of
AutoAugment's range, as in torchvision: rotation to 30 degrees, shear to 0.3, translation to 150/331 of the side, colour,
contrast, brightness and sharpness to factors of 1 ± 0.9, solarising from 256 down to 0, posterising from 8 down to 4 bits.
Signs are random.  Pixels from outside the image are grey.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

from lowrank_jax.experiment.data.random import uniforms

_CROPS = 64  # draws reserved for crops
_GREY = (128, 128, 128)

Operation = Callable[[np.ndarray, float], np.ndarray]
"""Of an image, uint8 `[height, width, 3]`, and a signed strength from -1 to 1."""


def randaugment(image: np.ndarray, bits: np.ndarray, layers: int, magnitude: float) -> np.ndarray:
    """The image after `layers` operations chosen by its 64 bits, uint8 `[height, width, 3]`."""
    for choice, sign in uniforms(bits, 2 * layers, skip=_CROPS).reshape(layers, 2).tolist():
        operation = _OPERATIONS[int(choice * len(_OPERATIONS))]
        image = operation(image, magnitude / 10 * (1 if sign < 0.5 else -1))
    return image


def identity(image: np.ndarray, strength: float) -> np.ndarray:
    """Returns the image."""
    return image


def autocontrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Stretches each channel to 0 ... 255."""
    low, high = (np.array([float(end(channel)) for channel in cv2.split(image)]) for end in (np.min, np.max))
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1)
    offset = np.where(high > low, -low * scale, 0)
    return _look_up(image, np.arange(256)[:, None] * scale + offset)


def equalize(image: np.ndarray, strength: float) -> np.ndarray:
    """Makes the histogram of each channel as flat as it can."""
    histograms = (cv2.calcHist([image], [i], None, [256], [0, 256]) for i in range(3))
    return _look_up(image, np.stack([_equalizing(histogram.ravel().astype(np.int64)) for histogram in histograms], -1))


def _equalizing(histogram: np.ndarray) -> np.ndarray:
    """The table of a channel, as Pillow defines it, `[256]`."""
    used = histogram[histogram > 0]
    step = (used.sum() - used[-1]) // 255
    if len(used) < 2 or not step:
        return np.arange(256)
    return (step // 2 + np.concatenate([[0], np.cumsum(histogram)[:-1]])) // step


def posterize(image: np.ndarray, strength: float) -> np.ndarray:
    """Keeps the upper bits."""
    return image & np.uint8(0xFF << round(4 * abs(strength)) & 0xFF)


def solarize(image: np.ndarray, strength: float) -> np.ndarray:
    """Inverts bright pixels."""
    return np.where(image < 256 * (1 - abs(strength)), image, 255 - image)


def color(image: np.ndarray, strength: float) -> np.ndarray:
    """Changes saturation: away from or towards grey."""
    return _blend(np.repeat(_luma(image)[:, :, None], 3, axis=2), image, strength)


def contrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Changes contrast: away from or towards the mean luma."""
    mean = math.floor(_luma(image).mean() + 0.5)
    return _look_up(image, _blend(np.full((256, 3), mean, np.uint8), _RAMP, strength))


def brightness(image: np.ndarray, strength: float) -> np.ndarray:
    """Changes brightness: away from or towards black."""
    return _look_up(image, _blend(np.zeros((256, 3), np.uint8), _RAMP, strength))


def sharpness(image: np.ndarray, strength: float) -> np.ndarray:
    """Changes sharpness: away from or towards a smoothed image; border pixels are kept."""
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, strength)


def rotate(image: np.ndarray, strength: float) -> np.ndarray:
    """About the centre, counter-clockwise."""
    angle = math.radians(30 * strength)
    cos, sin = math.cos(angle), math.sin(angle)
    y, x = image.shape[0] / 2, image.shape[1] / 2
    return _warp(image, ((cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)))


def shear_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves each row sideways, by its distance from the top."""
    return _warp(image, ((1, 0.3 * strength, 0), (0, 1, 0)))


def shear_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves each column up or down, by its distance from the left."""
    return _warp(image, ((1, 0, 0), (0.3 * strength, 1, 0)))


def translate_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves sideways by whole pixels."""
    return _warp(image, ((1, 0, round(150 / 331 * strength * image.shape[1])), (0, 1, 0)))


def translate_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Moves up or down by whole pixels."""
    return _warp(image, ((1, 0, 0), (0, 1, round(150 / 331 * strength * image.shape[0]))))


_OPERATIONS: tuple[Operation, ...] = (
    identity, autocontrast, equalize, rotate, solarize, color, posterize, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip

_RAMP = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps each channel through its column of a table `[256, 3]`, which is clipped to 0 ... 255 and truncated."""
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8)[None])


def _luma(image: np.ndarray) -> np.ndarray:
    """Brightness by ITU-R 601, uint8 `[height, width]`."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _blend(away: np.ndarray, image: np.ndarray, strength: float) -> np.ndarray:
    """Interpolates: `away` at strength -1/0.9, the image at 0, and beyond it for positive strengths."""
    factor = 1 + 0.9 * strength
    return cv2.addWeighted(image, factor, away, 1 - factor, 0)


def _warp(image: np.ndarray, inverse: tuple[tuple[float, float, float], tuple[float, float, float]]) -> np.ndarray:
    """Warps with nearest pixels; `inverse` maps a place of the result to its origin, in pixels from the upper left corner."""
    matrix = np.array(inverse, np.float64)
    matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5  # OpenCV's origin is the centre of the first pixel
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, image.shape[1::-1], flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=_GREY)
