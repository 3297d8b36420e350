"""A multilayer perceptron on flattened images."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.checks import at_least, below_one, each
from lowrank_jax.models.common import check_settings

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class MLP(nn.Module):
    """Dense layers with ReLU, and optionally BatchNorm before and dropout after it.

    Attributes:
      num_classes: the number of logits.
      widths: of the hidden layers.
      batch_norm: normalise before every ReLU.
      dropout: the rate at which hidden units are dropped in training.
      dtype: of the computation up to the head; parameters and logits stay float32.
    """

    num_classes: int
    widths: Sequence[int] = (256, 256, 256, 256)
    batch_norm: bool = False
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[batch, ...] -> [batch, num_classes]`."""
        check_settings(widths=(self.widths, each(at_least(1))), dropout=(self.dropout, below_one))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, start=1):
            x = nn.Dense(width, use_bias=not self.batch_norm, kernel_init=he_normal, dtype=self.dtype, name=f"dense{i}")(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.relu(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        # Without a dtype it is the parameters' own, float32: in bfloat16 many of 1000 logits would be equal.
        return nn.Dense(self.num_classes, name="head")(x)
