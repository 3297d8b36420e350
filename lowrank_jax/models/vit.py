"""Vision transformers (Dosovitskiy et al., 2021): pre-norm blocks on the patches of an image."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_jax.checks import at_least, below_one
from lowrank_jax.models.common import BLOCKS, check_settings, stochastic_depth

xavier_uniform = nn.initializers.xavier_uniform()
layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class MLPBlock(nn.Module):
    """A dense layer to more features, GELU, and one back."""

    features: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(
            nn.Dense, kernel_init=xavier_uniform, bias_init=nn.initializers.normal(1e-6), dtype=self.dtype
        )
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=not self.train)
        y = drop()(nn.gelu(dense(self.features, name="fc1")(x), approximate=False))
        return drop()(dense(x.shape[-1], name="fc2")(y))


class Block(nn.Module):
    """Attention among the tokens, then an MLP on each; both read normalised tokens and add to the plain ones."""

    heads: int
    mlp_features: int
    dropout: float
    attention_dropout: float
    drop_rate: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            dropout_rate=self.attention_dropout,
            deterministic=not self.train,
            force_fp32_for_softmax=True,
            kernel_init=xavier_uniform,
            dtype=self.dtype,
            name="attention",
        )
        y = attention(layer_norm(dtype=self.dtype, name="norm1")(x))
        y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
        x = x + stochastic_depth(y, self.drop_rate, self.train)
        mlp = MLPBlock(self.mlp_features, self.dropout, self.train, self.dtype, name="mlp")
        return x + stochastic_depth(mlp(layer_norm(dtype=self.dtype, name="norm2")(x)), self.drop_rate, self.train)


class ViT(nn.Module):
    """A vision transformer.

    Initialised as in the published JAX code, except for the head: it is random rather than zero, so that the logits of an
    untrained network depend on its kernels.

    Attributes:
      num_classes: the number of logits.
      width: the features of a token; a multiple of the heads.
      depth: the number of blocks.
      heads: attention heads per block.
      patch: the height and width of a patch; those of the image must be multiples of it.
      mlp_ratio: the hidden features of the MLPs, in multiples of `width`.
      pool: what the classifier reads: an extra `token`, or the `mean` over the patches.
      positions: `learned`, one for every token of the image size at initialisation; or `sincos`, fixed, of rows and columns.
      dropout: the rate after positions, attention and both layers of the MLPs.
      attention_dropout: the rate of dropped attention weights.
      stochastic_depth: the rate to which the blocks' rates of stochastic depth rise linearly, the first block's being zero.
      dtype: of the computation up to the head; parameters and logits stay float32.
    """

    num_classes: int
    width: int
    depth: int
    heads: int
    patch: int = 16
    mlp_ratio: int = 4
    pool: Literal["token", "mean"] = "token"
    positions: Literal["learned", "sincos"] = "learned"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, num_classes]`."""
        sizes = {name: (getattr(self, name), at_least(1)) for name in ("width", "heads", "patch", "mlp_ratio")}
        rates = {name: (getattr(self, name), below_one) for name in ("dropout", "attention_dropout", "stochastic_depth")}
        check_settings(depth=(self.depth, BLOCKS), **sizes, **rates)
        x = nn.Dropout(self.dropout, deterministic=not train)(self._tokens(x))
        block = functools.partial(
            Block, self.heads, self.mlp_ratio * self.width, self.dropout, self.attention_dropout, train=train, dtype=self.dtype
        )
        for i in range(self.depth):
            x = block(drop_rate=self.stochastic_depth * i / max(1, self.depth - 1), name=f"block{i + 1}")(x)
        x = layer_norm(dtype=self.dtype, name="norm")(x)
        x = x[:, 0] if self.pool == "token" else x.mean(axis=1)
        # Without a dtype it is the parameters' own, float32: in bfloat16 many of 1000 logits would be equal.
        return nn.Dense(self.num_classes, name="head")(x)

    def _tokens(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, channels] -> [batch, tokens, width]`: patches with their positions, the extra token first."""
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"images of {x.shape[1]} x {x.shape[2]} cannot be divided into patches of {self.patch} x {self.patch}"
            )
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, padding="VALID", dtype=self.dtype, name="embed")(x)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows * columns, self.width)
        extra = self.pool == "token"
        if extra:
            token = self.param("token", nn.initializers.zeros_init(), (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)).astype(x.dtype), x], axis=1)
        if self.positions == "learned":
            positions = self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        else:  # the extra token is nowhere
            positions = jnp.pad(sincos(rows, columns, self.width), ((int(extra), 0), (0, 0)))
        return x + positions.astype(x.dtype)


def sincos(rows: int, columns: int, width: int) -> jax.Array:
    """Fixed positions `[rows * columns, width]`: a quarter each of sines and cosines of the column and of the row.

    Raises:
      ValueError: the width is not a multiple of four, or less than eight.
    """
    if width % 4 or width < 8:
        raise ValueError(f"width {width} must be a multiple of 4, at least 8, for positions of sines and cosines")
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, width // 4)
    y, x = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (x, y)]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=1)


VITS: dict[str, dict[str, Any]] = {
    f"vit_{size}{patch}": {"width": width, "depth": depth, "heads": heads, **({} if patch == 16 else {"patch": patch})}
    for size, width, depth, heads in (("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16))
    for patch in (16, 32)
}
