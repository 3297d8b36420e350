"""Every operation against Pillow's, written for a mind of its own."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lowrank_jax.experiment.data import randaugment as ra
from lowrank_jax.experiment.data.augment import Augmentation, augment
from lowrank_jax.experiment.data.random import random_bits
from tests.imagenet_files import natural_images

STRENGTHS = (-1.0, -0.4, 0.3, 0.9)


@pytest.fixture(scope="module")
def images():
    dull = Image.fromarray(np.random.default_rng(0).integers(60, 180, (40, 50, 3)).astype(np.uint8))
    flat = Image.new("RGB", (30, 20), (7, 100, 255))
    return [*natural_images(4, side=120), dull, flat]


EXACT = {
    ra.identity: lambda image, s: image,
    ra.autocontrast: lambda image, s: ImageOps.autocontrast(image),
    ra.equalize: lambda image, s: ImageOps.equalize(image),
    ra.posterize: lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    ra.solarize: lambda image, s: ImageOps.solarize(image, 256 * (1 - abs(s))),
}
BLENDED = {
    ra.color: lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    ra.contrast: lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    ra.brightness: lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    ra.sharpness: lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
}


def affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=(128, 128, 128))


MOVED = {
    ra.rotate: lambda image, s: image.rotate(30 * s, fillcolor=(128, 128, 128)),
    ra.shear_x: lambda image, s: affine(image, 1, 0.3 * s, 0, 0, 1, 0),
    ra.shear_y: lambda image, s: affine(image, 1, 0, 0, 0.3 * s, 1, 0),
    ra.translate_x: lambda image, s: affine(image, 1, 0, round(150 / 331 * s * image.width), 0, 1, 0),
    ra.translate_y: lambda image, s: affine(image, 1, 0, 0, 0, 1, round(150 / 331 * s * image.height)),
}


def both(operation, reference, images):
    for image in images:
        for strength in STRENGTHS:
            yield operation(np.asarray(image), strength), np.asarray(reference(image, strength))


@pytest.mark.parametrize("operation", EXACT, ids=lambda f: f.__name__)
def test_tables_are_pillows(operation, images):
    for ours, theirs in both(operation, EXACT[operation], images):
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("operation", BLENDED, ids=lambda f: f.__name__)
def test_blends_are_pillows_to_rounding(operation, images):
    for ours, theirs in both(operation, BLENDED[operation], images):
        # Pillow cuts off where we round, and rounds the grey and the smoothed image that it blends with by itself.
        assert np.abs(ours.astype(int) - theirs).max() <= 3
        assert np.abs(ours.astype(int) - theirs).mean() <= 1


@pytest.mark.parametrize("operation", MOVED, ids=lambda f: f.__name__)
def test_moves_are_pillows_but_for_ties(operation, images):
    for ours, theirs in both(operation, MOVED[operation], images):
        assert (ours == theirs).all(-1).mean() > 0.97


def test_there_are_the_papers_fourteen():
    assert set(ra._OPERATIONS) == {*EXACT, *BLENDED, *MOVED} and len(ra._OPERATIONS) == 14


def test_magnitude_zero_changes_colours_and_places_by_nothing(images):
    image = np.asarray(images[0])
    for operation in {*BLENDED, *MOVED, ra.posterize, ra.solarize}:
        np.testing.assert_array_equal(operation(image, 0.0), image, err_msg=operation.__name__)


def test_each_example_has_its_own_operations_and_keeps_them():
    batch = np.stack([np.asarray(natural_images(1, side=64)[0].resize((32, 32)))] * 60)
    bits = random_bits(3, np.zeros(60, int), np.arange(60))
    settings = Augmentation(randaugment_layers=2, randaugment_magnitude=7.0)
    varied = augment(batch, bits, settings)
    assert varied.shape == batch.shape and varied.dtype == np.uint8
    assert len({image.tobytes() for image in varied}) > 40
    np.testing.assert_array_equal(augment(batch[10:20], bits[10:20], settings), varied[10:20])
