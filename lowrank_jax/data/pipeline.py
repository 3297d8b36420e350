"""The order of the data: a batch is a function of (seed, step), an augmentation of (seed, epoch, example).

Nothing about the order is ever stored but the number of the next batch, which is all that Grain's iterator state holds.
"""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import numpy as np

from lowrank_jax.data.datasets import Arrays

Batch = dict[str, np.ndarray]


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
      arrays: the split.
      batch_size: over all processes.
      length: how many batches there are.
      seed: of order and augmentation.
      flip: mirror every other image.
      crop_padding: pad by so many pixels on each side and crop back to size at a random place.
      shard: this process's part.
    """

    arrays: Arrays
    batch_size: int
    length: int
    seed: int
    flip: bool = False
    crop_padding: int = 0
    shard: Shard = Shard()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.batch_size
        positions = self.shard.of(np.arange(start, start + self.batch_size))
        epochs, places = np.divmod(positions, len(self.arrays))
        examples = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            examples[now] = _permutation(self.seed, int(epoch), len(self.arrays))[places[now]]
        images = self.arrays.images[examples]
        if self.flip or self.crop_padding:
            bits = _bits(self.seed, epochs, examples)
            images = crop_shifted(images, bits, self.crop_padding) if self.crop_padding else images
            images = flip_every_other(images, bits) if self.flip else images
        return {"image": images, "label": self.arrays.labels[examples]}


def train_iterator(batches: TrainBatches) -> grain.DatasetIterator[Batch]:
    """Batches from the first on; `get_state` and `set_state` move it.

    They are made on the caller's thread: the devices run ahead of the loop, and to gather a batch from memory takes less time
    than to hand it from one thread to another.
    """
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def eval_batches(arrays: Arrays, batch_size: int, shard: Shard = Shard()) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up with examples whose `mask` is 0."""
    for start in range(0, len(arrays), batch_size):
        index = shard.of(np.arange(start, start + batch_size))
        mask = index < len(arrays)
        index = np.where(mask, index, 0)
        yield {"image": arrays.images[index], "label": arrays.labels[index], "mask": mask.astype(np.float32)}


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _bits(seed: int, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
    """64 random bits for each example: splitmix64 over (seed, epoch, index), vectorised."""
    x = _splitmix64(np.full(index.shape, seed, np.uint64))
    x = _splitmix64(x ^ epochs.astype(np.uint64))
    return _splitmix64(x ^ index.astype(np.uint64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea and Flood (OOPSLA 2014); arithmetic modulo 2**64 is meant."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def flip_every_other(images: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Mirrors the images whose lowest bit is set."""
    flip = (bits & np.uint64(1)).astype(bool)
    return np.where(flip[:, None, None, None], images[:, :, ::-1], images)


def crop_shifted(images: np.ndarray, bits: np.ndarray, padding: int) -> np.ndarray:
    """Pads with black and crops back to size, each image at its own offset."""
    batch, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    choices = np.uint64(2 * padding + 1)
    down = ((bits >> np.uint64(1)) & np.uint64(0xFFFF)) % choices
    right = ((bits >> np.uint64(17)) & np.uint64(0xFFFF)) % choices
    rows = down.astype(np.int64)[:, None] + np.arange(height)
    columns = right.astype(np.int64)[:, None] + np.arange(width)
    return padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
