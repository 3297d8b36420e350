"""Matrices of one shape that are factored together."""

import dataclasses

import jax

from lowrank_jax.projection.activations import ActivationLike


@dataclasses.dataclass(frozen=True)
class Stack:
    """Kernels of one shape that are factored alike.

    Attributes:
      keys: a key for each, `[k]`; None where nothing is drawn.
      w: their matrices, `[k, n, m]`.
      rank, activation, group: as in `projection.kernel_projection`.
      inputs: samples of what each layer is fed, `[k, samples, group, n]`; None for Gaussian inputs.
    """

    keys: jax.Array | None
    w: jax.Array
    rank: int
    activation: ActivationLike = "relu"
    group: int = 1
    inputs: jax.Array | None = None
