"""Augmentation of a training batch on the devices: normalisation, random erasing, mixup, cutmix and label smoothing."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Normalize = Callable[[jax.Array], jax.Array]

# timm's, which the recipes with random erasing refer to; the paper's largest area is 0.4.
_ERASED_AREA = (0.02, 1 / 3)  # of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)


def normalizer(mean: tuple[float, ...], std: tuple[float, ...]) -> Normalize:
    """Inputs to float32 of mean 0 and deviation 1 per channel or feature; they stay as they are where these are empty.

    Those of uint8 are given of pixels in [0, 1], those of floating-point inputs of what these hold.
    """

    def normalize(images: jax.Array) -> jax.Array:
        values = images.astype(jnp.float32)
        values = values / 255 if images.dtype == jnp.uint8 else values
        return (values - jnp.array(mean)) / jnp.array(std) if mean else values

    return normalize


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Turns the images and labels of a batch into inputs and targets.

    Attributes:
      normalize: see `normalizer`.
      num_classes: labels become distributions over so many classes; None if they stay as they are, but for mixup and cutmix.
      label_smoothing: the share of every target that is spread over all classes.
      random_erasing: the probability that a rectangle of an image is replaced by noise.
      mixup: alpha of the Beta distribution of the mixing weight; 0 for no mixup.
      cutmix: alpha of the Beta distribution of the area that a second image covers; 0 for no cutmix.  With both, every batch
        takes one of them, with equal probability.
    """

    normalize: Normalize
    num_classes: int | None
    label_smoothing: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images or vectors `[batch, ...]`, labels `[batch, ...]` -> float32 inputs, targets `[batch, ..., num_classes]`."""
        images = self.normalize(images)
        targets = labels
        if self.num_classes is not None:
            targets = optax.smooth_labels(jax.nn.one_hot(labels, self.num_classes), self.label_smoothing)
        erase_key, mix_key = jax.random.split(key)
        if self.random_erasing:
            images = erase(erase_key, images, self.random_erasing)
        if self.mixup or self.cutmix:
            images, targets = mix(mix_key, images, targets, self.mixup, self.cutmix)
        return images, targets


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al. 2020, arXiv 1708.04896); every pixel of the rectangle is drawn from N(0, 1).

    The area is 2 to 33 % of the image and the aspect ratio 0.3 to 1 / 0.3.  A side longer than the image is clipped, where the
    paper draws again.

    Args:
      key: of the draws.
      images: normalised, `[batch, height, width, channels]`.
      probability: of erasing an image.
    """
    batch, height, width, _ = images.shape
    chosen, area, aspect, place, noise = jax.random.split(key, 5)
    area = jax.random.uniform(area, (batch,), minval=_ERASED_AREA[0], maxval=_ERASED_AREA[1])
    low, high = jnp.log(jnp.array(_ERASED_ASPECT))
    aspect = jnp.exp(jax.random.uniform(aspect, (batch,), minval=low, maxval=high))
    sides = jnp.stack([jnp.sqrt(area * height * width * aspect), jnp.sqrt(area * height * width / aspect)], -1)
    size = jnp.array([height, width])
    sides = jnp.clip(jnp.round(sides), 1, size)
    start = jnp.floor(jax.random.uniform(place, (batch, 2)) * (size - sides + 1))
    inside = rectangle(start, start + sides, height, width)
    inside &= jax.random.bernoulli(chosen, probability, (batch,))[:, None, None, None]
    return jnp.where(inside, jax.random.normal(noise, images.shape, images.dtype), images)


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899), with one mixing weight for the whole batch.

    Every image is mixed with its neighbour in the batch, whose order is random: only images at the edges of a device's part
    move between devices.

    Args:
      key: of the draws.
      images: `[batch, height, width, channels]`; without cutmix of any shape.
      targets: `[batch, ...]`, such as distributions over classes.
      mixup_alpha, cutmix_alpha: see `Mixing`; not both zero.
    """
    choice, share, place = jax.random.split(key, 3)
    use_cutmix = jax.random.bernoulli(choice, 0.5) if mixup_alpha and cutmix_alpha else jnp.array(bool(cutmix_alpha))
    alpha = jnp.where(use_cutmix, cutmix_alpha, mixup_alpha)
    kept = jax.random.beta(share, alpha, alpha)

    if images.ndim != 4:
        return _blend(kept, images), _blend(kept, targets)
    _, height, width, _ = images.shape
    size = jnp.array([height, width])
    cut = jnp.round(size * jnp.sqrt(1 - kept))
    centre = jnp.floor(jax.random.uniform(place, (2,)) * size)
    start, end = (jnp.clip(centre + step, 0, size) for step in (-jnp.floor(cut / 2), jnp.ceil(cut / 2)))
    inside = rectangle(start[None], end[None], height, width)

    weight = jnp.where(use_cutmix, 1 - inside, kept)
    kept = jnp.where(use_cutmix, 1 - inside.mean(), kept)  # at the edge a rectangle is cut
    return _blend(weight, images), _blend(kept, targets)


def _blend(kept: jax.Array, values: jax.Array) -> jax.Array:
    """Every example mixed with its neighbour."""
    return kept * values + (1 - kept) * jnp.roll(values, 1, axis=0)


def rectangle(start: jax.Array, end: jax.Array, height: int, width: int) -> jax.Array:
    """Which pixels are in a rectangle: corners `[batch, 2]`, the end excluded, -> bool `[batch, height, width, 1]`."""
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    top, left = (start[:, axis, None, None, None] for axis in (0, 1))
    bottom, right = (end[:, axis, None, None, None] for axis in (0, 1))
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
