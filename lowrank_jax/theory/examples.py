"""Networks to learn, drawn at random, and samples of them."""

import jax
import jax.numpy as jnp

from lowrank_jax.linalg import highest_precision
from lowrank_jax.theory import hidden
from lowrank_jax.theory.learning import ReluNetwork, unit_rows


@highest_precision
def draw_network(key: jax.Array, n: int, width: int, outputs: int, *, condition: float = 3.0) -> ReluNetwork:
    """y = relu(x W) A with the singular values of W from 1 to `condition`, and outputs of variance one.

    In float64 where jax has it enabled; the rows of A have length one in `ReluNetwork`'s manner.

    Args:
      key: of the singular vectors and of A, whose elements are Gaussian.
      n, width, outputs: sizes; width at most n.
      condition: of W.
    """
    keys = jax.random.split(key, 3)
    left, right = (jnp.linalg.qr(jax.random.normal(k, (rows, width)))[0] for k, rows in zip(keys, (n, width), strict=False))
    w = left * jnp.linspace(1, condition, width) @ right.T
    a = jax.random.normal(keys[2], (width, outputs))
    a /= jnp.sqrt(hidden.variance(w, a))
    w, a = unit_rows(w, a)
    return ReluNetwork(w, a, 0.0, True)


def draw_samples(key: jax.Array, network: ReluNetwork, count: int) -> tuple[jax.Array, jax.Array]:
    """Standard Gaussian x `[count, n]` and y `[count, outputs]`."""
    x = jax.random.normal(key, (count, len(network.w)), network.w.dtype)
    return x, network(x)
