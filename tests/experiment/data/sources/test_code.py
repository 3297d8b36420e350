"""Data of a function of the user's."""

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.base import DataError, Decoding, Field
from lowrank_jax.experiment.data.pipeline import Feed, Shard, TrainBatches
from lowrank_jax.experiment.data.sources import code
from tests.experiment.data.sources import own_data

PLAIN = Augmentation()


def described(function, image_size=None, **kwargs):
    return datasets.describe(f"{own_data.__name__}:{function}", kwargs, image_size=image_size, decoding=Decoding(0.5, 0))


def test_arrays_come_as_they_are():
    dataset = described("arrays", size=31)
    assert (dataset.image_shape, dataset.num_classes, dataset.sizes) == ((6, 5, 2), 3, {"train": 31, "test": 9})
    images, _ = own_data.arrays(31)["train"]
    train = datasets.load(dataset, "train[1:4]+test[:2]", None)
    np.testing.assert_array_equal(train.images[:3], images[1:4])
    np.testing.assert_array_equal(train.labels, [1, 2, 0, 0, 1])
    assert train.labels.dtype == np.int32
    np.testing.assert_array_equal(train.all_labels(), train.labels)


def test_vectors_are_of_32_bits():
    dataset = described("vectors")
    assert (dataset.image_shape, dataset.image_dtype, dataset.num_classes, dataset.mean) == ((7,), "float32", 4, ())
    batch = datasets.load(dataset, "train", None).augmented(np.arange(3), np.zeros(3, np.uint64), PLAIN)
    np.testing.assert_array_equal(batch["image"], own_data.vectors()["train"][0][:3].astype(np.float32))


def test_labels_that_are_numbers_are_no_classes_and_other_fields_come_along():
    dataset = described("targets")
    assert dataset.num_classes is None and dataset.outputs == 2
    assert dataset.label == Field((2,), "float32") and dataset.extras == {"weight": Field((), "int32")}
    batch = datasets.load(dataset, "train[2:]", None).plain(np.arange(4))
    assert set(batch) == {"image", "label", "weight", "mask"}
    np.testing.assert_array_equal(batch["weight"], [2, 3, 4, 5])
    np.testing.assert_allclose(batch["label"][:, 0], np.linspace(0, 1, 24)[4:12:2], rtol=1e-6)


def test_maps_of_classes_have_the_shape_of_the_image():
    dataset = described("maps")
    assert dataset.num_classes == 4 and dataset.label == Field((4, 4), "int32")


