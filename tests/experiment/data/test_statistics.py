import dataclasses

import numpy as np
import pytest

from lowrank_jax.experiment.data.arrays import Arrays
from lowrank_jax.experiment.data.base import DataError, Dataset
from lowrank_jax.experiment.data.statistics import label_counts, mean_and_std, one_sided

PIXELS = Dataset("some", (5, 4, 3), 10, {"train": 1300}, (), ())
VECTORS = Dataset("some", (7,), 10, {"train": 1300}, (), (), image_dtype="float32")


def split(images):
    return Arrays(images, (np.arange(len(images)) % 7).astype(np.int32))


def test_pixels_are_measured_in_the_range_from_0_to_1():
    images = np.random.default_rng(0).integers(0, 256, (1300, 5, 4, 3), np.uint8) // np.array([1, 2, 3], np.uint8)
    mean, std = mean_and_std(PIXELS, split(images))
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-12)


def test_numbers_far_from_zero_keep_their_digits():
    vectors = (1e4 + np.random.default_rng(0).normal(0, 0.01, (1300, 7))).astype(np.float32)
    mean, std = mean_and_std(VECTORS, split(vectors))
    exact = vectors.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(std, exact.std(0), rtol=1e-9)


def test_what_is_constant_can_be_divided_by_its_deviation():
    vectors = np.random.default_rng(0).normal(size=(600, 7)).astype(np.float32)
    vectors[:, 3] = 0.1
    mean, std = mean_and_std(VECTORS, split(vectors))
    assert std[3] == 1 and mean[3] == pytest.approx(0.1) and 1 not in std[:3]


def test_images_that_cannot_be_decoded_do_not_count():
    images = np.full((20, 5, 4, 3), 255, np.uint8)
    images[4] = 0
    whole = split(images)
    mean, _ = mean_and_std(PIXELS, dataclasses.replace(whole, undecodable={4: "x"}))
    assert mean == (1, 1, 1)
    with pytest.raises(DataError, match="no image of the training split could be decoded"):
        mean_and_std(PIXELS, dataclasses.replace(whole, undecodable=dict.fromkeys(range(20), "x")))


def test_long_work_says_how_far_it_is(monkeypatch):
    from lowrank_jax.experiment.data import progress

    monkeypatch.setattr(progress, "_SECONDS", -1)
    said = []
    mean_and_std(PIXELS, split(np.zeros((1300, 5, 4, 3), np.uint8)), said.append)
    assert [line.split(", about")[0] for line in said] == [
        "measuring mean and standard deviation of some: 512 of 1,300",
        "measuring mean and standard deviation of some: 1,024 of 1,300",
    ]


def test_labels_are_counted():
    labels = np.array([0, 3, 3, 1, 3], np.int32)
    np.testing.assert_array_equal(label_counts(Arrays(np.zeros((5, 1)), labels), 5), [1, 1, 0, 3, 0])
    maps = Arrays(np.zeros((2, 2, 2, 1)), np.array([[[0, 1], [1, 1]], [[2, 2], [2, 0]]], np.int32))
    np.testing.assert_array_equal(label_counts(maps, 3), [2, 3, 3])


def test_a_split_that_lacks_classes_is_named():
    present = {"train": {0, 1, 2, 3, 4}, "test": {2}, "valid": {0, 1, 2, 3}}
    assert one_sided(present, range(5), "abcde") == [
        "no examples of a, b, d and 1 more in the split test",
        "no examples of e in the split valid",
    ]
