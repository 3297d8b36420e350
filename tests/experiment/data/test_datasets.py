import os
import pathlib

import numpy as np
import pytest

from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.datasets import describe, find, load
from lowrank_jax.experiment.data.sources.synthetic import SyntheticOptions
from lowrank_jax.experiment.data.splits import split_parts, split_size


def test_digits_come_whole_through_the_real_builder():
    digits = describe("digits", {})
    train, test = (load(digits, split, None) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 1) and train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    pixels = train.images / 255
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [digits.mean[0], digits.std[0]], atol=2e-3)

    from sklearn.datasets import load_digits

    everything, labels = load_digits(return_X_y=True)
    ours = np.concatenate([train.images, test.images]).reshape(-1, 64) / 255 * 16
    order, theirs = np.lexsort(ours.round().T), np.lexsort(everything.T)
    np.testing.assert_array_equal(ours.round()[order], everything[theirs])
    assert sorted(np.concatenate([train.labels, test.labels])) == sorted(labels)


def test_the_second_reading_finds_decoded_pixels_and_survives_their_loss():
    digits = describe("digits", {})
    first = load(digits, "test", None)
    cache = next(p for p in pathlib.Path(os.environ["TFDS_DATA_DIR"]).glob("digits/*/decoded-test.npz"))
    np.testing.assert_array_equal(load(digits, "test", None).images, first.images)
    cache.write_bytes(cache.read_bytes()[:1000])
    np.testing.assert_array_equal(load(digits, "test", None).images, first.images)


def test_parts_of_a_split_are_disjoint_and_complete():
    digits = describe("digits", {})
    assert split_parts(digits, "train[:90%]") == [("train", 0, 1293)]
    assert split_parts(digits, "train[90%:]+test") == [("train", 1293, 1437), ("test", 0, 360)]
    assert split_size(digits, "train[:100]") == 100
    whole, head, tail = (load(digits, split, None) for split in ("train", "train[:90%]", "train[90%:]"))
    np.testing.assert_array_equal(np.concatenate([head.labels, tail.labels]), whole.labels)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tset", "has no split 'tset'; did you mean test"),
        ("train[:x]", "cannot be parsed"),
        ("train[:0]", "contains an empty slice"),
        ("train[10:5]", r"'train\[10:5\]' contains an empty slice; its end must come after its start"),
        ("test+train[50%:20%]", "contains an empty slice"),
        ("train[:10shard]", r"uses shards; slice by examples or per cent, as in train\[:10%\]"),
    ],
)
def test_bad_splits_are_named(split, message):
    with pytest.raises(ValueError, match=message):
        split_parts(describe("digits", {}), split)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_a_data_set_that_is_not_there_says_how_to_get_it(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name} is not prepared under {tmp_path}; run: .*{tmp_path}"):
        load(describe(name, {}), "train", str(tmp_path))


def test_an_unknown_data_set_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"^unknown 'fashion_mnits'; did you mean fashion_mnist"):
        find("fashion_mnits")


def test_synthetic_images_follow_their_options():
    options = {"image_shape": (4, 5, 2), "num_classes": 3, "train_size": 30, "test_size": 7}
    assert SyntheticOptions(**options).num_classes == 3
    dataset = describe("synthetic", options)
    train, test = load(dataset, "train", None), load(dataset, "test", None)
    assert train.images.shape == (30, 4, 5, 2) and len(test) == 7
    assert set(train.labels) <= {0, 1, 2}
    assert not np.array_equal(train.images[:7], test.images)
