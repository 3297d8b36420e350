"""Crops and decoding against Pillow and against what the crops are said to be."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.data.augment import random_bits, uniforms
from lowrank_jax.data.crops import ASPECTS, DRAWS, Box, central_crop, random_crop
from lowrank_jax.data.decode import Undecodable, decode_box, resize
from tests.imagenet_files import jpeg, natural_images


def encode(image, kind="JPEG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def decoded(data, choose, size, **settings):
    out = np.zeros((size, size, 3), np.uint8)
    decode_box(data, choose, out, **settings)
    return out


def reference(image, box, size):
    """Pillow's antialiased bilinear resizing."""
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(float)


def test_the_central_crop_is_the_shorter_side_resized_and_its_middle():
    for image in natural_images(8, side=500):
        data = jpeg(image)
        stored = Image.open(io.BytesIO(data))
        ours = decoded(data, lambda h, w: central_crop(h, w, 0.875), 224)
        scale = 256 / min(stored.size)
        whole = stored.resize([round(side * scale) for side in stored.size], Image.Resampling.BILINEAR)
        left, top = ((side - 224) // 2 for side in whole.size)
        theirs = np.asarray(whole.crop((left, top, left + 224, top + 224))).astype(float)
        # Mean absolute difference in levels; moved by a pixel these images differ by 8 and more.
        assert np.abs(ours - theirs).mean() < 3


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("fast", [False, True])
def test_any_box_is_what_pillow_makes_of_it(size, fast):
    draws = np.random.default_rng(1).random((16, DRAWS))
    for image, row in zip(natural_images(16, side=500), draws, strict=True):
        data = jpeg(image)
        box = random_crop(image.height, image.width, (0.08, 1.0), row)
        theirs = reference(Image.open(io.BytesIO(data)), box, size)
        assert np.abs(decoded(data, lambda h, w, box=box: box, size, fast=fast) - theirs).mean() < 3


def test_what_lies_below_the_box_makes_no_difference():
    """The same box of a JPEG that is decoded to its end, because it begins with another marker, is the same to the bit."""
    settings = [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"restart_marker_rows": 2}]
    for image, setting in zip(natural_images(4, side=400), settings, strict=True):
        data = encode(image, quality=90, **setting)
        whole = data + b"\0"  # without an end where it should be, it is decoded whole
        for box in (Box(0, 0, 60, 80), Box(30, 17, 100, 90), Box(5, 5, 140, 200)):
            np.testing.assert_array_equal(
                decoded(data, lambda h, w, box=box: box, 48), decoded(whole, lambda h, w, box=box: box, 48)
            )


def test_resizing_enlarges_shrinks_and_shrinks_a_lot_as_pillow_does():
    image = natural_images(1, side=500)[0].crop((0, 0, 300, 300))
    for width, height in ((60, 45), (224, 224), (180, 290), (136, 300), (20, 16)):
        out = np.zeros((height, width, 3), np.uint8)
        resize(np.asarray(image), out)
        theirs = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(float)
        assert np.abs(out - theirs).mean() < 2.5, (width, height)
    small = image.resize((100, 100))
    out = np.zeros((224, 224, 3), np.uint8)
    resize(np.asarray(small), out)
    assert np.abs(out - np.asarray(small.resize((224, 224), Image.Resampling.BILINEAR)).astype(float)).max() <= 2


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("L", {"kind": "JPEG"}),
        ("CMYK", {"kind": "JPEG"}),
        ("RGB", {"kind": "PNG"}),
        ("P", {"kind": "PNG"}),
        ("RGB", {"kind": "JPEG", "progressive": True}),
    ],
)
def test_what_imagenet_has_besides_plain_jpegs_is_read(mode, settings):
    image = natural_images(1, side=300)[0].convert(mode)
    data = encode(image, **settings)
    theirs = reference(Image.open(io.BytesIO(data)).convert("RGB"), central_crop(image.height, image.width, 1.0), 100)
    assert np.abs(decoded(data, lambda h, w: central_crop(h, w, 1.0), 100) - theirs).mean() < 3


def test_a_jpeg_with_a_flaw_that_leaves_the_image_there_is_read():
    data = jpeg(natural_images(1, side=200)[0])
    flawed = data[:-2] + bytes(8) + data[-2:]
    ours, plain = (decoded(d, lambda h, w: central_crop(h, w, 1.0), 64).astype(float) for d in (flawed, data))
    assert np.abs(ours - plain).mean() < 1


@pytest.mark.parametrize("data", [b"", b"<html>", jpeg(Image.new("RGB", (90, 80)))[:300]])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(Undecodable):
        decoded(data, lambda h, w: central_crop(h, w, 1.0), 32)


def test_a_truncated_jpeg_is_refused_even_if_the_box_is_there():
    data = jpeg(natural_images(1, side=300)[0])
    with pytest.raises(Undecodable, match="truncated"):
        decoded(data[: len(data) * 3 // 4], lambda h, w: Box(0, 0, 30, 30), 32)


def test_random_crops_have_the_areas_and_aspects_that_they_are_said_to_have():
    # A large image, so that every box fits at once up to nine tenths of its area.
    draws = uniforms(random_bits(0, np.zeros(8000, int), np.arange(8000)), DRAWS)
    boxes = [random_crop(4000, 4000, (0.1, 0.5), row) for row in draws]
    areas = np.array([box.height * box.width for box in boxes]) / 4000**2
    aspects = np.log([box.width / box.height for box in boxes])
    for values, low, high in ((areas, 0.1, 0.5), (aspects, *map(math.log, ASPECTS))):
        uniform = (np.sort(values) - low) / (high - low)
        assert np.abs(uniform - np.arange(8000) / 8000).max() < 1.63 / math.sqrt(8000)  # Kolmogorov and Smirnov at 1 %
    assert abs(np.corrcoef(areas, aspects)[0, 1]) < 0.04
    tops = np.array([box.top / (4000 - box.height) for box in boxes])
    assert np.abs(np.sort(tops) - np.arange(8000) / 8000).max() < 1.63 / math.sqrt(8000)
    for box in boxes:
        assert 0 <= box.top <= 4000 - box.height and 0 <= box.left <= 4000 - box.width


def test_random_crops_that_cannot_fit_are_the_largest_allowed_one_in_the_middle():
    row = np.full(DRAWS, 0.5)
    assert random_crop(100, 1000, (1.0, 1.0), row) == Box(0, 433, 100, 133)
    assert random_crop(1000, 100, (1.0, 1.0), row) == Box(433, 0, 133, 100)


def test_uniform_numbers_are_uniform_and_each_their_own():
    numbers = uniforms(random_bits(0, np.zeros(2000, int), np.arange(2000)), 10)
    assert numbers.shape == (2000, 10) and numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.sort(numbers.ravel()) - np.arange(20000) / 20000).max() < 1.63 / math.sqrt(20000)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(10)).max() < 0.1
    assert len(np.unique(numbers)) == 20000
