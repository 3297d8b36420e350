"""Residual networks: the ImageNet family (v1.5: a bottleneck strides in its 3x3) and the CIFAR family of He et al. (2016)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from lowrank_jax.checks import at_least, each
from lowrank_jax.models.common import BLOCKS, check_settings

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

IMAGENET_WIDTHS = (64, 128, 256, 512)
CIFAR_WIDTHS = (16, 32, 64)


class Stem(nn.Module):
    """What comes before the first stage: 7x7/2 and a max-pool for large images, one 3x3 for small ones."""

    features: int
    small_images: bool
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.small_images:
            return nn.relu(self.norm(name="norm")(self.conv(self.features, (3, 3), padding=1, name="conv")(x)))
        x = self.conv(self.features, (7, 7), 2, padding=3, name="conv")(x)
        x = nn.relu(self.norm(name="norm")(x))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # type: ignore[arg-type]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    features: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    last_norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.features, (3, 3), self.strides, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, (3, 3), padding=1, name="conv2")(y)
        y = self.last_norm(name="norm2")(y)
        return nn.relu(_shortcut(self, x, y, self.features) + y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 with the stride, and 1x1 to four times the features; the first two `inner` times as wide as these."""

    features: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    last_norm: Callable[..., Any]
    inner: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.inner * self.features
        y = nn.relu(self.norm(name="norm1")(self.conv(hidden, (1, 1), name="conv1")(x)))
        y = self.conv(hidden, (3, 3), self.strides, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(4 * self.features, (1, 1), name="conv3")(y)
        y = self.last_norm(name="norm3")(y)
        return nn.relu(_shortcut(self, x, y, 4 * self.features) + y)


def _shortcut(block: Any, x: jax.Array, y: jax.Array, features: int) -> jax.Array:
    if x.shape == y.shape:
        return x
    return block.norm(name="proj_norm")(block.conv(features, (1, 1), block.strides, name="proj")(x))


class Stage(nn.Module):
    """Blocks of one width; the first one strides."""

    features: int
    blocks: int
    strides: int
    block: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = self.block(self.features, self.strides if i == 0 else 1, name=f"block{i + 1}")(x)
        return x


class ResNet(nn.Module):
    """A residual network.

    Attributes:
      num_classes: the number of logits.
      blocks: the number of blocks of each stage.
      widths: the features of each stage.
      bottleneck: bottleneck blocks rather than basic ones.
      inner_width: a factor on the width of what is inside of bottleneck blocks.
      stem: `imagenet` (7x7/2 and max-pool) or `cifar` (3x3).
      norm: `batch` or `none`; without normalisation, convolutions have biases.
      zero_init_last_norm: start the last norm scale of every block at zero, so that blocks start as identities.
      dtype: of the computation up to the head; parameters, statistics and logits stay float32.
    """

    num_classes: int
    blocks: Sequence[int]
    widths: Sequence[int] = IMAGENET_WIDTHS
    bottleneck: bool = False
    inner_width: int = 1
    stem: Literal["imagenet", "cifar"] = "imagenet"
    norm: Literal["batch", "none"] = "batch"
    zero_init_last_norm: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, num_classes]`."""
        check_settings(
            blocks=(self.blocks, each(BLOCKS)),
            widths=(self.widths, each(at_least(1))),
            inner_width=(self.inner_width, at_least(1, 1000)),
        )
        if self.inner_width > 1 and not self.bottleneck:
            raise ValueError(f"setting inner_width: {self.inner_width}; only bottleneck blocks have one")
        if not len(self.widths) == len(self.blocks) > 0:
            raise ValueError(f"settings widths and blocks: {self.widths!r} and {self.blocks!r}; must be of one length")
        normalised = self.norm == "batch"
        conv = functools.partial(nn.Conv, use_bias=not normalised, kernel_init=he_normal, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        norm = norm if normalised else _Identity
        last_norm = norm
        if normalised and self.zero_init_last_norm:
            last_norm = functools.partial(norm, scale_init=nn.initializers.zeros_init())
        kind = functools.partial(BottleneckBlock, inner=self.inner_width) if self.bottleneck else BasicBlock
        block = functools.partial(kind, conv=conv, norm=norm, last_norm=last_norm)
        x = Stem(self.widths[0], self.stem == "cifar", conv, norm, name="stem")(x)
        for i, (features, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            x = Stage(features, blocks, 1 if i == 0 else 2, block, name=f"stage{i + 1}")(x)
        # Without a dtype it is the parameters' own, float32: in bfloat16 many of 1000 logits would be equal.
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


class _Identity(nn.Module):
    """Takes the place of a norm."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def _cifar(depth: int) -> dict[str, Any]:
    return {"blocks": ((depth - 2) // 6,) * 3, "widths": CIFAR_WIDTHS, "stem": "cifar"}


RESNETS: dict[str, dict[str, Any]] = {
    **{f"resnet{depth}": _cifar(depth) for depth in (8, 20, 32, 56)},
    "resnet18": {"blocks": (2, 2, 2, 2)},
    "resnet34": {"blocks": (3, 4, 6, 3)},
    "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
    "resnet152": {"blocks": (3, 8, 36, 3), "bottleneck": True},
    "wide_resnet50_2": {"blocks": (3, 4, 6, 3), "bottleneck": True, "inner_width": 2},
    "wide_resnet101_2": {"blocks": (3, 4, 23, 3), "bottleneck": True, "inner_width": 2},
}
