"""`factorize` and `merge` for the parameters of Linen modules, which may come in boxes (`nn.with_partitioning`)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.kernel import is_low_rank
from lowrank_jax.linen import boxes
from lowrank_jax.planning import factorize as trees
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection.two_sided import GradientMoments


def factorize(
    params: Any,
    plan: Plan,
    *,
    key: jax.Array,
    moments: Mapping[str, jax.Array] | None = None,
    gradients: Mapping[str, GradientMoments] | None = None,
    inputs: Mapping[str, jax.Array] | None = None,
) -> Any:
    """Replaces the planned kernels by factor pairs, each made by its rule's method; paths stay the same.

    Kernels of one shape are decomposed together, so that each decomposition is compiled once.  It compiles as one program,
    whether it is called under `jit` or not.

    Args:
      params: the dense model's parameters; boxes such as those of `nn.with_partitioning` stay, and name the factors' axes.
      plan: from `plan` for the same model.
      key: for random methods; what is drawn for a kernel depends on the key and the kernel's name alone.
      moments: E xxᵀ of every planned kernel's inputs, from `inputs.second_moments`; kernels are then factored for these
        inputs rather than for isotropic ones (docs/mathematics.md, section 8).
      gradients: the moments of its gradients for every kernel whose method is `two_sided`, from `inputs.gradient_moments`;
        that method needs them, and no moments (docs/mathematics.md, section 14).
      inputs: samples of every planned kernel's inputs, from `inputs.samples`, for the method `function_approximation`.

    Returns:
      The tree with `LowRankKernel`s in it, in the kernels' own dtypes; decompositions run in float32 or better.

    Raises:
      ValueError: the parameters do not match the plan or are not finite, or moments, gradients or inputs do not fit it or
        are missing.
    """
    factored = trees.factorize(nn.meta.unbox(params), plan, key=key, moments=moments, gradients=gradients, inputs=inputs)
    return jax.tree.map(boxes.like, params, factored, is_leaf=nn.meta.is_axis_metadata)


def merge(params: Any) -> Any:
    """The plain model's parameters: every factor pair multiplied out, in float32 or better, at its own path and in its box."""
    return jax.tree.map(lambda leaf: boxes.merged(leaf) if is_low_rank(leaf) else leaf, params, is_leaf=is_low_rank)