@pytest.mark.parametrize("kind", ["array", "pillow"])
def test_images_of_many_sizes_are_cropped(kind):
    dataset = described("photographs", image_size=8, kind=kind)
    assert dataset.cropped and dataset.image_shape == (8, 8, 3) and dataset.class_names == ("even", "odd")
    assert dataset.extras == {"id": Field((), "int32")}
    train = datasets.load(dataset, "train", None)
    batch = train.plain(np.arange(5))
    np.testing.assert_array_equal(batch["label"], [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(batch["id"], [0, 1, 2, 3, 4])
    for i, image in enumerate(batch["image"]):
        values = own_data.Photographs(40)[i]["image"]
        side = round(0.5 * min(values.shape[:2]))
        top, left = ((length - side) // 2 for length in values.shape[:2])
        theirs = Image.fromarray(values).resize((8, 8), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        assert np.abs(image - np.asarray(theirs).astype(float)).mean() < 12  # of noise, which differs by 80 from other noise
    np.testing.assert_array_equal(train.all_labels(), np.arange(40) % 2)


def test_batches_of_items_are_a_function_of_seed_epoch_and_index():
    dataset = described("photographs", image_size=8)
    augmentation = Augmentation((0.3, 1.0), flip=True)
    batches = TrainBatches(datasets.load(dataset, "train", None), 8, 12, 1, augmentation)
    parts = [TrainBatches(datasets.load(dataset, "train", None), 8, 12, 1, augmentation, Shard((i,), 2)) for i in range(2)]
    feed = Feed(batches)
    for i in range(12):
        expected, ahead = batches[i], next(feed)
        for key, value in expected.items():
            np.testing.assert_array_equal(ahead[key], value)
            np.testing.assert_array_equal(np.concatenate([part[i][key] for part in parts]), value)


def test_items_of_one_size_are_read_into_memory_if_they_fit(monkeypatch):
    dataset = described("listed")
    assert (dataset.image_shape, dataset.decoding, dataset.num_classes) == ((6, 5, 1), None, 3)
    images, labels = own_data._draw(25, 6, 5)
    train = datasets.load(dataset, "train[5:]", None)
    np.testing.assert_array_equal(train.images[..., 0], images[5:])
    np.testing.assert_array_equal(train.labels, labels[5:])
    monkeypatch.setattr(code, "SMALL_TOTAL", 10)
    by_index = datasets.load(dataset, "train[5:]", None)
    assert by_index.prefetch and not isinstance(by_index, type(train))
    index, bits = np.array([3, 0, 19]), np.array([1, 2, 3], np.uint64)
    for other, own in (
        (by_index.plain(index), train.plain(index)),
        *[(s.augmented(index, bits, Augmentation(crop_padding=1, flip=True)) for s in (by_index, train))],
    ):
        for key, value in own.items():
            np.testing.assert_array_equal(other[key], value)


def test_a_source_that_changes_is_refused():
    with pytest.raises(
        DataError, match=r"changing/train\[0\] has another image each time it is read; give the same example for the"
    ):
        described("changing")


def test_the_digest_follows_the_content():
    digests = {described("arrays", **kwargs).digest for kwargs in ({}, {"seed": 1}, {"size": 29})}
    assert len(digests) == 3
    code._found._kept.clear()
    assert described("arrays").digest in digests


def test_a_description_is_found_once(monkeypatch):
    first = described("photographs", image_size=8)
    monkeypatch.setattr(own_data.Photographs, "__getitem__", lambda *_: pytest.fail("an example was read"))
    monkeypatch.setattr(code, "_notes", lambda *_: pytest.fail("labels were looked through"))
    assert described("photographs", image_size=8) == first


def test_an_item_that_fails_is_named():
    train = datasets.load(described("failing", image_size=8), "train", None)
    with pytest.raises(DataError, match=r"failing/train\[7\] cannot be read \(KeyError: 'no such file'\)"):
        train.plain(np.arange(10))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("float", r"train\[7\] is 22x29x3 float32; images of many sizes must be uint8 with 3 channels"),
        ("grey", r"train\[7\] is 22x29x1 uint8; images of many sizes must be uint8 with 3 channels"),
        ("label", r"train\[7\] has the label 9; labels must be from 0 to 1"),
    ],
)
def test_one_that_is_of_another_kind_is_named(kind, message):
    train = datasets.load(described("odd", image_size=8, kind=kind), "train", None)
    assert len(train.plain(np.arange(7))["image"]) == 7
    with pytest.raises(DataError, match=message):
        train.plain(np.arange(10))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "returned None; expected splits by name"),
        ("number", "returned 3; expected splits by name"),
        ("no splits", r"returned \{\}; expected splits by name"),
        ("no label", "train has no label; it has image"),
        ("lengths", "train has arrays of several lengths: image 6, label 3"),
        ("int64 images", "the images of .*/train are int64; give uint8, from 0 to 255, or floating-point numbers"),
        ("nan", "the images of .*/train are not all finite"),
        ("texts", "the labels of .*/train are <U1, not numbers"),
        ("negative", "train has the label -1; labels must be from 0 to 1"),
        ("too large", "train has the label 2; labels must be from 0 to 1"),
        ("names", "has 2 class names for 3 classes"),
        ("other shapes", "its splits have images of several sizes; give all one size"),
        ("other types", "image is 4x4x3 float32 in test, but 4x4x3 uint8 in train"),
        ("empty", "test is empty; leave it out"),
        ("split name", "'the train' cannot be the name of a split; use letters, digits and _"),
        ("five axes", r"has inputs of shape \(1, 6, 4, 4, 3\); expected \(height, width, channels\) or \(features,\)"),
        ("items", r"train\[0\] is 1; expected \(image, label\), or a mapping"),
        ("ids", r"the largest label makes 1,900,000,001 classes; labels are whole numbers from 0 on, one for each class"),
        ("many classes", r"num_classes makes 1,000,000,000 classes; labels are whole numbers"),
        ("streaming", r"train does not say how many examples it has \(NotImplementedError: it streams\)"),
        ("a fraction", r"train does not say how many examples it has \(TypeError: "),
        ("unsaid classes", "does not say how many classes there are; return Data"),
        ("label of an item", r"label is a number float32 in .*train\[6\], but a number int32 in"),
    ],
)
def test_what_cannot_be_used_is_said_in_words(what, message):
    with pytest.raises(DataError, match=message):
        described("returning", what=what)


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        ("broken", {}, r"broken failed \(SystemExit: no\)"),
        ("not_a_function", {}, "is 3; expected a function that returns splits by name"),
        ("arrays", {"sise": 3}, r"dataset\.kwargs\.sise: .* has no such argument; did you mean size\?"),
        ("returning", {}, "cannot be called: missing a required argument: 'what'"),
        ("gone", {}, "cannot be imported: .*has no attribute 'gone'"),
    ],
)
def test_a_function_that_cannot_be_called_is_named(function, kwargs, message):
    with pytest.raises(DataError, match=message):
        described(function, **kwargs)
