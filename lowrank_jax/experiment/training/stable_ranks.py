"""When a dense warm-up of its own accord ends: once the kernels' stable ranks settle, as in Cuttlefish (arXiv 2305.02538).

The stable rank |W|_F² / |W|_2² counts the singular values that matter.  It falls fast at first; where it no longer moves, the
subspaces that training uses are found.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.kernel import MatrixView
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.energy import energy_of
from lowrank_jax.planning.plans import FactoredKernel, Plan

SETTLED = 0.1
"""A stable rank that changes by no more than this in an epoch has settled."""

Row = tuple[int, dict[str, float]]
"""A step, and every kernel's stable rank by name."""


class StableRanks:
    """The stable ranks at the last two ends of epochs.

    Args:
      plan: whose kernels are looked at that are factored, or may be by their energies.
      epoch: steps between two looks.
      latest: the step at which the warm-up ends anyway.
      rows: what an earlier process saw.
    """

    def __init__(self, plan: Plan, epoch: int, latest: int, rows: Sequence[Row] = ()):
        self._views, self._epoch, self._latest = _views(plan), max(1, epoch), latest
        self.rows = list(rows)

    def look(self, step: int, params: Any) -> dict[str, float]:
        """The stable ranks of the dense parameters, at the end of an epoch that was not looked at; {} elsewhere."""
        if not step or step % self._epoch or (self.rows and self.rows[-1][0] >= step):
            return {}
        leaves = named_leaves(params)
        found = _stable_ranks({name: leaves[name] for name, _ in self._views}, self._views)
        row = {name: float(value) for name, value in found.items()}
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


_Views = tuple[tuple[str, MatrixView], ...]


def _views(plan: Plan) -> _Views:
    factored = {kernel.name: kernel.view for kernel in plan.kernels if isinstance(kernel, FactoredKernel)}
    energies = {kernel.name: kernel.choices[0].view for kernel in plan.kernels if kernel.choices and energy_of(kernel)}
    return tuple({**energies, **factored}.items())


@functools.partial(jax.jit, static_argnames="views")
def _stable_ranks(kernels: dict[str, jax.Array], views: _Views) -> Mapping[str, jax.Array]:
    return {name: _stable_rank(view.to_matrix(kernels[name])) for name, view in views}


def _stable_rank(matrix: jax.Array) -> jax.Array:
    """Of `[*stack, n, m]`, the mean over the stack; of zeros 0."""
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    rows, columns = matrix.shape[-2:]
    one, two = ("...nm,...km->...nk", "...nm,...nk->...mk")
    gram = jnp.einsum(one if rows <= columns else two, matrix, matrix, precision="highest")
    largest, total = jnp.linalg.eigvalsh(gram)[..., -1], jnp.trace(gram, axis1=-2, axis2=-1)
    return jnp.mean(jnp.where(total > 0, total / jnp.where(largest > 0, largest, 1), 0))
