"""The order of the data: a batch is a function of (seed, step), an augmentation of (seed, epoch, example).

Nothing about the order is ever stored but the number of the next batch, which is all that Grain's iterator state holds.
"""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import numpy as np

from lowrank_jax.data.augment import Augmentation, random_bits
from lowrank_jax.data.datasets import Batch, Split


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of every global batch this process reads: `index` of `count`."""

    index: int = 0
    count: int = 1

    def of(self, batch: np.ndarray) -> np.ndarray:
        size = len(batch) // self.count
        return batch[self.index * size : (self.index + 1) * size]


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Random access to the batches of an endless shuffled epoch after epoch; a Grain data source.

    Epochs follow each other without a gap, so a batch may end one and begin the next, and no example is ever dropped.

    Attributes:
      split: the examples.
      batch_size: over all processes.
      length: how many batches there are.
      seed: of order and augmentation.
      augmentation: how images are varied.
      shard: this process's part.
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
    """Every example once, in order; the last batch is filled up with examples whose `mask` is 0."""

    split: Split
    batch_size: int
    shard: Shard = Shard()

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.batch_size
        positions = self.shard.of(np.arange(start, start + self.batch_size))
        batch = self.split.plain(positions[positions < len(self.split)])
        return {name: _filled_up(array, len(positions)) for name, array in batch.items()}


def train_iterator(batches: TrainBatches) -> grain.DatasetIterator[Batch]:
    """Batches from the first on; `get_state` and `set_state` move it."""
    return _read_ahead(batches, batches.split.prefetch)


def eval_batches(split: Split, batch_size: int, shard: Shard = Shard()) -> Iterator[Batch]:
    """The batches of `EvalBatches` in order."""
    return _read_ahead(EvalBatches(split, batch_size, shard), split.prefetch)


def _read_ahead(batches: TrainBatches | EvalBatches, count: int) -> grain.DatasetIterator[Batch]:
    """So many batches are made ahead of time; with none, each on the caller's thread when it is asked for."""
    options = grain.ReadOptions(num_threads=count, prefetch_buffer_size=count)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _filled_up(array: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(array)
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) if missing else array


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
