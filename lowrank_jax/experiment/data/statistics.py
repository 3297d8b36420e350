"""What is measured over a split: how often each class occurs."""

import numpy as np

from lowrank_jax.experiment.data.base import Split

_PART = 512  # examples that are read at a time


def label_counts(split: Split, num_classes: int) -> np.ndarray:
    """How often each class occurs in a split, int64 `[num_classes]`; of maps of classes, at how many places."""
    counts = np.zeros(num_classes, np.int64)
    for start in range(0, len(split), _PART):
        batch = split.plain(np.arange(start, min(start + _PART, len(split))))
        counts += np.bincount(batch["label"][batch["mask"] > 0].ravel(), minlength=num_classes)
    return counts
