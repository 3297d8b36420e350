"""Images that are stored as TensorFlow Examples."""

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank_jax.experiment.data.base import DataError, Field
from lowrank_jax.experiment.data.encoded import Example
from lowrank_jax.text import first_line

_FILE_NAMES = ("file_name", "filename", "image/filename", "image/file_name")


class TFExamples:
    """Records on disk, each a TensorFlow Example of an encoded image, a label and, if it has one, the file's name.

    Args:
      name: of the split, for messages.
      parts: stored records as `(source, start, stop)`, in order; `source[i]` are the bytes of a record.
      remedy: what to do about a record that cannot be read, for messages.
      label: what a label is.
      image_key, label_key: what the records call the two.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[tuple[Sequence[bytes], int, int]],
        remedy: str,
        label: Field,
        *,
        image_key: str = "image",
        label_key: str = "label",
    ):
        self._name, self._parts, self._remedy = name, list(parts), remedy
        self._expected, self._image_key, self._label_key = label, image_key, label_key
        self._ends = list(itertools.accumulate(stop - start for _, start, stop in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        features = self._features(index)
        names = (features[key].bytes_list.value for key in _FILE_NAMES if key in features)
        name = next((value[0].decode(errors="replace") for value in names if value), f"record {index}")
        label = {"label": self._label(features)}
        return Example(features[self._image_key].bytes_list.value[0], label, name)

    def labels(self) -> np.ndarray:
        """Of all records, which are read for that; `[size, ...]`."""
        return np.stack([self._label(self._features(index)) for index in range(len(self))])

    def _label(self, features: Any) -> np.ndarray:
        feature, (shape, dtype) = features[self._label_key], (self._expected.shape, self._expected.dtype)
        values = np.array(feature.int64_list.value or feature.float_list.value)
        if values.size != math.prod(shape):
            raise DataError(
                f"{self._name}: the label of an example has {values.size} values, {math.prod(shape)} expected; {self._remedy}"
            )
        if dtype == "int32" and values.min(initial=0) < 0:
            raise DataError(
                f"{self._name}: an example has the label {values.min()}, as those without a class have; choose another split"
            )
        return values.astype(dtype).reshape(shape)

    def _features(self, index: int) -> Any:
        """The features of an example by name."""
        part = bisect.bisect_right(self._ends, index)
        source, _, stop = self._parts[part]
        try:
            record = source[index - self._ends[part] + stop]
            return _example_type().FromString(record).features.feature
        except Exception as error:  # array_record has no error type of its own
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{self._name}: record {index} cannot be read ({reason}); {self._remedy}") from error


@functools.cache
def _example_type() -> Any:
    """TFDS's copy of the message type; TensorFlow's would import all of it."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example  # type: ignore[attr-defined]
