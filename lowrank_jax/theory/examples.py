"""Networks to learn, drawn at random, and samples of them."""

import math

import jax
import jax.numpy as jnp

from lowrank_jax.activations import relu_h
from lowrank_jax.linalg import highest_precision
from lowrank_jax.theory.learning import ReluNetwork


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
    length = jnp.linalg.norm(w, axis=0)
    covariance = jnp.outer(length, length) * (relu_h((w.T @ w) / jnp.outer(length, length)) / 2 - 1 / (2 * math.pi))
    a /= jnp.sqrt(jnp.einsum("jk,jl,lk->k", a, covariance, a))
    rows = jnp.linalg.norm(a, axis=1)
    return ReluNetwork(w * rows, a / rows[:, None], 0.0, True)


def draw_samples(key: jax.Array, network: ReluNetwork, count: int) -> tuple[jax.Array, jax.Array]:
    """Standard Gaussian x `[count, n]` and y `[count, outputs]`."""
    x = jax.random.normal(key, (count, len(network.w)), network.w.dtype)
    return x, network(x)
