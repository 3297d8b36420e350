"""Crops and decoding against Pillow and against what the crops are said to be."""

import io
import math
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.experiment.data import decode
from lowrank_jax.experiment.data.crops import ASPECTS, DRAWS, Box, central_crop, random_crop
from lowrank_jax.experiment.data.decode import Undecodable, decode_box, resample
from lowrank_jax.experiment.data.random import random_bits, uniforms
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


def differences(ours, theirs):
    """Mean absolute differences in levels.  Pillow's own box filter is 2 to 6 away, one pixel of shift 3 to 7."""
    return np.array([np.abs(a.astype(float) - b).mean() for a, b in zip(ours, theirs, strict=True)])


@pytest.mark.parametrize("fraction", [0.875, 1.0, 224 / 235])
def test_the_central_crop_is_the_shorter_side_resized_and_its_middle(fraction):
    ours, theirs = [], []
    for image in natural_images(16, side=500):
        data = jpeg(image)
        ours.append(decoded(data, lambda h, w: central_crop(h, w, fraction), 224))
        stored = Image.open(io.BytesIO(data))
        # In the image as stored: the middle `size` pixels of a shorter side of size / fraction.  Ours are whole pixels.
        side = fraction * min(stored.size)
        left, top = ((length - side) / 2 for length in stored.size)
        box = central_crop(stored.height, stored.width, fraction)
        assert box.height == box.width == round(side)
        assert max(abs(box.left - left), abs(box.top - top)) <= 0.75
        theirs.append(reference(stored, box, 224))
    assert differences(ours, theirs).max() < 3.5 and differences(ours, theirs).mean() < 1.5


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("fast", [False, True])
def test_any_box_is_what_pillow_makes_of_it(size, fast):
    draws = np.random.default_rng(1).random((16, DRAWS))
    ours, theirs = [], []
    for image, row in zip(natural_images(16, side=500), draws, strict=True):
        data, box = jpeg(image), random_crop(image.height, image.width, (0.08, 1.0), row)
        ours.append(decoded(data, lambda h, w, box=box: box, size, fast=fast))
        theirs.append(reference(Image.open(io.BytesIO(data)), box, size))
    assert differences(ours, theirs).max() < 5 and differences(ours, theirs).mean() < 2


def cut_to(data, box, size):
    """The height that is left of a JPEG, and how many times smaller it is decoded."""
    height = decode._header(data)[0]
    return decode._cut(data, height, box.top + box.height)[1], decode._reduction(box, (size, size))


