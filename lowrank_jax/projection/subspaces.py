"""Which r-dimensional subspace the columns of a kernel are projected on: `top`, `search`, `refine`.

All work in the singular basis.  With W = A diag(s) Bᵀ the coordinates are C = diag(s) Bᵀ `[p, m]`, p = min(n, m), and an output
keeps the cosine rho_j = |Pᵀ C_j| / |C_j| under an orthonormal P `[p, r]`.  `Loss` gives the risk of every output; the sum is
minimised (docs/mathematics.md, section 3.2).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.projection.linalg import orthonormal, ratio

Loss = Callable[[jax.Array], jax.Array]  # cosines [..., outputs] -> risks [..., outputs]

SUBSPACES = ("top", "search", "refine")

ENUMERATED = 20_000  # subsets; beyond that, `search` swaps vectors instead
_SWEEPS, _SWAP_GAIN = 100, 1e-6  # relative; smaller gains are float32 rounding of a sum of risks
_STEPS, _STEP_GAIN, _IDLE_STEPS = 300, 1e-7, 8  # `refine` ends after _STEPS, or after _IDLE_STEPS with less gain


def search(energy: jax.Array, length: jax.Array, rank: int, loss: Loss) -> jax.Array:
    """The best `rank` of the left singular vectors; never worse than the leading ones.

    Tries every subset if there are at most `ENUMERATED`.  Otherwise starts from the leading vectors and swaps one vector at a
    time for the best other one until no swap helps.

    Args:
      energy: squared coordinates of every output, `[p, outputs]`.
      length: `[outputs]`, the outputs' lengths.
      rank: from 1 to p.
      loss: the risk as a function of the cosine.

    Returns:
      Indices `[rank]`, ascending.
    """
    p = energy.shape[0]

    def total(kept: jax.Array) -> jax.Array:
        return jnp.sum(loss(jnp.minimum(ratio(jnp.sqrt(kept), length), 1)), axis=-1)

    if math.comb(p, rank) <= ENUMERATED:
        return _enumerate(energy, rank, total)
    return _swap(energy, rank, total)


def _enumerate(energy: jax.Array, rank: int, total: Callable[[jax.Array], jax.Array]) -> jax.Array:
    p = energy.shape[0]
    # The leading vectors come first in this order, and win ties.
    subsets = np.fromiter(itertools.chain.from_iterable(itertools.combinations(range(p), rank)), np.int32).reshape(-1, rank)
    totals = jax.lax.map(lambda subset: total(jnp.sum(energy[subset], axis=0)), jnp.asarray(subsets), batch_size=64)
    return jnp.asarray(subsets)[jnp.argmin(totals)]


def _swap(energy: jax.Array, rank: int, total: Callable[[jax.Array], jax.Array]) -> jax.Array:
    p = energy.shape[0]

    def exchange(i, state):
        """Replaces the i-th vector by the best one."""
        chosen, member, value, changed = state
        others = member.at[chosen[i]].set(False)
        rest = others.astype(energy.dtype) @ energy  # summed anew: a running difference would accumulate rounding
        values = jnp.where(others, jnp.inf, total(rest + energy))
        best = jnp.argmin(values)
        better = values[best] < value - _SWAP_GAIN * jnp.abs(value)
        new = jnp.where(better, best, chosen[i])
        return chosen.at[i].set(new), others.at[new].set(True), jnp.where(better, values[best], value), changed | better

    def sweep(state):
        *state, _, sweeps = state
        return *jax.lax.fori_loop(0, rank, exchange, (*state, jnp.asarray(False))), sweeps + 1

    chosen = jnp.arange(rank)
    start = (chosen, jnp.arange(p) < rank, total(jnp.sum(energy[:rank], axis=0)), jnp.asarray(True), jnp.asarray(0))
    chosen, *_ = jax.lax.while_loop(lambda state: state[3] & (state[4] < _SWEEPS), sweep, start)
    return jnp.sort(chosen)


class _Ascent(NamedTuple):
    """The state of `refine`."""

    basis: jax.Array  # [p, r]
    value: jax.Array
    gradient: jax.Array  # [p, r], tangent at basis
    step: jax.Array
    iteration: jax.Array
    idle: jax.Array  # iterations since the last relevant gain


def refine(coordinates: jax.Array, basis: jax.Array, cosine: Callable[[jax.Array], jax.Array], loss: Loss) -> jax.Array:
    """Minimises the total loss over subspaces by a monotone descent from a given one.

    Gradient steps on the Grassmann manifold with QR retraction and Barzilai-Borwein step sizes.  A step is accepted only if it
    lowers the loss enough (Armijo); otherwise the step size is divided by four.

    Args:
      coordinates: C, `[p, m]`.
      basis: the initial P, `[p, r]`, orthonormal.
      cosine: from projected coordinates `[r, m]` to `[outputs]`.
      loss: the risk as a function of the cosine.

    Returns:
      P, `[p, r]`, orthonormal.
    """

    def total(basis):
        return jnp.sum(loss(cosine(basis.T @ coordinates)))

    def slope(basis):
        value, gradient = jax.value_and_grad(total)(basis)
        return value, gradient - basis @ (basis.T @ gradient)

    def advance(state: _Ascent) -> _Ascent:
        moved = orthonormal(state.basis - state.step * state.gradient)
        value, gradient = slope(moved)
        squared = jnp.sum(state.gradient**2)
        accepted = value <= state.value - 1e-4 * state.step * squared
        change = moved - state.basis
        curvature = jnp.abs(jnp.sum(change * (gradient - state.gradient)))
        longer = jnp.where(curvature > 0, jnp.sum(change**2) / jnp.where(curvature > 0, curvature, 1), jnp.inf)
        longer = jnp.clip(longer, state.step / 10, state.step * 10)
        gained = accepted & (state.value - value > _STEP_GAIN * jnp.abs(state.value))
        taken = _Ascent(moved, value, gradient, longer, state.iteration, state.idle)
        kept = state._replace(step=state.step / 4)
        new: Any = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), taken, kept)
        return new._replace(iteration=state.iteration + 1, idle=jnp.where(gained, 0, state.idle + 1))

    def unfinished(state: _Ascent) -> jax.Array:
        return (state.iteration < _STEPS) & (state.idle < _IDLE_STEPS)

    value, gradient = slope(basis)
    step = ratio(jnp.asarray(0.1, basis.dtype), jnp.sqrt(jnp.sum(gradient**2)))  # a tenth of a radian in all
    start = _Ascent(basis, value, gradient, step, jnp.asarray(0), jnp.asarray(0))
    return jax.lax.while_loop(unfinished, advance, start).basis


def tabulated(loss: Loss, outputs: int, dtype: Any) -> Loss:
    """A table of an expensive loss, read by cubic (Catmull-Rom) interpolation.

    Args:
      loss: `[outputs] -> [outputs]` over cosines in [0, 1].
      outputs: number of outputs.
      dtype: of the table.
    """
    cells = 64
    grid = jnp.arange(-1, cells + 2, dtype=dtype) / cells
    inner = jax.lax.map(lambda rho: loss(jnp.full(outputs, rho, dtype)), grid[1:-1])
    before, after = 3 * inner[0] - 3 * inner[1] + inner[2], 3 * inner[-1] - 3 * inner[-2] + inner[-3]
    table = jnp.concatenate([before[None], inner, after[None]])  # [cells + 3, outputs]

    def read(rho: jax.Array) -> jax.Array:
        place = jnp.clip(rho, 0, 1) * cells
        cell = jnp.clip(jnp.floor(place), 0, cells - 1)
        x, column = place - cell, jnp.arange(outputs)
        a, b, c, d = (table[cell.astype(jnp.int32) + k, column] for k in range(4))
        return b + 0.5 * x * (c - a + x * (2 * a - 5 * b + 4 * c - d + x * (3 * (b - c) + d - a)))

    return read
