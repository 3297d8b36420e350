"""When a dense warm-up of its own accord ends: once the kernels' stable ranks settle, as in Cuttlefish (arXiv 2305.02538).

The stable rank |W|_F² / |W|_2² counts the singular values that matter.  It falls fast at first; where it no longer moves, the
subspaces that training uses are found.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import Plan

SETTLED = 0.1
"""A stable rank that changes by no more than this in an epoch has settled."""

Row = tuple[int, dict[str, float]]
"""A step, and every kernel's stable rank by name."""


class StableRanks:
    """The stable ranks at the last two ends of epochs.

    Args:
      plan: whose factored kernels are looked at.
      epoch: steps between two looks.
      latest: the step at which the warm-up ends anyway.
      rows: what an earlier process saw.
    """

    def __init__(self, plan: Plan, epoch: int, latest: int, rows: Sequence[Row] = ()):
        self._plan, self._epoch, self._latest = plan, max(1, epoch), latest
        self.rows = list(rows)

    def look(self, step: int, params: Any) -> dict[str, float]:
        """The stable ranks of the dense parameters, at the end of an epoch that was not looked at; {} elsewhere."""
        if not step or step % self._epoch or (self.rows and self.rows[-1][0] >= step):
            return {}
        row = {name: float(value) for name, value in _stable_ranks(params, self._plan).items()}
        self.rows = [*self.rows[-1:], (step, row)]
        return row

    def settled(self, step: int) -> bool:
        """Whether the warm-up ends with this step."""
        if step >= self._latest:
            return True
        if len(self.rows) < 2 or self.rows[-1][0] != step:
            return False
        (_, before), (_, now) = self.rows
        return before.keys() == now.keys() and all(abs(now[name] - before[name]) <= SETTLED for name in now)


def _stable_ranks(params: Any, plan: Plan) -> Mapping[str, jax.Array]:
    leaves = named_leaves(params)
    return _of_matrices({kernel.name: leaves[kernel.name] for kernel in plan.factored}, plan)


@functools.partial(jax.jit, static_argnames="plan")
def _of_matrices(kernels: dict[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    return {kernel.name: _stable_rank(kernel.view.to_matrix(kernels[kernel.name])) for kernel in plan.factored}


def _stable_rank(matrix: jax.Array) -> jax.Array:
    """Of `[*stack, n, m]`, the mean over the stack; of zeros 0."""
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    rows, columns = matrix.shape[-2:]
    one, two = ("...nm,...km->...nk", "...nm,...nk->...mk")
    gram = jnp.einsum(one if rows <= columns else two, matrix, matrix, precision="highest")
    largest, total = jnp.linalg.eigvalsh(gram)[..., -1], jnp.trace(gram, axis1=-2, axis2=-1)
    return jnp.mean(jnp.where(total > 0, total / jnp.where(largest > 0, largest, 1), 0))