def test_the_rows_that_colours_are_interpolated_from_are_there():
    """At 4:2:0 the last row of a box that ends where coded rows do is made of colours below it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8))
    data = encode(noise, quality=90, subsampling=2)
    for box in (Box(0, 0, 64, 80), Box(0, 0, 32, 40), Box(3, 5, 93, 80)):
        size = box.height
        ours, whole = (decoded(d, lambda h, w, box=box: box, size) for d in (data, data + b"\0"))
        assert cut_to(data, box, size)[0] < noise.height
        np.testing.assert_array_equal(ours, whole)


@pytest.mark.parametrize(("box", "factor"), [(Box(0, 0, 64, 80), 2), (Box(0, 0, 130, 140), 4), (Box(9, 0, 264, 260), 8)])
def test_what_is_scaled_down_by_its_decoder_is_cut_as_well(box, factor):
    data = encode(natural_images(1, side=400)[0].resize((400, 400)), quality=90, subsampling=2)
    assert cut_to(data, box, 32) == (-(-(box.top + box.height + 2) // 32) * 32, factor)
    ours, whole = (decoded(d, lambda h, w: box, 32) for d in (data, data + b"\0"))
    np.testing.assert_array_equal(ours, whole)


def test_every_cut_leaves_whole_units_of_coded_rows_and_the_context():
    data = encode(natural_images(1, side=400)[0].resize((300, 400)), subsampling=2)
    for bottom in range(1, 300):
        rows = decode._cut(data, 400, bottom)[1]
        assert rows % 32 == 0 and rows >= bottom + 2


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


@pytest.mark.parametrize("box", [(0, 0, 300, 300), (20.5, 31.25, 200.75, 250.5)])
@pytest.mark.parametrize("size", [(60, 45), (224, 224), (180, 290), (136, 300), (20, 16)])
def test_resampling_enlarges_shrinks_and_shrinks_a_lot_as_pillow_does(size, box):
    image = natural_images(1, side=500)[0].crop((0, 0, 300, 300))
    out = np.zeros((*size[::-1], 3), np.uint8)
    resample(np.asarray(image), box, out)
    top, left, height, width = box
    place = (left, top, left + width, top + height)
    theirs = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=place)).astype(float)
    assert np.abs(out - theirs).mean() < 4


def test_enlarging_is_pillows_to_rounding():
    image = natural_images(1, side=500)[0].crop((0, 0, 100, 100))
    out = np.zeros((224, 224, 3), np.uint8)
    resample(np.asarray(image), (0, 0, 100, 100), out)
    assert np.abs(out - np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR)).astype(float)).max() <= 2


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
    assert np.abs(ours - plain).mean() < 4  # one was scaled down by its decoder


@pytest.mark.parametrize("data", [b"", b"<html>", jpeg(Image.new("RGB", (90, 80)))[:300]])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(Undecodable):
        decoded(data, lambda h, w: central_crop(h, w, 1.0), 32)


def test_a_reason_is_for_people_and_not_an_address():
    with pytest.raises(Undecodable, match=r"^not an image, or of another format than BMP, GIF, JPEG, PNG, TIFF, WEBP$"):
        decoded(b"<html>", lambda h, w: central_crop(h, w, 1.0), 32)


def test_grey_of_16_bits_is_scaled_to_8():
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    data = encode(Image.fromarray(grey), "PNG")
    ours = decoded(data, lambda h, w: central_crop(h, w, 1.0), 64)
    np.testing.assert_array_equal(ours, np.repeat((grey >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_header_that_asks_for_gigabytes_is_refused(kind):
    data = bytearray(encode(Image.new("RGB", (90, 80)), kind))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = b"\xff\xdc\xff\xdc"
    else:
        data[16:24] = (11000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(Undecodable, match=r"pixels are too many for an image|exceeds limit"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns at fewer
        decoded(bytes(data), lambda h, w: central_crop(h, w, 1.0), 32)


def test_a_jpeg_whose_end_became_zeros_is_refused():
    data = jpeg(natural_images(1, side=300)[0])
    with pytest.raises(Undecodable, match="truncated"):
        decoded(data[: len(data) // 2] + bytes(len(data) // 2), lambda h, w: Box(0, 0, 30, 30), 32)


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
    for places in ([box.top / (4000 - box.height) for box in boxes], [box.left / (4000 - box.width) for box in boxes]):
        assert np.abs(np.sort(places) - np.arange(8000) / 8000).max() < 1.63 / math.sqrt(8000)
    for box in boxes:
        assert 0 <= box.top <= 4000 - box.height and 0 <= box.left <= 4000 - box.width


def test_random_crops_that_cannot_fit_are_the_largest_allowed_one_in_the_middle():
    row = np.full(DRAWS, 0.5)
    assert random_crop(100, 1000, (1.0, 1.0), row) == Box(0, 433, 100, 133)
    assert random_crop(1000, 100, (1.0, 1.0), row) == Box(433, 0, 133, 100)


def test_uniform_numbers_are_uniform_and_each_their_own():
    numbers = uniforms(random_bits(1, np.zeros(20000, int), np.arange(20000)), 10)
    assert numbers.shape == (20000, 10) and numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.sort(numbers.ravel()) - np.arange(200000) / 200000).max() < 1.63 / math.sqrt(200000)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(10)).max() < 0.03
    assert len(np.unique(numbers)) == 200000
