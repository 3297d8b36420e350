"""Relatives of the projection that change one thing at a time, so that a claim about it can be taken apart.

Each makes a factor pair of a matrix `[n, m]` (docs/mathematics.md, section 6).
"""

import jax
import jax.numpy as jnp

from lowrank_jax.projection import activations, linalg, matrix
from lowrank_jax.projection.activations import ActivationLike
from lowrank_jax.projection.linalg import Pair, lengths, ratio


@linalg.highest_precision
def spectral_global_scale(w: jax.Array, rank: int, *, activation: ActivationLike = "relu", group: int = 1) -> Pair:
    """The spectral factors times one number for all: that of least function risk."""
    u, v = (factor.astype(linalg.wide(w.dtype)) for factor in matrix.spectral(w, rank))
    y, unit = u @ v, linalg.unit(w)
    # By the Cauchy-Schwarz inequality no homogeneous activation wants more than |W| / |Y|.
    highest = 2 * ratio(jnp.linalg.norm(w.astype(y.dtype) / unit), jnp.linalg.norm(y / unit))
    scale = activations.minimise(lambda c: matrix.relative_risk(w, c * y, activation=activation, group=group), highest)
    return (jnp.sqrt(scale) * u).astype(w.dtype), (jnp.sqrt(scale) * v).astype(w.dtype)


@linalg.highest_precision
def spectral_column_scales(w: jax.Array, rank: int, *, activation: ActivationLike = "relu", group: int = 1) -> Pair:
    """The spectral factors, the columns of V scaled to the lengths of least function risk.

    The product is that of the kernel projection with subspace `top`, except that outputs at right angles to the subspace stay
    zero; the factors are not rebalanced.
    """
    u, v = (factor.astype(linalg.wide(w.dtype)) for factor in matrix.spectral(w, rank))
    a, b = matrix.kernel_projection(w, rank, activation=activation, group=group)
    unit = linalg.unit(w)
    length = ratio(lengths(a.astype(u.dtype) @ b.astype(u.dtype) / unit, group), lengths(u @ v / unit, group))
    return u.astype(w.dtype), (v * jnp.tile(length, group)).astype(w.dtype)


@linalg.highest_precision
def random_subspace(key: jax.Array, w: jax.Array, rank: int, *, activation: ActivationLike = "relu", group: int = 1) -> Pair:
    """The best stand-in in a subspace that is drawn uniformly, with no regard to W."""
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    q = linalg.orthonormal(jax.random.normal(key, (w.shape[0], rank), linalg.wide(w.dtype)))
    return matrix.on_subspace(w, q, activation=activation, group=group)


@linalg.highest_precision
def unit_spectral(w: jax.Array, rank: int) -> Pair:
    """The spectral directions with all singular values one: U and V have orthonormal columns and rows."""
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    a, _, bt = linalg.truncated_svd(w, linalg.gram_eigenvectors(w), rank)
    return a.astype(w.dtype), bt.astype(w.dtype)


def random_factors(key: jax.Array, w: jax.Array, rank: int) -> Pair:
    """Independent Gaussian factors scaled by their fan-in, as He et al. do; each element of UV varies as one of W does.

    U has the variance of W itself (2/n when W is He-initialised) and V has 1/rank, so the product keeps W's variance.
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    (n, m), dtype, unit = w.shape, linalg.wide(w.dtype), linalg.unit(w)
    deviation = unit * jnp.sqrt(jnp.mean(jnp.square(w.astype(dtype) / unit)))
    key_u, key_v = jax.random.split(key)
    u = deviation * jax.random.normal(key_u, (n, rank), dtype)
    v = jax.random.normal(key_v, (rank, m), dtype) / jnp.sqrt(rank)
    return u.astype(w.dtype), v.astype(w.dtype)
