"""Data sources of other libraries, as a function of the user's returns them."""

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.experiment.data import datasets as ours
from lowrank_jax.experiment.data.base import Decoding
from tests.experiment.data.sources import own_data


def described(function, image_size=None, **kwargs):
    return ours.describe(f"{own_data.__name__}:{function}", kwargs, image_size=image_size, decoding=Decoding())


def test_a_source_of_grains():
    dataset = described("grain_source")
    assert (dataset.image_shape, dataset.sizes) == ((6, 5, 3), {"train": 20})
    images, labels = own_data._draw(20, 6, 5, 3)
    train = ours.load(dataset, "train[3:]", None)
    np.testing.assert_array_equal(train.images, 255 - images[3:])
    np.testing.assert_array_equal(train.labels, labels[3:])


@pytest.fixture
def stored(tmp_path):
    """A data set of Hugging Face's, made and saved here."""
    theirs = pytest.importorskip("datasets", reason="Hugging Face's datasets are not installed: the extra hf")

    def split(count, side):
        draw = np.random.default_rng(count)
        images = [Image.fromarray(draw.integers(0, 256, (side + i % 3 * (side > 20), side, 3), np.uint8)) for i in range(count)]
        features = theirs.Features({"image": theirs.Image(), "label": theirs.ClassLabel(names=["cat", "dog"])})
        return images, theirs.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(count)]}, features=features)

    def make(side):
        (train, one), (_, two) = split(20, side), split(6, side)
        theirs.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "stored"))
        return train, str(tmp_path / "stored")

    return make


@pytest.mark.parametrize("encoded", [False, True])
def test_a_data_set_of_hugging_faces_from_disk(stored, encoded):
    images, folder = stored(12)
    dataset = described("hugging_face", folder=folder, encoded=encoded)
    assert (dataset.image_shape, dataset.sizes, dataset.num_classes) == ((12, 12, 3), {"train": 20, "test": 6}, 2)
    assert dataset.class_names == ("cat", "dog") and dataset.digest
    train = ours.load(dataset, "train", None)
    np.testing.assert_array_equal(train.images, np.stack([np.asarray(image) for image in images]))
    np.testing.assert_array_equal(train.labels, np.arange(20) % 2)


@pytest.mark.parametrize("encoded", [False, True])
def test_one_of_many_sizes(stored, encoded):
    images, folder = stored(40)
    dataset = described("hugging_face", image_size=16, folder=folder, encoded=encoded)
    assert dataset.cropped
    batch = ours.load(dataset, "train", None).plain(np.arange(20))
    for image, one in zip(batch["image"], images, strict=True):
        side = round(0.875 * 40)
        left, top = ((length - side) // 2 for length in one.size)
        theirs = one.resize((16, 16), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        assert np.abs(image - np.asarray(theirs).astype(float)).mean() < 10
    np.testing.assert_array_equal(batch["label"], np.arange(20) % 2)
