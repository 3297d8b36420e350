"""How images are varied in training: what to do, and the randomness of each example to do it with."""

import dataclasses

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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


def random_bits(seed: int, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
    """64 random bits for each example: splitmix64 over (seed, epoch, index), vectorised."""
    x = _splitmix64(np.full(index.shape, seed, np.uint64))
    x = _splitmix64(x ^ epochs.astype(np.uint64))
    return _splitmix64(x ^ index.astype(np.uint64))


def uniforms(bits: np.ndarray, count: int, *, skip: int = 0) -> np.ndarray:
    """Numbers in [0, 1), `[*bits.shape, count]`: the outputs of splitmix64 from the state `bits` on, `skip` left out."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64, also of scalars
        state = bits[..., None] + _GOLDEN * np.arange(1 + skip, 1 + skip + count, dtype=np.uint64)
    return (_splitmix64(state) >> np.uint64(11)) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea and Flood (OOPSLA 2014); arithmetic modulo 2**64 is meant."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
