"""How images are varied in training: what to do, and the randomness of each example to do it with."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to every training image, in this order; the default changes nothing.

    Attributes:
      crop_area: cut out a box of such a fraction of an image, from and to, and bring it to size; of images of many sizes.
      crop_padding: pad by so many pixels on each side and crop back to size at a random place; of images of one size.
      flip: mirror every other image.
      randaugment_layers: apply so many random operations of RandAugment.
      randaugment_magnitude: how strongly, from 0 to 10.
    """

    crop_area: tuple[float, float] | None = None
    crop_padding: int = 0
    flip: bool = False
    randaugment_layers: int = 0
    randaugment_magnitude: float = 9.0


def augment(images: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Images of one size `[batch, height, width, channels]`, each varied by its own 64 bits `[batch]`."""
    if augmentation.crop_padding:
        images = crop_shifted(images, bits, augmentation.crop_padding)
    if augmentation.flip or augmentation.randaugment_layers:
        images = np.stack([augment_cropped(*example, augmentation) for example in zip(images, bits, strict=True)])
    return images


def augment_cropped(image: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """What follows on the crop, of one image `[height, width, channels]` by its 64 bits; it may come back as it is."""
    if augmentation.flip and is_flipped(bits):
        import cv2

        image = cv2.flip(image, 1).reshape(image.shape)  # in a fortieth of NumPy's time
    if augmentation.randaugment_layers:
        from lowrank_jax.experiment.data.randaugment import randaugment

        image = randaugment(image, bits, augmentation.randaugment_layers, augmentation.randaugment_magnitude)
    return image


def is_flipped(bits: np.ndarray) -> bool:
    """Whether the lowest bit is set."""
    return bool(bits & np.uint64(1))


def crop_shifted(images: np.ndarray, bits: np.ndarray, padding: int) -> np.ndarray:
    """Pads with black and crops back to size, each image at its own offset."""
    batch, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    choices = np.uint64(2 * padding + 1)
    down = ((bits >> np.uint64(1)) & np.uint64(0xFFFF)) % choices
    right = ((bits >> np.uint64(17)) & np.uint64(0xFFFF)) % choices
    rows = down.astype(np.int64)[:, None] + np.arange(height)
    columns = right.astype(np.int64)[:, None] + np.arange(width)
    return padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
