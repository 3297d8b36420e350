"""Weight decay for factor pairs, by norms of the product UV without forming it (docs/mathematics.md, section 9).

Frobenius decay (Khodak et al., ICLR 2021):

    ½ λ |UV|_F² = ½ λ tr((UᵀU)(VVᵀ)),      gradients λ U (VVᵀ) and λ (UᵀU) V,      O((n + m) r²)

Nuclear decay: ½ λ (|U|_F² + |V|_F²) ≥ λ |UV|_*, the sum of singular values, with equality for balanced factors.  It is plain
weight decay on the factors, named after its effect.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.kernel import LowRankKernel, is_low_rank


def frobenius_penalty(params: Any) -> jax.Array:
    """½ Σ |UV|_F² over all factor pairs of a tree; differentiable."""
    return 0.5 * sum((jnp.sum(_gram_u(pair) * _gram_v(pair)) for pair in _pairs(params)), start=jnp.zeros(()))


def add_frobenius_decay(decay: float) -> optax.GradientTransformation:
    """Adds the gradient of `decay * frobenius_penalty` to the updates of factor pairs; others stay unchanged."""

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("add_frobenius_decay needs the parameters: call update(updates, state, params)")

        def add(update, param):
            return _decayed(update, param, decay) if is_low_rank(param) else update

        return jax.tree.map(add, updates, params, is_leaf=is_low_rank), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def nuclear_penalty(params: Any) -> jax.Array:
    """½ Σ (|U|_F² + |V|_F²) over all factor pairs of a tree: at least Σ |UV|_*, equal if balanced; differentiable."""
    factors = jax.tree.leaves(_pairs(params))
    return 0.5 * sum((jnp.sum(factor**2) for factor in factors), start=jnp.zeros(()))


def add_nuclear_decay(decay: float) -> optax.GradientTransformation:
    """Adds the gradient of `decay * nuclear_penalty` to the updates of factor pairs; others stay unchanged."""

    def factor_pairs(params):
        return jax.tree.map(is_low_rank, params, is_leaf=is_low_rank)

    return optax.add_decayed_weights(decay, mask=factor_pairs)


def _pairs(params: Any) -> list[LowRankKernel]:
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_low_rank) if is_low_rank(leaf)]


def _decayed(update: LowRankKernel, param: LowRankKernel, decay: float) -> LowRankKernel:
    u, v = param.matrices()
    du = jnp.matmul(u, _gram_v(param), precision="highest")
    dv = jnp.matmul(_gram_u(param), v, precision="highest")

    def add(factor: Any, gradient: jax.Array) -> Any:  # in its box, if it is in one
        return jax.tree.map(lambda update: update + decay * gradient.reshape(update.shape), factor)

    return dataclasses.replace(update, u=add(update.u, du), v=add(update.v, dv))


def _gram_u(kernel: LowRankKernel) -> jax.Array:
    """UᵀU, `[*stack, r, r]`."""
    u, _ = kernel.matrices()
    return jnp.matmul(jnp.swapaxes(u, -1, -2), u, precision="highest")


def _gram_v(kernel: LowRankKernel) -> jax.Array:
    """VVᵀ, `[*stack, r, r]`; symmetric, like UᵀU."""
    _, v = kernel.matrices()
    return jnp.matmul(v, jnp.swapaxes(v, -1, -2), precision="highest")
