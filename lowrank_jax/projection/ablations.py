"""Variants of the projection that change one thing at a time, for ablation studies.

Each factors a matrix `[n, m]` (docs/mathematics.md, section 6).
"""

import jax
import jax.numpy as jnp

from lowrank_jax.projection import activations, linalg, matrix
from lowrank_jax.projection.activations import ActivationLike
from lowrank_jax.projection.batched import measure
from lowrank_jax.projection.linalg import Pair, lengths, ratio


@linalg.highest_precision
def spectral_global_scale(w: jax.Array, rank: int, *, activation: ActivationLike = "relu", group: int = 1) -> Pair:
    """The spectral factors times a single scale: the one of least function risk."""
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    act, dtype, own = activations.get(activation), w.dtype, linalg.unit(w)
    unit = measure(act, own)
    scaled = w.astype(own.dtype) * (unit / own)  # compilers join divisions in a row, and the product may be too large a number
    u, v = matrix.spectral(scaled, rank)
    y = u @ v
    # By Cauchy-Schwarz, the best scale for a homogeneous activation is at most |W| / |Y|.
    highest = 2 * ratio(jnp.linalg.norm(scaled / unit), jnp.linalg.norm(y / unit))
    scale = activations.minimise(lambda c: matrix.relative_risk(scaled, c * y, activation=act, group=group), highest)
    root = jnp.sqrt(scale) * jnp.sqrt(own / unit)
    return (root * u).astype(dtype), (root * v).astype(dtype)


@linalg.highest_precision
def spectral_column_scales(w: jax.Array, rank: int, *, activation: ActivationLike = "relu", group: int = 1) -> Pair:
    """The spectral factors, the columns of V scaled to the lengths of least function risk.

    The product equals that of the kernel projection with subspace `top`, except that outputs orthogonal to the subspace stay
    zero.  The factors are not rebalanced.
    """
    u, v = (factor.astype(linalg.wide(w.dtype)) for factor in matrix.spectral(w, rank))
    a, b = matrix.kernel_projection(w, rank, activation=activation, group=group)
    root = jnp.sqrt(linalg.unit(w))
    length = ratio(
        lengths((a.astype(u.dtype) / root) @ (b.astype(u.dtype) / root), group), lengths((u / root) @ (v / root), group)
    )
    return u.astype(w.dtype), (v * jnp.tile(length, group)).astype(w.dtype)


@linalg.highest_precision
def random_subspace(key: jax.Array, w: jax.Array, rank: int, *, activation: ActivationLike = "relu", group: int = 1) -> Pair:
    """The best approximation in a subspace drawn uniformly at random, independent of W."""
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    q = linalg.orthonormal(jax.random.normal(key, (w.shape[0], rank), linalg.wide(w.dtype)))
    return matrix.on_subspace(w, q, activation=activation, group=group)


@linalg.highest_precision
def unit_spectral(w: jax.Array, rank: int) -> Pair:
    """The spectral directions with all singular values set to one: orthonormal columns of U and rows of V."""
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    a, _, bt = linalg.truncated_svd(w, linalg.gram_eigenvectors(w, rank), rank)
    return a.astype(w.dtype), bt.astype(w.dtype)


def random_factors(key: jax.Array, w: jax.Array, rank: int) -> Pair:
    """Independent Gaussian factors scaled by fan-in, as in He et al.; elements of UV have the variance of those of W.

    U has the variance of W (2/n for a He-initialised W) and V has variance 1/rank, so the product keeps the variance of W.
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    (n, m), dtype, unit = w.shape, linalg.wide(w.dtype), linalg.unit(w)
    deviation = unit * jnp.sqrt(jnp.mean(jnp.square(w.astype(dtype) / unit)))
    key_u, key_v = jax.random.split(key)
    u = deviation * jax.random.normal(key_u, (n, rank), dtype)
    v = jax.random.normal(key_v, (rank, m), dtype) / jnp.sqrt(rank)
    return u.astype(w.dtype), v.astype(w.dtype)
