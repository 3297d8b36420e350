"""Random networks to learn, and samples of them."""

import functools

import jax
import jax.numpy as jnp

from lowrank_jax.projection.linalg import highest_precision, is_count
from lowrank_jax.theory import hidden
from lowrank_jax.theory.learning import ReluNetwork, unit_rows


def draw_network(key: jax.Array, n: int, width: int, outputs: int, *, condition: float = 3.0) -> ReluNetwork:
    """y = relu(x W) A with the singular values of W from 1 to `condition`, and outputs of variance one.

    Then, as in `ReluNetwork`, the rows of A are scaled to length one and their lengths moved to the columns of W.  With one
    output these lengths are Gaussian numbers, some of them small, and W becomes as ill-conditioned.  In float64 if JAX has it
    enabled.

    Args:
      key: for the singular vectors and for A, whose elements are Gaussian.
      n, width, outputs: sizes; width at most n.
      condition: condition number of W.

    Raises:
      ValueError: a size is not a positive whole number, or the width is above n.
    """
    if not all(map(is_count, (n, width, outputs))) or width > n:
        raise ValueError(f"n {n!r}, width {width!r}, outputs {outputs!r}: must be whole numbers from 1, with width at most n")
    w, a = _weights(key, n, width, outputs, condition)
    return ReluNetwork(w, a, 0.0, True)


@functools.partial(jax.jit, static_argnames=("n", "width", "outputs"))
@highest_precision
def _weights(key: jax.Array, n: int, width: int, outputs: int, condition: float) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(key, 3)
    left, right = (jnp.linalg.qr(jax.random.normal(k, (rows, width)))[0] for k, rows in zip(keys, (n, width), strict=False))
    w = left * jnp.linspace(1, condition, width) @ right.T
    a = jax.random.normal(keys[2], (width, outputs))
    a /= jnp.sqrt(hidden.variance(w, a))
    return unit_rows(w, a)


def draw_samples(key: jax.Array, network: ReluNetwork, count: int) -> tuple[jax.Array, jax.Array]:
    """Standard Gaussian x `[count, n]` and y `[count, outputs]`."""
    x = jax.random.normal(key, (count, len(network.w)), network.w.dtype)
    return x, network(x)
