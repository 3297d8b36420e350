"""Arrays in a file."""

import numpy as np
import pytest

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.data.kept import look_again

IMAGES = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4)
LABELS = np.arange(10) % 2


def described(path):
    look_again()
    return datasets.describe(f"arrays:{path}", {})


@pytest.mark.parametrize(
    "names", [("train_image", "train_label"), ("train_images", "train_labels"), ("x_train", "y_train"), ("X_train", "y_train")]
)
def test_arrays_are_found_by_their_names(tmp_path, names):
    path = tmp_path / "data.npz"
    np.savez(path, **dict(zip(names, (IMAGES, LABELS[:, None]), strict=True)), class_names=["a", "b"], mean=[0.5], std=[0.25])
    dataset = described(path)
    assert (dataset.image_shape, dataset.num_classes, dataset.sizes) == ((4, 4, 1), 2, {"train": 10})
    assert (dataset.class_names, dataset.mean, dataset.std) == (("a", "b"), (0.5,), (0.25,))
    train = datasets.load(dataset, "train", None)
    np.testing.assert_array_equal(train.images[..., 0], IMAGES)
    np.testing.assert_array_equal(train.labels, LABELS)


def test_other_fields_and_splits_come_along(tmp_path):
    np.savez_compressed(
        tmp_path / "data.npz", train_image=np.ones((3, 5)), train_label=np.ones(3), train_age=np.arange(3),
        test_image=np.zeros((2, 5)), test_label=np.ones(2), test_age=np.arange(2),
    )  # fmt: skip
    dataset = described(tmp_path / "data.npz")
    assert dataset.image_shape == (5,) and dataset.num_classes is None and set(dataset.extras) == {"age"}
    np.testing.assert_array_equal(datasets.load(dataset, "test", None).plain(np.arange(2))["age"], [0, 1])


def test_another_file_in_its_place_is_seen_when_a_config_is_read(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, train_image=IMAGES, train_label=LABELS)
    first = described(path)
    assert described(path).digest == first.digest
    np.savez(path, train_image=255 - IMAGES, train_label=LABELS, test_image=IMAGES, test_label=LABELS)
    second = described(path)
    assert second.digest != first.digest and set(second.sizes) == {"train", "test"}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "data.npz does not exist"),
        (lambda path: path.write_bytes(b"PK\3\4 nonsense"), "data.npz cannot be read as arrays of NumPy's"),
        (lambda path: path.write_bytes(b""), "data.npz cannot be read as arrays of NumPy's"),
        (lambda path: path.mkdir(), "data.npz cannot be read as arrays of NumPy's"),
        (lambda path: np.savez(path, images=IMAGES), "the array 'images' names no split; expected names like train_image"),
        (lambda path: np.savez(path, train_image=IMAGES), "train has no label"),
        (
            lambda path: np.savez(path, train_image=IMAGES, train_label=LABELS, train_images=0 * IMAGES),
            "the images of 'train' are there under two names, 'train_images' for one; keep one",
        ),
        (lambda path: np.savez(path, train_image=np.array([{}], object), train_label=[0]), "cannot be read as arrays.*pickle"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, write, message):
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(DataError, match=message):
        described(path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"mean": 0.5}, "its mean is 0.5; give a list of finite numbers, one for each channel"),
        ({"mean": [0.1, 0.2, 0.3]}, "its mean has 3 numbers; its inputs have 1 channels"),
        ({"std": [0.1, 0.2, 0.3]}, "its std has 3 numbers; its inputs have 1 channels"),
        ({"mean": [np.nan]}, r"its mean is \[nan\]; give"),
        ({"mean": ["a"]}, r"its mean is \['a'\]; give"),
        ({"mean": [[0.5]]}, "its mean is .*; give"),
        ({"std": [0.0]}, r"its std is \[0\.0\]; give a list of finite numbers above 0"),
        ({"std": [1e-45]}, "its std is .*; give"),
        ({"std": [np.inf]}, "its std is .*; give"),
        ({"num_classes": [1, 2]}, r"its num_classes is \[1, 2\]; give a whole number of at least 1"),
        ({"num_classes": 2.5}, "its num_classes is 2.5; give"),
        ({"num_classes": 0}, "its num_classes is 0; give"),
        ({"num_classes": -1}, "its num_classes is -1; give"),
        ({"num_classes": True}, "its num_classes is True; give"),
        ({"class_names": "abc"}, "its class_names are 'abc'; give a list of names"),
        ({"class_names": [["a", "b"]]}, "its class_names are .*; give a list of names"),
        ({"class_names": ["a", "a"]}, "its class_names have 'a' more than once; give each class a name of its own"),
    ],
)
def test_what_is_said_of_the_arrays_is_checked(tmp_path, facts, message):
    path = tmp_path / "data.npz"
    np.savez(path, train_image=IMAGES, train_label=LABELS, **facts)
    with pytest.raises(DataError, match=rf"data\.npz: {message}"):
        described(path)


def test_a_single_array_is_no_data_set(tmp_path):
    path = tmp_path / "data.npz"
    with path.open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match=r"holds a single array; expected a file of np\.savez"):
        described(path)
