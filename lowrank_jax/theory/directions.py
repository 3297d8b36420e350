"""The common directions of symmetric matrices: M_k ≈ Σ_j d_jk u_ju_jᵀ for all k at once.

They are unique if the u_j are linearly independent and no two rows of d are parallel.  They are found by alternating least
squares over three unknowns, the u_j on the left, those on the right and d, which weighs all matrices equally; joint
diagonalisation of pairs of weightings would depend on the closest pair of eigenvalues of each.  From a random start this finds
all directions, or all but one or two and others twice: the directions that explain least are then drawn again.
"""

import jax
import jax.numpy as jnp

from lowrank_jax.projection.linalg import highest_precision, solve_gram, unit_columns

_STARTS = 12
_TIMES = 3  # how often the least error must be found before it is trusted
_SAME = 1.02  # errors within this ratio belong to one minimum: missing a direction costs far more
_SWEEPS = 400
_SLACK = 16.0  # for Gram matrices: directions get close to each other on the way


def common_directions(slices: jax.Array, width: int, key: jax.Array) -> jax.Array:
    """The directions of least squared error, `[d, width]`, with length one and arbitrary signs.

    Args:
      slices: symmetric M, `[k, d, d]`.
      width: number of directions, at most d.
      key: for the random starts.
    """
    best, errors = jnp.ones((slices.shape[1], width), slices.dtype), []
    for i, start in enumerate(jax.random.split(key, _STARTS)):
        found, error = _alternate(slices, _begin(start, slices, best, i % 3 == 0))
        error = float(error) if jnp.isfinite(error) else float("inf")
        best = found if error < min(errors, default=float("inf")) else best
        errors.append(error)
        if sum(error <= _SAME * min(errors) for error in errors) >= _TIMES:
            break
    return best


@jax.jit
@highest_precision
def _begin(key: jax.Array, slices: jax.Array, best: jax.Array, anew: jax.Array) -> jax.Array:
    """A random start, or the best directions with the weakest of them drawn again."""
    drawn = unit_columns(jax.random.normal(key, best.shape, best.dtype))
    return jnp.where(anew | _weakest(slices, best), drawn, best)


@jax.jit
@highest_precision
def _alternate(slices: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sweeps until the directions stop moving; returns them and the squared error."""
    still = jnp.sqrt(jnp.finfo(u.dtype).eps)

    def sweep(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        u, v, _, count = state
        weights = _weights(slices, u, v)
        moved = _factor(slices, v, weights)
        v = _factor(slices, moved, weights)  # the slices are symmetric: left and right are alike
        v = v * jnp.where(jnp.sum(moved * v, axis=0) < 0, -1, 1)
        return moved, v, jnp.max(jnp.abs(moved - u)), count + 1

    def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[2] > still) & (state[3] < _SWEEPS)

    u, v, *_ = jax.lax.while_loop(goes_on, sweep, (u, u, jnp.ones((), u.dtype), jnp.int32(0)))
    u = unit_columns(u + v)
    return u, jnp.sum((slices - jnp.einsum("ij,kj,lj->kil", u, _weights(slices, u, u), u)) ** 2)


def _weights(slices: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """d by least squares, `[k, width]`."""
    products = jnp.einsum("kij,kij->kj", *jnp.broadcast_arrays(u, slices @ v))
    return solve_gram((u.T @ u) * (v.T @ v), products.T, _SLACK).T


def _factor(slices: jax.Array, v: jax.Array, weights: jax.Array) -> jax.Array:
    """The u_j by least squares, `[d, width]`, scaled to length one."""
    products = jnp.einsum("kij,kj->ij", slices @ v, weights)
    return unit_columns(solve_gram((v.T @ v) * (weights.T @ weights), products.T, _SLACK).T)


def _weakest(slices: jax.Array, u: jax.Array) -> jax.Array:
    """A mask of the tenth of the directions that explain least given the others, `[width]`."""
    width = u.shape[1]
    gram = (u.T @ u) ** 2
    loss = jnp.sum(_weights(slices, u, u) ** 2, axis=0) / jnp.diagonal(solve_gram(gram, jnp.eye(width, dtype=u.dtype), _SLACK))
    return loss <= jnp.sort(loss)[max(1, width // 10) - 1]
