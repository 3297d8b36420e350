"""Intervals for what was measured on several images of each photograph."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def bootstrap(
    values: ArrayLike,
    picture: ArrayLike,
    statistic: Callable[[np.ndarray], Any] = np.mean,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of a statistic, by drawing whole pictures anew.

    Crops of one picture are alike, so the images are not a sample of their number; the pictures are.  Each resample draws as
    many pictures as there are, with replacement, and takes all images of each.  The interval is from the 2.5th to the 97.5th
    percentile of the statistic.

    Args:
      values: what was measured on each image: `[n]`, or `[n, ...]` for a statistic of several numbers.
      picture: the picture that each image was cut from: integers `[n]`.
      statistic: of the values of some images, `[m, ...]`, gives a number.
      resamples: how many times to draw.
      seed: of the draws.

    Returns:
      Low and high end.

    Raises:
      ValueError: lengths differ, a value is not finite, or there are fewer than two pictures or one resample; all are listed.
    """
    values, picture = np.asarray(values), np.asarray(picture)
    _check(values, picture, resamples)
    order = np.argsort(picture, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(picture[order])) + 1)
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(groups), size=(resamples, len(groups)))
    found = [statistic(values[np.concatenate([groups[i] for i in draw])]) for draw in draws]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _check(values: np.ndarray, picture: np.ndarray, resamples: int) -> None:
    problems = []
    if picture.ndim != 1 or values.shape[:1] != picture.shape:
        problems.append(f"values {list(values.shape)} and picture {list(picture.shape)} need one entry for each image")
    if not np.issubdtype(values.dtype, np.number) and values.dtype != bool:
        problems.append(f"values of type {values.dtype} are not numbers")
    elif not np.all(np.isfinite(values)):
        problems.append("a value is not finite")
    if len(np.unique(picture)) < 2:
        problems.append(f"an interval over pictures needs two, got {len(np.unique(picture))}")
    if resamples < 1:
        problems.append(f"resamples={resamples} is below 1")
    if problems:
        raise ValueError("; ".join(problems))
