"""A split whose images all fit into memory; `tf_examples` reads those that do not."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lowrank_jax.experiment.data.augment import Augmentation, augment
from lowrank_jax.experiment.data.base import Batch, Dataset
from lowrank_jax.experiment.data.splits import split_parts
from lowrank_jax.experiment.memory import TooLarge, beyond_machine


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split in memory: `images` uint8 `[size, height, width, channels]`, `labels` int32 `[size]`."""

    images: np.ndarray
    labels: np.ndarray

    # Indexing memory takes less time than handing a batch from one thread to another.
    prefetch = 0

    @property
    def undecodable(self) -> dict[int, str]:
        return {}

    def __len__(self) -> int:
        return len(self.labels)

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        return {"image": augment(self.images[index], bits, augmentation), "label": self.labels[index]}

    def plain(self, index: np.ndarray) -> Batch:
        mask = np.ones(len(index), np.float32)
        return {"image": self.images[index], "label": self.labels[index], "mask": mask}


def read_split(dataset: Dataset, split: str, read: Callable[[str], Arrays]) -> Arrays:
    """A split with slices, such as "train[:90%]", cut out of the whole splits that `read` returns by name.

    Raises:
      TooLarge: one of them does not fit into memory.
    """
    parts = []
    for name, start, stop in split_parts(dataset, split):
        size = dataset.sizes[name] * math.prod(dataset.image_shape)
        if problems := beyond_machine(f"the {dataset.sizes[name]:,} images of {dataset.name}/{name}", size):
            raise TooLarge(problems)
        whole = read(name)
        parts.append(Arrays(whole.images[start:stop], whole.labels[start:stop]))
    if len(parts) == 1:
        return parts[0]
    return Arrays(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
