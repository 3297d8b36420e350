"""The best low-rank approximation of a kernel for what the network makes of it.

An error E of a kernel costs the network ½ E ⟨E, S⟩² to second order, S the gradient of a prediction at the kernel.  With
A = E SSᵀ / E |S|² and B = E SᵀS that is about

    ½ tr(Eᵀ A E B):

Kullback-Leibler divergence of its predictions in nats, or what else S was measured for (docs/mathematics.md, section 14).
With RᵀR = A and TᵀT = B it is ½ |R E Tᵀ|².  So the truncated SVD of R W Tᵀ is optimal, and half of the squared singular values
that it leaves out are what is lost.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lowrank_jax.projection import linalg, matrix
from lowrank_jax.projection.linalg import Pair
from lowrank_jax.projection.stack import Stack


class GradientMoments(NamedTuple):
    """What errors of a kernel, or of a stack of them, cost: ½ tr(Eᵀ A E B).

    Attributes:
      rows: A, `[*stack, n, n]`.
      columns: B, `[*stack, m / group, m / group]`, the same for each column of an output.
    """

    rows: jax.Array
    columns: jax.Array


def two_sided(w: jax.Array, rank: int, *, rows: jax.Array, columns: jax.Array, group: int = 1) -> Pair:
    """Factors UV of least ½ tr(Eᵀ A E B), E = W - UV; both sides with a ridge of a hundredth of their diagonals.

    Args:
      w: `[n, m]`.
      rank: from 1 to min(n, m).
      rows: A, `[n, n]`.
      columns: B, `[m / group, m / group]`.
      group: columns per output.

    Returns:
      u `[n, rank]` and v `[rank, m]` in the dtype of w, balanced: UᵀU = VVᵀ.

    Raises:
      ValueError: an argument is no matrix of real, finite numbers, or rank, group, rows or columns do not fit w.
    """
    linalg.check_matrix(w)
    linalg.check_rank(w, rank)
    linalg.check_group(w, group)
    for name, value, size in (("rows", rows, w.shape[0]), ("columns", columns, w.shape[1] // group)):
        linalg.check_matrix(value)
        if value.shape != (size, size):
            raise ValueError(f"{name} must have shape [{size}, {size}], not {list(value.shape)}")
    return _two_sided(w, rows, columns, rank, group)


@functools.partial(jax.jit, static_argnames=("rank", "group"))
def _two_sided(w: jax.Array, rows: jax.Array, columns: jax.Array, rank: int, group: int) -> Pair:
    [(u, v)] = two_sided_stacks(
        [Stack(None, w[None], rank, group=group)], [linalg.square_roots(rows)], [linalg.square_roots(columns)]
    )
    return u[0], v[0]


@linalg.highest_precision
def two_sided_stacks(stacks: Sequence[Stack], rows: Sequence[jax.Array], columns: Sequence[jax.Array]) -> list[Pair]:
    """`two_sided` of many kernels at once.

    Args:
      stacks: the kernels.
      rows: for every stack R `[k, n, n]`, upper triangular, with RᵀR = A.
      columns: for every stack T `[k, m / group, m / group]`, upper triangular, with TᵀT = B.

    Returns:
      For every stack u `[k, n, rank]` and v `[k, rank, m]`, in the dtype of its kernels.
    """
    sides = list(zip(stacks, rows, columns, strict=True))
    pairs = matrix.spectral_stacks(
        [dataclasses.replace(stack, w=_in_metric(stack.w.astype(r.dtype), r, t)) for stack, r, t in sides]
    )
    us = [linalg.triangular_solves(r, u) for r, (u, _) in zip(rows, pairs, strict=True)]
    vs = [_outputs_solved(t, v) for t, (_, v) in zip(columns, pairs, strict=True)]
    balanced = linalg.rebalance(us, vs)
    return [(u.astype(stack.w.dtype), v.astype(stack.w.dtype)) for stack, (u, v) in zip(stacks, balanced, strict=True)]


def _in_metric(w: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
    """RWTᵀ of kernels W `[k, n, m]`, with Tᵀ for each column of an output."""
    k, n, m = w.shape
    outputs = t.shape[-1]
    return ((r @ w).reshape(k, n * m // outputs, outputs) @ t.mT).reshape(w.shape)


def divergences(rw: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Half of the squared singular values of RWTᵀ beyond every rank from 1 to min(n, m), in float64 on the host.

    Args:
      rw, t: RW `[n, m]`, and T `[m / group, m / group]`.
    """
    n, m = rw.shape
    measured = (rw.reshape(n * m // len(t), len(t)) @ t.T).reshape(n, m)
    gram = measured @ measured.T if len(measured) < measured.shape[1] else measured.T @ measured
    squares = np.maximum(np.linalg.eigvalsh(gram), 0)  # increasing
    return 0.5 * np.append(np.cumsum(squares)[-2::-1], 0.0)


def _outputs_solved(t: jax.Array, v: jax.Array) -> jax.Array:
    """V `[k, r, m]` without the metric of the columns: what times Tᵀ, for each column of an output, is V."""
    k, r, m = v.shape
    outputs = t.shape[-1]
    return linalg.triangular_solves(t, v.reshape(k, r * m // outputs, outputs).mT).mT.reshape(k, r, m)
