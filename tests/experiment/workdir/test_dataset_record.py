import dataclasses
import json

import pytest

from lowrank_jax.experiment.data.base import Dataset, Decoding, Field
from lowrank_jax.experiment.workdir.dataset_record import changes, from_record, misfits, to_record

CLASSES = Dataset(
    "folder:x", (8, 6, 3), 3, {"train": 20, "test": 4}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6),
    decoding=Decoding(0.5, 3, True, "white"),
    class_names=("a", "b", "ç"), digest="123", whole=True, skipped={"hidden": 2},
)  # fmt: skip
NUMBERS = Dataset(
    "x:y", (7,), None, {"train": 20}, (0.0,) * 7, (1.0,) * 7, image_dtype="float32",
    label=Field((2,), "float32"), extras={"weight": Field((), "int32")},
)  # fmt: skip


@pytest.mark.parametrize("dataset", [CLASSES, NUMBERS], ids=["classes", "numbers"])
def test_what_is_written_is_read(dataset):
    assert from_record(json.loads(json.dumps(to_record(dataset)))) == dataset


def damaged(**changes):
    return {**json.loads(json.dumps(to_record(CLASSES))), **changes}


@pytest.mark.parametrize(
    "record",
    [
        {}, damaged(mean=[1, 2]), damaged(mean=[1, 2, "3"]), damaged(std=None), damaged(label=3), damaged(decoding={"x": 1}),
        damaged(class_names=["a"]), damaged(image_dtype="banana"), damaged(extras={"a": {"shape": [], "dtype": "object"}}),
        damaged(image_shape=[]), damaged(image_shape=3), damaged(extras=[]), damaged(mean=[True] * 3), damaged(class_names=5),
        damaged(sizes=[]), damaged(label={"shape": 3, "dtype": 5}), damaged(std=[0.0, 1.0, 1.0]), damaged(num_classes="3"),
    ],
)  # fmt: skip
def test_what_is_no_description_is_refused(record):
    with pytest.raises(ValueError, match=r"^its? (has no \w+|\w+ must be .*|\w+ is of the type .*, which is none of numbers)$"):
        from_record(record)


def test_what_has_changed_is_said():
    def other(**values):
        return from_record(damaged(**values))

    assert changes(CLASSES, CLASSES) == []
    assert changes(CLASSES, other(digest="4")) == ["as many examples of the same classes, but not the same ones"]
    assert changes(CLASSES, other(digest="4", sizes={"train": 21, "valid": 1}, class_names=["a", "b", "d"])) == [
        "train has 21 examples, 20 before",
        "test has 0 examples, 4 before",
        "valid has 1 examples, 0 before",
        "the class 'ç' is gone",
        "the class 'd' is new",
    ]
    assert changes(CLASSES, other(class_names=["b", "a", "ç"])) == ["the classes are in another order"]


def test_what_a_network_was_not_made_for_is_said():
    def different(**values):
        return misfits(CLASSES, from_record(damaged(digest="4", **values)))

    assert different() == different(sizes={"train": 1}) == []
    assert different(image_shape=[8, 8, 3]) == ["inputs are 8x8x3 uint8, 8x6x3 uint8 before"]
    assert different(image_dtype="float32") == ["inputs are 8x6x3 float32, 8x6x3 uint8 before"]
    assert different(whole=False) == ["inputs are 8x6x3 uint8, cropped from many sizes, 8x6x3 uint8 before"]
    assert different(label={"shape": [2], "dtype": "int32"}) == ["labels are 2 int32, single numbers int32 before"]
    assert different(num_classes=None) == ["classes are none, 3 before"]
    assert misfits(dataclasses.replace(CLASSES, digest=""), dataclasses.replace(CLASSES, class_names=())) == []
