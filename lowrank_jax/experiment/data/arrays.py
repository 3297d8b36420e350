"""A split whose examples all fit into memory; `encoded` reads those that do not."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lowrank_jax.experiment.data.augment import Augmentation, augment
from lowrank_jax.experiment.data.base import Batch, Dataset
from lowrank_jax.experiment.data.splits import split_parts
from lowrank_jax.experiment.memory import TooLarge, beyond_machine


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split in memory.

    Attributes:
      images: uint8 or float32 `[size, height, width, channels]`, or vectors `[size, features]`.
      labels: `[size, ...]`, int32 for classes.
      extras: other arrays `[size, ...]` by name.
      undecodable: names of the images that could not be decoded, by index; those are zeros.
    """

    images: np.ndarray
    labels: np.ndarray
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    undecodable: dict[int, str] = dataclasses.field(default_factory=dict)

    # Indexing memory takes less time than handing a batch from one thread to another.
    prefetch = 0

    def __len__(self) -> int:
        return len(self.labels)

    def all_labels(self) -> np.ndarray:
        """The labels of all examples, `[size, ...]`."""
        return self.labels

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        """Training examples; in place of an undecodable image the next one that is none."""
        batch = self._at(self._decodable(index))
        return {**batch, "image": augment(batch["image"], bits, augmentation)}

    def plain(self, index: np.ndarray) -> Batch:
        """Evaluation examples, with a `mask` that is 0 where an image is undecodable."""
        return {**self._at(index), "mask": 1 - self._is_undecodable(index).astype(np.float32)}

    def _at(self, index: np.ndarray) -> Batch:
        others = {name: array[index] for name, array in self.extras.items()}
        return {"image": self.images[index], "label": self.labels[index], **others}

    def _is_undecodable(self, index: np.ndarray) -> np.ndarray:
        return np.isin(index, list(self.undecodable)) if self.undecodable else np.zeros(len(index), bool)

    def _decodable(self, index: np.ndarray) -> np.ndarray:
        while (missing := self._is_undecodable(index)).any():
            index = np.where(missing, (index + 1) % len(self), index)
        return index


def read_split(dataset: Dataset, split: str, read: Callable[[str], Arrays]) -> Arrays:
    """A split with slices, such as "train[:90%]", cut out of the whole splits that `read` returns by name.

    Raises:
      TooLarge: one of them does not fit into memory.
    """
    parts = []
    for name, start, stop in split_parts(dataset, split):
        check_memory(dataset, f"{dataset.name}/{name}", dataset.sizes[name])
        whole = read(name)
        extras = {key: array[start:stop] for key, array in whole.extras.items()}
        parts.append(Arrays(whole.images[start:stop], whole.labels[start:stop], extras))
    return joined(parts)


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Splits one after the other; of images that can all be decoded."""
    if len(parts) == 1:
        return parts[0]
    extras = {name: np.concatenate([part.extras[name] for part in parts]) for name in parts[0].extras}
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return Arrays(images, labels, extras)


def check_memory(dataset: Dataset, name: str, size: int) -> None:
    """Raises TooLarge if so many images do not fit into this machine's memory."""
    number = np.dtype(dataset.image_dtype).itemsize
    if problems := beyond_machine(f"the {size:,} images of {name}", size * math.prod(dataset.image_shape) * number):
        raise TooLarge(problems)
