"""Means of a hidden ReLU layer over x ~ N(0, I), in closed form (docs/mathematics.md, section 3)."""

import math

import jax
import jax.numpy as jnp

from lowrank_jax.projection.activations import relu_h
from lowrank_jax.projection.linalg import highest_precision, lengths, ratio


@jax.jit
@highest_precision
def products(w: jax.Array, y: jax.Array) -> jax.Array:
    """E relu(x W)ᵀ relu(x Y) for W `[n, m]` and Y `[n, k]`: ½|w_j||y_l| h(ρ_jl), `[m, k]`."""
    size = jnp.outer(lengths(w, 1), lengths(y, 1))
    return size * relu_h(ratio(w.T @ y, size)) / 2


@jax.jit
@highest_precision
def variance(w: jax.Array, a: jax.Array) -> jax.Array:
    """The variance of every output of relu(x W) A, `[outputs]`."""
    mean = lengths(w, 1) / math.sqrt(2 * math.pi)
    return jnp.einsum("jk,jl,lk->k", a, products(w, w) - jnp.outer(mean, mean), a)
