"""The data: bright circles, squares and crosses on noise, drawn anew from a seed."""

import numpy as np

from lowrank_jax.experiment.data.own import Data

SHAPES = ("circle", "square", "cross")
SIDE = 16


def splits():
    """Images and labels of every split, and what the classes are called."""
    return Data({"train": _draw(600, seed=0), "test": _draw(150, seed=1)}, class_names=SHAPES)


def _draw(count, seed):
    """Images `[count, SIDE, SIDE, 3]` uint8 and labels `[count]`."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 128, (count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = random.integers(0, len(SHAPES), count, dtype=np.int32)
    for image, label in zip(images, labels, strict=True):
        y, x = np.abs(np.indices((SIDE, SIDE)) - random.integers(5, SIDE - 5, (2, 1, 1)))
        shape = {"circle": y**2 + x**2 <= 12, "square": np.maximum(y, x) <= 3, "cross": (y * x == 0) & (y + x <= 4)}
        image[shape[SHAPES[label]]] = random.integers(160, 256, 3)
    return images, labels
