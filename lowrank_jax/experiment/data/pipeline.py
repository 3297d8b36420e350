"""The order of the data: a batch is a function of (seed, step), an augmentation of (seed, epoch, example).

The only state is the number of the next batch, which is what Grain's iterator state contains.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from lowrank_jax.experiment.data.augment import Augmentation
from lowrank_jax.experiment.data.base import Batch, DataError, Split
from lowrank_jax.experiment.data.random import random_bits
from lowrank_jax.experiment.hosts.sharding import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of every global batch that this process reads: these `parts` out of `count` equal ones."""

    parts: tuple[int, ...] = (0,)
    count: int = 1

    def of(self, batch: np.ndarray) -> np.ndarray:
        return batch.reshape(self.count, -1)[list(self.parts)].reshape(-1)


def shard_of(mesh: Mesh) -> Shard:
    """The part of a batch on this process's devices; processes that differ along the model axis alone read the same part."""
    by_part = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in BATCH_AXES], [0, 1])
    by_part = by_part.reshape(by_part.shape[0] * by_part.shape[1], -1)
    own = jax.process_index()
    return Shard(tuple(i for i, devices in enumerate(by_part) if own in {d.process_index for d in devices}), len(by_part))


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Random access to the batches of training, reshuffled every epoch; a Grain data source.

    Epochs follow each other without a gap: a batch may span two of them, and no example is dropped.

    Attributes:
      split: the examples.
      batch_size: over all processes.
      length: the number of batches.
      seed: of order and augmentation.
      augmentation: of the images.
      shard: this process's part of a batch.
    """

    split: Split
    batch_size: int
    length: int
    seed: int
    augmentation: Augmentation = Augmentation()
    shard: Shard = Shard()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.batch_size
        positions = self.shard.of(np.arange(start, start + self.batch_size))
        epochs, places = np.divmod(positions, len(self.split))
        examples = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            examples[now] = _permutation(self.seed, int(epoch), len(self.split))[places[now]]
        return self.split.augmented(examples, random_bits(self.seed, epochs, examples), self.augmentation)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Every example once, in order; the last batch is padded with examples whose `mask` is 0."""

    split: Split
    batch_size: int
    shard: Shard = Shard()

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.batch_size
        positions = self.shard.of(np.arange(start, start + self.batch_size))
        return self._padded_batch(positions[positions < len(self.split)], len(positions))

    def __iter__(self) -> Iterator[Batch]:
        return _read_ahead(self, self.split.prefetch)

    def blank(self) -> Batch:
        """A batch of padding, in place of one that cannot be read."""
        return self._padded_batch(np.arange(0), len(self.shard.of(np.arange(self.batch_size))))

    def _padded_batch(self, positions: np.ndarray, size: int) -> Batch:
        return {name: _padded(array, size) for name, array in self.split.plain(positions).items()}


class Feed:
    """The training batches in order.

    Args:
      batches: the source.
      ahead: the number of batches to read before they are needed, so that `error` is known that early.

    Attributes:
      error: why an upcoming batch cannot be read; raised in its place.
    """

    def __init__(self, batches: TrainBatches, ahead: int = 0):
        self.error: DataError | None = None
        self._iterator = _read_ahead(batches, batches.split.prefetch)
        self._ahead = ahead
        self._queue: collections.deque[tuple[Batch, dict[str, Any]]] = collections.deque()
        self._state = self._iterator.get_state()

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        self.fill()
        if not self._queue:
            raise self.error or StopIteration
        batch, self._state = self._queue.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, for `set_state`."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._queue.clear()
        self._state = state
        self._iterator.set_state(state)

    def take_back(self, state: dict[str, Any]) -> None:
        """The next batch is again that of this earlier position; nothing more can be read before `set_state`."""
        self._state = state

    def fill(self) -> None:
        """Reads the batches that are to be read ahead."""
        while len(self._queue) <= self._ahead and not self.error:
            try:
                batch = next(self._iterator)
            except StopIteration:
                return
            except DataError as error:
                self.error = error
                return
            self._queue.append((batch, self._iterator.get_state()))


def _read_ahead(batches: TrainBatches | EvalBatches, count: int) -> grain.DatasetIterator[Batch]:
    """An iterator that prefetches `count` batches on other threads; with 0 it makes each on the caller's thread."""
    options = grain.ReadOptions(num_threads=count, prefetch_buffer_size=count)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(array)
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) if missing else array


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
