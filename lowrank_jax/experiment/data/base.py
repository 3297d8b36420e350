"""What a data set and a split are."""

import dataclasses
from typing import Protocol

import numpy as np

from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.frozen import FrozenDict

Batch = dict[str, np.ndarray]


class DataError(UserError):
    """Data is missing or unusable; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How images of many sizes are read.

    Attributes:
      eval_crop: for evaluation, the square in the middle of so large a fraction of the shorter side.
      max_undecodable: so many images of a split each process may find not to decode.
    """

    eval_crop: float = 0.875
    max_undecodable: int = 10


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a data set beforehand.

    Attributes:
      name: its name in TFDS.
      image_shape: `(height, width, channels)`, as a network gets them.
      num_classes: labels run from 0 to num_classes - 1.
      sizes: the number of examples in each split.
      mean, std: per channel, of pixels scaled to [0, 1]; taken over the training split.
      prepare: what to run when it is not there; empty when it is made on first use.
      decoding: set where images are stored encoded and in many sizes; None where all have one size and fit into memory.
      classes: what the labels mean; a network can be evaluated on other data sets of the same.  Default: the name.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    sizes: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prepare: str = ""
    decoding: Decoding | None = None
    classes: str = ""

    def __post_init__(self):
        object.__setattr__(self, "classes", self.classes or self.name)
        object.__setattr__(self, "sizes", FrozenDict(self.sizes))  # a data set is a key of caches


class Split(Protocol):
    """Examples by index: batches of `image` uint8 `[batch, height, width, channels]` and `label` int32 `[batch]`."""

    @property
    def prefetch(self) -> int:
        """How many batches to make ahead of time, on other threads."""
        ...

    @property
    def undecodable(self) -> dict[int, str]:
        """The examples that this process could not decode so far: their names by index."""
        ...

    def __len__(self) -> int: ...

    def augmented(self, index: np.ndarray, bits: np.ndarray, augmentation: Augmentation) -> Batch:
        """Examples for training, each varied by its own 64 bits, `[batch]`."""
        ...

    def plain(self, index: np.ndarray) -> Batch:
        """Examples for evaluation, with a float32 `mask` that is 0 where there is no image."""
        ...
