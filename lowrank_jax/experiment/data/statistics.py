"""What is measured over a split: means, deviations and how often each class occurs."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_jax.experiment.data.base import DataError, Dataset, Split
from lowrank_jax.experiment.data.progress import Progress, to_stderr
from lowrank_jax.text import one_line

_PART = 512  # examples that are read at a time


def measured(dataset: Dataset, train: Split, say: Callable[[str], None] = to_stderr) -> Dataset:
    """The data set with the mean and deviation of its training split where it has none; see `mean_and_std`."""
    if dataset.mean and dataset.std:
        return dataset
    mean, std = mean_and_std(dataset, train, say)
    return dataclasses.replace(dataset, mean=dataset.mean or mean, std=dataset.std or std)


def mean_and_std(
    dataset: Dataset, split: Split, say: Callable[[str], None] = to_stderr
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a split's inputs as evaluation sees them, by channel or feature, in float64.

    Of pixels scaled to [0, 1] if they are uint8, else of the numbers as they are.  A channel that is constant has the
    deviation 1, so that it can be divided by.

    Args:
      dataset: the split's.
      split: the examples; images that cannot be decoded do not count.
      say: takes a line about progress.

    Raises:
      DataError: nothing can be read, or what is read is not finite.
    """
    channels = dataset.image_shape[-1]
    count, mean, squares = 0, np.zeros(channels), np.zeros(channels)
    told = Progress(f"measuring mean and standard deviation of {dataset.name}", len(split), say)
    for start in range(0, len(split), _PART):
        batch = split.plain(np.arange(start, min(start + _PART, len(split))))
        values = batch["image"][batch["mask"] > 0].reshape(-1, channels).astype(np.float64)
        if len(values):  # Chan, Golub and LeVeque's update
            own = values.mean(axis=0)
            total, away = count + len(values), own - mean
            squares += ((values - own) ** 2).sum(axis=0) + away**2 * count * len(values) / total
            mean, count = mean + away * len(values) / total, total
        told.at(start + len(batch["mask"]))
    if not count:
        raise DataError(f"{dataset.name}: no image of the training split could be decoded")
    if not (np.isfinite(mean).all() and np.isfinite(squares).all()):
        raise DataError(f"{dataset.name}: the inputs of the training split are not all finite")
    scale = 255.0 if dataset.image_dtype == "uint8" else 1.0
    std = np.sqrt(squares / count) / scale
    return _floats(mean / scale), _floats(np.where(std > 0, std, 1.0))


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def one_sided(present: Mapping[str, Collection[Any]], classes: Sequence[Any], names: Sequence[str]) -> list[str]:
    """A line for each split that lacks classes.

    Args:
      present: the classes in each split.
      classes, names: all of them, and what to call each.
    """
    lines = []
    for split, found in present.items():
        if missing := [name for one, name in zip(classes, names, strict=True) if one not in found]:
            rest = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
            lines.append(f"no examples of {', '.join(map(one_line, missing[:_SHOWN]))}{rest} in the split {one_line(split)}")
    return lines


_SHOWN = 3


def label_counts(split: Split, num_classes: int) -> np.ndarray:
    """How often each class occurs in a split, int64 `[num_classes]`; of maps of classes, at how many places.

    No image is decoded, and those that cannot be are counted too.
    """
    return np.bincount(split.all_labels().ravel(), minlength=num_classes).astype(np.int64)
