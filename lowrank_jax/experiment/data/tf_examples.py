"""A split of TensorFlow Examples with encoded images, which are read and decoded when they are needed."""

import bisect
import concurrent.futures
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lowrank_jax.experiment.data import augment, crops
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.base import Batch, DataError, Dataset
from lowrank_jax.experiment.data.decode import Choose, Undecodable, decode_box
from lowrank_jax.experiment.data.random import uniforms
from lowrank_jax.text import first_line

_CHUNK = 4  # examples that a thread takes at a time; small, so that all threads end at about the same time


class Records:
    """Encoded images on disk, each a TensorFlow Example of `image`, `label` and `file_name`.

    An image that cannot be decoded is reported once, with its file's name, and skipped: in training the next example takes
    its place, in evaluation its `mask` is 0.  Too many of them in one process end the run with a DataError.

    Args:
      dataset: the data set; its `decoding` must be set.
      split: its name in messages.
      parts: stored records as `(source, start, stop)`, in order; `source[i]` are the bytes of a record.
      remedy: what to do about a record that cannot be read, for messages.
    """

    prefetch = 2
    """The number of batches to prefetch, each on a thread of its own."""

    def __init__(self, dataset: Dataset, split: str, parts: Sequence[tuple[Sequence[bytes], int, int]], remedy: str):
        if dataset.decoding is None:
            raise ValueError(f"the images of {dataset.name} have one size and need no decoding")
        self._dataset, self._decoding, self._name = dataset, dataset.decoding, f"{dataset.name}/{split}"
        self._parts, self._remedy = list(parts), remedy
        self._ends = list(itertools.accumulate(stop - start for _, start, stop in parts))
        self._undecodable: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def undecodable(self) -> dict[int, str]:
        """Names of the images that this process could not decode so far, by index."""
        return dict(self._undecodable)

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        """Training images at `index`, each cropped and augmented with its own 64 random bits, and their labels."""
        images, labels = self._empty(len(index))
        choose = self._crops(bits, augmentation)

        def make(i: int) -> None:
            labels[i] = self._decode_or_next(int(index[i]), choose[i], images[i])
            images[i] = augment.augment_cropped(images[i], bits[i], augmentation)

        _in_parallel(make, len(index))
        return {"image": images, "label": labels}

    def plain(self, index: np.ndarray) -> Batch:
        """Evaluation images at `index`, centrally cropped, their labels, and a `mask` that is 0 where one cannot be decoded."""
        images, labels = self._empty(len(index))
        mask = np.ones(len(index), np.float32)

        def make(i: int) -> None:
            label = self._decode(int(index[i]), self._central_crop, images[i])
            if label is None:
                images[i], labels[i], mask[i] = 0, 0, 0
            else:
                labels[i] = label

        _in_parallel(make, len(index))
        return {"image": images, "label": labels, "mask": mask}

    def _empty(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((size, *self._dataset.image_shape), np.uint8), np.empty(size, np.int32)

    def _crops(self, bits: np.ndarray, augmentation: Augmentation) -> list[Choose]:
        if augmentation.crop_area is None:
            return [self._central_crop] * len(bits)
        draws = uniforms(bits, crops.DRAWS)
        return [functools.partial(crops.random_crop, area=augmentation.crop_area, draws=row) for row in draws]

    def _central_crop(self, height: int, width: int) -> crops.Box:
        return crops.central_crop(height, width, self._decoding.eval_crop)

    def _decode_or_next(self, index: int, choose: Choose, out: np.ndarray) -> int:
        """Decodes the example, or the first one after it that can be decoded, whatever the process; returns its label."""
        for other in range(index, index + len(self)):
            label = self._decode(other % len(self), choose, out, fast=True)
            if label is not None:
                return label
        raise DataError(f"{self._name}: none of the {len(self)} images can be decoded")

    def _decode(self, index: int, choose: Choose, out: np.ndarray, *, fast: bool = False) -> int | None:
        """Fills `out` and returns the label; None if the image cannot be decoded."""
        features = self._read(index)
        try:
            decode_box(features["image"].bytes_list.value[0], choose, out, fast=fast)
        except Undecodable as error:
            self._note(index, features["file_name"].bytes_list.value[0].decode(), error)
            return None
        return features["label"].int64_list.value[0]

    def _read(self, index: int) -> Any:
        """The features of an example by name."""
        part = bisect.bisect_right(self._ends, index)
        source, _, stop = self._parts[part]
        try:
            record = source[index - self._ends[part] + stop]
            return _example_type().FromString(record).features.feature
        except Exception as error:  # array_record has no error type of its own
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{self._name}: record {index} cannot be read ({reason}); {self._remedy}") from error

    def _note(self, index: int, name: str, error: Undecodable) -> None:
        with self._lock:
            if index in self._undecodable:
                return
            self._undecodable[index] = name
            count, limit = len(self._undecodable), self._decoding.max_undecodable
            print(
                f"{self._name}: {name} cannot be decoded ({error}); {count} of at most {limit} so far",
                file=sys.stderr,
                flush=True,
            )
            names = ", ".join(self._undecodable.values())
        if count > limit:
            raise DataError(
                f"{self._name}: {count} images cannot be decoded, more than dataset.max_undecodable={limit}: {names}."
                f" Raise the limit (lowrank evaluate: --max-undecodable) to continue without them,"
                f" or prepare the data again: {self._remedy}"
            )


@functools.cache
def _example_type() -> Any:
    """TFDS's copy of the message type; TensorFlow's would import all of it."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example  # type: ignore[attr-defined]


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    """One pool for all splits; created on first use, so that the process can fork before."""
    return concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")


def _in_parallel(make: Callable[[int], None], count: int) -> None:
    """Calls `make` for every number below `count`; an exception in one of the calls is raised here."""

    def make_all(numbers: Iterable[int]) -> None:
        for number in numbers:
            make(number)

    chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    for _ in _pool().map(make_all, chunks):
        pass
