"""Self-guided training: for a while, a dense kernel guides each factor pair.

A kernel computes with W = a G + (1 - a) U V.  The guide G is dense and begins as the product of the first factors; a falls from
1 to 0 on a cosine, and G, U and V are all trained.  Then G is dropped.

From "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers" (Wei et al., NeurIPS
2024).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.kernel import LowRankKernel, is_low_rank
from lowrank_jax.paths import named_leaves

GUIDE = "guide"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["u", "v", GUIDE], meta_fields=["rows", "execution"])
@dataclasses.dataclass(frozen=True, repr=False)
class GuidedKernel(LowRankKernel):
    """A factor pair with its guide beside it.

    To all that knows factor pairs it is the pair: networks that are evaluated run on U and V alone, and decay of the product is
    that of UV.  Only a training step computes with `blend`.

    Attributes:
      guide: G, of the dense kernel's shape.
    """

    guide: jax.Array = dataclasses.field(kw_only=True)

    def blend(self, share: jax.Array) -> jax.Array:
        """The dense kernel that a training step computes with, given the guide's share a of it."""
        return (share * self.guide + (1 - share) * self.merge()).astype(self.guide.dtype)

    def pair(self) -> LowRankKernel:
        """The factors alone."""
        return LowRankKernel(self.u, self.v, self.rows, self.execution)


def is_guided(leaf: Any) -> bool:
    """Whether a node of a tree is a factor pair with a guide; for use as `is_leaf=`."""
    return isinstance(leaf, GuidedKernel)


def share_at(step: jax.Array, length: int) -> jax.Array:
    """The guide's share a at a step, from 1 at step 0 to 0 at step `length`."""
    return (1 + jnp.cos(jnp.pi * step / length)) / 2


def with_guides(params: Any) -> Any:
    """Parameters with a guide beside every factor pair, which is their product."""

    def guided(leaf: Any) -> Any:
        return GuidedKernel(leaf.u, leaf.v, leaf.rows, leaf.execution, guide=leaf.merge()) if is_low_rank(leaf) else leaf

    return jax.tree.map(guided, params, is_leaf=is_low_rank)


def without_guides(tree: Any) -> Any:
    """Parameters, or anything that stores something for each of them, with factor pairs alone."""
    return jax.tree.map(lambda leaf: leaf.pair() if is_guided(leaf) else leaf, tree, is_leaf=is_guided)


def blended(params: Any, share: jax.Array) -> Any:
    """Parameters with dense kernels in the place of those that are guided."""
    return jax.tree.map(lambda leaf: leaf.blend(share) if is_guided(leaf) else leaf, params, is_leaf=is_guided)


def names_in_rules(params: Any) -> dict[str, str]:
    """What rules on parameters call each array, by its name: a guide is called what the dense kernel is."""
    kernels = named_leaves(params, is_leaf=is_guided)
    guides = {f"{name}/{GUIDE}": name for name, leaf in kernels.items() if is_guided(leaf)}
    return {name: guides.get(name, name) for name in named_leaves(params)}
