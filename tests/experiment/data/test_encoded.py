"""What examples hold besides their images."""

import numpy as np
import pytest

from lowrank_jax.experiment.data.base import DataError, Dataset, Decoding, Field
from lowrank_jax.experiment.data.encoded import EncodedImages, Example


class Given:
    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Example(np.zeros((9, 9, 3), np.uint8), {"label": self.label}, str(index))

    def labels(self):
        return np.stack([self.label] * 2)


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_a_label_of_another_shape_is_not_repeated_to_fill_its_place(shape):
    dataset = Dataset("x", (8, 8, 3), None, {"train": 2}, (), (), decoding=Decoding(), label=Field((3,), "float32"))
    fits = EncodedImages(dataset, "train", Given(np.arange(3.0)), "mend them").plain(np.arange(2))
    np.testing.assert_array_equal(fits["label"], [[0, 1, 2]] * 2)
    with pytest.raises(DataError, match=r"the label of an example has the shape \[\d?\], \[3\] expected"):
        EncodedImages(dataset, "train", Given(np.ones(shape)), "mend them").plain(np.arange(2))
