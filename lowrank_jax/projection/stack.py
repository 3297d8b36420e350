"""Kernels of one shape that are factored together."""

import dataclasses

import jax

from lowrank_jax.projection.activations import ActivationLike


@dataclasses.dataclass(frozen=True)
class Stack:
    """Kernels of equal shape and settings.

    Attributes:
      keys: a random key for each kernel, `[k]`; None if nothing is drawn.
      w: the kernels as matrices, `[k, n, m]`.
      rank, activation, group: as in `projection.kernel_projection`.
      inputs: samples of each layer's inputs, `[k, samples, group, n]`; None for Gaussian inputs.
    """

    keys: jax.Array | None
    w: jax.Array
    rank: int
    activation: ActivationLike = "relu"
    group: int = 1
    inputs: jax.Array | None = None
