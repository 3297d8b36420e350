"""Weights for tests of models, drawn by numpy: a model's own initialisers take seconds to compile, and have their own tests."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lowrank_jax.paths import map_named


def variables(model: nn.Module, images: Any, seed: int = 0) -> Any:
    """What `model.init` returns, with kernels of that size; biases, scales and statistics are drawn too."""
    rng = np.random.default_rng(seed)

    def draw(name: str, leaf: Any) -> np.ndarray:
        kind = name.rsplit("/", 1)[-1]
        if kind in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        size = 1 / math.sqrt(math.prod(leaf.shape[:-1])) if kind == "kernel" else 0.1
        return (size * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return map_named(draw, jax.eval_shape(model.init, jax.random.key(0), images))
