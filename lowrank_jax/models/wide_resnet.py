"""Wide residual networks for small images (Zagoruyko and Komodakis, 2016): pre-activation blocks, few and wide."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.checks import at_least, below_one
from lowrank_jax.models.common import BLOCKS, check_settings
from lowrank_jax.models.resnet import Stage, he_normal

WIDTHS = (16, 32, 64)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, with dropout between them."""

    features: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    dropout: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm(name="norm1")(x))
        if x.shape[-1] != self.features:  # where the width changes, the shortcut too starts from the activations
            x = self.conv(self.features, (1, 1), self.strides, name="proj")(y)
        y = self.conv(self.features, (3, 3), self.strides, padding=1, name="conv1")(y)
        y = self.dropout()(nn.relu(self.norm(name="norm2")(y)))
        return x + self.conv(self.features, (3, 3), padding=1, name="conv2")(y)


class WideResNet(nn.Module):
    """A wide residual network, WRN-depth-widening.

    Attributes:
      num_classes: the number of logits.
      depth: 6 n + 4 for n blocks a stage; the shortcuts' convolutions do not count.
      widening: the factor on the stages' 16, 32 and 64 channels; the stem has 16.
      dropout: the rate between the convolutions of a block.
      dtype: of the computation up to the head; parameters, statistics and logits stay float32.
    """

    num_classes: int
    depth: int
    widening: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, num_classes]`."""
        check_settings(depth=(self.depth, BLOCKS), widening=(self.widening, at_least(1)), dropout=(self.dropout, below_one))
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {self.depth} must be 6 n + 4, such as 10, 16 or 28")
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        block = functools.partial(WideBlock, conv=conv, norm=norm, dropout=dropout)
        x = conv(WIDTHS[0], (3, 3), padding=1, name="stem")(x)
        for i, width in enumerate(WIDTHS):
            x = Stage(self.widening * width, blocks, 1 if i == 0 else 2, block, name=f"stage{i + 1}")(x)
        x = nn.relu(norm(name="norm")(x))
        # Without a dtype it is the parameters' own, float32: in bfloat16 many of 1000 logits would be equal.
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


WIDE_RESNETS: dict[str, dict[str, Any]] = {
    "wrn_16_4": {"depth": 16, "widening": 4},
    "wrn_28_10": {"depth": 28, "widening": 10},
}
