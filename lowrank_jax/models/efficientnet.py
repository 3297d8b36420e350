"""EfficientNet (Tan and Le, 2019): one base network of inverted bottlenecks, scaled in width, depth and resolution together."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax

from lowrank_jax.checks import above, below_one
from lowrank_jax.models.common import check_settings, stochastic_depth

Padding = Literal["same", "symmetric"]

fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# A depthwise kernel is [k, k, 1, c] here and [k, k, c, 1] where the rule comes from: its fan out there is the fan in here.
depthwise_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
head_uniform = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # within 1/sqrt(fan out)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a member of the family is scaled.

    Attributes:
      width: the factor on the number of channels.
      depth: the factor on the number of blocks.
      resolution: the height and width of the images that it was designed for.
      dropout: the rate before the classifier.
    """

    width: float
    depth: float
    resolution: int
    dropout: float


VARIANTS = {
    "efficientnet_b0": Variant(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": Variant(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Variant(1.1, 1.2, 260, 0.3),
    "efficientnet_b3": Variant(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Variant(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Variant(1.6, 2.2, 456, 0.4),
    "efficientnet_b6": Variant(1.8, 2.6, 528, 0.5),
    "efficientnet_b7": Variant(2.0, 3.1, 600, 0.5),
    "efficientnet_b8": Variant(2.2, 3.6, 672, 0.5),
    # Nobody published a B9.  From B6 to B7 and from B7 to B8 the step is the same, (0.2, 0.5, 72): this is one step more.
    "efficientnet_b9": Variant(2.4, 4.1, 744, 0.5),
    "efficientnet_l2": Variant(4.3, 5.3, 800, 0.5),
    # For devices that have no squeeze-and-excitation, and compute in eight bits.
    "efficientnet_lite0": Variant(1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": Variant(1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": Variant(1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": Variant(1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": Variant(1.4, 1.8, 300, 0.3),
}
_LITE = {"squeeze_excite": False, "activation": "relu6", "fixed_ends": True}


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """A stage of the base network: its window, the stride of its first block, expansion, channels and blocks."""

    kernel: int
    strides: int
    expansion: int
    features: int
    blocks: int


STAGES = (
    StageSpec(3, 1, 1, 16, 1),
    StageSpec(3, 2, 6, 24, 2),
    StageSpec(5, 2, 6, 40, 2),
    StageSpec(3, 2, 6, 80, 3),
    StageSpec(5, 1, 6, 112, 3),
    StageSpec(5, 2, 6, 192, 4),
    StageSpec(3, 1, 6, 320, 1),
)


ACTIVATIONS = {"silu": nn.silu, "relu6": nn.relu6}


class ConvNorm(nn.Module):
    """The stem, and the 1x1 convolution on top."""

    features: int
    kernel: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(self.features, self.kernel, self.strides, name="conv")(x)
        return self.act(self.norm(name="norm")(x))


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate in (0, 1), computed from the means of all channels."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # On one position a dense layer is the 1x1 convolution of the paper.
        dense = functools.partial(nn.Dense, kernel_init=fan_out_normal, dtype=self.dtype)
        gate = dense(self.features, name="reduce")(x.mean(axis=(1, 2), keepdims=True))
        gate = dense(x.shape[-1], name="excite")(nn.silu(gate))
        return x * nn.sigmoid(gate)


class MBConv(nn.Module):
    """An inverted bottleneck: 1x1 to more channels, a depthwise convolution, squeeze-and-excitation, 1x1 to few."""

    features: int
    kernel: int
    strides: int
    expansion: int
    drop_rate: float
    squeeze_excite: bool
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[..., Any]
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[-1]
        hidden, y = self.expansion * inputs, x
        if self.expansion > 1:
            y = self.act(self.norm(name="expand_norm")(self.conv(hidden, 1, name="expand")(y)))
        depthwise = functools.partial(self.conv, feature_group_count=hidden, kernel_init=depthwise_normal)
        y = depthwise(hidden, self.kernel, self.strides, name="depthwise")(y)
        y = self.act(self.norm(name="depthwise_norm")(y))
        if self.squeeze_excite:
            y = SqueezeExcite(max(1, inputs // 4), self.dtype, name="se")(y)
        y = self.norm(name="project_norm")(self.conv(self.features, 1, name="project")(y))
        if self.strides > 1 or inputs != self.features:
            return y
        return x + stochastic_depth(y, self.drop_rate, self.train)


class Stage(nn.Module):
    """Blocks of one width, as many as there are drop rates; the first one strides."""

    spec: StageSpec
    features: int
    drop_rates: tuple[float, ...]
    block: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, rate in enumerate(self.drop_rates):
            strides = self.spec.strides if i == 0 else 1
            block = self.block(
                self.features, self.spec.kernel, strides, self.spec.expansion, drop_rate=rate, name=f"block{i + 1}"
            )
            x = block(x)
        return x


class EfficientNet(nn.Module):
    """An EfficientNet.  Any image size works; `VARIANTS` has the sizes that the members of the family were designed for.

    Initialisers and defaults are those of the published TensorFlow code.  B9 is an extrapolation: there is no official one.
    Of the models in timm, `tf_efficientnet_*` are these defaults, `efficientnet_*` are `padding="symmetric"` and
    `epsilon=1e-5`; `tf_efficientnet_lite*` are `efficientnet_lite*` here.

    Attributes:
      num_classes: the number of logits.
      width: the factor on the base network's channels, which are rounded to multiples of eight.
      depth: the factor on the base network's blocks, which are rounded up.
      dropout: the rate before the classifier.
      drop_connect: the rate of stochastic depth to which the blocks' rates rise linearly, the first block's being zero.
      squeeze_excite: whether blocks have squeeze-and-excitation.
      activation: of the blocks, the stem and the top.
      fixed_ends: whether the stem, the top, and the number of blocks of the first and the last stage stay those of the base
        network.
      padding: `same`, which pads a strided convolution as TensorFlow does, more on the right and below where it must be
        uneven; or `symmetric`, by half the window on every side.
      stem: `imagenet` (3x3/2) or `cifar` (3x3/1), for small images.
      momentum: of the running statistics of BatchNorm.
      epsilon: of BatchNorm.
      dtype: of the computation up to the head; parameters, statistics and logits stay float32.
    """

    num_classes: int
    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    drop_connect: float = 0.2
    squeeze_excite: bool = True
    activation: Literal["silu", "relu6"] = "silu"
    fixed_ends: bool = False
    padding: Padding = "same"
    stem: Literal["imagenet", "cifar"] = "imagenet"
    momentum: float = 0.99
    epsilon: float = 1e-3
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, num_classes]`."""
        check_settings(
            width=(self.width, above(0, 1000)),
            depth=(self.depth, above(0, 100)),
            dropout=(self.dropout, below_one),
            drop_connect=(self.drop_connect, below_one),
            momentum=(self.momentum, below_one),
            epsilon=(self.epsilon, above(0)),
        )
        conv = functools.partial(_conv, padding=self.padding, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype
        )
        act, width = ACTIVATIONS[self.activation], 1.0 if self.fixed_ends else self.width
        block = functools.partial(
            MBConv, squeeze_excite=self.squeeze_excite, conv=conv, norm=norm, act=act, train=train, dtype=self.dtype
        )
        x = ConvNorm(round_features(32, width), 3, 2 if self.stem == "imagenet" else 1, conv, norm, act, name="stem")(x)
        for i, (spec, rates) in enumerate(zip(STAGES, self._drop_rates(), strict=True), start=1):
            x = Stage(spec, round_features(spec.features, self.width), rates, block, name=f"stage{i}")(x)
        x = ConvNorm(round_features(1280, width), 1, 1, conv, norm, act, name="top")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=(1, 2)))
        # Without a dtype it is the parameters' own, float32: in bfloat16 many of 1000 logits would be equal.
        return nn.Dense(self.num_classes, kernel_init=head_uniform, name="head")(x)

    def _drop_rates(self) -> Iterator[tuple[float, ...]]:
        """Every stage's rates of stochastic depth, one per block."""
        blocks = [math.ceil(self.depth * spec.blocks) for spec in STAGES]
        if self.fixed_ends:
            blocks = [STAGES[0].blocks, *blocks[1:-1], STAGES[-1].blocks]
        for i, count in enumerate(blocks):
            first = sum(blocks[:i])
            yield tuple(self.drop_connect * index / sum(blocks) for index in range(first, first + count))


def _conv(features: int, kernel: int, strides: int = 1, *, padding: Padding, **kwargs: Any) -> nn.Conv:
    symmetric = padding == "symmetric" and kernel > 1  # "SAME" tells a pointwise convolution, which has nothing to pad
    kwargs = {"use_bias": False, "kernel_init": fan_out_normal, **kwargs}
    return nn.Conv(features, (kernel, kernel), strides, padding=kernel // 2 if symmetric else "SAME", **kwargs)


def round_features(features: int, width: float) -> int:
    """Channels scaled, to the nearest multiple of eight that is at least eight and keeps 90 % of them."""
    scaled = features * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


EFFICIENTNETS: dict[str, dict[str, Any]] = {
    name: {
        "width": variant.width,
        "depth": variant.depth,
        "dropout": variant.dropout,
        **(_LITE if name.startswith("efficientnet_lite") else {}),
    }
    for name, variant in VARIANTS.items()
}
