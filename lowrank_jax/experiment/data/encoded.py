"""A split of images that are stored encoded or in many sizes, and are read and decoded when they are needed."""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowrank_jax.experiment.data import augment, crops
from lowrank_jax.experiment.data.arrays import Arrays
from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.base import Batch, DataError, Dataset
from lowrank_jax.experiment.data.decode import Choose, Undecodable, decode_box, pool
from lowrank_jax.experiment.data.progress import Progress, to_stderr
from lowrank_jax.experiment.data.random import uniforms

_CHUNK = 4  # examples that a thread takes at a time; small, so that all threads end at about the same time


class Example(NamedTuple):
    """An example as it is stored.

    Attributes:
      image: encoded, or its pixels, uint8 `[height, width, channels]`.
      others: the label, and whatever else `Dataset.fields` lists, by name.
      name: what to call the image in messages.
    """

    image: bytes | np.ndarray
    others: Mapping[str, Any]
    name: str


class Examples(Protocol):
    """Examples as they are stored, by index; an item raises DataError if it cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def labels(self) -> np.ndarray:
        """Of all examples, `[size, ...]`, without their images where that is possible."""
        ...


class EncodedImages:
    """Images of any kind of storage, cropped or resized to the one size that a network takes.

    An image that cannot be decoded is reported once, with its file's name, and skipped: in training the next example takes
    its place, in evaluation its `mask` is 0.  Too many of them in one process end the run with a DataError.

    Args:
      dataset: the data set; its `decoding` must be set.
      split: its name in messages.
      examples: as they are stored.
      remedy: what to do about images that cannot be decoded, besides raising the limit, for messages.
    """

    prefetch = 2
    """The number of batches to prefetch, each on a thread of its own."""

    def __init__(self, dataset: Dataset, split: str, examples: Examples, remedy: str):
        if dataset.decoding is None:
            raise ValueError(f"the images of {dataset.name} have one size and need no decoding")
        self._dataset, self._decoding, self._name = dataset, dataset.decoding, f"{dataset.name}/{split}"
        self._examples, self._remedy = examples, remedy
        self._undecodable: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def undecodable(self) -> dict[int, str]:
        """Names of the images that this process could not decode so far, by index."""
        return dict(self._undecodable)

    def all_labels(self) -> np.ndarray:
        """The labels of all examples, `[size, ...]`; no image is decoded."""
        return self._examples.labels()

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        """Training examples at `index`, their images cropped and augmented with their own 64 random bits each."""
        batch = self._empty(len(index))
        images, choose = batch["image"], self._crops(bits, augmentation)

        def make(i: int) -> None:
            _fill(batch, i, self._decode_or_next(int(index[i]), choose[i], images[i]))
            images[i] = augment.augment_cropped(images[i], bits[i], augmentation)

        _in_parallel(make, len(index))
        return batch

    def plain(self, index: np.ndarray) -> Batch:
        """Evaluation examples at `index`, centrally cropped, and a `mask` that is 0 where an image cannot be decoded."""
        return self._with_mask(index, self._central_crop)

    def whole(self, index: np.ndarray) -> Batch:
        """The same with whole images."""
        return self._with_mask(index, lambda height, width: crops.Box(0, 0, height, width))

    def _with_mask(self, index: np.ndarray, choose: Choose) -> Batch:
        batch = self._empty(len(index))
        mask = np.ones(len(index), np.float32)

        def make(i: int) -> None:
            others, mask[i] = self._decode(int(index[i]), choose, batch["image"][i])
            _fill(batch, i, others)
            if not mask[i]:
                batch["image"][i] = 0

        _in_parallel(make, len(index))
        return {**batch, "mask": mask}

    def _empty(self, size: int) -> Batch:
        return {name: np.empty((size, *field.shape), field.dtype) for name, field in self._dataset.fields.items()}

    def _crops(self, bits: np.ndarray, augmentation: Augmentation) -> list[Choose]:
        if augmentation.crop_area is None:
            return [self._central_crop] * len(bits)
        draws = uniforms(bits, crops.DRAWS)
        return [functools.partial(crops.random_crop, area=augmentation.crop_area, draws=row) for row in draws]

    def _central_crop(self, height: int, width: int) -> crops.Box:
        return crops.central_crop(height, width, self._decoding.eval_crop)

    def _decode_or_next(self, index: int, choose: Choose, out: np.ndarray) -> Mapping[str, Any]:
        """Decodes the example, or the first one after it that can be decoded, whatever the process.

        Returns its other fields.
        """
        for other in range(index, index + len(self)):
            others, decoded = self._decode(other % len(self), choose, out, fast=True)
            if decoded:
                return others
        raise DataError(f"{self._name}: none of the {len(self)} images can be decoded")

    def _decode(self, index: int, choose: Choose, out: np.ndarray, *, fast: bool = False) -> tuple[Mapping[str, Any], bool]:
        """Fills `out`; returns the other fields, and whether the image could be decoded."""
        image, others, name = self._examples[index]
        try:
            decode_box(image, choose, out, fast=fast, exif=self._decoding.exif, alpha=self._decoding.alpha)
        except Undecodable as error:
            self._note(index, name, error)
            return others, False
        return others, True

    def _note(self, index: int, name: str, error: Undecodable) -> None:
        with self._lock:
            if index in self._undecodable:
                return
            self._undecodable[index] = name
            count, limit = len(self._undecodable), self._decoding.max_undecodable
            to_stderr(f"{self._name}: {name} cannot be decoded ({error}); {count} of at most {limit} so far")
            names = ", ".join(self._undecodable.values())
        if count > limit:
            raise DataError(
                f"{self._name}: {count} images cannot be decoded, more than dataset.max_undecodable={limit}: {names}."
                f" Raise the limit (lowrank evaluate: --max-undecodable) to continue without them,"
                f" or {self._remedy}"
            )


def read_whole(encoded: EncodedImages, name: str, size: int) -> Arrays:
    """All `size` examples of a split in memory; their images have one size.  Says how far it is if that takes long."""
    told, parts = Progress(f"reading {name}", size), []
    for start in range(0, size, _PART):
        parts.append(encoded.whole(np.arange(start, min(start + _PART, size))))
        told.at(min(start + _PART, size))
    batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0] if key != "mask"}
    if len(encoded.undecodable) == size:
        raise DataError(f"{name}: none of the {size} images can be decoded")
    return Arrays(batch.pop("image"), batch.pop("label"), batch, encoded.undecodable)


_PART = 1024


def _fill(batch: Batch, row: int, others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        out, shape = batch[name], np.shape(value)
        if shape != out.shape[1:]:  # which would be repeated to fill it
            raise DataError(f"the {name} of an example has the shape {list(shape)}, {list(out.shape[1:])} expected")
        out[row] = value


def _in_parallel(make: Callable[[int], None], count: int) -> None:
    """Calls `make` for every number below `count`; an exception in one of the calls is raised here."""

    def make_all(numbers: Iterable[int]) -> None:
        for number in numbers:
            make(number)

    chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    for _ in pool().map(make_all, chunks):
        pass
