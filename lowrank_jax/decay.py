"""Weight decay for factor pairs, by norms of the product UV without forming it (docs/mathematics.md, section 9).

Frobenius decay (Khodak et al., ICLR 2021):

    ½ λ |UV|_F² = ½ λ tr((UᵀU)(VVᵀ)),      gradients λ U (VVᵀ) and λ (UᵀU) V,      O((n + m) r²)

Nuclear decay: ½ λ (|U|_F² + |V|_F²) ≥ λ |UV|_*, the sum of singular values, with equality for balanced factors.  It is plain
weight decay on the factors, named after its effect.

Sums are taken in float32 or better: squares of float16 factors leave the range of float16.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax.checks import at_least, is_number
from lowrank_jax.kernel import LowRankKernel, is_low_rank
from lowrank_jax.projection.linalg import Pair, wide
from lowrank_jax.text import shown


def frobenius_penalty(params: Any) -> jax.Array:
    """½ Σ |UV|_F² over all factor pairs of a tree, a scalar in float32 or better; its gradients keep the factors' dtypes."""
    return 0.5 * sum((jnp.sum(_gram_u(u) * _gram_v(v)) for u, v in _pairs(params)), start=jnp.zeros(()))


def add_frobenius_decay(decay: float) -> optax.GradientTransformation:
    """Adds the gradient of `decay * frobenius_penalty` to the updates of factor pairs; others stay unchanged.

    Updates keep their dtypes.  `update` raises ValueError if it is not given the parameters, or one factor of a pair without
    the other, as under `optax.masked` with a mask that tells them apart.

    Raises:
      ValueError: the decay is no number of at least 0.
    """
    _check(decay)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("add_frobenius_decay needs the parameters: call update(updates, state, params)")

        def add(update, param):
            return _decayed(update, param, decay) if is_low_rank(param) and not _is_masked(param) else update

        return jax.tree.map(add, updates, params, is_leaf=is_low_rank), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def nuclear_penalty(params: Any) -> jax.Array:
    """½ Σ (|U|_F² + |V|_F²) over all factor pairs of a tree: at least Σ |UV|_*, equal if balanced.

    A scalar in float32 or better; its gradients keep the factors' dtypes.
    """
    return 0.5 * sum((jnp.sum(u**2) + jnp.sum(v**2) for u, v in _pairs(params)), start=jnp.zeros(()))


def add_nuclear_decay(decay: float) -> optax.GradientTransformation:
    """Adds the gradient of `decay * nuclear_penalty` to the updates of factor pairs; others stay unchanged.

    Raises:
      ValueError: the decay is no number of at least 0.
    """
    _check(decay)

    def factor_pairs(params):
        return jax.tree.map(is_low_rank, params, is_leaf=is_low_rank)

    return optax.add_decayed_weights(decay, mask=factor_pairs)


def _check(decay: Any) -> None:
    if isinstance(decay, jax.Array | np.ndarray | np.generic):  # a hyperparameter that is injected
        return
    complaint = at_least(0)(decay) if is_number(decay) else "must be a number of at least 0"
    if complaint:
        raise ValueError(f"decay {shown(decay)} {complaint}")


def _pairs(params: Any) -> list[Pair]:
    return [_matrices(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_low_rank) if is_low_rank(leaf)]


def _matrices(kernel: LowRankKernel) -> Pair:
    """U `[*stack, n, r]` and V `[*stack, r, m]` in float32 or better."""
    u, v = kernel.matrices()
    return u.astype(wide(u.dtype)), v.astype(wide(v.dtype))


def _is_masked(pair: LowRankKernel) -> bool:
    """Whether optax has put nothing in the place of both factors.  Raises ValueError if it did so to one of them."""
    there = [bool(jax.tree.leaves(factor)) for factor in (pair.u, pair.v)]
    if any(there) != all(there):
        raise ValueError("the gradient of a factor needs the other one: mask pairs as a whole (is_leaf=is_low_rank)")
    return not any(there)


def _decayed(update: LowRankKernel, param: LowRankKernel, decay: float) -> LowRankKernel:
    u, v = _matrices(param)
    return dataclasses.replace(
        update,
        u=_added(update.u, decay * jnp.matmul(u, _gram_v(v), precision="highest")),
        v=_added(update.v, decay * jnp.matmul(_gram_u(u), v, precision="highest")),
    )


def _added(update: Any, change: jax.Array) -> Any:
    """The sum, in the box that the update may be in."""
    return jax.tree.map(lambda part: (part + change.reshape(part.shape)).astype(part.dtype), update)


def _gram_u(u: jax.Array) -> jax.Array:
    """UᵀU, `[*stack, r, r]`."""
    return jnp.matmul(u.mT, u, precision="highest")


def _gram_v(v: jax.Array) -> jax.Array:
    """VVᵀ, `[*stack, r, r]`; symmetric, like UᵀU."""
    return jnp.matmul(v, v.mT, precision="highest")
