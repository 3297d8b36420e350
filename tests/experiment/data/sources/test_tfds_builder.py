"""Data sets of TFDS that are not among the project's own."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.base import DataError, Decoding, Field
from lowrank_jax.experiment.data.kept import look_again
from tests.experiment.data.sources import own_builder

KEYS = {"image_key": "picture", "label_key": "kind"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def described(builder, data_dir, image_size=None, **keys):
    look_again()
    name = builder if ":" in builder else f"{own_builder.__name__}:{builder}"
    return datasets.describe(name, keys or KEYS, image_size=image_size, decoding=Decoding(), data_dir=data_dir)


def test_a_builder_of_ones_own_is_prepared_on_first_use(data_dir, capfd):
    dataset = described("Shapes", data_dir)
    assert "preparing " in capfd.readouterr().err
    assert (dataset.image_shape, dataset.num_classes, dataset.sizes) == ((10, 12, 3), 3, {"train": 30, "test": 9})
    assert dataset.class_names == ("round", "square", "flat") and dataset.mean == () and dataset.decoding is None
    for _ in range(2):  # the second time they are found decoded
        test = datasets.load(dataset, "test[2:]", data_dir)
        draw = np.random.default_rng(1)
        expected = [own_builder.Shapes.example(own_builder.Shapes, draw, i) for i in range(9)]
        stored = {image.tobytes(): label for image, label in zip(test.images, test.labels, strict=True)}
        assert len(stored) == 7 and stored.items() <= {e["picture"].tobytes(): e["kind"] for e in expected}.items()
    assert described("Shapes", data_dir).digest == dataset.digest
    assert "preparing" not in capfd.readouterr().err


def test_images_of_many_sizes_are_decoded_as_they_are_read(data_dir):
    dataset = described("Photographs", data_dir, image_size=16)
    assert dataset.cropped and dataset.image_shape == (16, 16, 3)
    train = datasets.load(dataset, "train", data_dir)
    batch = train.augmented(np.arange(30), np.arange(30, dtype=np.uint64), Augmentation((0.5, 1.0)))
    assert batch["image"].shape == (30, 16, 16, 3) and sorted(batch["label"]) == sorted([0, 1, 2] * 10)
    np.testing.assert_array_equal(train.all_labels(), batch["label"])


def test_a_label_may_be_numbers(data_dir):
    dataset = described("Shapes", data_dir, image_key="picture", label_key="size")
    assert dataset.num_classes is None and dataset.label == Field((2,), "float32")
    labels = datasets.load(dataset, "train", data_dir).labels
    np.testing.assert_array_equal(np.sort(labels[:, 0]), np.arange(30))


def test_a_label_of_several_numbers_is_read_whole_beside_images_of_many_sizes(data_dir):
    dataset = described("Photographs", data_dir, image_size=16, image_key="picture", label_key="size")
    read = datasets.load(dataset, "train", data_dir)
    for labels in (read.all_labels(), read.plain(np.arange(30))["label"]):
        assert labels.shape == (30, 2) and labels.dtype == np.float32
        np.testing.assert_array_equal(labels[np.argsort(labels[:, 0])], [(i, 0.5) for i in range(30)])
    other = dataclasses.replace(dataset, label=Field((3,), "float32"))
    with pytest.raises(DataError, match="the label of an example has 2 values, 3 expected; "):
        datasets.load(other, "train", data_dir).plain(np.arange(2))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {},
            r"^dataset\.kwargs\.image_key: .* has no feature 'image'.*\ndataset\.kwargs\.label_key: .* has no feature 'label'",
        ),
        (
            {"image_key": "picture", "label_key": "kindd"},
            r"dataset\.kwargs\.label_key: .*no feature 'kindd'; did you mean kind\?",
        ),
        ({"image_key": "picture", "label_key": "count"}, "the feature 'count' is .*; expected a ClassLabel, or floating-point"),
        ({"image_key": "count", "label_key": "kind"}, "the feature 'count' is .*; expected an image"),
        ({"imagekey": "picture"}, r"dataset\.kwargs\.imagekey: .* has no such setting; did you mean image_key"),
        ({"image_key": 3}, r"dataset\.kwargs\.image_key: 3; must be a string"),
        ({"image_key": 3, "lable_key": "kind"}, r"lable_key: .* has no such setting.*\ndataset\.kwargs\.image_key: 3; must be"),
    ],
)
def test_keys_that_do_not_fit_are_named(data_dir, keys, message):
    with pytest.raises(DataError, match=message):
        look_again()
        datasets.describe(f"{own_builder.__name__}:Shapes", keys, data_dir=data_dir)


def test_a_builder_that_fails_is_named(data_dir):
    with pytest.raises(DataError, match=r"Failing cannot be prepared \(KeyError: .*no such file"):
        described("Failing", data_dir)


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, KeyError, AttributeError, SystemExit])
@pytest.mark.parametrize("part", ["_info", "__init__"])
def test_a_builder_that_cannot_be_made_is_named(data_dir, monkeypatch, part, error):
    def fail(*args, **kwargs):
        raise error("no")

    monkeypatch.setattr(own_builder.Failing, part, fail)
    with pytest.raises(DataError, match=rf"own_builder:Failing cannot be opened \({error.__name__}: '?no'?\)$"):
        described("Failing", data_dir)


@pytest.mark.parametrize("name", ["mnist/nope", "mnist/1.0.0", "mnist/", "glue"])
def test_a_config_that_tfds_does_not_know_is_named(tmp_path, name):
    with pytest.raises(DataError, match=rf"^tfds:{name} "):
        described(f"tfds:{name}", str(tmp_path))


def test_a_data_set_of_tfds_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(
        DataError, match=rf"tfds:mnist is not prepared under {tmp_path}; run: tfds build mnist --file_format=array"
    ):
        described("tfds:mnist", str(tmp_path))
    with pytest.raises(DataError, match="TFDS has no data set 'mnits'; did you mean mnist"):
        described("tfds:mnits", str(tmp_path))
    with pytest.raises(DataError, match="TFDS has no data set 'huggingface:mnist'"):
        described("tfds:huggingface:mnist", str(tmp_path))


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """TFDS's own builder, on pictures that are drawn here."""
    data_dir = tmp_path_factory.mktemp("mnist")
    builder = tfds.builder("mnist", data_dir=str(data_dir), file_format="array_record")
    draw = np.random.default_rng(0)

    def examples(count):
        for i in range(count):
            yield i, {"image": draw.integers(0, 256, (28, 28, 1), np.uint8), "label": i % 10}

    builder._split_generators = lambda *_, **__: {"train": examples(40), "test": examples(20)}
    builder.download_and_prepare()
    return str(data_dir)


def test_a_data_set_that_tfds_knows_is_read_by_its_name(mnist):
    dataset = described("tfds:mnist", mnist, image_key="image")
    assert (dataset.image_shape, dataset.num_classes, dataset.sizes) == ((28, 28, 1), 10, {"train": 40, "test": 20})
    train = datasets.load(dataset, "train", mnist)
    assert train.images.shape == (40, 28, 28, 1) and sorted(train.labels) == sorted([*range(10)] * 4)
