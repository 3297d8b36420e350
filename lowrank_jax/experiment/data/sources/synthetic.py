"""Synthetic images that a small network can learn."""

import dataclasses

import numpy as np

from lowrank_jax.experiment.data.arrays import Arrays, read_split
from lowrank_jax.experiment.data.base import Dataset, Request, Source, positive


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """The legal `dataset.kwargs` of the data set `synthetic`."""

    image_shape: tuple[int, int, int] = positive((32, 32, 3))
    num_classes: int = positive(10)
    train_size: int = positive(4096)
    test_size: int = positive(1024)


def _describe(options: SyntheticOptions, request: Request) -> Dataset:
    del request
    height, width, channels = options.image_shape
    sizes = {"train": options.train_size, "test": options.test_size}
    mean, std = (0.5,) * channels, (0.25,) * channels
    return Dataset("synthetic", (height, width, channels), options.num_classes, sizes, mean, std)


def _load(dataset: Dataset, split: str, data_dir: str | None) -> Arrays:
    del data_dir
    return read_split(dataset, split, lambda name: _draw(dataset, name))


def _draw(dataset: Dataset, split: str) -> Arrays:
    """A fixed random pattern for each class, plus noise."""
    num_classes = dataset.outputs
    patterns = np.random.default_rng(0).integers(0, 256, (num_classes, *dataset.image_shape))
    draw = np.random.default_rng([1, split == "train"])
    labels = draw.integers(0, num_classes, dataset.sizes[split]).astype(np.int32)
    noise = draw.integers(0, 256, (len(labels), *dataset.image_shape))
    return Arrays(((patterns[labels] + noise) // 2).astype(np.uint8), labels)


SOURCE = Source(_describe, _load, SyntheticOptions)
